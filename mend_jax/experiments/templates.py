"""Templates (paper, Table 7): trained with one, tested with another.

    python -m mend_jax.experiments.templates --config=configs/small_world.py --workdir=runs/experiments

The templates are experiment.templates; what experiment.trained names was trained with data.template, and is tested with it too. What was trained with another
template than the test's says so in a warning: here that is the point.
"""

from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, reading
from mend_jax.experiments.trainings import trained_elsewhere

UNTRAINED = "-"


def rows(config):
    names, there, made = config.experiment.templates, trained_elsewhere(config), []
    given = [method for method in reading(config) if method in there]
    methods = [method for method in reading(config) if method != "icl" and method not in there]
    for tested in dict.fromkeys((*names, *([config.data.template] if given else ()))):
        fields = {"data.template": tested}
        made += of_methods(config, ["icl"], {"trained": UNTRAINED, "tested": tested}, fields)
        made += of_methods(config, given, {"trained": config.data.template, "tested": tested}, fields)
        for trained in names:
            trained_with = {} if trained == config.data.template else {"data.template": trained}
            made += of_methods(config, methods, {"trained": trained, "tested": tested}, fields, trained_with)
    return made


EXPERIMENT = Experiment("templates", "Trained with one template, tested with another", "Table 7", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
