"""The small world, which comes with the package: nothing is downloaded, everything runs on 2 CPU cores.

    python -m mend_jax.experiments.methods --config=configs/small_world.py:quick --workdir=runs/quick
    python -m mend_jax.experiments.methods --config=configs/small_world.py:full --workdir=runs/full
    python -m mend_jax.experiments.all --config=configs/small_world.py --workdir=runs/experiments

On 2 cores of an Intel Xeon the first takes 5 minutes: MEND 99.3, Vanilla ICL 100 (one training). The second took 64 minutes of
one core; in it a quarter of the labels in training and demonstrations are wrong: MEND 77.7, Vanilla ICL 76.0, HyperTuning 71.4,
from one training each (docs/results.md).
The third, which is what `:experiments` names too, trains 50 times and makes 44 evaluations in 30 minutes on two quiet cores
(docs/results.md).

A single stage:

    python -m mend_jax.train --config=configs/small_world.py:pretrain --workdir=runs/pretrain
    python -m mend_jax.train --config=configs/small_world.py:finetune --workdir=runs/finetune \\
        --config.prefix.start_from=runs/pretrain

The distiller's starting point, a small LM, and the packaged LLM, which was grown from it (mend_jax/small_world/), were made by

    python -m mend_jax.train --config=configs/small_world.py:backbone --workdir=runs/backbone
    python -m mend_jax.train --config=configs/small_world.py:llm --workdir=runs/llm --config.llm.path=runs/backbone/llm
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import base
from mend_jax.cli.errors import UserError

NAMES = ("backbone", "llm", "pretrain", "finetune", "quick", "full", "experiments")


def get_config(name: str = "experiments") -> ConfigDict:
    c = base.get_config()
    c.llm.path = "small_world"  # the packaged model; paths for this value: mend_jax/data/small_world.py:resolve
    c.prefix.backbone = "small_world"
    c.prefix.rms = 0.0  # docs/results.md was made before first vectors were as large as embeddings
    c.prefix.length = 8  # at most an eighth of the demonstrations' 64-80 tokens
    c.data.text = "small_world"
    c.data.tasks = "small_world"
    c.data.partition = "small_world"
    c.data.max_text_tokens = 88  # pretraining: 70 are distilled, 18 are the continuation
    c.data.max_demo_tokens = 80  # 16 demonstrations of 3-4 words and a label: all fit
    c.data.max_input_tokens = 8
    c.data.demo_buckets = (80,)  # one shape: compiling another would take longer than it saves
    c.data.query_buckets = (8, 24)  # an input with its label; a text's continuation
    c.data.queries = 8  # per context: the distiller learns far more than from one (docs/lab_notes.md)
    c.data.sequence_length = 88
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 50
    c.train.batch_size = 64
    c.train.log_every = 20
    c.train.patience = 1000  # no early stopping: the runs are short and the learning rate has to come down
    c.evaluate.batch_size = 64
    c.experiment.num_vectors = (2, 8, 16)  # the window has 96 positions
    c.experiment.many_demonstrations = (16, 64, 256, 1024)
    c.experiment.domains = "small_world_domains"  # the LLM knows no digits
    if name in ("backbone", "llm"):
        _language_model(c, name)
    elif name in ("quick", "pretrain", "finetune"):
        _quick(c, name)
    elif name == "full":
        _full(c)
    elif name == "experiments":
        _experiments(c)
    else:
        raise UserError(f"configs/small_world.py has no {name!r}: use {', '.join(NAMES[:-1])} or {NAMES[-1]}.")
    return c


def _language_model(c: ConfigDict, name: str) -> None:
    c.stage = "lm"
    c.data.text_share = 0.25  # only the text has the words of the meta-test topics
    c.optimizer.weight_decay = 0.01
    c.train.eval_every = c.train.save_every = 250
    if name == "backbone":
        # With all tasks it had not learnt to read unseen topics after as many steps: docs/lab_notes.md.
        c.data.partition = "small_world_first"
        c.optimizer.learning_rate = 4e-3
        c.optimizer.warmup_steps = 200
        c.train.steps = 3_000
    else:
        # The LLM is grown from the small LM: a distiller made from an LM that was trained separately is far worse
        # (docs/lab_notes.md).
        c.llm.path = str(Path(__file__).parents[1] / "mend_jax" / "small_world" / "backbone")
        c.llm.layers = 4
        c.optimizer.learning_rate = 2e-3
        c.train.steps = 1_000


def _quick(c: ConfigDict, name: str) -> None:
    c.stage = "pretrain" if name == "pretrain" else "finetune"
    c.experiment.methods = ("zero_shot", "icl", "mend")
    c.experiment.pretrain_steps = 300
    c.experiment.finetune_steps = 500
    c.train.steps = c.experiment.pretrain_steps if name == "pretrain" else c.experiment.finetune_steps
    c.train.eval_every = 250
    c.train.save_every = 100
    c.evaluate.seeds = (13, 21)


def _full(c: ConfigDict) -> None:
    # If all labels are right, all methods that read the demonstrations are almost always right: docs/results.md.
    c.data.tasks = "small_world_wrong_labels"
    c.loss.kd = 10.0  # the largest of those searched in the paper's Table 5
    c.experiment.pretrain_steps = 1_000  # on text with the words of all topics, including those of unseen tasks
    c.experiment.finetune_steps = 2_000
    c.train.steps = c.experiment.finetune_steps
    c.train.eval_every = 500
    c.train.save_every = 250


def _experiments(c: ConfigDict) -> None:
    # As `full`, at a small budget for all experiments together: the numbers show that they run, and little else.
    c.data.tasks = "small_world_wrong_labels"
    c.loss.kd = 10.0
    c.experiment.pretrain_steps = 100
    c.experiment.finetune_steps = 120
    c.experiment.training_seeds = (0,)
    c.experiment.partitions = ("small_world", "small_world_four")
    c.experiment.betas = (0.5, 0.8)
    c.experiment.gammas = (0.1, 1.0)
    c.experiment.lambdas = (1.0, 10.0)
    c.experiment.cost_llms = ()  # their real programs take minutes
    c.experiment.cost_rows = (1,)
    c.experiment.cost_repeats = 1
    c.train.steps = c.experiment.finetune_steps
    c.train.batch_size = 16
    c.train.eval_every = c.train.save_every = 1_000  # at the end alone
    c.optimizer.warmup_steps = 20
