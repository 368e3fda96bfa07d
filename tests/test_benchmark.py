"""The formulas of cost against products counted in the jaxpr; each workload of the benchmark at a tiny size."""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import threading
from functools import partial
from multiprocessing.connection import Connection
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says, states

from mend_jax import benchmark
from mend_jax.cli import command_line as cli
from mend_jax.cli.errors import UserError
from mend_jax.measure import inference as benchmark_inference
from mend_jax.measure import machine as measure
from mend_jax.measure import step as benchmark_step
from mend_jax.measure.jax_side import InferenceSide, Settings, StepSide, random_params
from mend_jax.measure.model_sizes import known_or_folder
from mend_jax.measure.scored_tasks import SHAPES, random_task
from mend_jax.measure.scoring import compare_scores
from mend_jax.models.decoder import Decoder
from mend_jax.models.families import DecoderConfig, from_hf_config
from mend_jax.scoring import costs

pytestmark = pytest.mark.slow

LLM = DecoderConfig("gpt2", 96, 16, 3, 2, 64, 64)
BACKBONE = DecoderConfig("gpt2", 96, 8, 2, 2, 24, 64)  # narrower, with an MLP that is not 4 times as wide
SETTINGS = Settings(LLM, BACKBONE, "float32", rows=2, demos=20, query=9, target=3, vectors=4)
OPT = {"model_type": "opt", "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OPT |= {"ffn_dim": 64, "max_position_embeddings": 64}
SIZES = (LLM, BACKBONE, 2, 20, 9, 4)
TINY = ["--demos=20", "--query=9", "--target=3", "--vectors=4", "--repeats=2", "--batch_size=2"]


@pytest.fixture
def folder(tmp_path):
    fields = {"model_type": "gpt2", "vocab_size": 96, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


class Thread(threading.Thread):
    """In the place of a process, which has seconds of imports before it: with an end of the pipe of its own, as a process has."""

    def __init__(self, target, args, daemon):
        pipe, *rest = args
        super().__init__(target=target, args=(Connection(os.dup(pipe.fileno())), *rest), daemon=daemon)


@pytest.fixture
def no_processes(monkeypatch):
    """Real ones are those of test_step_command and of the last tests."""
    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Thread)
    monkeypatch.setattr(measure, "multiprocessing", SimpleNamespace(get_context=lambda _: context))


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(benchmark.COMMANDS, ["benchmark", *arguments])
    return ended.value.code


def test_products_of_loops_are_counted_as_often_as_they_run():
    a = jnp.ones((4, 4))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ a, None), x, None, length=5)[0] @ a

    def looped(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ a, x)

    assert costs.count_products(scanned, jnp.ones((3, 4))) == 6 * 2 * 3 * 4 * 4
    assert costs.count_products(looped, jnp.ones((3, 4)), 7, while_trips=7) == 7 * 2 * 3 * 4 * 4
    batched = partial(jnp.einsum, "bij,bjk->bik")
    assert costs.count_products(jax.jit(batched), jnp.ones((5, 2, 3)), jnp.ones((5, 3, 4))) == 2 * 5 * 2 * 3 * 4


def test_reading_forward_and_both_gradients():
    params = random_params(BACKBONE, 0)
    x = jnp.ones((1, 11, BACKBONE.width))
    products = costs.reading(BACKBONE, 11)

    def total(params, x):
        return (Decoder(BACKBONE).apply({"params": params}, x) ** 2).sum()

    assert costs.count_products(total, params, x) == products.forward
    again = (
        products.attention // 2
    )  # the backward pass computes the scores a second time, which the model does not count
    assert costs.count_products(jax.grad(total, 1), params, x) == products.forward + products.input_gradient + again
    assert costs.count_products(jax.grad(total), params, x) == products.forward + products.gradient + again


@pytest.mark.parametrize("backbone", [BACKBONE, LLM])
def test_train_step(backbone):
    settings = Settings(LLM, backbone, "float32", rows=2, demos=20, query=9, target=3, vectors=4)
    again = costs.reading(backbone, 24).attention // 2 + costs.reading(LLM, 13).attention // 2  # scores, computed twice
    assert StepSide(settings).flops == costs.step(LLM, backbone, *SIZES[2:])["total"] + 2 * again


