"""Every experiment, one after another, in one workdir.

    python -m mend_jax.experiments.all --config=configs/small_world.py --workdir=runs/experiments

All tables are checked before the first begins. The order is that of what they share: the first ones need the fewest trainings. Attention
and cost come last.
"""

from mend_jax.experiments import (
    ablations,
    attention,
    cost,
    domains,
    hyperparameters,
    main_table,
    many_demonstrations,
    num_demonstrations,
    num_vectors,
    objectives,
    order,
    perturbations,
    retrieval,
    templates,
)
from mend_jax.experiments.run import run_experiments

TABLES = (
    main_table, perturbations, retrieval, num_demonstrations, order, domains, ablations, num_vectors, templates, many_demonstrations,
    objectives, hyperparameters,
)  # fmt: skip


def main(config, workdir) -> int:
    code = run_experiments([table.EXPERIMENT for table in TABLES], config, workdir)
    return code or attention.main(config, workdir) or cost.main(config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
