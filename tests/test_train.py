"""The loop: resumed, stopped and broken runs, and what a run leaves on disk."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training
from conftest import ONE_DEVICE
from facts import says, states
from tiny_training import RandomBatches, config, model_folder, programs_made_once

from configs import base
from mend_jax import train
from mend_jax.cli import progress
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models.folders import load_model
from mend_jax.run import build, checkpoint, lock, reporting, saved_steps
from mend_jax.run.best import lines_until
from mend_jax.run.distributed import INTERRUPTED, STOPPED
from mend_jax.run.lock import alone_in
from mend_jax.run.loop import Loop
from mend_jax.step import init_state, loss_weights, make_loss_fn, make_train_step

pytestmark = pytest.mark.slow

SCRIPT = tiny_training.__file__


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True, scope="module")
def _programs_made_once():
    with programs_made_once():
        yield


@pytest.fixture(autouse=True)
def _random_batches(monkeypatch):
    monkeypatch.setattr(build, "make_batches", RandomBatches)


@pytest.fixture(scope="session")
def finished_run(model, tmp_path_factory):
    """An unbroken run of `config(model)`, after its end."""
    runs, go = [], Loop.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "make_batches", RandomBatches)
        patch.setattr(Loop, "run", lambda run: (runs.append(run), go(run))[1])
        assert train.train(config(model), tmp_path_factory.mktemp("finished")) == 0
    return runs[0]


@pytest.fixture(scope="session")
def finished(finished_run):
    """Its workdir."""
    return finished_run.workdir


def assert_same_run(workdir, other):
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    steps = saved_steps.whole_steps(workdir)
    assert steps == saved_steps.whole_steps(other)
    for step in steps:
        ours, theirs = (checkpoint.read_step(folder, step) for folder in (workdir, other))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def stop_after(step):
    """Batches whose iterator breaks like a machine that goes away."""

    class Breaking(RandomBatches):
        def iterator(self, start_step):
            for i, batch in enumerate(super().iterator(start_step), start_step):
                if i == step:
                    raise KeyboardInterrupt
                yield batch

    return Breaking


def test_metrics_have_every_line_once(finished):
    lines = reporting.read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, 12]
    assert [line["step"] for line in lines if "validation_loss" in line] == [6, 12]
    assert {"kd", "pred", "clm", "grad_norm", "learning_rate", "padding", "tokens"} <= lines[0].keys()
    batches = [RandomBatches(config("x"), None)[i] for i in range(4)]
    tokens = [int(batch.demos_length.sum() + batch.query.length.sum()) for batch in batches]
    assert lines[0]["tokens"] == sum(tokens)
    sizes = [batch.demos.size + batch.query.tokens.size for batch in batches]
    assert lines[0]["padding"] == pytest.approx(np.mean([1 - n / size for n, size in zip(tokens, sizes, strict=True)]))
    for line in reporting.read_lines(finished / "speed.jsonl"):
        assert {"step", "seconds_per_step", "tokens_per_second", "data_wait_per_step"} == line.keys()


def test_a_checkpoint_has_the_metrics_up_to_its_step_however_late_it_is_written(model, tmp_path, monkeypatch):
    """It is written in the background, while the next steps add theirs to those that no line has yet."""
    given, save = {}, checkpoint.Checkpoints.save

    def late(self, step, params, opt_state, meta, score=None):
        given[step] = meta
        return save(self, step, params, opt_state, meta, score)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", late)
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    c = config(model, **{"train.steps": 8, "train.log_every": 5, "train.save_every": 2, "train.eval_every": 8})
    assert train.train(c, tmp_path) == 0
    assert {step: len(meta["window"]) for step, meta in given.items()} == {2: 2, 4: 4, 6: 1, 8: 0}


def test_workdir_explains_the_run(finished, model):
    assert json.loads((finished / "config.json").read_text())["llm"]["path"] == str(model)
    table = (finished / "params.txt").read_text()
    frozen = reporting.count(load_model(model).params)
    assert "placeholders" in table and f"{frozen:,} frozen" in table
    assert list((finished / "tensorboard").glob("events*"))


def test_kept_are_the_newest_two_and_the_best(finished):
    scores = {}
    for line in reporting.read_lines(finished / "metrics.jsonl"):
        if "validation_loss" in line:
            scores[line["step"]] = line["validation_loss"]
    assert set(saved_steps.whole_steps(finished)) == {9, 12, min(scores, key=scores.get)}


def test_says_that_it_compiles_before_the_first_step(model, tmp_path, capsys, monkeypatch):
    said = []

    def dispatch(run, *of_step):
        said.append(capsys.readouterr().err)
        return dispatch.real(run, *of_step)

    dispatch.real = Loop._dispatch
    monkeypatch.setattr(Loop, "_dispatch", dispatch)
    assert train.train(config(model, **{"train.steps": 2}), tmp_path) == 0
    assert "Compiling the train step" in said[0] and "Compiled in" in said[1] and "Compiling" not in said[1]


def test_says_that_it_still_compiles(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.01)
    with contextlib.closing(reporting.Reporter(tmp_path, 0, 1)) as report:
        with report.compiling():
            time.sleep(0.2)
        between = capsys.readouterr().err
        time.sleep(0.1)
    assert "compiling: 0 of 1 program after 0:00:00" in between and "Compiled in 0." in between
    assert "compiling" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "weights", "shown"),
    [
        ("finetune", {"kd": 10.0, "pred": 1.0, "clm": 5.0}, ["kd", "pred"]),
        ("finetune", {"kd": 0.0, "pred": 1.0, "clm": 0.0}, ["pred"]),
        ("pretrain", {"kd": 0.5, "pred": 1.0, "clm": 1.0}, ["kd", "clm"]),
        ("lm", {"kd": 10.0, "pred": 1.0, "clm": 0.0}, ["clm"]),
    ],
)
def test_the_line_of_a_training_has_the_losses_that_have_a_weight(stage, weights, shown):
    c = base.get_config()
    c.stage = stage
    c.loss.update(weights)
    assert [name for name, weight in loss_weights(c)._asdict().items() if weight] == shown


def test_the_line_of_a_training_shows_the_losses_beside_their_sum(tmp_path, capsys):
    line = {"step": 1, "loss": 23.8, "kd": 2.3, "pred": 0.80123, "clm": 0.0, "padding": 0.1}
    with contextlib.closing(reporting.Reporter(tmp_path, 0, 1, parts=("kd", "pred"))) as report:
        report.progress(line)
    said = capsys.readouterr().err
    assert "loss 23.8000  kd 2.3  pred 0.801  tokens/s" in said and "clm" not in said


def test_finished_run_says_so(finished, model, capsys):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    assert train.train(config(model), finished) == 0
    assert "is finished: 12 steps" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("broken_at", [2, 5, 11])
def test_broken_run_goes_on_to_the_same_end(broken_at, model, finished, tmp_path, monkeypatch):
    """5 and 11 lie between lines of metrics.jsonl: the half-filled mean is in the checkpoint."""
    monkeypatch.setattr(build, "make_batches", stop_after(broken_at))
    with pytest.raises(KeyboardInterrupt):
        train.train(config(model), tmp_path)
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    assert train.train(config(model), tmp_path) == 0
    assert_same_run(tmp_path, finished)


def test_killed_at_random_moments_ends_the_same(tmp_path, kill_rng):
    """SIGKILL twice, each somewhere after new steps were saved: bit-equal to an unbroken run.

    MEND_KILL_SEED=N (printed; tests/conftest.py) kills at the same moments again.
    """
    model_folder(tmp_path / "model")
    fields = ["train.steps=48", "train.eval_every=16", "train.save_every=4", "train.log_every=3"]
    environment = os.environ | ONE_DEVICE | {"TINY_STEP_SECONDS": "0.04"}

    def start(name):
        command = [sys.executable, SCRIPT, str(tmp_path / name), *fields]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    unbroken = start("unbroken")
    codes = []
    for _ in range(2):
        run = start("broken")
        before = set(_folders(tmp_path / "broken"))
        until = time.monotonic() + 60
        while set(_folders(tmp_path / "broken")) <= before and run.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(kill_rng.uniform(0, 0.4))
        run.kill()
        said = run.communicate()[1]
        codes.append(run.returncode)
        assert run.returncode in (-signal.SIGKILL, 0), said
    assert -signal.SIGKILL in codes
    last = start("broken")
    assert last.wait() == 0, last.communicate()[1]
    assert unbroken.wait() == 0, unbroken.communicate()[1]
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")


def _folders(workdir):
    return [p.name for p in (workdir / "checkpoints").iterdir()] if (workdir / "checkpoints").exists() else []


def test_sigterm_saves_and_says_75(model, finished, tmp_path, monkeypatch):
    class Terminated(RandomBatches):
        def __getitem__(self, step):
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(step)

    monkeypatch.setattr(build, "make_batches", Terminated)
    assert train.train(config(model), tmp_path) == STOPPED == 75
    assert max(saved_steps.whole_steps(tmp_path)) in (7, 8)
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    assert train.train(config(model), tmp_path) == 0
    # The extra checkpoint was dropped when newer ones came, and the numbers are those of the unbroken run.
    assert_same_run(tmp_path, finished)


@pytest.fixture
def heeds_interrupts():
    """What runs in the background ignores Ctrl-C, these tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_saves_the_step_too(model, finished, tmp_path, monkeypatch, capfd, heeds_interrupts):
    class Interrupted(RandomBatches):
        def __getitem__(self, step):
            if step == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(step)

    monkeypatch.setattr(build, "make_batches", Interrupted)
    assert train.train(config(model), tmp_path) == INTERRUPTED == 130
    assert max(saved_steps.whole_steps(tmp_path)) in (7, 8) and "which is saved first" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    assert train.train(config(model), tmp_path) == 0
    assert_same_run(tmp_path, finished)


