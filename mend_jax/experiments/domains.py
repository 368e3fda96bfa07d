"""Beyond MetaICL: tasks of other domains, and demonstrations that are noisy, irrelevant or adversarial, by share.

    python -m mend_jax.experiments.domains --config=configs/small_world.py --workdir=runs/experiments

The tasks of experiment.domains (mend_jax/data/domains.py) are answered by what was trained on the config's own tasks. The noise is
put into the demonstrations of the config's own test tasks.
"""

from mend_jax.data import domains, metaicl
from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_methods, reading

NOISE = ("typos", "irrelevant", "adversarial")


def rows(config):
    folder = domains.written(config.experiment.domains, config.data.cache)
    methods, made = reading(config), []
    for task in metaicl.load_partition(folder, domains.PARTITION)["test"]:
        fields = {"data.tasks": str(folder), "data.partition": domains.PARTITION, "evaluate.tasks": (task,)}
        made += of_methods(
            config, ["zero_shot", *methods], {"tasks": task, "demonstrations": "none", "share": 0}, fields
        )
    own = config.data.partition
    made += of_methods(config, methods, {"tasks": own, "demonstrations": "none", "share": 0})
    for noise in NOISE:
        for share in map(float, config.experiment.shares):
            fields = {"evaluate.perturb": noise, "evaluate.perturb_share": share}
            made += of_methods(config, methods, {"tasks": own, "demonstrations": noise, "share": f"{share:g}"}, fields)
    return made


EXPERIMENT = Experiment("domains", "Other domains, noisy demonstrations", "", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
