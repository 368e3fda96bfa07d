"""Gemma 3 270M with a distiller made of its own first six layers: a small LLM that learns from demonstrations, on two CPU cores.

    python -m mend_jax.experiments.main_table --config=configs/gemma3_270m.py --workdir=runs/gemma3_270m \\
        --config.data.text=C4 --config.data.tasks=METAICL

The LLM comes with a package (docs/data.md). Of the small LLMs that packages carry it is the one that gains from demonstrations what
methods can be compared by (docs/results.md). The demonstrations become 96 vectors, which begin as their last 96 tokens
(prefix.residual, docs/running.md). Inputs are cut at 48 tokens, in tests too.

`:chunked` is the setting until 2026-12-01: each demonstration, a chunk of its own, becomes six vectors, which begin as its last six
tokens, and L_distill is of inputs too.

Hardware: 2 CPU cores and 12 GB.
Time: of `:chunked` about three hours on 2 cores of an Intel Xeon with AMX, 10 to 14 s a step of finetuning (docs/lab_notes.md: with
    jemalloc). Of the 96 vectors not measured there; on one core of an AMD EPYC beside other work 20 to 28 s a step
    (docs/results.md).
Expected: hr_to_lr, without PromptTuning: zero-shot 28.0, MEND 35.1, HyperTuning 35.6, Vanilla ICL 36.2 (docs/results.md, which has
    class_to_class with `:chunked` too); no number for this LLM is published.
"""

from configs import own_llm
from mend_jax.cli.errors import UserError


def get_config(name: str = ""):
    if name not in ("", "chunked"):
        raise UserError(f"configs/gemma3_270m.py has no {name!r}: use it alone, or with :chunked.")
    c = own_llm.get_config(name)
    c.llm.path = c.prefix.backbone = "gemma3-270m"
    if name == "chunked":
        c.prefix.chunk_tokens = 64
    c.data.max_demo_tokens = 896
    c.data.max_input_tokens = 48
    c.data.max_text_tokens = 352
    c.data.demo_buckets, c.data.query_buckets = (288, 512, 640, 768, 896), (64, 128)
    c.data.validation_items = 24
    c.data.validation_seeds = (13,)
    c.optimizer.warmup_steps = 10
    c.train.batch_size = 4
    c.train.eval_every, c.train.save_every = 60, 20  # no checkpoint is chosen: so few dev items would choose by chance
    c.experiment.methods = ("zero_shot", "prompt_tuning", "icl", "hypertuning", "mend")
    c.experiment.pretrain_steps, c.experiment.finetune_steps = 40, 60
    c.experiment.prompt_tuning_learning_rate = 3e-3  # of 3e-3, 3e-2, 0.1 and 0.3 the one with the best checkpoint on dev items (docs/lab_notes.md)
    c.evaluate.limit = 40
    return c
