"""Hyperparameters (paper, Figures 6 and 7): beta, gamma and lambda.

    python -m mend_jax.experiments.hyperparameters --config=configs/small_world.py --workdir=runs/experiments

As the paper's ablations, and unlike its Figure 6, which scores MEND before its finetuning, every row is pretrained and finetuned; gamma = 0 is
pretraining with L_CLM alone. beta is the share of a text that is distilled in pretraining, gamma the weight of L_distill beside L_CLM there, lambda the weight of
L_distill beside L_pred in finetuning; the other two are as in MEND.
"""

from mend_jax.experiments.methods import FINETUNING
from mend_jax.experiments.run import run_experiment
from mend_jax.experiments.table import Experiment, of_trainings
from mend_jax.experiments.trainings import of_stages, pretraining


def with_beta(config, value, seed):
    before = of_stages(config, [("pretrain", 1.0, 0.0, 0.0)], seed, {"data.beta": value})
    return of_stages(config, [FINETUNING], seed, start=before)


def with_gamma(config, value, seed):
    return of_stages(config, [("pretrain", value, 0.0, 1.0), FINETUNING], seed)


def with_lambda(config, value, seed):
    return of_stages(config, [("finetune", value, 1.0, 0.0)], seed, start=pretraining(config, seed))


def rows(config):
    searched = config.experiment
    values = {
        "beta": searched.betas,
        "gamma": (0.0, *filter(None, searched.gammas)) if searched.gammas else (),
        "lambda": searched.lambdas,
    }
    trained = {"beta": with_beta, "gamma": with_gamma, "lambda": with_lambda}
    return [
        row
        for name, searched_values in values.items()
        for value in map(float, searched_values)
        for row in of_trainings(
            config,
            "mend",
            {"hyperparameter": name, "value": f"{value:g}"},
            lambda seed, name=name, value=value: trained[name](config, value, seed),
        )
    ]


EXPERIMENT = Experiment("hyperparameters", "beta, gamma and lambda", "Figures 6 and 7", rows)


def main(config, workdir) -> int:
    return run_experiment(EXPERIMENT, config, workdir)


if __name__ == "__main__":
    from mend_jax.cli.command_line import run

    run(main, several=True)
