"""A training run so small that tests can start, kill and repeat it: random tokens, a model of 2 layers, width 16.

As a program (`python tests/tiny_training.py WORKDIR [field=value ...]`) it trains, for tests that kill it.
"""

import ast
import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCAB, POSITIONS = 40, 48
STEP_SECONDS = float(os.environ.get("TINY_STEP_SECONDS", "0"))  # a pause in each step, so that a kill meets it


def config(folder, **fields):
    """configs/base.py for a tiny run of 12 steps; fields as {"train.steps": 3}."""
    from configs.base import get_config

    c = get_config()
    c.stage, c.llm.path, c.prefix.backbone = "pretrain", str(folder), str(folder)
    c.prefix.length, c.data.max_demo_tokens, c.data.validation_items = 4, 16, 16
    c.data.max_text_tokens = c.data.max_input_tokens = c.data.sequence_length = 40
    c.optimizer.learning_rate, c.train.batch_size, c.loss.chunk = 1e-3, 8, 64
    c.train.steps, c.train.log_every, c.train.eval_every, c.train.save_every = 12, 4, 6, 3
    for name, value in fields.items():
        section, _, key = name.rpartition(".")
        with c.unlocked():
            (c[section] if section else c)[key] = value
    return c


def model_folder(folder, with_weights=True, words=VOCAB, heads=2):
    """A Hugging Face folder of a random model and a tokenizer; without weights stage "lm" begins with random ones."""
    from mend_jax.models.families import from_hf_config
    from mend_jax.models.folders import init_model, save_model

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": heads, "n_positions": POSITIONS, "vocab_size": VOCAB}
    settings = {"model_type": "gpt2", "n_inner": None, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
    (folder / "config.json").write_text(json.dumps(settings | sizes))
    write_tokenizer(folder, [f"w{i}" for i in range(words)])
    if with_weights:
        save_model(folder, from_hf_config(folder), init_model(folder, seed=3).params, folder)
    return folder


def write_tokenizer(folder, words):
    """A tokenizer of these words, whose numbers are their places."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


class RandomBatches:
    """Rows of random tokens as a function of (seed, step), in the place of mend_jax.data.batches."""

    contents = {}  # of no files

    def __init__(self, config, readers, split="train", share=(0, 1)):
        assert share[1] == 1  # test_processes.py has several
        self.config, self.rows = config, config.train.batch_size
        self.seed = [config.seed, ("train", "validation").index(split), 0]
        self.steps = 2 if split == "validation" else None

    def __getitem__(self, step):
        return self._batch(step)

    def plan(self, step):
        batch = self._batch(step)
        return batch.ids, batch.demos_length, batch.query.length

    def tokens(self, step):
        batch = self._batch(step)
        return int(batch.demos_length.sum() + batch.query.length.sum())

    def _batch(self, step):
        import numpy as np

        from mend_jax.data.batches import Batch
        from mend_jax.data.query import Query

        rng, B, Q = np.random.default_rng([*self.seed, step]), self.rows, 16
        N = 0 if self.config.stage == "lm" else 16
        demos = rng.integers(0, VOCAB, (B, N), np.int32)
        demos_length = rng.integers(4, N + 1, B, np.int32) if N else np.zeros(B, np.int32)
        start = np.full(B, 3 if self.config.stage == "finetune" else 0, np.int32)
        query = Query(rng.integers(0, VOCAB, (B, Q), np.int32), rng.integers(5, Q + 1, B, np.int32), start)
        return Batch(demos, demos_length, query, np.arange(step * B, (step + 1) * B))

    def iterator(self, start_step):
        while True:
            time.sleep(STEP_SECONDS)
            yield self[start_step]
            start_step += 1

    def describe(self, row):
        return f"random row {row}"


@contextlib.contextmanager
def programs_made_once():
    """Within it, runs of the same settings share their train step and their evaluation, whose tracing takes ten times as long
    as the rest of a tiny run. (Runs of several processes trace their own: test_end_to_end.py, test_processes.py, and the
    killed runs of test_train.py.)"""
    import pytest

    from mend_jax import train
    from mend_jax.run import build

    made, make_step, make_layout, evaluation = {}, train.make_train_step, train.make_layout, build.evaluation

    def once(what, config, make):
        key = what, config.to_json(), train.make_loss_fn  # a test may have put another loss in its place
        if key not in made:
            made[key] = make()
        return made[key]

    def layout_of(*settings):
        layout = make_layout(*settings)

        def compile_step(step, state):
            if step not in made:
                made[step] = layout.compile_step(step, state)
            return made[step]

        return dataclasses.replace(layout, compile_step=compile_step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_layout", layout_of)
        patch.setattr(train, "make_train_step", lambda c, *rest: once("step", c, lambda: make_step(c, *rest)))
        patch.setattr(build, "evaluation", lambda c, *rest: once("evaluation", c, lambda: evaluation(c, *rest)))
        yield


def main(workdir, *fields):
    from mend_jax import train
    from mend_jax.run import build

    build.make_batches = RandomBatches
    values = {name: ast.literal_eval(value) for name, value in (field.split("=", 1) for field in fields)}
    return train.train(config(Path(workdir).parent / "model", **values), workdir)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
