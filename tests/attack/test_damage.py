"""Flipped bits, cuts and worse at random places of every file that the program writes: what is read back is what was written, or
one sentence says that it is not. Never a trace, never another value without a word.

A run is repeated by MEND_ATTACK_SEED=N, which a failure prints.
"""

import copy
import json
import logging
import random
import shutil

import jax
import numpy as np
import pytest
from answer_files import write_evaluation, write_experiment
from attack_scale import SEED, times
from conftest import save_tokenizer
from data_files import make_world, tiny_config
from tiny_training import model_folder

from configs.base import get_config
from mend_jax.cli.errors import UserError
from mend_jax.cli.text import shown
from mend_jax.data import prepared
from mend_jax.data.metaicl import Example
from mend_jax.data.retrieval import cached_neighbours
from mend_jax.data.stores import TaskStore, text_splits
from mend_jax.data.templates import chosen
from mend_jax.experiments.methods import Times
from mend_jax.interchange.trained import read_trained
from mend_jax.losses import TopK
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import load_model, load_tokenizer
from mend_jax.packs.pack import Pack, load_pack
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.distiller_folder import write_folder
from mend_jax.prefixes.soft_prompt import SoftPrompt
from mend_jax.report.results import read_results
from mend_jax.run import best, checkpoint, reporting, resume, saved_config, saved_steps, teacher_cache
from mend_jax.run.checkpoint import Checkpoints
from mend_jax.run.sealed import write_checksums, write_sealed
from mend_jax.scoring import results
from mend_jax.scoring.answers import Source, read_answers, read_scores

FILES = times(6, 60)  # damaged files of each kind


class Run:
    """A training's workdir: three checkpoints and what they say of metrics.jsonl."""

    def write(self, folder):
        checkpoints, lines = Checkpoints(folder, False), []
        for step in (1, 2, 3):
            lines.append({"step": step, "loss": 1.0 / step, "validation_loss": 2.0 / step})
            (folder / "metrics.jsonl").write_text(reporting._as_text(lines))
            params = {"a": np.full((40, 30), step, np.float32), "b": np.float32(step).reshape(())}
            meta = {"metrics": reporting.checksum_of_lines(lines)}
            checkpoints.save(step, params, {"m": np.zeros((40, 30), np.float32)}, meta, 2.0 / step)
        checkpoints.close()
        config = get_config()
        saved_config.write_config(folder, config)
        write_sealed(folder / "sources.json", {"llm.path": {"folder": "/models/a", "fingerprint": "0123456789abcdef"}})

    def read(self, folder):
        said = saved_config.read_config(folder), resume.read_sources(folder)
        params, meta = checkpoint.load_best(folder)
        lines = best.lines_until(folder, saved_steps.whole_steps(folder)[-1])
        assert (params["a"] == meta["step"]).all() and params["b"] == meta["step"]  # whichever step it is, all of it is
        return *said, meta, lines


class Prepared:
    """Tokenised texts and tasks."""

    def write(self, folder):
        world = make_world(folder / "world")
        save_tokenizer(folder / "tokenizer")
        self.tokenizer, self.config = load_tokenizer(folder / "tokenizer"), tiny_config(world, "finetune")
        self.read(folder)

    def read(self, folder):
        config = copy.deepcopy(self.config)
        config.data.cache, config.data.tasks, config.data.text = (
            str(folder / n) for n in ("cache", "world/metaicl", "world/c4")
        )
        text = prepared.prepare_text(config, self.tokenizer)
        tasks = prepared.prepare_tasks(config, self.tokenizer, ["a", "b"])
        found = {name: (store, range(len(store))) for name, (store, _) in text_splits(text, 4).items()}
        stores = [TaskStore(shard, tasks["dtype"], tasks["between"]) for shard in tasks["shards"]]
        counts = [[shard["items"], shard["tokens"]] for shard in (*text["shards"], *tasks["shards"])]
        texts = {name: [store[i].tolist() for i in numbers] for name, (store, numbers) in found.items()}
        return texts, [[store.example(i, 6)[0].tolist() for i in range(len(store))] for store in stores], counts

    folder = "cache"  # what is damaged


class Predictions:
    """What an evaluation keeps."""

    LINES = [
        {
            "item": i,
            "scores": [-0.5 - i, -1.5, -7.25],
            "options": ["a", "b", "é"],
            "prediction": "a" if i < 1 else "b",
            "gold": "a",
        }
        for i in range(5)
    ]
    COST = {"content": "c0ffee", "prefix_length": 4.0, "item_seconds": 0.25, "compiled": False, "cache_bytes": 123}

    def write(self, folder):
        results.Store(folder, "mend", {"k": 4}).write("t", 13, self.LINES, self.COST)

    def read(self, folder):
        return results.Store(folder, "mend", {"k": 4}).read("t", 13, "c0ffee", len(self.LINES))


class Evaluated:
    """A finished evaluation, as `compare` reads it."""

    def write(self, folder):
        write_evaluation(folder, {"icl": 0.5, "mend": 0.7}, items=5)

    def read(self, folder):
        return read_scores(folder), [read_answers(Source(folder, method)).lines for method in ("icl", "mend")]


class Experiment:
    """What an experiment left, as the report reads it."""

    def write(self, folder):
        write_evaluation(folder / "e", {"icl": 0.5, "mend": 0.7}, items=5)
        rows = [({"method": method, "K": "4"}, None, "e", method) for method in ("icl", "mend")]
        path = write_experiment(folder, "order", rows, x="K") / "experiment.json"
        write_sealed(path, json.loads(path.read_text()))

    def read(self, folder):
        [result] = read_results(folder)
        found = [(row.label("method"), read_answers(row.sources[0]).lines) for row in result.rows]
        return found, result.head, result.varied, result.x


