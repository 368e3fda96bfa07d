"""A current small LLM: SmolLM2-1.7B, with SmolLM2-135M (which has its tokenizer) as the distiller's backbone.

    python -m mend_jax.experiments.methods --config=configs/smollm2.py:class_to_class --workdir=runs/smollm2 \\
        --config.data.text=C4 --config.data.tasks=METAICL

All else is as in the paper's main setting (configs/gpt2_large.py), with the LLM's weights in bfloat16. Another pair from one
family needs only two names: --config.llm.path=Qwen/Qwen3-1.7B --config.prefix.backbone=Qwen/Qwen3-0.6B.

Hardware: 8 devices of 24 GB with a sequence each are enough by the compiler's analysis (docs/scaling.md); it has not been run.
Time: not measured here.
Expected: no number for this LLM is published or was measured here; the table has zero-shot and Vanilla ICL to compare with.
"""

from configs import gpt2_large


def get_config(partition: str = "class_to_class"):
    c = gpt2_large.get_config(partition)
    c.llm.path, c.prefix.backbone = "HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-135M"
    c.llm.weights = "full"
    return c