def test_an_evaluation_ends_at_once_and_is_made_when_the_run_goes_on(
    model, finished, tmp_path, monkeypatch, capsys, heeds_interrupts
):
    """Its step is saved before; a command of several stages must not begin the next one."""
    signals, evaluation = [signal.SIGTERM, signal.SIGINT, None, signal.SIGTERM], build.evaluation

    def broken(*given):
        evaluate = evaluation(*given)

        def of(params):
            if signals and (number := signals.pop(0)):
                os.kill(os.getpid(), number)
                time.sleep(10)
            return evaluate(params)

        return of

    monkeypatch.setattr(build, "evaluation", broken)
    assert train.train(config(model), tmp_path) == 75
    assert "Stopped at step 6, which is saved" in capsys.readouterr().err
    assert saved_steps.whole_steps(tmp_path)[-1] == 6
    with pytest.raises(KeyboardInterrupt):
        train.train(config(model), tmp_path)
    assert train.train(config(model), tmp_path) == 75
    assert "Stopped at step 12, which is saved" in capsys.readouterr().err
    assert train.train(config(model), tmp_path) == 0
    assert "Compiling the train step" not in capsys.readouterr().err
    assert train.train(config(model), tmp_path) == 0
    assert "This run is finished" in capsys.readouterr().err
    assert_same_run(tmp_path, finished)
    assert checkpoint.load_best(tmp_path)[1] == checkpoint.load_best(finished)[1]