class Neighbours:
    """The demonstrations that were found for test items."""

    POOL = [Example("t", f"w{i} w{i % 3}", "a", ()) for i in range(9)]

    def write(self, folder):
        self.read(folder)

    def read(self, folder):
        return cached_neighbours(folder, "", self.POOL, self.POOL[:4], 3, "bm25", 13, None).tolist()


class Packed:
    """A pack of vectors."""

    def write(self, folder):
        vectors = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
        facts = ("gpt2", "01", "23", "runs/mend", "45", "distiller", chosen("qa"), "false", 16, (3, 4), (("x", "y"),))
        Pack(vectors, *facts).save(folder / "a.pack.safetensors")

    def read(self, folder):
        pack = load_pack(folder / "a.pack.safetensors")
        return pack.vectors.tolist(), pack.metadata()


class Exported:
    """An exported distiller with its backbone and tokenizer."""

    def write(self, folder):
        model = load_model(model_folder(folder.parent / "model"))
        params = {"backbone": model.params, "placeholders": np.ones((4, 16), np.float32)}
        write_folder(Distiller.of(model.config, params, "identity", model.tokenizer), folder)
        write_checksums(folder)

    def read(self, folder):
        distiller = read_trained(folder)
        return results.tree_hash(distiller.params), distiller.template, distiller.bos, distiller.tokenizer.get_vocab()


class ExportedPrompt:
    """An exported soft prompt."""

    def write(self, folder):
        SoftPrompt({"vectors": np.arange(64, dtype=np.float32).reshape(4, 16)}, "auto", chosen("qa")).write(folder)
        write_checksums(folder)

    def read(self, folder):
        prompt = read_trained(folder)
        return results.tree_hash(prompt.params), prompt.template, prompt.bos


class TrainedLLM:
    """The LLM of stage "lm"."""

    def write(self, folder):
        model_folder(folder)
        write_checksums(folder)

    def read(self, folder):
        model = load_model(folder)
        return results.tree_hash(model.params), model.config, from_hf_config(folder), model.tokenizer.get_vocab()


class Teacher:
    """The teacher's predictions of a batch."""

    def write(self, folder):
        rng = np.random.default_rng(0)
        found = TopK(
            rng.integers(0, 9, (2, 3, 4), np.int32),
            rng.normal(size=(2, 3, 4)).astype(np.float16),
            np.ones((2, 3), np.float32),
        )
        with open(folder / "a.npz", "wb") as file:
            np.savez(file, **found._asdict())

    def read(self, folder):
        found = teacher_cache._read(folder / "a.npz")
        return None if found is None else [a.tolist() for a in found]


class Seconds:
    """The seconds of an experiment's parts, which are not worth a word."""

    def write(self, folder):
        Times(folder / "times.json").run("evaluation", lambda: 0)

    def read(self, folder):
        return isinstance(Times(folder / "times.json").parts, dict)


KINDS = (
    Run, Prepared, Predictions, Evaluated, Experiment, Neighbours, Packed, Exported, ExportedPrompt, TrainedLLM, Teacher, Seconds,
)  # fmt: skip


def flip(content, rng):
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]


def swap(content, rng):
    """Two bytes in each other's place: what a sum of all bytes would not notice."""
    a, b = sorted((rng.randrange(len(content)), rng.randrange(len(content))))
    found = bytearray(content)
    found[a], found[b] = found[b], found[a]
    return bytes(found)


DAMAGES = (
    flip, flip, flip,
    lambda content, rng: content[: rng.randrange(len(content))],
    lambda content, rng: content[rng.randrange(len(content)) :],
    lambda content, rng: b"",
    lambda content, rng: bytes(len(content)),
    lambda content, rng: content + rng.randbytes(9),
    lambda content, rng: rng.randbytes(len(content)),
    swap,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_damaged_files(kind, tmp_path, caplog):
    kind, whole = kind(), tmp_path / "whole"
    whole.mkdir()
    caplog.set_level(logging.WARNING)
    kind.write(whole)
    before = kind.read(whole)
    caplog.clear()
    assert kind.read(whole) == before and not caplog.messages
    noticed = 0
    for number in range(FILES):
        rng = random.Random(f"{SEED}-{type(kind).__name__}-{number}")
        broken = tmp_path / "broken"
        shutil.copytree(whole, broken)
        inside = broken / getattr(kind, "folder", "")
        file = rng.choice(sorted(p for p in inside.rglob("*") if p.is_file() and p.stat().st_size))
        content = file.read_bytes()
        damaged = rng.choice(DAMAGES)(content, rng)
        where = f"{file.relative_to(broken)} of {type(kind).__name__}, number {number} of MEND_ATTACK_SEED={SEED}"
        file.write_bytes(damaged)
        caplog.clear()
        try:
            same = _same(kind.read(broken), before)
        except UserError as error:
            said, same = shown(str(error)), False
            assert "\n" not in said and said.endswith("."), (where, said)
            noticed += 1
        except Exception as error:
            raise AssertionError(where) from error
        else:
            words = [r for r in caplog.records if r.levelno >= logging.WARNING]
            assert same or words, f"{where}: another value, and not a word"
            noticed += bool(words)
        shutil.rmtree(broken)
    print(f"{type(kind).__name__}: {FILES} damaged files, {noticed} of them noticed, the others read as they were")


def _same(ours, theirs):
    return jax.tree.structure(ours) == jax.tree.structure(theirs) and ours == theirs
