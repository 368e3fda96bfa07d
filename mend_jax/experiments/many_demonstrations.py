"""Many demonstrations (the paper's open questions 1 and 2): K = 16, 32, 64, 256, 1,024 and a distiller that reads in chunks.

    python -m mend_jax.experiments.many_demonstrations --config=configs/small_world.py --workdir=runs/experiments

For every K all methods have the same demonstrations: the file's, then ones drawn from the tasks' training pools. Vanilla ICL and MEND read those that fit
their windows. MEND in chunks reads all that its chunks hold, untrained (the distiller as it is) and trained: finetuned
from the same pretraining with contexts twice as long as the config's, or as the teacher's window holds: there the LLM reads them whole.
"""

from mend_jax.experiments.methods import FINETUNING
from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, of_trainings
from mend_jax.experiments.trainings import of_method, of_stages, pretraining

JOINS = ("concat", "mean")
CHUNKED = "chunked"


def in_chunks(config, join, seed):
    data, prefix = config.data, config.prefix
    twice = {"data.k": 2 * data.k, "data.max_demo_tokens": 2 * data.max_demo_tokens}
    if prefix.chunk_tokens:  # else a chunk is as long as a context was
        twice["prefix.chunks"] = 2 * prefix.chunks
    chunk = {
        "prefix.kind": CHUNKED,
        "prefix.join": join,
        "prefix.chunk_tokens": prefix.chunk_tokens or data.max_demo_tokens,
    }
    fields = twice | chunk | {"evaluate.demos": "pool"}
    return of_stages(config, [FINETUNING], seed, fields, pretraining(config, seed))


def rows(config):
    made = []
    for k in config.experiment.many_demonstrations:
        fields = {"data.k": k, "evaluate.demos": "pool"}
        made += of_methods(config, ["icl", "mend"], {"K": k}, fields)
        for join in JOINS:
            joined, labels = fields | {"prefix.join": join}, {"method": f"mend, chunks {join}", "K": k}
            made += of_trainings(
                config, "mend", labels, lambda seed: of_method(config, "mend", seed), fields=joined, used_as=CHUNKED
            )
            made += of_trainings(
                config,
                "mend",
                labels | {"method": f"mend, chunks {join} trained"},
                lambda seed, join=join: in_chunks(config, join, seed),
                fields=joined,
            )
    return made


EXPERIMENT = Experiment(
    "many_demonstrations", "More demonstrations than a window holds", "open questions 1 and 2", rows, x="K"
)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
