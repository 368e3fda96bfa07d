"""opt-6.7b as the LLM, opt-125m as the distiller's backbone, all else as configs/gpt2_large.py.

    python -m mend_jax.experiments.methods --config=configs/opt_6_7b.py:class_to_class --workdir=runs/opt_6_7b \\
        --config.data.text=C4 --config.data.tasks=METAICL

The paper gives no hyperparameters for this LLM: those of its gpt2-large are used. The hub has these weights as .bin, which
needs PyTorch: pip install torch.

Hardware: the paper's: 8 devices of 24 GB with a sequence each, half precision, the LLM in 8 bits.
Time: not measured here.
Expected (Table 6, class_to_class): PromptTuning 38.81, Vanilla ICL 42.38, HyperTuning 32.67, MEND 44.27.
"""

from configs import gpt2_large


def get_config(partition: str = "class_to_class"):
    c = gpt2_large.get_config(partition)
    c.llm.path, c.prefix.backbone = "facebook/opt-6.7b", "facebook/opt-125m"
    return c
