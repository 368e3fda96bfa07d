"""Retrieved demonstrations (paper, Table 3): K nearest neighbours of each test item in its task's training pool.

    python -m mend_jax.experiments.retrieval --config=configs/small_world.py --workdir=runs/experiments

`file` are MetaICL's demonstrations, the same for all items; `random` are drawn for each item from the same pool as the neighbours
(mend_jax/data/retrieval.py).
"""

from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, reading

HOW = ("file", "random", "bm25", "dense")


def rows(config):
    return [
        row
        for how in HOW
        for row in of_methods(config, reading(config), {"demonstrations": how}, fields={"evaluate.demos": how})
    ]


EXPERIMENT = Experiment("retrieval", "Retrieved demonstrations", "Table 3", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
