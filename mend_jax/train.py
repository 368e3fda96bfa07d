"""Train: meta-distillation pretraining, finetuning, PromptTuning, HyperTuning and an ordinary LM, with one loop and one step.

    python -m mend_jax.train --config=configs/small_world.py:finetune --workdir=runs/mend --config.optimizer.learning_rate=1e-4

The same command resumes a run that was stopped, killed or crashed, and ends with exactly the numbers of an uninterrupted run.
A run starts from the first of these that exists:

1. the newest complete checkpoint of the workdir;
2. the best checkpoint of the workdir `prefix.start_from`;
3. the pretrained backbone (stage "lm": the LLM's own weights);
4. random weights (stage "lm", if `llm.path` holds only a config.json).

Exit codes: 0 finished; 2 a user error, explained in one sentence; 75 stopped by SIGTERM after writing a checkpoint: start it
again. Files in the workdir: config.json, sources.json, params.txt, checkpoints/, metrics.jsonl (deterministic), speed.jsonl
(times), tensorboard/ and, after stage "lm" has ended, llm/: its best weights as a Hugging Face folder.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np

from mend_jax.cli.command_line import run
from mend_jax.cli.errors import UserError
from mend_jax.interchange.trained import lm_settings
from mend_jax.models.folders import local_folder, save_model
from mend_jax.run import build, checkpoint, checks, distributed, reporting, resume, saved_config
from mend_jax.run.best import is_finished, lines_until, score_of
from mend_jax.run.checkpoint import Checkpoints
from mend_jax.run.files import is_disk_full, whole_folder, write_text
from mend_jax.run.layout import make_layout
from mend_jax.run.lock import alone_in
from mend_jax.run.loop import Loop
from mend_jax.run.sealed import write_checksums
from mend_jax.run.teacher_cache import TeacherCache, is_used
from mend_jax.scoring.results import tree_hash
from mend_jax.step import TrainState, init_state, make_loss_fn, make_optimizer, make_train_step

LLM_FOLDER = "llm"
LOCK = ".lock"


def train(config, workdir) -> int:
    """Trains the run of `config` (configs/base.py) in `workdir`, or resumes it; returns the exit code.

    Raises:
        UserError: a configuration that cannot run, a workdir of another run, a loss that is not finite, a full disk.
    """
    workdir = Path(workdir).absolute()
    try:
        with alone_in(workdir, LOCK, "training"):
            return _train(config, workdir)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"The disk of {workdir} is full: free some space and run the same command again."
            ) from error
        raise


def _train(config, workdir):
    score = score_of(config)
    checkpoints = Checkpoints(workdir, score.maximize)
    try:
        start = checkpoints.steps[-1] if checkpoints.steps else 0
        finished = is_finished(config, workdir, start)
        checks.check_workdir(workdir, config, bool(checkpoints.steps), finished)
        if finished:
            reporting.say(
                f"This run is finished: {start} steps, {score.best_text(lines_until(workdir, start))}. Nothing to do in {workdir}."
            )
        else:
            checks.check_config(config)
            code = _prepare_loop(config, workdir, checkpoints, score).run()
            if code:
                return code
            best = score.best_text(reporting.read_lines(workdir / reporting.METRICS))
            reporting.say(f"Trained: {best}; commands that read {workdir} use the weights of that step.")
        checkpoints.wait()
        _write_llm(config, workdir)
        distributed.wait_for_all("trained")  # whatever reads the folder next finds it complete
        return 0
    finally:
        checkpoints.close()


def _prepare_loop(config, workdir, checkpoints, score) -> Loop:
    """Prepares a run, from its config up to its first step. Nothing here keeps the state: each step of the loop replaces it."""
    resumes = bool(checkpoints.steps)

    # 1. The layout: how the step is spread over the devices.
    layout = make_layout(config.train.parallel, config.mesh)

    # 2. The LLM.
    llm = build.load(config, layout.place)
    config = build.measured(config, llm, workdir)

    # 3. What is trained: the model that makes the prefix, or (None) the LLM itself.
    model = None if config.stage == "lm" else build.build(config, llm, not resumes, layout.place)
    params, frozen = build.split(llm, model)

    # 4. Checks that need both models.
    checks.check_models(config, llm, model)

    # 5. The state: restored from the newest checkpoint, or fresh.
    optimizer = make_optimizer(config)
    start, state, meta = _restored_or_fresh(workdir, checkpoints, layout, params, optimizer)

    # 6. The step, compiled.
    loss_fn = make_loss_fn(config, llm, model, layout.mesh)
    compiled_step = layout.compile_step(make_train_step(config, loss_fn, optimizer, layout.average), state)
    placed = layout.place_frozen(frozen)

    # 7. The data and the evaluation.
    evaluate = build.evaluation(config, llm, model, loss_fn, layout, placed)
    batches = build.batches(config, llm, model, "train", layout)
    if resumes:
        resume.check_data(workdir, config, batches.contents)
    _write_start(config, workdir, start, params, frozen, batches.contents)

    # 8. The loop.
    return Loop(
        config=config, workdir=workdir, checkpoints=checkpoints, score=score, layout=layout, start=start, state=state,
        window=reporting.Window(meta.get("window", ())), frozen=placed, compiled_step=compiled_step, evaluate=evaluate,
        batches=batches, due=meta.get("due", False), teacher=TeacherCache(config, llm, layout) if is_used(config) else None,
    )  # fmt: skip


def _restored_or_fresh(workdir, checkpoints, layout, params, optimizer):
    """(step, TrainState on the devices, meta) that the run starts from."""
    init = partial(init_state, optimizer=optimizer)
    shapes = layout.shaped(jax.eval_shape(init, params))
    found = checkpoints.restore(shapes.params, shapes.opt_state)
    if found is None:
        return 0, layout.init(init, params), {}
    step, params, opt_state, meta = found
    reporting.say(f"Resuming from step {step} in {workdir}.")
    return step, layout.place_state(TrainState(np.int32(step), params, opt_state)), meta


def _write_start(config, workdir, start, params, frozen, contents):
    """Reports what this run is and writes it to the workdir, before the first step."""
    device = jax.devices()[0]
    plural = "s" * (jax.device_count() > 1)
    reporting.say(
        f"{reporting.parameter_summary(params, frozen)}; {jax.device_count()} device{plural} ({device.device_kind}), "
        f"{config.train.parallel}, batch {config.train.batch_size}"
    )
    begins = start == 0 and config.stage != "lm" and config.prefix.start_from
    start_hash = tree_hash(params) if begins else None  # all processes call it: each holds a part
    if jax.process_index() == 0:
        saved_config.write_config(workdir, config)
        resume.write_sources(workdir, config, contents, start_hash)
        write_text(workdir / reporting.PARAMS, reporting.parameter_table(params, frozen))


def _write_llm(config, workdir):
    """In stage "lm", writes the best weights as a Hugging Face folder, which appears complete or not at all."""
    target = workdir / LLM_FOLDER
    if config.stage != "lm" or target.exists() or jax.process_index() != 0:
        return
    folder = local_folder(config.llm.path)
    params, meta = checkpoint.load_best(workdir)
    with whole_folder(target) as temporary:
        save_model(temporary, lm_settings(config, folder), params, folder)
        write_checksums(temporary)
    reporting.say(f"Wrote the weights of step {meta['step']} to {target} as a Hugging Face folder.")


if __name__ == "__main__":
    run(train, several=True)
