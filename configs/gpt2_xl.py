"""gpt2-xl as the LLM, all else as configs/gpt2_large.py.

    python -m mend_jax.experiments.methods --config=configs/gpt2_xl.py:class_to_class --workdir=runs/gpt2_xl \\
        --config.data.text=C4 --config.data.tasks=METAICL

The paper (Table 2) has for class_to_class: zero-shot 32.08, PromptTuning 37.65, Vanilla ICL 40.63, HyperTuning 40.26,
MEND 42.79. Where memory is short: --config.llm.remat=true.
"""

from configs import gpt2_large


def get_config(partition: str = "class_to_class"):
    c = gpt2_large.get_config(partition)
    c.llm.path = "gpt2-xl"
    return c
