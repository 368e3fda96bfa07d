"""Every setting of MEND-JAX, with its default: the paper's settings (Table 5) for gpt2-large.

A variant imports this and changes only what differs. Any field can be overridden on the command line of every command:

    python -m mend_jax.train --config=configs/base.py --workdir=runs/mend --config.optimizer.learning_rate=1e-5

It computes in float32; configs/gpt2_large.py is the paper's run.

Hardware: one or more devices with 24 GB or more.
Time: not measured here.
Expected: as configs/gpt2_large.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.stage = "finetune"  # "pretrain": plain text; "finetune": tasks; "lm": an ordinary LM, all weights trained
    c.seed = 0  # everything random (data, initial values) is a function of (seed, step)

    c.llm = llm = ConfigDict()
    llm.path = "gpt2-large"  # Hugging Face folder or hub name; in stage "lm" a folder with only a config.json starts from random weights
    llm.dtype = "float32"  # of the frozen weights and of the LLM's arithmetic: "float32" or "bfloat16"
    llm.weights = "full"  # "full": the frozen weights in llm.dtype; "int8": 8 bits with a scale per output channel, arithmetic in llm.dtype
    llm.attention = "xla"  # "xla" everywhere; "cudnn" (flash attention) on NVIDIA GPUs with dtype "bfloat16"
    llm.layers = 0  # stage "lm": start with this many layers: the first of llm.path (as DistilGPT-2 from GPT-2), or all and new ones on top; 0: all
    llm.remat = False  # recompute each layer's activations in the backward pass: less memory, 11 to 17% more FLOPs with prefix.remat (docs/scaling.md)

    c.prefix = prefix = ConfigDict()
    prefix.kind = "distiller"  # "distiller" (MEND, HyperTuning), "soft_prompt" (PromptTuning), or "chunked": a distiller that reads any number of demonstrations, chunk by chunk
    prefix.length = 100  # l, the number of vectors
    prefix.backbone = "gpt2"  # the distiller starts from this Hugging Face folder or hub name; its tokenizer may differ from the LLM's
    prefix.placeholder_init = (
        "vocabulary"  # random rows of the token embedding, or "normal" (std 0.02); a soft prompt too
    )
    prefix.projection = "auto"  # to the LLM's width: "tanh" (Linear, tanh), "linear", "identity"; "auto": "tanh" where widths differ, else "identity"
    prefix.dtype = "float32"  # of the distiller's arithmetic; its parameters are always float32
    prefix.remat = False  # as llm.remat, for the distiller
    prefix.join = "concat"  # kind "chunked": the chunks' vectors one after another, or their "mean"
    prefix.chunk_demos = 16  # demonstrations in a chunk, at most; a chunk also holds at most data.max_demo_tokens
    prefix.chunks = 4  # chunks in a training context, at most; an evaluation has as many as the LLM's window holds
    prefix.start_from = (
        ""  # workdir of an earlier stage, to start from its best checkpoint; "": start from the backbone
    )

    c.loss = loss = ConfigDict()
    loss.kd = 1.0  # weight of L_distill: lambda in finetuning, gamma in pretraining with L_CLM
    loss.objective = "forward_kl"  # L_distill: "forward_kl" (the paper's), "reverse_kl", "mixed_kl", "jensen_shannon", "skewed_kl", "top_k_kl"; on the LLM's states "hidden_mse", "hidden_cosine", "info_nce"
    loss.temperature = 1.0  # divides the logits, or the cosines of info_nce
    loss.mix = 0.5  # mixed_kl: share of the reverse KL; jensen_shannon (beta), skewed_kl (alpha): share of the teacher in the mixture
    loss.top_k = 64  # top_k_kl: how many of the teacher's most likely tokens are compared
    loss.pred = 1.0  # weight of L_pred: finetuning only
    loss.clm = 0.0  # weight of L_CLM: pretraining only (and 1 in stage "lm")
    loss.chunk = 256  # tokens whose (tokens, vocabulary) logits exist at one time

    c.data = data = ConfigDict()
    data.text = ""  # C4: a folder of AllenAI's *.json.gz, or a prepared tfds c4/en directory
    data.tasks = ""  # MetaICL: the folder that holds data/<task>/<task>_<k>_<seed>_<split>.jsonl
    data.partition = "class_to_class"  # one of MetaICL's seven settings, or one of <tasks>/partitions.json
    data.cache = "~/.cache/mend_jax"  # tokenised data are kept here, keyed by tokenizer and source
    data.template = "space"  # separates inputs, outputs and examples: "space" or "newline" (Table 7)
    data.k = 16  # demonstrations per context
    data.queries = (
        1  # finetuning: queries of one task that share a context, which is read once for all of them (the paper has 1)
    )
    data.beta = 0.8  # pretraining: share of a text that is distilled; the rest is the continuation
    data.max_text_tokens = 1024  # pretraining: a text is cut here
    data.max_demo_tokens = (
        900  # a context's budget, in the tokens of either model; examples that do not fit are left out
    )
    data.max_input_tokens = 256  # an input x is cut here; an output y never
    data.release_truncation = (
        False  # the public release's budgets instead: distiller < 643 tokens, teacher < 767, last example cut
    )
    data.demo_buckets = (256, 384, 512, 640, 768, 900)  # padded lengths of the contexts; the last covers the budget
    data.query_buckets = (32, 64, 128, 272, 512)  # padded lengths of the queries
    data.bucket_window = 64  # batches drawn together and sorted by length, which saves padding
    data.text_share = 0.0  # stage "lm": share of each batch that is plain text; the rest are in-context sequences
    data.sequence_length = 256  # stage "lm": tokens per sequence
    data.validation_items = 256  # held-out texts (pretraining, lm) that the validation loss is measured on
    data.processes = 2  # worker processes of `prepare`
    data.prefetch = 8  # batches prepared ahead of the device

    c.optimizer = optimizer = ConfigDict()  # AdamW
    optimizer.learning_rate = 5e-5  # decays linearly to 0 over train.steps
    optimizer.warmup_steps = 0
    optimizer.weight_decay = 0.0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.clip = 1.0  # global gradient norm

    c.train = train = ConfigDict()
    train.steps = 30_000
    train.batch_size = 8  # sequences per step, over all devices and accumulation steps together
    train.accumulate = 1  # gradient accumulation: the number of parts that a batch is computed in
    train.parallel = "pmap"  # "pmap": data parallel; "mesh": weights are split too, by the section `mesh`
    train.log_every = 10  # steps between lines in metrics.jsonl
    train.eval_every = 2_000  # steps between evaluations on the validation data
    train.save_every = 500  # steps between checkpoints; the newest two and the best are kept
    train.patience = 5  # evaluations without a better score before training stops

    c.mesh = mesh = (
        ConfigDict()
    )  # for train.parallel="mesh": devices along each axis; their product is all devices, and -1 is the rest
    mesh.data = 1  # splits the batch; each device has whole weights
    mesh.fsdp = -1  # splits the batch and every weight, which is gathered when needed
    mesh.tensor = 1  # splits the products by heads: for fast links, such as those within one machine

    c.evaluate = evaluate = ConfigDict()
    evaluate.methods = (
        "zero_shot",
        "icl",
    )  # and "NAME=PATH", PATH a training workdir or exported distiller; NAME is printed; "NAME=chunked:PATH" reads in chunks
    evaluate.split = "test"  # "test" or "dev"
    evaluate.seeds = (13, 21, 42, 87, 100)  # each names a file of K demonstrations per task
    evaluate.tasks = ()  # some of the partition's test tasks; () means all
    evaluate.limit = 0  # test items per task and seed; 0 means all
    evaluate.batch_size = (
        32  # rows in one pass of the LLM; a row holds one test item with all its options, or several short ones
    )
    evaluate.parallel = "auto"  # "tasks": processes share the tasks, each with whole models on one device; "mesh": all compute each task, models are split; "auto": "mesh" if train.parallel is
    evaluate.shuffle_demos = False  # a new order of the demonstrations for every test item, as in the release

    c.experiment = experiment = (
        ConfigDict()
    )  # python -m mend_jax.experiments.methods: train and evaluate several methods
    # It sets stage, train.steps, prefix.kind, prefix.start_from, loss.pred, loss.clm and, mostly, loss.kd of each run itself.
    experiment.methods = ("zero_shot", "prompt_tuning", "icl", "hypertuning", "mend")
    experiment.pretrain_steps = 30_000  # train.steps of every pretraining
    experiment.finetune_steps = 30_000  # and of every finetuning
    experiment.pretrain_batch_size = 0  # train.batch_size of every pretraining; 0: as in finetuning
    return c
