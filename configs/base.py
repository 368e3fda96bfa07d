"""Every knob of MEND-JAX, with its default: the paper's settings (Table 5) for gpt2-large.

A variant imports this and changes only what differs. Override on the command line, for every command alike:

    python -m mend_jax.train --config=configs/base.py --workdir=runs/mend --config.optimizer.learning_rate=1e-5

As it stands it computes in float32; configs/gpt2_large.py is the paper's run.

Hardware: a device of 24 GB or more, or several.
Time: not measured here.
Expected: as configs/gpt2_large.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.stage = "finetune"  # "pretrain": plain text; "finetune": tasks; "lm": an ordinary LM, all weights trained
    c.seed = 0  # data, initial values: everything random is a function of (seed, step)

    c.llm = llm = ConfigDict()
    llm.path = "gpt2-large"  # Hugging Face folder, hub name, GGUF file ("model.gguf") or packaged model ("smollm2-135m-instruct"); with stage="lm" a folder with config.json alone starts from random weights
    llm.dtype = "float32"  # of the frozen weights and of the LLM's arithmetic: "float32" or "bfloat16"
    llm.weights = "full"  # "full": the frozen weights in llm.dtype; "int8": 8 bits with a scale per output channel, arithmetic in llm.dtype
    llm.attention = "xla"  # "xla" everywhere; "cudnn" (flash attention) on NVIDIA GPUs with dtype "bfloat16"
    llm.layers = 0  # stage "lm": start from the first layers of llm.path alone, as DistilGPT-2 from GPT-2, or from it with new layers on top; 0 is all it has
    llm.remat = False  # recompute each layer's activations in the backward pass: less memory, 11 to 17% more FLOPs with prefix.remat (docs/scaling.md)

    c.prefix = prefix = ConfigDict()
    prefix.kind = "distiller"  # "distiller" (MEND, HyperTuning), "soft_prompt" (PromptTuning), or "chunked": a distiller that reads any number of demonstrations, chunk by chunk
    prefix.length = 100  # l, the number of vectors (kind "chunked": of each chunk)
    prefix.nested = ()  # shorter lengths that a distiller is trained with as well: of each row the LLM reads the first so many vectors, a number drawn from these and prefix.length; in use any of them can be chosen
    prefix.backbone = "gpt2"  # the distiller starts from this model, named as llm.path; its tokenizer may differ from the LLM's
    prefix.layers = 0  # of the backbone: its first so many layers alone; 0: all
    prefix.train_embeddings = True  # False: the backbone's token embeddings stay as they are, and out of checkpoints, optimiser and, where they are the LLM's own, exports
    prefix.placeholder_init = "vocabulary"  # random rows of the token embedding, or "normal" (std 0.02); a soft prompt too
    prefix.projection = "auto"  # to the LLM's width: "tanh" (Linear, tanh), "linear", "identity"; "auto": "tanh" where widths differ, else "identity"; with prefix.residual "linear" begins at zero, and learns faster than "identity" (docs/running.md)
    prefix.residual = False  # add the distiller's vectors to the LLM's embeddings of the last l tokens that it reads (kind "chunked": of each chunk), so that training begins with in-context learning cut to these; for a backbone that is the LLM, with train_embeddings=False
    prefix.rms = -1.0  # root mean square of the first vectors; -1: that of the LLM's token embeddings, measured when a run begins and kept in its config.json (with prefix.residual a tenth of it is added to them, or, with a linear projection, which begins at zero, the states that it reads have it); 0: as backbone and projection give them
    prefix.dtype = "float32"  # of the distiller's arithmetic; its parameters are always float32
    prefix.remat = False  # as llm.remat, for the distiller
    prefix.join = "concat"  # kind "chunked": the chunks' vectors one after another, or their "mean"
    prefix.chunk_demos = 16  # demonstrations of a chunk, at most
    prefix.chunk_tokens = 0  # tokens of a chunk, at most; 0: data.max_demo_tokens, which is also that of a context in training
    prefix.chunks = 4  # chunks of a context in training, at most; an evaluation has as many as the LLM's window holds
    prefix.start_from = ""  # begin with an earlier training: its workdir, an exported folder, or a name that load_prefix knows; "": the backbone

    c.loss = loss = ConfigDict()
    loss.kd = 1.0  # weight of L_distill: lambda in finetuning, gamma in pretraining with L_CLM
    loss.objective = "forward_kl"  # L_distill: "forward_kl" (the paper's), "reverse_kl", "mixed_kl", "jensen_shannon", "skewed_kl", "top_k_kl"; of the LLM's states "hidden_mse", "hidden_cosine", "info_nce" (which contrasts with the teacher states of the queries of one device and accumulation step)
    loss.kd_tokens = "all"  # L_distill in finetuning: of the predictions at every token of the query (as in the release), or of its "outputs" alone, which are what is scored; in pretraining always all
    loss.temperature = 1.0  # logits are divided by it; of info_nce the cosines
    loss.mix = 0.5  # mixed_kl: share of the reverse KL; jensen_shannon (beta), skewed_kl (alpha): share of the teacher in the mixture
    loss.top_k = 64  # top_k_kl: the teacher's likeliest words that are compared
    loss.pred = 1.0  # weight of L_pred: finetuning only
    loss.clm = 0.0  # weight of L_CLM: pretraining only (and 1 in stage "lm")
    loss.clm_tokens = "all"  # stage "lm": the tokens that are predicted; "outputs": of an in-context sequence its outputs alone, as MetaICL trains
    loss.teacher_cache = ""  # a folder that keeps the teacher's predictions: a rerun of the same batches computes no teacher pass; "" keeps none
    loss.teacher_top_k = 128  # teacher_cache: the likeliest words that are kept of each prediction; the mass of the rest is logged as teacher_lost
    loss.chunk = 256  # tokens whose (tokens, vocabulary) logits exist at one time

    c.data = data = ConfigDict()
    data.text = ""  # C4: a folder of AllenAI's *.json.gz, or a prepared tfds c4/en directory
    data.tasks = ""  # MetaICL: the folder that holds data/<task>/<task>_<k>_<seed>_<split>.jsonl
    data.partition = "class_to_class"  # one of MetaICL's seven settings, or one of <tasks>/partitions.json
    data.cache = "~/.cache/mend_jax"  # prepared tokens are kept here, keyed by tokenizer and source
    data.template = "space"  # the texts around every input and output (docs/protocol.md): "space", "newline" (Table 7), "qa" ("Input: x", "Output: y"), "question" ("Question: x", "Answer: y")
    data.bos = "false"  # whether the LLM's BOS token stands before every prefix: "true", "false", or "auto", as its tokenizer does before a text (docs/protocol.md); Gemma needs it
    data.k = 16  # demonstrations per context
    data.queries = 1  # finetuning: queries of one task that share a context; the context is read once for all (the paper has 1)
    data.symbols = 0.0  # symbol tuning: the share of contexts (stage "lm": of in-context sequences) that have random words in the place of their task's labels, which only the demonstrations then tell (docs/protocol.md)
    data.beta = 0.8  # pretraining: share of a text that is distilled; the rest is continued
    data.max_text_tokens = 1024  # pretraining: a text is cut here
    data.max_demo_tokens = 900  # a context's budget, in the tokens of either model; examples that do not fit are left out
    data.max_input_tokens = 256  # an input x is cut here; an output y never
    data.release_truncation = False  # the public release's budgets too: distiller < 643 tokens, teacher < 767, last example cut
    data.demo_buckets = (256, 384, 512, 640, 768, 900)  # padded lengths of the contexts; the last covers the budget
    data.query_buckets = (32, 64, 128, 272, 512)  # padded lengths of the queries
    data.bucket_window = 64  # batches drawn together and sorted by length, so that little is padding
    data.text_share = 0.0  # stage "lm": share of each batch that is plain text; the rest are in-context sequences
    data.sequence_length = 256  # stage "lm": tokens per sequence
    data.validation_items = 256  # held-out texts that the validation loss is measured on (pretraining, lm); dev items that `recovered` is (finetuning); rounded to whole batches
    data.validation_seeds = ()  # the seeds whose demonstrations and dev items a validation in training reads; () is evaluate.seeds
    data.processes = 2  # of `prepare`
    data.prefetch = 8  # batches held ready ahead of the device

    c.optimizer = optimizer = ConfigDict()  # AdamW
    optimizer.learning_rate = 5e-5  # decays linearly to 0 over train.steps
    optimizer.warmup_steps = 0
    optimizer.weight_decay = 0.0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.clip = 1.0  # global gradient norm

    c.train = train = ConfigDict()
    train.steps = 30_000
    train.batch_size = 8  # sequences a step, over all devices and accumulation steps together
    train.accumulate = 1  # gradient accumulation: the batch is computed in so many parts
    train.parallel = "pmap"  # "pmap": data parallel; "mesh": weights split too, as the section `mesh` says
    train.log_every = 10  # steps between lines in metrics.jsonl
    train.eval_every = 2_000  # steps between evaluations on the validation data
    train.save_every = 500  # steps between checkpoints; the newest two and the best are kept
    train.patience = 5  # evaluations without a better score before training stops

    c.mesh = mesh = ConfigDict()  # with train.parallel="mesh": devices along each axis, their product is all; -1 is the rest
    mesh.data = 1  # splits the batch; the weights are whole on each
    mesh.fsdp = -1  # splits the batch and every weight, which is gathered when it is needed
    mesh.tensor = 1  # splits the products by heads: for fast links, such as those within one machine

    c.evaluate = evaluate = ConfigDict()
    evaluate.methods = ("zero_shot", "icl")  # and "NAME=PATH", PATH a training workdir or exported distiller; NAME is printed; "NAME=chunked:PATH" reads in chunks, "NAME=first8:PATH" makes the first 8 vectors (prefix.nested); "NAME=last96:icl" is ICL cut to the last 96 tokens, "NAME=last6each:icl" to the last 6 of each demonstration
    evaluate.split = "test"  # "test" or "dev"
    evaluate.seeds = (13, 21, 42, 87, 100)  # each names a file of K demonstrations per task
    evaluate.tasks = ()  # some of the partition's test tasks, of a validation in finetuning too; () is all
    evaluate.limit = 0  # test items, or dev items of a validation in finetuning, per task and seed; 0 is all
    evaluate.batch_size = 32  # rows in one pass of the LLM; a row holds one test item with all its options, or several short ones
    evaluate.parallel = "auto"  # "tasks": processes share the tasks, models are whole on one device of each; "mesh": all compute each task, models split; "auto": "mesh" where train.parallel is
    evaluate.option_score = "mean"  # an option's log-probability per token (MetaICL's), or its "sum", the probability of the whole option (docs/protocol.md)
    evaluate.shuffle_demos = False  # the release's fresh order of demonstrations for every test item
    # What `evaluate` shows instead of the files' demonstrations (docs/experiments.md); of them validation in training follows evaluate.demos="pool" alone.
    evaluate.demos = "file"  # "file": the seed's; "pool": these, then ones drawn from the task's training pool; from the pool for each item "random", "bm25" (shared words), "dense" (near embeddings)
    evaluate.encoder = ""  # demos "dense": a sentence encoder, or a model whose mean last states are the embeddings, named as llm.path; "" is the LLM itself
    evaluate.perturb = "none"  # "no_label", "no_input", "random_label", "wrong_label" (Table 3), "adversarial" (labels exchanged), "typos", "irrelevant" (of other tasks)
    evaluate.perturb_share = 1.0  # the share of the demonstrations that is perturbed
    evaluate.order = 0  # the n-th of the seed's orders of the demonstrations; 0 is the file's

    c.experiment = experiment = ConfigDict()  # python -m mend_jax.experiments.NAME: train and evaluate (docs/experiments.md)
    # Each run of it sets stage, train.steps, prefix.start_from, loss.pred, loss.clm itself, mostly loss.kd too, and PromptTuning prefix.kind.
    experiment.methods = ("zero_shot", "prompt_tuning", "icl", "hypertuning", "mend")
    experiment.pretrain_steps = 30_000  # train.steps of every pretraining
    experiment.finetune_steps = 30_000  # and of every finetuning
    experiment.pretrain_batch_size = 0  # train.batch_size of every pretraining; 0: as in finetuning
    experiment.first_seeds = 0  # methods: validate and evaluate with the first so many of evaluate.seeds alone; the files of all are read and checked first. 0: all
    experiment.prompt_tuning_learning_rate = 0.0  # of PromptTuning, whose few vectors need larger steps than a distiller's weights; 0: optimizer.learning_rate
    # The rest is of all experiments but `methods`.
    experiment.training_seeds = (0, 1, 2)  # config.seed of the trainings of what is trained: as many of each
    experiment.trained = ()  # "METHOD=WORKDIR": use what was trained there, of several of one METHOD each as a training of it; "pretraining=WORKDIR": begin MEND's finetunings with it
    experiment.partitions = ()  # main_table, ablations: their settings; () is data.partition alone
    experiment.num_demonstrations = (1, 2, 4, 8, 16, 32, 64)  # num_demonstrations: K; those beyond data.k are drawn from the tasks' pools
    experiment.num_vectors = (1, 10, 50, 100, 200)  # num_vectors: l
    experiment.many_demonstrations = (16, 32, 64, 256, 1024)  # many_demonstrations: K; those that the files lack are drawn from the tasks' pools
    experiment.betas = (0.1, 0.5, 0.8, 0.9)  # hyperparameters: data.beta
    experiment.gammas = (0.01, 0.1, 1.0, 10.0)  # weight of L_distill beside L_CLM in pretraining; 0 is added to them
    experiment.lambdas = (0.01, 0.1, 1.0, 10.0)  # weight of L_distill in finetuning
    experiment.templates = ("space", "newline")  # templates: each is trained with, and tested with
    experiment.orders = 10  # order: of the same demonstrations
    experiment.domains = "domains"  # domains: a folder of MetaICL's files with a partition "domains"; "domains": generated ones, "small_world_domains": in the small world's words
    experiment.shares = (0.25, 0.5, 1.0)  # domains: shares of demonstrations that are perturbed
    experiment.cost_llms = ("gpt2-large", "gpt2-xl")  # cost: sizes beside the config's own LLM, with random weights; () is none
    experiment.cost_rows = (1, 8)  # and the numbers of queries to a pass
    experiment.cost_repeats = 3  # and the timed runs of each program; 0: no time is measured
    experiment.attention_sequences = 10  # attention: random sequences that are read twice, to find induction heads
    experiment.attention_length = 500  # and their tokens, or half the LLM's window
    experiment.attention_items = 16  # and the test items, of as many tasks as there are, before whose answers attention is shown
    return c
