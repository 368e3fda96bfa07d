"""Every experiment, one after another, in one workdir.

    python -m mend_jax.experiments.all --config=configs/small_world.py --workdir=runs/experiments

All are checked before the first begins. The order is that of what they share: the first ones need the fewest trainings. Attention
and cost come last; they are of decoder-only LLMs and run in one process: else they are left out.
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
from mend_jax.experiments.run import run_experiments, say
from mend_jax.models.families import DecoderConfig, from_hf_config
from mend_jax.models.folders import local_folder
from mend_jax.run import distributed

TABLES = (
    main_table, perturbations, retrieval, num_demonstrations, order, domains, ablations, num_vectors, templates, many_demonstrations,
    objectives, hyperparameters,
)  # fmt: skip


OF_DECODERS = (attention, cost)


def main(config, workdir) -> int:
    is_decoder = isinstance(from_hf_config(local_folder(config.llm.path)), DecoderConfig)
    rest = OF_DECODERS if is_decoder and not distributed.is_running() else ()
    if not rest:
        why = "run as one process" if is_decoder else f"are of decoder-only LLMs, and {config.llm.path} is none"
        say(f"attention and cost {why}: they are left out")
    for one in rest:
        one.check(config)
    code = run_experiments([table.EXPERIMENT for table in TABLES], config, workdir)
    for one in rest:
        code = code or one.main(config, workdir)
    return code


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
