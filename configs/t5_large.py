"""The paper's T5: t5-large-lm-adapt, with t5-small-lm-adapt as the distiller's backbone, for each of MetaICL's partitions.

    python -m mend_jax.experiments.methods --config=configs/t5_large.py:class_to_class --workdir=runs/t5_large \\
        --config.data.text=C4 --config.data.tasks=METAICL

A single stage (python -m mend_jax.train) takes 8 sequences per step, as the paper's finetuning; its pretraining needs
--config.train.batch_size=64 --config.train.steps=5000. The hub has these weights only as .bin, which needs PyTorch, and the
tokenizers as spiece.model, which needs SentencePiece: pip install torch sentencepiece.

Hardware: the paper's (Table 5): 8 devices of 24 GB, with 8 sequences each in pretraining and one in finetuning, float32.
Time: not measured here.
Expected (Table 2; MEND's spread over five seeds is 0.6 to 2.2):

    partition                     zero-shot  PromptTuning  Vanilla ICL  HyperTuning   MEND
    class_to_class                    36.75         32.56        38.40        31.17  41.75
    non_class_to_class                36.75         32.37        38.40        29.06  38.93
    non_nli_to_nli                    25.72         25.80        36.68        33.56  37.15
    non_qa_to_qa                      39.05         39.48        39.26        39.03  41.76
    qa_to_qa                          39.05         39.44        39.26        41.17  42.91
    hr_to_lr                          32.09         32.43        38.77        34.28  39.07
    non_paraphrase_to_paraphrase      34.28         36.44        36.31        37.39  36.99
"""

from configs import gpt2_large


def get_config(partition: str = "class_to_class"):
    c = gpt2_large.get_config(partition)
    c.llm.path, c.prefix.backbone = "google/t5-large-lm-adapt", "google/t5-small-lm-adapt"
    c.llm.dtype = c.prefix.dtype = "float32"
    c.llm.weights = "full"
    c.experiment.pretrain_steps, c.experiment.pretrain_batch_size = 5_000, 64
    return c
