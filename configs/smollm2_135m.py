"""SmolLM2-135M-Instruct with a distiller made of its own first eight layers: MEND for a current LLM, meant for one GPU.

    python -m mend_jax.experiments.methods --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m \\
        --config.data.text=C4 --config.data.tasks=METAICL

The LLM comes with a package (docs/data.md). Each stage has one shape of batches: on a fast device compiling another takes
longer than its padding.

`:tokens` lets vectors begin as tokens, six of each demonstration (configs/own_llm.py:chunked), which was better on CPU cores than vectors that begin as noise; it is what `launch/accelerator.sh` trains. `:cpu` has shorter contexts, 32 vectors and symbol tuning, for two CPU cores; the distiller that the package carries was trained with it
and vectors that begin as tokens, without symbol tuning (docs/lab_notes.md). `:metaicl` makes SmolLM2-MetaICL of the LLM, by training it on in-context
sequences:

    python -m mend_jax.train --config=configs/smollm2_135m.py:metaicl --workdir=runs/smollm2_metaicl --config.data.tasks=METAICL

It stands in runs/smollm2_metaicl/llm, for --config.llm.path and --config.prefix.backbone.

Hardware: a device of 24 GB; `:cpu` and `:metaicl` 2 CPU cores and 8 GB.
Time: on a device not measured here; `:metaicl` 32 minutes on 2 cores of an Intel Xeon with AMX (docs/lab_notes.md).
Expected: no number for this LLM is published; those measured here are in docs/results.md. SmolLM2-MetaICL was no better than the LLM
that it began with (docs/lab_notes.md).
"""

from configs import base, own_llm
from mend_jax.cli.errors import UserError

NAMES = ("gpu", "tokens", "cpu", "metaicl")


def get_config(name: str = "gpu"):
    if name not in NAMES:
        raise UserError(f"configs/smollm2_135m.py has no {name!r}: use {', '.join(NAMES[:-1])} or {NAMES[-1]}.")
    c = own_llm.get_config("chunked") if name == "tokens" else base.get_config()
    c.llm.path = c.prefix.backbone = "smollm2-135m-instruct"
    c.llm.dtype = c.prefix.dtype = "bfloat16"
    c.prefix.layers = 8
    c.prefix.train_embeddings = False
    c.data.queries = 4  # of one task share a context, which the teacher reads once
    c.data.demo_buckets, c.data.query_buckets = (900,), (512,)
    c.data.validation_items = 64
    c.optimizer.learning_rate = 3e-4  # the paper's is 5e-5, for 30,000 steps
    c.optimizer.warmup_steps = 50
    c.train.batch_size = 16
    c.train.eval_every = c.train.save_every = 500
    c.experiment.methods = ("zero_shot", "icl", "mend")
    c.experiment.pretrain_steps = c.experiment.finetune_steps = 1_500
    c.evaluate.tasks = ("emo", "ethos-religion", "wiki_qa")  # () is all of the partition
    c.evaluate.limit = 100
    if name == "tokens":
        _short_chunks(c)
    elif name != "gpu":
        _small_batches(c)
    if name == "metaicl":
        _metaicl(c)
    return c


def _short_chunks(c):
    c.prefix.chunk_tokens = 64
    c.data.max_input_tokens = 48
    c.data.max_demo_tokens = 1024
    c.data.demo_buckets, c.data.query_buckets = (1024,), (128,)


def _small_batches(c):
    c.prefix.length = 32
    c.data.template = "qa"  # the LLM learns most from demonstrations in it: docs/results.md
    c.data.symbols = 0.5  # a distiller that was trained without did not read which label an input has (docs/results.md)
    c.data.max_text_tokens = c.data.max_demo_tokens = 512
    c.data.max_input_tokens = 112
    c.data.demo_buckets, c.data.query_buckets = (256, 384, 512), (64, 128)
    c.data.validation_items = 24
    c.optimizer.learning_rate = 5e-4
    c.optimizer.warmup_steps = 30
    c.train.batch_size = 4
    c.train.eval_every, c.train.save_every = 100, 25
    c.train.patience = 50
    c.experiment.pretrain_steps, c.experiment.finetune_steps = 250, 400
    c.evaluate.tasks = ()


def _metaicl(c):
    c.stage = "lm"
    c.loss.clm_tokens = "outputs"
    c.data.sequence_length = 768
    c.data.query_buckets = (128, 256, 384, 512)
    c.data.validation_items = 64
    c.optimizer.learning_rate = 1e-4
    c.train.batch_size = 8
    c.train.steps = 150
    c.train.eval_every = 50
