"""Perturbed demonstrations (paper, Table 3): what a method reads in them.

    python -m mend_jax.experiments.perturbations --config=configs/small_world.py --workdir=runs/experiments

What is done to a demonstration is in mend_jax/data/perturbations.py.
"""

from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, reading

KINDS = ("none", "no_label", "no_input", "random_label", "wrong_label")


def rows(config):
    return [
        row
        for kind in KINDS
        for row in of_methods(config, reading(config), {"demonstrations": kind}, fields={"evaluate.perturb": kind})
    ]


EXPERIMENT = Experiment("perturbations", "Perturbed demonstrations", "Table 3", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
