"""An LLM of your own, with a distiller made of its first layers whose vectors begin as tokens: the recipe to start from.

    python -m mend_jax.experiments.methods --config=configs/own_llm.py --workdir=runs/mine \\
        --config.llm.path=LLM --config.prefix.backbone=LLM --config.data.text=TEXTS --config.data.tasks=TASKS --config.data.partition=NAME

To see first that your files are read and all of it runs, without a use for what comes out: --config=configs/own_llm.py:try (6 minutes
for SmolLM2-135M and 16 test tasks on 2 quiet cores of an AMD EPYC, commit a387c94, 2026-12-01, when the recipe was what is now
:chunked). It evaluates with the first seed of
evaluate.seeds alone, but reads and checks the files of all five first, as the whole recipe needs them; whoever has those of one seed
gives both commands --config.evaluate.seeds=13.

LLM is a folder, a hub name or a GGUF file, TEXTS and TASKS are folders of your files, NAME is a partition (docs/data.md). The
demonstrations become 96 vectors, which begin as their last 96 tokens (docs/running.md, "Vectors that begin as tokens"). What differs from
the paper's defaults is what was best among what was tried with Gemma 3 270M on CPU cores (docs/results.md, docs/lab_notes.md):
configs/gemma3_270m.py is this file at a size for them. The batch of 16 and the 1,500 steps were not tried.

`:chunked` reads each demonstration by itself, any number of them, and makes six vectors of each, which begin as its last six tokens;
L_distill is then of inputs too.

Hardware: one device that holds the LLM, in bfloat16, and the training of a distiller of its first six layers: `python -m mend_jax.scaling
    own_llm --llm=LLM --batch_size=16` (docs/scaling.md) computes the memory of a step. Never run on a GPU.
Time: not measured; 24,000 texts, then 24,000 contexts of 16 demonstrations with four queries each.
Expected: no number is published; those of Gemma 3 270M after a hundredth of this are in docs/results.md.
"""

from configs import base
from mend_jax.cli.errors import UserError


def get_config(name: str = ""):
    if name not in ("", "chunked", "try"):
        raise UserError(f"configs/own_llm.py has no {name!r}: use it alone, or with :chunked or :try.")
    c = base.get_config()
    c.llm.path = c.prefix.backbone = ""  # yours: no other is tried
    c.llm.dtype = c.prefix.dtype = "bfloat16"
    c.data.bos = "auto"  # as its tokenizer does: many LLMs have only ever read behind their BOS
    c.data.template = "qa"
    _vectors_that_begin_as_tokens(c)
    c.data.queries = 4  # of one task share a context, which teacher and distiller read once
    c.loss.kd = 10.0  # lambda
    c.loss.kd_tokens = "outputs"  # the inputs' words, most of a query, take what is to be learnt of the answers
    c.optimizer.learning_rate = 3e-4  # the paper's is 5e-5, for 30,000 steps
    c.optimizer.warmup_steps = 50
    c.train.batch_size = 16
    c.train.eval_every, c.train.save_every = 500, 100
    c.experiment.methods = ("zero_shot", "icl", "mend")
    c.experiment.pretrain_steps = c.experiment.finetune_steps = 1_500
    if name == "chunked":
        _chunks(c)
    if name == "try":
        _a_few_steps(c)
    return c


def _vectors_that_begin_as_tokens(c):
    c.prefix.layers = 6  # of the LLM: the distiller is small, and reads with the LLM's embeddings
    c.prefix.train_embeddings = False
    c.prefix.residual = True
    c.prefix.projection = "linear"  # begins at zero
    c.prefix.length = 96
    c.data.max_input_tokens = 96
    c.data.max_demo_tokens = 2048  # of an LLM whose window is longer than that and a query
    c.data.demo_buckets, c.data.query_buckets = (512, 1024, 1536, 2048), (64, 128, 256)


def _chunks(c):
    """Each demonstration a chunk of its own."""
    c.loss.kd_tokens = "all"  # the outputs alone changed little here (docs/results.md)
    c.prefix.kind = "chunked"
    c.prefix.length = 6  # of each demonstration
    c.prefix.chunk_demos, c.prefix.chunk_tokens, c.prefix.chunks = 1, 128, 16  # a longer demonstration would be left out


def _a_few_steps(c):
    c.experiment.pretrain_steps = c.experiment.finetune_steps = 4
    c.optimizer.warmup_steps = 1
    c.train.batch_size, c.data.queries = 2, 2
    c.train.log_every, c.train.eval_every = 1, 4
    c.data.validation_items = c.evaluate.limit = 4
    c.experiment.first_seeds = 1  # the files of the others are checked too: the whole recipe reads them
