"""Which score chooses a run's best checkpoint, and when a run has ended."""

import dataclasses
import logging
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.run import reporting, saved_steps


@dataclasses.dataclass(frozen=True)
class Score:
    """What an evaluation measures, by which the best checkpoint is chosen. `lines` are those of metrics.jsonl."""

    name: str
    maximize: bool

    def bad_evaluations(self, lines) -> int:
        """The number of evaluations since the best one."""
        values = [line[self.name] for line in lines if self.name in line]
        best = (max if self.maximize else min)(values, default=None)
        return 0 if best is None else len(values) - 1 - values.index(best)

    def best_text(self, lines) -> str:
        """The best evaluation in words."""
        evaluated = [line for line in lines if self.name in line]
        if not evaluated:
            return "never evaluated"
        best = (max if self.maximize else min)(
            evaluated, key=lambda line: line[self.name]
        )  # the first of equals, as in the checkpoints
        return f"best {self.name} {best[self.name]:.4f} at step {best['step']}"


def score_of(config) -> Score:
    """The score of a run's stage."""
    return Score("dev_score", True) if config.stage == "finetune" else Score("validation_loss", False)


def lines_until(workdir, step: int) -> list[dict]:
    """The lines of metrics.jsonl up to the step of a checkpoint, or 0.

    Raises UserError if they are not those of which that checkpoint holds a checksum: patience and the best step come from them.
    """
    path = Path(workdir) / reporting.METRICS
    if step and not path.exists():
        logging.warning("%s is gone: the evaluations before step %d no longer count.", path, step)
        return []
    meta = saved_steps.read_meta(saved_steps.step_folder(workdir, step)) if step else {}
    lines = [line for line in reporting.read_lines(path) if line["step"] <= step]
    lines = lines[: meta.get("lines")]  # without the evaluation of a step that was saved before it
    if meta.get("metrics") is not None and meta["metrics"] != reporting.checksum_of_lines(lines):
        raise UserError(f"{path} has changed since checkpoint {step} was written: {reporting.REMEDY}.")
    return [*lines, {"step": step} | meta["values"]] if "values" in meta else lines


def is_finished(config, workdir, step: int) -> bool:
    """Whether a run whose newest checkpoint is that of `step` has nothing left to do: all steps, or no patience
    left, and its last evaluation."""
    if step and saved_steps.read_meta(saved_steps.step_folder(workdir, step)).get("due"):
        return False
    bad = score_of(config).bad_evaluations(lines_until(workdir, step))
    return step >= config.train.steps or bad >= config.train.patience
