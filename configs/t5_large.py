"""The paper's T5: t5-large-lm-adapt, with t5-small-lm-adapt as the distiller's backbone, for each of MetaICL's partitions.

    python -m mend_jax.experiments.methods --config=configs/t5_large.py:class_to_class --workdir=runs/t5_large \\
        --config.data.text=C4 --config.data.tasks=METAICL

The paper (Tables 2 and 5; 8 devices, fp32) has for class_to_class: zero-shot 36.75, PromptTuning 32.56, Vanilla ICL 38.40,
HyperTuning 31.17, MEND 41.75. It pretrains with 64 sequences a step and finetunes with 8: one command does all stages
with --config.train.batch_size, 8 here; a stage of its own (python -m mend_jax.train) takes its own.
The hub has these weights as .bin alone, which PyTorch reads.
"""

from configs import gpt2_large


def get_config(partition: str = "class_to_class"):
    c = gpt2_large.get_config(partition)
    c.llm.path, c.prefix.backbone = "google/t5-large-lm-adapt", "google/t5-small-lm-adapt"
    c.llm.dtype = c.prefix.dtype = "float32"
    c.experiment.pretrain_steps = 5_000
    return c
