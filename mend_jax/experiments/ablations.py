"""Ablations (paper, Table 4): MEND without a loss or a stage.

    python -m mend_jax.experiments.ablations --config=configs/small_world.py --workdir=runs/experiments

Vanilla ICL and the whole MEND come first. The settings are experiment.partitions, as in main_table.
"""

from mend_jax.experiments.methods import FINETUNING
from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, Row, of_methods, of_trainings, settings
from mend_jax.experiments.trainings import of_stages

# Stages as in methods.STAGES: (stage, weight of L_distill, None for lambda, of L_pred, of L_CLM).
L_DISTILL, CLM, BOTH = ("pretrain", 1.0, 0.0, 0.0), ("pretrain", 0.0, 0.0, 1.0), ("pretrain", 1.0, 0.0, 1.0)
ABLATIONS = {  # (pretraining, finetuning)
    ("none", "L_pred + L_distill"): [FINETUNING],
    ("CLM", "L_pred + L_distill"): [CLM, FINETUNING],
    ("CLM + L_distill", "L_pred + L_distill"): [BOTH, FINETUNING],
    ("L_distill", "L_distill"): [L_DISTILL, ("finetune", None, 0.0, 0.0)],
    ("L_distill", "L_pred"): [L_DISTILL, ("finetune", 0.0, 1.0, 0.0)],
}


def rows(config):
    return [row for setting in settings(config) for row in rows_of(config, setting)]


def rows_of(config, setting: str) -> list[Row]:
    """The table's rows for one setting."""
    where = {"data.partition": setting}
    other = {} if setting == config.data.partition else where
    full = {"setting": setting, "pretraining": "L_distill", "finetuning": "L_pred + L_distill"}
    made = of_methods(config, ["icl"], full | {"pretraining": "-", "finetuning": "-"}, where)
    made += of_methods(config, ["mend"], full, where, other, as_given=True)
    for (before, tuned), stages in ABLATIONS.items():
        labels = {"method": "mend", "setting": setting, "pretraining": before, "finetuning": tuned}
        made += of_trainings(
            config,
            "mend",
            labels,
            lambda seed, stages=stages: of_stages(config, stages, seed, other),
            fields=where,
        )
    return made


EXPERIMENT = Experiment("ablations", "MEND without a loss or a stage", "Table 4", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
