"""The paper's main setting, gpt2-large with gpt2 as the distiller's backbone, for each of MetaICL's seven partitions.

    python -m mend_jax.experiments.methods --config=configs/gpt2_large.py:class_to_class --workdir=runs/gpt2_large \\
        --config.data.text=C4 --config.data.tasks=METAICL

C4 is a folder of AllenAI's *.json.gz, METAICL a folder of MetaICL's files. The paper (Tables 2 and 5; 8 devices, fp16, LLM in
8 bit) has for class_to_class: zero-shot 34.36, PromptTuning 37.65, Vanilla ICL 41.30, HyperTuning 40.42, MEND 43.35.
"""

from configs import base
from mend_jax.errors import UserError

PARTITIONS = (
    "class_to_class",
    "non_class_to_class",
    "qa_to_qa",
    "non_qa_to_qa",
    "non_nli_to_nli",
    "hr_to_lr",
    "non_paraphrase_to_paraphrase",
)


def get_config(partition: str = "class_to_class"):
    if partition not in PARTITIONS:
        raise UserError(f"{partition!r} is not one of MetaICL's partitions: use one of {', '.join(PARTITIONS)}.")
    c = base.get_config()
    c.data.partition = partition
    c.llm.dtype = c.prefix.dtype = "bfloat16"  # the paper's half precision; trained parameters stay float32
    return c
