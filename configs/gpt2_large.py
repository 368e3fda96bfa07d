"""The paper's main setting, gpt2-large with gpt2 as the distiller's backbone, for each of MetaICL's seven partitions.

    python -m mend_jax.experiments.methods --config=configs/gpt2_large.py:class_to_class --workdir=runs/gpt2_large \\
        --config.data.text=C4 --config.data.tasks=METAICL

C4 is a folder of AllenAI's *.json.gz, METAICL a folder of MetaICL's files.

Hardware: the paper's (Table 5): 8 devices of 24 GB with a sequence each, half precision, the LLM in 8 bits.
Time: not measured here.
Expected (Table 2; MEND's spread over five seeds is 0.4 to 2.2):

    partition                     zero-shot  PromptTuning  Vanilla ICL  HyperTuning   MEND
    class_to_class                    34.36         37.65        41.30        40.42  43.35
    non_class_to_class                34.36         38.78        41.30        42.54  43.38
    non_nli_to_nli                    25.50         31.34        39.13        36.49  39.96
    non_qa_to_qa                      44.58         38.71        45.81        41.11  44.29
    qa_to_qa                          44.58         45.77        45.81        46.20  46.92
    hr_to_lr                          34.77         40.68        41.26        41.63  40.92
    non_paraphrase_to_paraphrase      34.12         34.23        38.93        39.63  42.54
"""

from configs import base
from mend_jax.cli.errors import UserError

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
    c.llm.weights = "int8"
    return c
