"""Real text and real tasks at a size that two CPU cores can train: C4 and MetaICL's class_to_class, GPT-2's tokenizer.

First the LLM, from random weights (a folder with configs/gpt2_tiny/config.json and the tokenizer's files beside it):

    python -m mend_jax.train --config=configs/c4_metaicl.py:llm --workdir=runs/real/llm \\
        --config.llm.path=runs/gpt2_tiny --config.data.text=C4 --config.data.tasks=METAICL

Then all five methods on it, and the table:

    python -m mend_jax.experiments.methods --config=configs/c4_metaicl.py --workdir=runs/real/methods \\
        --config.data.text=C4 --config.data.tasks=METAICL

Hardware: one of two busy cores of an Intel Xeon.
Time: the LLM 87 minutes, the trainings of the methods 72, the evaluation 58.
Expected: zero-shot 26.3, PromptTuning 28.3, Vanilla ICL 26.2, HyperTuning 25.9, MEND 25.4, which is guessing: so small an LLM
does not learn in context from real text (docs/lab_notes.md).
"""

from configs import base
from mend_jax.cli.errors import UserError


def get_config(name: str = "methods"):
    if name not in ("llm", "methods"):
        raise UserError(f"configs/c4_metaicl.py has no {name!r}: use llm or methods.")
    c = base.get_config()
    c.llm.path = c.prefix.backbone = "runs/real/llm/llm"
    c.prefix.rms = 0.0  # docs/results.md was made before first vectors were as large as embeddings
    if name == "llm":
        c.stage = "lm"
        c.data.text_share = 0.5
        c.data.sequence_length = 1024
        c.data.validation_items = 16
        c.train.batch_size = 4
        c.train.steps = 1_500
        c.train.eval_every = 250
        c.train.save_every = 50
        c.optimizer.learning_rate = 2e-3
        c.optimizer.warmup_steps = 100
        c.optimizer.weight_decay = 0.01
        return c
    # 30,000 steps a stage in the paper; the rate is higher because so few steps must do.
    c.data.demo_buckets, c.data.query_buckets = (256, 512, 900), (64, 272)  # few shapes: compiling counts in a short run
    c.experiment.pretrain_steps = c.experiment.finetune_steps = 300
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_steps = 20
    c.train.eval_every = 100
    c.train.save_every = 50
    c.data.validation_items = 32
    c.evaluate.batch_size = 64
    return c