def test_queries_that_share_a_context():
    """The LLM reads the context, and the vectors, once for all."""
    settings = dataclasses.replace(SETTINGS, queries=3)
    counted, planned = StepSide(settings).flops, costs.step(*SIZES, queries=3)
    once = costs.step(*SIZES)
    assert planned["head"] == 3 * once["head"] and planned["distiller"] == once["distiller"]
    assert once["teacher"] < planned["teacher"] < 2.2 * once["teacher"]
    # The queries of a row are read as one sequence of 27 tokens, with a mask, so there are more pairs of tokens than are needed;
    # the backward pass computes those of the queries again, of the others the scores alone.
    joined, apart = costs.reading(LLM, 27, 31).attention, 3 * costs.reading(LLM, 9, 13).attention
    more = 3 * (joined - apart) + costs.reading(LLM, 27, 47).attention - 3 * costs.reading(LLM, 9, 29).attention
    again = costs.reading(BACKBONE, 24).attention // 2 + costs.reading(LLM, 4).attention // 2 + joined
    assert counted == planned["total"] + 2 * (more + again)
    apart = costs.release_step(*SIZES, queries=3, query_head=True)
    assert apart > planned["total"]  # the vectors stand before each query


def test_the_release_head_costs_every_position_and_nothing_else():
    extra = costs.release_step(*SIZES) - costs.step(*SIZES)["total"]
    assert extra == 2 * (costs.head(LLM, 20) + 2 * costs.head(LLM, 4))


@pytest.mark.parametrize("method", ["icl", "mend"])
def test_inference(method):
    side = InferenceSide(SETTINGS, method, True, items=1, options=3)
    prefix_length = 4 if method == "mend" else 20
    distil = costs.distil(BACKBONE, LLM, 20, 4) if method == "mend" else 0
    assert costs.count_products(side._prefix, *side._params(), side.demos) == distil
    prefix = side._prefix(*side._params(), side.demos)
    params, llm = side.llm.params, side.llm
    read_prefix = costs.reading(LLM, prefix_length).forward
    assert costs.count_products(llm.prefix_cache, params, prefix) == read_prefix

    T, options = 9 + 3 * 2, [3, 3, 3]  # an option's last token is not read

    def score(cache):
        states = llm.cached_states(params, cache, *jnp.zeros((3, 1, T), jnp.int32))
        return llm.logits(params, states[:, :7])  # the last state of x, and two of each option

    counted = costs.count_products(score, jax.eval_shape(llm.prefix_cache, params, prefix))
    assert counted == costs.score_cached(LLM, prefix_length, 9, options)
    rereading = costs.count_products(side._reread, params, prefix, jnp.zeros((3, 12), jnp.int32))
    assert rereading == costs.score_rereading(LLM, prefix_length, 9, options)


def test_inference_costs_add_up():
    cached = benchmark_inference.inference_flops(SETTINGS, "mend", True, items=5, options=3)
    assert cached["task_flops"] == cached["once_flops"] + 5 * cached["item_flops"]
    anew = benchmark_inference.inference_flops(SETTINGS, "mend", False, items=5, options=3)
    assert anew["once_flops"] == 0 and anew["task_flops"] > cached["task_flops"]


def test_the_paper_sizes_cost_what_the_design_says():
    llm, distiller = known_or_folder("gpt2-large"), known_or_folder("gpt2")
    step = costs.step(llm, distiller, 1, 900, 124, 100)
    rounded = {name: round(flops / 1e12, 1) for name, flops in step.items()}
    assert (rounded["teacher"], rounded["distiller"]) == (1.6, 0.6)
    assert round((step["student"] + step["head"]) / 1e12, 1) == 0.7
    assert costs.cache_bytes(llm, 900, 2) == 165_888_000
    assert costs.vector_bytes(llm, 100, 2) == 256_000


def test_random_weights_are_the_same_in_both_processes():
    first, second = random_params(LLM, 1), random_params(LLM, 1)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    assert abs(float(first["layers"]["norm1"]["scale"].mean()) - 1) < 0.02


def test_known_devices():
    assert costs.peak_flops("NVIDIA H200") == costs.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert costs.peak_flops("cpu") is None
    side = {"device": "NVIDIA H200", "model_flops": 98.9e12, "seconds": 0.5}
    found = benchmark_step.model_flops_utilisation({"sides": {"MEND-JAX": side}}, "bfloat16")
    assert found["share"]["MEND-JAX"] == pytest.approx(0.2)
    assert benchmark_step.model_flops_utilisation({"sides": {"MEND-JAX": side}}, "float32") is None