@pytest.mark.parametrize("written", [False, True])
def test_a_kill_between_a_score_and_its_line(written, model, finished, tmp_path):
    """The score is written first; the line in metrics.jsonl follows from it."""
    shutil.copytree(finished, tmp_path / "run")
    run, path = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    score = saved_steps.step_folder(run, 12) / saved_steps.SCORE
    if written:  # without its line
        path.write_text("".join(path.read_text().splitlines(True)[:-1]))
        assert lines_until(run, 12) == reporting.read_lines(finished / "metrics.jsonl")
    else:
        score.unlink()
        assert lines_until(run, 12) == reporting.read_lines(finished / "metrics.jsonl")[:-1]
        assert train.train(config(model), run) == 0
        assert_same_run(run, finished)


def test_goes_on_from_the_previous_where_the_newest_is_damaged(model, finished, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build, "make_batches", stop_after(10))
    with pytest.raises(KeyboardInterrupt):
        train.train(config(model), tmp_path)
    newest = tmp_path / "checkpoints" / str(max(saved_steps.whole_steps(tmp_path)))
    largest = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    assert train.train(config(model), tmp_path) == 0
    [said] = caplog.messages
    states(said, newest, "damaged", largest.relative_to(newest), "changed", f"{newest}.damaged")
    assert_same_run(tmp_path, finished)


