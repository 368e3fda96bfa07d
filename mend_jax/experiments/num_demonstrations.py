"""How many demonstrations (paper, Figure 4a): K = 1, 2, 4, 8, 16 and beyond, as far as a method's window goes.

    python -m mend_jax.experiments.num_demonstrations --config=configs/small_world.py --workdir=runs/experiments

Up to config.data.k they are the first of the files' demonstrations; beyond it those of a seed's largest file, as a rule the same, are followed by ones that are drawn from the tasks'
training pools (evaluate.demos="pool"). Demonstrations that do not fit a method's window are left out: its prefix then stops growing.
"""

from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, reading


def rows(config):
    return [
        row
        for k in config.experiment.num_demonstrations
        for row in of_methods(
            config,
            reading(config),
            {"K": k},
            fields={"data.k": k, "evaluate.demos": "file" if k <= config.data.k else "pool"},
        )
    ]


EXPERIMENT = Experiment("num_demonstrations", "The number of demonstrations", "Figure 4a", rows, x="K")


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
