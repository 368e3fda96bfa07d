"""Llama-2-7b as the LLM, TinyLlama-1.1B (which has its tokenizer) as the distiller's backbone, all else as configs/gpt2_large.py.

    python -m mend_jax.experiments.methods --config=configs/llama_2_7b.py:class_to_class --workdir=runs/llama_2_7b \\
        --config.data.text=C4 --config.data.tasks=METAICL

With a distiller this large both models and the optimizer's state are split over the devices (docs/scaling.md). The hub gives
Llama-2-7b to those who have agreed to its licence: hf auth login.

Hardware: 8 devices of 24 GB with a sequence each are enough by the compiler's analysis (docs/scaling.md); it has not been run.
Time: not measured here.
Expected: no number for this pair is published or was measured here; the table has zero-shot and Vanilla ICL to compare with.
"""

from configs import gpt2_large


def get_config(partition: str = "class_to_class"):
    c = gpt2_large.get_config(partition)
    c.llm.path, c.prefix.backbone = "meta-llama/Llama-2-7b-hf", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    c.train.parallel = "mesh"  # fsdp over all devices
    return c