def test_frozen_llm_is_not_changed_and_not_on_disk(model, finished):
    params, _ = checkpoint.load_best(finished)
    assert params.keys() == {"backbone", "placeholders"}
    # The backbone starts as the LLM does, and is trained: the LLM itself must not have moved with it.
    llm = load_llm(model)
    assert not np.array_equal(params["backbone"]["embed"]["tokens"], llm.params["embed"]["tokens"])
    trainable = sum(np.prod(shape) for shape, _ in checkpoint.shapes_of(params).values())
    state = 4 * 3 * trainable  # params and Adam's two moments
    for step in saved_steps.whole_steps(finished):
        files = [p for p in (finished / "checkpoints" / str(step)).rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) < state + 60_000  # and what orbax says about them


def test_llm_params_are_the_same_after_training(model, finished_run):
    frozen = jax.device_get(finished_run.frozen)
    jax.tree.map(np.testing.assert_array_equal, frozen, jax.device_get(load_llm(model).params))


@pytest.mark.parametrize(
    "field, value", [("seed", 1), ("train.steps", 13), ("optimizer.learning_rate", 0.5), ("loss.kd", 2.0)]
)
def test_another_meaning_is_refused(field, value, model, finished):
    with says(finished, re.compile(f"{re.escape(field)}="), value):
        train.train(config(model, **{field: value}), finished)


def test_where_and_how_it_computes_may_change(model, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "make_batches", stop_after(8))
    with pytest.raises(KeyboardInterrupt):
        train.train(config(model), tmp_path)
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    changed = config(model, **{"train.parallel": "mesh", "data.cache": "elsewhere"})
    assert train.train(changed, tmp_path) == 0
    ours, theirs = (reporting.read_lines(folder / "metrics.jsonl") for folder in (tmp_path, finished))
    assert ours[-1]["validation_loss"] == pytest.approx(theirs[-1]["validation_loss"], rel=1e-4)


def test_finished_run_may_be_evaluated_with_other_settings(model, finished, capsys):
    changed = config(model, **{"evaluate.seeds": (1, 2), "evaluate.tasks": ("a",), "evaluate.limit": 5})
    assert train.train(changed, finished) == 0
    assert "is finished: 12 steps" in capsys.readouterr().err


def test_second_stage_starts_from_the_best_of_the_first(model, finished, tmp_path):
    built = build.build(config(model, **{"prefix.start_from": str(finished)}), load_llm(model))
    best, _ = checkpoint.load_best(finished)
    jax.tree.map(np.testing.assert_array_equal, built.params, best)
    with says(f"prefix.start_from={tmp_path}/nothing", "not a folder"):
        train.train(config(model, **{"prefix.start_from": str(tmp_path / "nothing")}), tmp_path / "run")
    with says(f"prefix.start_from={finished}", "prefix.length=4", 5):
        train.train(config(model, **{"prefix.start_from": str(finished), "prefix.length": 5}), tmp_path / "run")


