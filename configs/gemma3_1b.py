"""Gemma 3: gemma-3-1b-pt, with gemma-3-270m (which has its tokenizer) as the distiller's backbone.

    python -m mend_jax.experiments.methods --config=configs/gemma3_1b.py:class_to_class --workdir=runs/gemma3 \\
        --config.data.text=C4 --config.data.tasks=METAICL

All else is as in the paper's main setting (configs/gpt2_large.py), with the LLM's weights in bfloat16, and its BOS before
every prefix, without which Gemma is of no use (docs/protocol.md).

Hardware: as configs/smollm2.py, whose models are about as large; it was not run on any device.
Time: not measured here.
Expected: no number of this LLM is published, and none was measured here; the table has zero-shot and Vanilla ICL to compare with.
"""

from configs import gpt2_large


def get_config(partition: str = "class_to_class"):
    c = gpt2_large.get_config(partition)
    c.llm.path, c.prefix.backbone = "google/gemma-3-1b-pt", "google/gemma-3-270m"
    c.llm.weights = "full"
    c.data.bos = "auto"
    return c
