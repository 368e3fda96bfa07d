"""SmolLM2-135M-Instruct with a distiller made of its own first eight layers: MEND for a current LLM, in minutes on one GPU.

    python -m mend_jax.experiments.methods --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m \\
        --config.data.text=C4 --config.data.tasks=METAICL

The LLM comes with a package (docs/data.md). Each stage has one shape of batches: on a fast device compiling another takes
longer than its padding. `launch/accelerator.sh` trains it with as many steps as its minutes allow.

Hardware: a device of 24 GB.
Time: not measured here.
Expected: no number for this LLM is published or was measured here; the table has zero-shot and Vanilla ICL to compare with.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.llm.path = c.prefix.backbone = "smollm2-135m-instruct"
    c.llm.dtype = c.prefix.dtype = "bfloat16"
    c.prefix.layers = 8
    c.prefix.train_embeddings = False
    c.data.queries = 4  # of one task share a context, which the teacher reads once
    c.data.demo_buckets, c.data.query_buckets = (900,), (512,)
    c.data.validation_items = 64
    c.optimizer.learning_rate = 3e-4  # the paper's is 5e-5, for 30,000 steps
    c.optimizer.warmup_steps = 50
    c.train.batch_size = 16
    c.train.eval_every = c.train.save_every = 500
    c.experiment.methods = ("zero_shot", "icl", "mend")
    c.experiment.pretrain_steps = c.experiment.finetune_steps = 1_500
    c.evaluate.tasks = ("emo", "ethos-religion", "wiki_qa")  # () is all of the partition
    c.evaluate.limit = 100
    return c