def test_second_stage_goes_on_after_both_were_moved(model, finished, tmp_path, monkeypatch):
    """And where the first was thrown away: its result is in the second's checkpoints."""
    shutil.copytree(finished, tmp_path / "a" / "first")
    fields = {"train.steps": 5, "train.save_every": 1, "prefix.start_from": str(tmp_path / "a" / "first")}
    monkeypatch.setattr(build, "make_batches", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        train.train(config(model, **fields), tmp_path / "a" / "second")
    (tmp_path / "a").rename(tmp_path / "b")
    fields["prefix.start_from"] = str(tmp_path / "b" / "first")
    monkeypatch.setattr(build, "make_batches", stop_after(4))
    with pytest.raises(KeyboardInterrupt):
        train.train(config(model, **fields), tmp_path / "b" / "second")
    shutil.rmtree(tmp_path / "b" / "first")
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    assert train.train(config(model, **fields), tmp_path / "b" / "second") == 0
    assert saved_steps.whole_steps(tmp_path / "b" / "second")[-1] == 5


def test_not_finite_stops_and_keeps_the_last_good_checkpoint(model, finished, tmp_path, monkeypatch):
    class Poisoned(RandomBatches):
        def _batch(self, step):
            batch = super()._batch(step)
            return batch.replace(demos=np.full_like(batch.demos, 7)) if step == 5 else batch

    def poisoned(*args):
        loss_fn = make_loss_fn(*args)

        def loss(params, llm_params, batch):
            value, metrics = loss_fn(params, llm_params, batch)
            return jnp.where((batch.demos == 7).all(), jnp.nan, value), metrics

        return loss

    make_loss_fn = train.make_loss_fn
    with monkeypatch.context() as patch:
        patch.setattr(build, "make_batches", Poisoned)
        patch.setattr(train, "make_loss_fn", poisoned)
        with says("Step 6", "not finite", re.compile(r"rows \d+, \d+"), re.compile("random row"), "checkpoint 3"):
            train.train(config(model), tmp_path)
    assert saved_steps.whole_steps(tmp_path) == [3]
    assert train.train(config(model), tmp_path) == 0  # with what was learnt until then
    assert_same_run(tmp_path, finished)


def test_overflow_of_a_parameter_is_noticed(model, tmp_path):
    exploding = {"optimizer.learning_rate": 1e36, "train.save_every": 1, "train.eval_every": 100, "optimizer.clip": 1e9}
    with says(re.compile(r"Step \d+"), "not finite", re.compile(r"rows \d+, \d+"), re.compile("random row")):
        train.train(config(model, **exploding), tmp_path)
    for step in saved_steps.whole_steps(tmp_path):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint.read_step(tmp_path, step)))


def test_batch_that_does_not_divide(model, tmp_path):
    devices = jax.device_count()
    with says(f"train.batch_size={devices + 1}", f"{devices} devices", "train.accumulate=1", f"multiple of {devices}"):
        train.train(config(model, **{"train.batch_size": devices + 1}), tmp_path)
    with says("train.accumulate=2", f"multiple of {2 * devices}"):
        train.train(config(model, **{"train.accumulate": 2}), tmp_path)


