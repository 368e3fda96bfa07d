"""The main comparison (paper, Tables 2 and 6): settings by methods.

    python -m mend_jax.experiments.main_table --config=configs/small_world.py --workdir=runs/experiments

The settings are experiment.partitions, each with finetunings of its own; a pretraining serves all of them, and so does what
experiment.trained names.
"""

from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, settings


def rows(config):
    return [
        row
        for setting in settings(config)
        for row in of_methods(
            config,
            config.experiment.methods,
            {"setting": setting},
            fields={"data.partition": setting},
            trained_with={} if setting == config.data.partition else {"data.partition": setting},
            as_given=True,
        )
    ]


EXPERIMENT = Experiment("main_table", "Settings and methods", "Tables 2 and 6", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
