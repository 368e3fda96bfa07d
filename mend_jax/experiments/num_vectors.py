"""How many vectors (paper, Figure 4b): PromptTuning, HyperTuning and MEND with l = 1, 10, 50, 100, 200, trained for each l, and MEND
trained once for all of them.

    python -m mend_jax.experiments.num_vectors --config=configs/small_world.py --workdir=runs/experiments

The one that is trained once has nested lengths (prefix.nested): its first l vectors are used. It is left out where prefix.kind cannot have
them: of chunks l are the vectors of each. The others are those of experiment.methods.
"""

from mend_jax.experiments.methods import STAGES
from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, of_trainings
from mend_jax.experiments.trainings import of_method
from mend_jax.prefixes import kind_of


def rows(config):
    made, lengths = [], config.experiment.num_vectors
    longest = max(lengths)
    nested = {"prefix.length": longest, "prefix.nested": tuple(length for length in lengths if length != longest)}
    methods = [name for name in STAGES if name == "mend" or (STAGES[name] and name in config.experiment.methods)]
    for length in lengths:
        trained_with = {} if length == config.prefix.length else {"prefix.length": length}
        made += of_methods(config, ["icl"], {"l": length})
        made += of_methods(config, methods, {"l": length}, trained_with=trained_with)
        if kind_of(config).can_nest:
            made += of_trainings(
                config,
                "mend",
                {"method": "mend, nested", "l": length},
                lambda seed: of_method(config, "mend", seed, nested),
                used_as="" if length == longest else f"first{length}",
            )
    return made


EXPERIMENT = Experiment("num_vectors", "The number of vectors", "Figure 4b", rows, x="l")


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
