"""Objectives (the paper's open question 3): what L_distill compares in finetuning.

    python -m mend_jax.experiments.objectives --config=configs/small_world.py --workdir=runs/experiments

All begin with one pretraining with the forward KL, that of the first of experiment.training_seeds, and have the same data, draws and
steps. With loss.teacher_cache the teacher of a seed reads each batch once for all objectives that compare predictions; those that
compare states need the teacher itself.
"""

from mend_jax.experiments.methods import FINETUNING
from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_trainings
from mend_jax.experiments.trainings import of_stages, pretraining
from mend_jax.objectives import OBJECTIVES, STATE_OBJECTIVES


def rows(config):
    first = config.experiment.training_seeds[0]

    def train(objective, seed):
        fields = {"loss.objective": objective}
        if objective in STATE_OBJECTIVES:
            fields["loss.teacher_cache"] = ""
        return of_stages(config, [FINETUNING], seed, fields, pretraining(config, first))

    return [
        row
        for objective in (*OBJECTIVES, *STATE_OBJECTIVES)
        for row in of_trainings(
            config, "mend", {"objective": objective}, lambda seed, objective=objective: train(objective, seed)
        )
    ]


EXPERIMENT = Experiment("objectives", "What L_distill compares", "open question 3", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