def test_median():
    assert measure.median([3.0, 1.0, 2.0]) == 2.0
    assert measure.median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_losses_that_differ_are_seen():
    run = {"loss": 2.0, "kd": 1.0, "pred": 1.0, "grad_norm": 3.0}
    assert benchmark_step.compare_losses({"a": [run], "b": [run | {"kd": 1.0001}]}, 1e-3)["yes"]
    assert not benchmark_step.compare_losses({"a": [run], "b": [run | {"kd": 1.01}]}, 1e-3)["yes"]
    assert not benchmark_step.compare_losses({"a": [run], "b": [run | {"kd": float("nan")}]}, 1e-3)["yes"]


def test_step_command(folder, capsys, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # PyTorch's threads spin, which takes long where tests share cores
    out = folder / "step.json"
    assert command("step", f"--llm={folder}", f"--distiller={folder}", *TINY, f"--out={out}") == 0
    report = json.loads(out.read_text())
    assert report["same"]["yes"] and report["same"]["largest_difference"] < 1e-3
    assert set(report["sides"]) == {"MEND-JAX", "PyTorch"}
    ours = report["sides"]["MEND-JAX"]
    assert ours["counted_flops"] > report["model_flops"]["total"] == ours["model_flops"]
    assert len(ours["runs"]) == 2 and ours["losses"][-1] < ours["losses"][0]
    assert ours["peak_bytes"] >= ours["start_bytes"] > 0
    assert report["ratio"] > 0 and report["machine"]["versions"]["jax"] == jax.__version__
    assert "the same" in capsys.readouterr().out


@pytest.mark.parametrize("queries", [1, 3])
def test_pytorch_computes_every_family_of_decoders(queries):
    pytest.importorskip("torch")
    from mend_jax.measure.pytorch_side import PyTorchStep

    opt = from_hf_config(OPT)
    settings = dataclasses.replace(SETTINGS, llm=opt, distiller=opt.headless, queries=queries)
    ours, theirs = (side.run() for side in (StepSide(settings), PyTorchStep(settings, False)))
    for name in ("loss", "pred", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    assert (
        ours["kd"] == pytest.approx(theirs["kd"], rel=1e-2) and ours["kd"] > 0
    )  # of 1e-4, a difference of larger numbers


@pytest.mark.usefixtures("no_processes")
def test_step_command_without_pytorch(folder, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    arguments = ["step", f"--llm={folder}", f"--distiller={folder}", *TINY]
    assert command(*arguments) == 2
    assert "--no_pytorch" in capsys.readouterr().err
    assert command(*arguments, "--no_pytorch") == 0
    assert "PyTorch" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_processes")
def test_step_command_with_as_many_sequences_as_pay(folder, capsys):
    out = folder / "step.json"
    arguments = [f"--llm={folder}", f"--distiller={folder}", *TINY, "--batch_size=1", f"--out={out}"]
    assert command("step", *arguments, "--up_to=2") == 0
    report = json.loads(out.read_text())
    assert [one["rows"] for one in report["tried"]] == [1, 2] and list(report["sides"]) == ["MEND-JAX"]
    best = max(report["tried"], key=lambda one: one["tokens_per_second"])
    assert report["settings"]["rows"] == best["rows"]
    assert report["sides"]["MEND-JAX"]["seconds"] == best["seconds"]
    assert report["model_flops"]["total"] == costs.step(LLM, LLM, best["rows"], *SIZES[3:])["total"]
    assert "memory full" not in capsys.readouterr().out


def tried(*speeds):
    """What was tried, from one row on: tokens/s, or None where the memory was full."""
    return [
        {"rows": 2**i, "out_of_memory": "full"} if speed is None else {"rows": 2**i, "seconds": 1.0, "tokens_per_second": speed}
        for i, speed in enumerate(speeds)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "rows"),
    [
        ([], 1),
        (tried(100), 2),
        (tried(100, 190), 4),
        (tried(100, 104), 0),  # not worth it
        (tried(100, 190, None), 0),  # memory is full
        (tried(100, 190, 380, 760), 0),  # as many as asked for
        ([{"rows": 6, "out_of_memory": "full"}], 3),  # the first do not fit
        ([{"rows": 6, "out_of_memory": "full"}, {"rows": 3, "seconds": 1.0, "tokens_per_second": 9}], 0),
        ([{"rows": 1, "out_of_memory": "full"}], 0),
    ],
)
def test_how_many_sequences_are_tried_next(before, rows):
    assert benchmark_step.next_rows(before, 1, 8) == rows


class Full(StepSide):
    """A device whose memory holds two rows."""

    def run(self):
        if self.settings.rows > 2:
            jax.tree.map(lambda array: array.delete(), self.state)  # a step that fails has taken them
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes. More follows.")
        return super().run()


@pytest.mark.parametrize(("first", "rows"), [(1, [1, 2, 4]), (8, [8, 4, 2])])
@pytest.mark.usefixtures("no_processes")
def test_a_full_memory_ends_the_trying(first, rows, folder, monkeypatch):
    monkeypatch.setattr(benchmark_step, "StepSide", Full)
    monkeypatch.setattr(benchmark_step, "GROWTH", 0.0)
    arguments = SimpleNamespace(repeats=1, up_to=64, out="", llm="tiny", distiller="tiny", query_head=False)
    report, text, _ = benchmark_step.measure_largest(arguments, dataclasses.replace(SETTINGS, rows=first))
    assert [one["rows"] for one in report["tried"]] == rows and report["settings"]["rows"] <= 2
    full = [one for one in report["tried"] if "out_of_memory" in one]
    marked = [line for line in text.splitlines() if "memory full" in line]
    assert full and "More" not in str(full)
    for one, line in zip(full, marked, strict=True):
        states(one["out_of_memory"], "memory", "9 bytes")
        states(line, one["rows"])


@pytest.mark.usefixtures("no_processes")
def test_inference_command_at_several_lengths(folder, capsys):
    out = folder / "inference.json"
    arguments = [f"--llm={folder}", f"--distiller={folder}", *TINY, "--items=2", f"--out={out}", "--demos=20,10"]
    assert command("inference", *arguments) == 0
    report = json.loads(out.read_text())
    assert [(row["method"], row["reuse"], row["demos"]) for row in report["rows"]] == [
        (method, reuse, demos) for method in ("icl", "mend") for reuse in (False, True) for demos in (10, 20)
    ]
    for row in report["rows"]:
        settings = dataclasses.replace(SETTINGS, distiller=LLM.headless, demos=row["demos"])
        expected = benchmark_inference.inference_flops(settings, row["method"], row["reuse"], 2, 3)
        assert row["task_flops"] == expected["task_flops"]
    icl, mend = report["rows"][3], report["rows"][7]  # of 20
    assert icl["cache_bytes"] == 5 * mend["cache_bytes"] and mend["store_bytes"] == 4 * 16 * 4
    assert report["same"]["largest_difference"] < 1e-3
    printed = capsys.readouterr().out
    assert "cached: " in printed and printed.count("K/V cache MB") == 2


AGAINST = ["scoring", "--items=3", "--repeats=1"]
LENGTHS = ["--demos=20", "--query=9", "--options=2", "--target=3"]


@pytest.mark.usefixtures("no_processes")
def test_scoring_against_pytorch(folder, capsys):
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = folder / "scoring.json"
    assert command(*AGAINST, f"--llm={folder}", *LENGTHS, f"--out={out}") == 0
    [task] = json.loads(out.read_text())["tasks"].values()
    assert task["same"]["yes"] and task["same"]["largest_difference"] < 1e-3
    assert task["prefix"] == 20 and task["compiled"] > 0 and task["ratio"] > 0
    # x, what both options begin with, and of each the second of three tokens: 12 of an item, in a row of 48
    assert task["shapes"] == {"passes": 1, "rows": 1, "columns": 48, "padding": pytest.approx(1 - 36 / 48)}
    assert "PyTorch" in capsys.readouterr().out


def test_scoring_sides_agree_or_the_command_says_so():
    same = compare_scores([[-1.0, -2.0]], [[-1.0001, -2.0]], 1e-3)
    assert same["yes"] and same["other_predictions"] == 0
    assert compare_scores([[-1.0, -1.0001]], [[-1.0002, -1.0]], 1e-3)["yes"]  # as good as equal
    other = compare_scores([[-1.0, -2.0]], [[-2.0, -1.0]], 1e-3)
    assert not other["yes"] and other["other_predictions"] == 1
    assert not compare_scores([[float("nan"), -2.0]], [[-2.0, -1.0]], 1e-3)["yes"]


def test_shapes_of_random_tasks_are_those_asked_for():
    task = random_task("emo", SHAPES["emo"], 20, 50)
    assert len(task.demos) == 302 and [len(item.x_tokens) for item in task.items[:3]] == [9, 10, 12]
    for item in task.items:
        assert [len(option) for option in item.options_tokens] == [3, 2, 2, 3]
        assert len({option[0] for option in item.options_tokens}) == 1


def test_quantization_command(folder, capsys):
    out, sizes = folder / "weights.json", ["--demos=20", "--query=9", "--target=3", "--vectors=4"]
    assert command("quantization", f"--llm={folder}", *sizes, f"--out={out}") == 0
    (model,) = json.loads(out.read_text())["models"].values()
    full, half, int8 = (model["formats"][name] for name in ("float32", "bfloat16", "int8"))
    assert full["gradient_error"] == full["logit_error"] == 0 and full["gradient_cosine"] == pytest.approx(1)
    assert 0.2 * full["bytes"] < int8["bytes"] < half["bytes"] == full["bytes"] / 2
    assert 0 < half["logit_error"] < int8["logit_error"] < 0.1
    assert 0.99 < int8["gradient_cosine"] < half["gradient_cosine"] < 1
    text = capsys.readouterr().out
    assert "random" in text and f"{int8['gradient_cosine']:.6f}" in text


@pytest.mark.usefixtures("no_processes")
def test_step_command_in_8_bits(folder, capsys):
    arguments = ["step", f"--llm={folder}", f"--distiller={folder}", *TINY, "--weights=int8"]
    assert command(*arguments) == 2
    assert "--no_pytorch" in capsys.readouterr().err
    assert command(*arguments, "--no_pytorch", f"--out={folder / 'step.json'}") == 0
    assert "int8 weights" in capsys.readouterr().out
    held, full = (StepSide(dataclasses.replace(SETTINGS, weights=name)) for name in ("int8", "full"))
    assert held.llm.params["layers"]["up"]["kernel"].dtype == jnp.int8 and held.flops == full.flops


@pytest.mark.usefixtures("no_processes")
def test_step_command_of_an_encoder_decoder(folder, capsys):
    fields = {
        "model_type": "t5",
        "vocab_size": 96,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 8,
        "d_ff": 24,
    }
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text(json.dumps(fields))
    out = folder / "step.json"
    arguments = [f"--llm={folder / 't5'}", f"--distiller={folder / 't5'}", *TINY, "--no_pytorch", f"--out={out}"]
    assert command("step", *arguments) == 0
    report = json.loads(out.read_text())
    [side] = report["sides"].values()
    assert side["losses"][-1] < side["losses"][0] and side["attention"] == "xla"
    assert report["model_flops"]["total"] < side["counted_flops"] < 1.3 * report["model_flops"]["total"]


@pytest.mark.parametrize(
    "arguments, facts",
    [
        (["step", "--llm=gpt3"], ["gpt3", "gpt2", "gpt2-medium"]),
        (["quantization", "--llm=gpt3"], ["gpt3", "gpt2", "gpt2-medium"]),
        (["inference", "--llm=t5-small-lm-adapt"], ["inference", "decoder-only", "t5-small-lm-adapt"]),
        (["step", "--llm=t5-small-lm-adapt"], ["decoder-only", "--no_pytorch"]),
        (["quantization", "--demos=1000"], ["window"]),
        (["step", "--weights=int4"], ["--weights", "full", "int8"]),
        (["step", "--demos=1000"], ["window"]),
        (["step", "--demos=20,30"], ["--demos", "20,30", "whole number"]),
        (["inference", "--demos=many"], ["--demos=many", "tokens"]),
        (["step", "--batch_size=4", "--up_to=2"], ["--up_to=2"]),
        (["inference", "--up_to=2"], ["--up_to"]),
        (["objectives", "--layers=2"], ["--layers"]),
        ([], ["first word", "step", "serving"]),
        (["--llm=gpt2", "step"], ["first word", "step"]),
        (["scores"], ["scores", "scoring"]),
        (["inference", "--demos=10,980"], ["window"]),
        (["inference", "--demos=980"], ["window"]),
        (["step", "--query=4"], ["--target=4"]),
        (["step", "--batch_size=0"], ["--batch_size=0"]),
        (["inference", "--options=0"], ["--options"]),
        ([*AGAINST, "--names=agnews"], ["emo", "ethos-religion"]),
        ([*AGAINST, "--tasks=/not/there"], ["--llm"]),
        ([*AGAINST, "--demos=1000", "--query=50"], ["window"]),
        ([*AGAINST, "--query=-5"], ["--query=-5"]),
        (["step", "--out=/not/there/a.json"], ["--out=/not/there/a.json"]),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, facts, capsys):
    assert command(*arguments) == 2
    states(capsys.readouterr().err.strip(), *facts)


def test_a_process_that_dies_is_named():
    with measure.Worker(os_exit) as worker, says("exit code 3", "--batch_size"):
        worker.call("anything")


def test_a_mistake_in_a_process_comes_back_as_one():
    with measure.Worker(mistaken) as worker, says("as it was said"):
        worker.call("anything")


def os_exit():
    os._exit(3)


def mistaken():
    raise UserError("as it was said")
