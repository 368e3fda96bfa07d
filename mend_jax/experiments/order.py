"""The order of the demonstrations: the same ones in ten orders, for Vanilla ICL and for what is distilled.

    python -m mend_jax.experiments.order --config=configs/small_world.py --workdir=runs/experiments

The spread over the orders is the answer; order 0 is the files'.
"""

from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, reading


def rows(config):
    return [
        row
        for number in range(config.experiment.orders)
        for row in of_methods(config, reading(config), {"order": number}, fields={"evaluate.order": number})
    ]


EXPERIMENT = Experiment("order", "The order of the demonstrations", "", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
