"""What a prefix recovers: all where it is the demonstrations, nothing where it is empty, in the values that a run writes."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from data_files import make_world, tiny_config
from family_rows import COMMON, ROWS, save_random

from mend_jax import train
from mend_jax.cli import progress
from mend_jax.llm.decoder_only import load_llm
from mend_jax.prefixes import KINDS
from mend_jax.run import reporting
from mend_jax.scoring.recovered import dev_batches, make_recovered
from mend_jax.scoring.tasks import dev_tasks
from mend_jax.step import make_kd_fn


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    c = tiny_config(make_world(folder / "world"), "finetune", max_demo_tokens=24)
    c.llm.path = c.prefix.backbone = save_random(folder / "llm", COMMON | ROWS["gpt2"], 0)
    c.optimizer.learning_rate, c.loss.chunk = 1e-3, 32
    c.train.batch_size, c.train.steps, c.train.eval_every = 4 * jax.device_count(), 2, 1
    return c


def test_nothing_is_asked_once_and_the_share_is_of_sums():
    asked = []
    recovered = make_recovered(
        lambda params: [[params, 2.0], [1.0, 2.0]], lambda params: asked.append(params) or [[3.0, 3.0], [5.0, 5.0]]
    )
    assert recovered(1.0) == [0.75, 0.5] and recovered(7.0)[0] == 0.0 and recovered(15.0)[0] == -1.0
    assert asked == [1.0]


@pytest.mark.slow
def test_the_demonstrations_recover_all_and_nothing_recovers_nothing(run):
    llm = load_llm(run.llm.path)
    shown, nothing = (KINDS[name].beside(llm) for name in ("demonstrations", "nothing"))
    tasks = dev_tasks(run, llm, shown)
    kinds, both = (("shown", shown), ("nothing", nothing), (None, None)), ("all", "outputs")
    kd = {kind: make_kd_fn(llm, made, 32, kd_tokens=both) for kind, made in kinds}
    for kind in (shown, nothing):  # what a kind does not read the teacher reads all the same
        [*parts] = dev_batches(run, llm, kind, tasks)
        assert all(part.teacher_demos_length.min() > 0 for part in parts)
        none, empty = (kd[name](llm.params, llm.params, parts[0]).tolist() for name in (None, "nothing"))
        assert none == empty and min(none) > 1e-3 and none[0] != none[1]
    all_of_it = kd["shown"](llm.params, llm.params, dev_batches(run, llm, shown, tasks)[0])
    assert all_of_it.tolist() == pytest.approx([0, 0], abs=1e-6)


def test_the_teacher_of_chunks_reads_what_its_window_holds(run):
    """Chunks hold more demonstrations than the LLM's window; both then see those that the teacher can read."""
    llm = load_llm(run.llm.path)
    llm = dataclasses.replace(llm, config=dataclasses.replace(llm.config, max_positions=14))
    kind = KINDS["chunked"].around(KINDS["distiller"].init(run, llm, 0), "mean", chunk_demos=1, chunk_tokens=10)
    tasks = dev_tasks(run, llm, kind)
    beyond = 0
    for task in tasks:
        beyond += sum(len(x) + len(y) for x, y in task.demos) + task.longest_query > llm.window
    assert beyond
    for batch in dev_batches(run, llm, kind, tasks):
        assert (batch.teacher_demos_length + batch.query.length <= llm.window).all()
        for row, count in zip(batch.demos, batch.teacher_demos_length, strict=True):
            assert (row[: batch.demos_length[0]] > 0).sum() == count


def test_dev_batches_have_one_shape_and_are_shared_by_processes(run):
    llm = load_llm(run.llm.path)
    kind = KINDS["distiller"].init(run, llm, 0)
    tasks = dev_tasks(run, llm, kind)
    whole = dev_batches(run, llm, kind, tasks)
    assert len({jax.tree.map(lambda a: a.shape, part).demos for part in whole}) == 1
    parts = [dev_batches(run, llm, kind, tasks, (i, 2)) for i in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for half, rows in zip(
            halves, (slice(0, len(batch.demos) // 2), slice(len(batch.demos) // 2, None)), strict=True
        ):
            assert (half.query.tokens == batch.query.tokens[rows]).all() and (half.demos == batch.demos[rows]).all()


@pytest.mark.slow
def test_items_that_share_a_context_recover_what_they_do_alone(run):
    llm = load_llm(run.llm.path)
    kind = KINDS["distiller"].init(run, llm, 0)
    tasks, shared = dev_tasks(run, llm, kind), run.copy_and_resolve_references().unlock()
    shared.data.queries, shared.train.batch_size = 2, run.train.batch_size // 2
    kd = make_kd_fn(llm, kind, 32, kd_tokens=("all", "outputs"))
    alone, together = (dev_batches(config, llm, kind, tasks) for config in (run, shared))
    assert together[0].query.tokens.ndim == 3 and len(alone) == len(together)
    for one, both in zip(alone, together, strict=True):
        assert np.array_equal(one.query.tokens, both.query.tokens.reshape(one.query.tokens.shape))
        losses = (kd(kind.params, llm.params, part) for part in (one, both))
        np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("stage", "kind"),
    [("pretrain", "distiller"), ("finetune", "soft_prompt"), ("finetune", "chunked")],
)
@pytest.mark.slow
def test_a_run_writes_it(run, stage, kind, tmp_path, capsys, monkeypatch):
    """And shows how far each number of a validation is, here at every part of it."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    c = run.copy_and_resolve_references().unlock()
    c.stage, c.prefix.kind = stage, kind
    assert train.train(c, tmp_path / "run") == 0
    found = [
        line["recovered"] for line in reporting.read_lines(tmp_path / "run" / "metrics.jsonl") if "recovered" in line
    ]
    assert len(found) == 2 and all(value < 1 for value in found) and found[0] != found[1]
    shown = capsys.readouterr().err
    assert f"recovered {found[-1]:.4f}" in shown and ("recovered_outputs " in shown) == (stage == "finetune")
    for name in ("recovered", "dev_score" if stage == "finetune" else "validation_loss"):
        assert re.search(rf"^{name}: (\d+) of \1 \w+", shown, re.MULTILINE)
