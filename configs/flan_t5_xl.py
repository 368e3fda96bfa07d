"""flan-t5-xl as the LLM, flan-t5-base as the distiller's backbone, all else as configs/t5_large.py.

    python -m mend_jax.experiments.methods --config=configs/flan_t5_xl.py:class_to_class --workdir=runs/flan_t5_xl \\
        --config.data.text=C4 --config.data.tasks=METAICL

The paper gives no hyperparameters for this LLM: those of its T5 are used.

Hardware: the paper's: 8 devices of 24 GB, with both models split over them: with whole models on each, 8 sequences of
pretraining in float32 would need more (docs/scaling.md).
Time: not measured here.
Expected (Table 6, class_to_class): PromptTuning 33.24, Vanilla ICL 40.63, HyperTuning 39.70, MEND 40.77.
"""

from configs import t5_large


def get_config(partition: str = "class_to_class"):
    c = t5_large.get_config(partition)
    c.llm.path, c.prefix.backbone = "google/flan-t5-xl", "google/flan-t5-base"
    c.train.parallel = "mesh"  # fsdp over all devices
    return c
