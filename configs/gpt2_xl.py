"""gpt2-xl as the LLM, all else as configs/gpt2_large.py.

    python -m mend_jax.experiments.methods --config=configs/gpt2_xl.py:class_to_class --workdir=runs/gpt2_xl \\
        --config.data.text=C4 --config.data.tasks=METAICL

Hardware: the paper's (Table 5): 8 devices of 24 GB with a sequence each, half precision, the LLM in 8 bits. If memory
is short: --config.llm.remat=true.
Time: not measured here.
Expected (Table 2; MEND's spread over five seeds is 0.4 to 2.2):

    partition                     zero-shot  PromptTuning  Vanilla ICL  HyperTuning   MEND
    class_to_class                    32.08         37.65        40.63        40.26  42.79
    non_class_to_class                32.08         38.78        40.63        43.74  43.37
    non_nli_to_nli                    25.54         36.27        37.35        34.61  37.00
    non_qa_to_qa                      46.09         41.45        48.32        40.71  45.95
    qa_to_qa                          46.09         46.95        48.32        47.41  48.07
    hr_to_lr                          33.95         40.83        42.27        41.83  42.16
    non_paraphrase_to_paraphrase      33.61         35.52        37.53        35.72  42.53
"""

from configs import gpt2_large


def get_config(partition: str = "class_to_class"):
    c = gpt2_large.get_config(partition)
    c.llm.path = "gpt2-xl"
    return c
