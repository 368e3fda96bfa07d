"""The paper's studies: each file makes a table or a figure, `python -m mend_jax.experiments.NAME --config=... --workdir=...`.

An experiment is data (table.py): a list of rows, each with its labels, the training that it needs (trainings.py) and the evaluation
that scores it, over the commands `train` and `evaluate`. One runner (run.py) does them all: in a workdir

    experiments.json               the config, which all experiments of the workdir share
    trainings/<stage>-<key>/       runs of `train`; the key is a hash of the config and of what it starts from
    evaluations/<key>/             runs of `evaluate`; the key is a hash of what decides the predictions
    <name>/experiment.json         the rows of a finished experiment: labels, training seed, evaluation and the method in it
    <name>/table.md                the table
    times.json                     the seconds of each training and evaluation

so that what one experiment has trained or scored another finds. `methods.py` is older: one comparison in a workdir of its own.
"""