def test_early_stop_is_the_same_after_a_break(model, tmp_path, monkeypatch):
    """Scores by step: the best is at 2, two worse ones end the run at 6; a break in between changes nothing."""
    scores = {2: 1.0, 4: 2.0, 6: 3.0, 8: 0.5}

    def scripted(*_):
        def evaluate(params):
            return {"validation_loss": scores[runs[-1]]}

        return evaluate

    runs, save = [], Loop._save
    monkeypatch.setattr(Loop, "_save", lambda run, step, evaluates: (runs.append(step), save(run, step, evaluates)))
    monkeypatch.setattr(build, "evaluation", scripted)
    fields = {"train.eval_every": 2, "train.patience": 2, "train.save_every": 1}
    assert train.train(config(model, **fields), tmp_path / "a") == 0
    assert saved_steps.whole_steps(tmp_path / "a") == [2, 5, 6]
    assert checkpoint.load_best(tmp_path / "a")[1]["step"] == 2
    monkeypatch.setattr(build, "make_batches", stop_after(5))
    with pytest.raises(KeyboardInterrupt):
        train.train(config(model, **fields), tmp_path / "b")
    monkeypatch.setattr(build, "make_batches", RandomBatches)
    assert train.train(config(model, **fields), tmp_path / "b") == 0
    assert_same_run(tmp_path / "b", tmp_path / "a")
    assert train.train(config(model, **fields), tmp_path / "b") == 0  # stopped early is finished


def test_language_model_ends_as_a_hugging_face_folder(tmp_path):
    folder = model_folder(tmp_path / "sizes", with_weights=False)
    c = config(folder, **{"stage": "lm", "train.steps": 4})
    assert train.train(c, tmp_path / "run") == 0
    best, _ = checkpoint.load_best(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, load_llm(tmp_path / "run" / "llm").params, best)
    with pytest.raises(AssertionError):  # it was trained
        np.testing.assert_array_equal(best["embed"]["tokens"], build.load(c).params["embed"]["tokens"])


def test_language_model_accumulates_to_the_same_update(model):
    """Its batches hold no demonstrations: arrays of no columns, which are divided into parts all the same."""

    def updated(accumulate):
        c, optimizer = config(model, stage="lm", **{"train.accumulate": accumulate}), optax.sgd(1.0)
        llm = load_llm(model)
        step = make_train_step(c, make_loss_fn(c, llm, None), optimizer)
        return llm.params, *jax.jit(step)(init_state(llm.params, optimizer), {}, RandomBatches(c, None)[0])

    (before, whole, expected), (_, parts, metrics) = updated(1), updated(4)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), whole.params, before)
    assert min(moved["layers"]["up"].values()) > 1e-4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), parts.params, whole.params)


def test_soft_prompt_trains(model, tmp_path):
    c = config(model, **{"prefix.kind": "soft_prompt", "loss.kd": 0.0, "loss.clm": 1.0, "train.steps": 3})
    assert train.train(c, tmp_path) == 0
    params, _ = checkpoint.load_best(tmp_path)
    assert {name: x.shape for name, x in params.items()} == {"vectors": (4, 16)}


def test_two_runs_in_one_workdir(model, tmp_path):
    with alone_in(tmp_path, train.LOCK, "training"), says(tmp_path, "Another run"):
        train.train(config(model), tmp_path)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def without(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", without)
    with alone_in(tmp_path, train.LOCK, "training"):
        assert str(tmp_path) in caplog.text and "no locks" in caplog.text


def test_metrics_that_have_changed_are_refused(model, finished, tmp_path):
    """A bit in an early line would end patience, or choose another best step, without a word."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text()
    digit = whole.replace('"loss": ', '"loss": 1', 1)
    for changed, facts in (
        (digit, ["checkpoint 12"]),
        (whole.replace("{", "k", 1), ["line 1"]),
        ("null\n" + whole, ["line 1", "null"]),
    ):
        path.write_text(changed)
        with says(path, *facts, "remove it"):
            train.train(config(model), tmp_path / "run")
    path.write_bytes(whole.encode() + b"\xff")
    with says(path, "UTF-8"):
        train.train(config(model), tmp_path / "run")
    path.write_text(whole + '{"step": 13, "lo')  # a line that a kill cut
    assert train.train(config(model), tmp_path / "run") == 0


def test_metrics_are_cut_back_to_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert reporting.cut(path, 2) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    assert reporting.cut(path, 1) == [{"step": 1, "loss": 2.0}]
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'
