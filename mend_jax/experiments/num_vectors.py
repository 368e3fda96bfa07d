"""How many vectors (paper, Figure 4b): MEND with l = 1, 10, 50, 100, 200, trained for each l.

python -m mend_jax.experiments.num_vectors --config=configs/small_world.py:experiments --workdir=runs/experiments
"""

from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods


def rows(config):
    return [
        row
        for length in config.experiment.num_vectors
        for method, trained_with in (
            ("icl", {}),
            ("mend", {} if length == config.prefix.length else {"prefix.length": length}),
        )
        for row in of_methods(config, [method], {"l": length}, trained_with=trained_with)
    ]


EXPERIMENT = Experiment("num_vectors", "The number of vectors", "Figure 4b", rows, x="l")


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
