"""The T5 family in training, evaluation, export and cost figures, on small random weights.

Axes: B batch, N demonstration tokens, L vectors, Q query tokens, X tokens of x, Y tokens of y.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import save_tokenizer
from data_files import make_world
from data_files import tiny_config as data_config
from facts import says
from test_t5 import COMMON, V1, V11, tokens, torch_model
from tiny_training import config as tiny_config
from tiny_training import write_tokenizer
from transformers import AutoTokenizer

from mend_jax.data.batches import Batch, make_batches
from mend_jax.data.evaluation import EvalTask, Item
from mend_jax.data.query import Query
from mend_jax.data.readers import Readers
from mend_jax.interchange.trained import read_distiller
from mend_jax.llm.decoder_only import load_llm
from mend_jax.losses import token_weights
from mend_jax.models.encoder_decoder import decode, encode
from mend_jax.prefixes import Demonstrations, Nothing, kind_of
from mend_jax.prefixes.context import bucket
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.distiller_folder import write_folder
from mend_jax.prefixes.prefix import Prefix
from mend_jax.prefixes.soft_prompt import SoftPrompt
from mend_jax.run.checks import check_config
from mend_jax.scoring import costs
from mend_jax.scoring.each import cache_prefixes, pass_size, score_each
from mend_jax.scoring.options import cache_prefix, score_items, score_options
from mend_jax.scoring.tasks import Method, evaluate_task, prefix_maker
from mend_jax.step import init_state, make_loss_fn, make_optimizer, make_train_step, training_losses

pytestmark = pytest.mark.slow

PAIRS = {  # the LLM, its distiller's backbone
    # v1.1: a wider and deeper LLM (a projection), heads that together are wider or narrower than the states, a head of its own
    "flan-t5-base to flan-t5-xl": (
        V11 | {"d_model": 32, "num_layers": 3, "num_decoder_layers": 3, "d_kv": 12, "num_heads": 4},
        V11,
    ),
    "t5-small to t5-small": (V1, V1),  # the first T5: a tied head, states scaled, no gate, vectors as they are
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory):
    """An LLM and the folder of its distiller's backbone."""
    folders, models = [], []
    for part, fields in zip(("llm", "backbone"), PAIRS[request.param], strict=True):
        folders.append(tmp_path_factory.mktemp(part))
        models.append(torch_model(fields))
        models[-1].save_pretrained(folders[-1])
        write_tokenizer(folders[-1], [f"w{i}" for i in range(COMMON["vocab_size"])])
    return SimpleNamespace(
        name=request.param, llm=load_llm(folders[0]), folder=folders[0], backbone=folders[1], torch=models[0]
    )


def settings(pair, **fields):
    c = tiny_config(pair.folder, **{"loss.chunk": 16, **fields})
    c.prefix.backbone = str(pair.backbone)
    return c


def batch(stage, B=4, N=12, Q=10):
    lengths = np.array([10, 6, 8, 9])
    start = np.array([3, 2, 5, 8]) if stage == "finetune" else np.zeros(B)
    query = Query(tokens(B, Q), lengths.astype(np.int32), start.astype(np.int32), 8 if stage == "finetune" else 0)
    return Batch(tokens(B, N), np.array([12, 5, 7, 9], np.int32), query, None)


METHODS = {  # stage, what is trained, L_distill, L_pred, L_CLM
    "MEND pretrains": ("pretrain", "distiller", 1.0, 1.0, 0.0),
    "HyperTuning pretrains": ("pretrain", "distiller", 0.0, 1.0, 1.0),
    "MEND finetunes": ("finetune", "distiller", 1.0, 1.0, 0.0),
    "HyperTuning finetunes": ("finetune", "distiller", 0.0, 1.0, 0.0),
    "PromptTuning": ("finetune", "soft_prompt", 0.0, 1.0, 0.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(pair, method):
    if pair.name != "flan-t5-base to flan-t5-xl" and not method.startswith("MEND"):
        pytest.skip("the methods differ in their losses alone: one pair shows it")
    stage, kind, *loss = METHODS[method]
    names = zip(("loss.kd", "loss.pred", "loss.clm"), loss, strict=True)
    c = settings(pair, **{"stage": stage, "prefix.kind": kind, "optimizer.learning_rate": 3e-3, **dict(names)})
    model = kind_of(c).init(c, pair.llm, 0)
    optimizer = make_optimizer(c)
    step = jax.jit(make_train_step(c, make_loss_fn(c, pair.llm, model), optimizer))
    state, rows, losses = init_state(model.params, optimizer), batch(stage), []
    for _ in range(6):
        state, metrics = step(state, pair.llm.params, rows)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and np.all(np.isfinite(losses))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), model.params, state.params)
    assert all(jax.tree.leaves(moved)), moved
    counted = {name for name in ("kd", "pred", "clm") if metrics[name] != 0}
    wanted = {"kd": loss[0], "pred": loss[1] * (stage == "finetune"), "clm": loss[2]}
    assert counted == {name for name, weight in wanted.items() if weight}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_queries_say_how_many_columns_x_and_y_have(tmp_path, stage):
    """One size for all processes; no row is longer."""
    folder = tmp_path / "tokenizer"
    save_tokenizer(folder)
    tokenizer, c = AutoTokenizer.from_pretrained(folder), data_config(make_world(tmp_path / "world"), stage)
    parts = [
        make_batches(c, Readers(tokenizer, 2**30, 2**30, separate_targets=True), "train", (i, 2)) for i in range(2)
    ]
    sizes = set()
    for step in range(8):
        queries = [part[step].query for part in parts]
        [size] = {(query.input_columns, query.target_columns) for query in queries}
        for query in queries:
            targets = query.length - query.target_start
            assert targets.max() <= size[1] <= query.tokens.shape[1] and query.target_start.max() <= size[0]
        sizes.add(size)
    assert {columns for columns, _ in sizes} == ({0} if stage == "pretrain" else {c.data.max_input_tokens})


def test_the_losses_cover_what_the_decoder_says():
    query = Query(jnp.asarray([[5, 6, 7, 0], [8, 0, 0, 0]]), jnp.asarray([3, 1]), jnp.zeros(2, jnp.int32))
    targets, weights = token_weights(query, shift=0)
    np.testing.assert_array_equal(targets, query.tokens)
    for loss in weights:
        np.testing.assert_allclose(loss, [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0]])


def test_the_losses_are_those_of_pytorch(pair):
    torch = pytest.importorskip("torch")
    distiller = Distiller.init(settings(pair), pair.llm, 0)
    demos, x, y = tokens(9).tolist(), [5, 6, 7, 8], [9, 10, 11]
    ours, labels = training_losses(pair.llm, distiller, demos, x, y), torch.tensor([y])
    embed = pair.torch.get_input_embeddings()
    with torch.no_grad():
        vectors = torch.from_numpy(np.array(distiller.distill(demos).embeds))
        read = torch.cat([vectors, embed(torch.tensor([x]))], 1)
        student = torch.log_softmax(pair.torch(inputs_embeds=read, labels=labels).logits[0].double(), -1)
        teacher = torch.log_softmax(pair.torch(torch.tensor([demos + x]), labels=labels).logits[0].double(), -1)
    ce = -student[torch.arange(3), labels[0]].mean().item()
    kd = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
    np.testing.assert_allclose([ours["kd"], ours["pred"], ours["clm"]], [kd, ce, ce], rtol=1e-4)


def items(count):
    rng = np.random.default_rng(0)
    row = lambda longest: rng.integers(1, 40, rng.integers(1, longest + 1)).astype(np.int32)  # noqa: E731
    return [Item(row(30), [row(6) for _ in range(2 + i % 3)], tuple("abcd"[: 2 + i % 3]), 0) for i in range(count)]


def test_items_scored_together_are_those_scored_one_by_one(pair):
    prefix = Prefix(np.random.randn(1, 24, pair.llm.config.width).astype(np.float32), np.array([19]))
    together = score_items(pair.llm, cache_prefix(pair.llm, prefix), items(7), batch_size=4)
    for item, scores in zip(items(7), together, strict=True):
        alone = score_options(pair.llm, prefix, item.x_tokens, item.options_tokens)
        np.testing.assert_allclose(scores, alone, atol=1e-4)


@pytest.mark.parametrize("pair", ["t5-small to t5-small"], indirect=True)
def test_items_with_a_prefix_each_are_those_scored_one_by_one(pair):
    """Prefixes of several lengths; the last one, which no item follows, fills the batch."""
    llm, asked = pair.llm, items(2)
    prefix = Prefix(np.random.randn(3, 24, llm.config.width).astype(np.float32), np.array([19, 7, 24]))
    each = score_each(llm, cache_prefixes(llm, prefix), asked, pass_size(llm, asked))
    own = Prefix(prefix.embeds[1:2], prefix.length[1:2])
    np.testing.assert_allclose(each[1], score_options(llm, own, asked[1].x_tokens, asked[1].options_tokens), atol=1e-4)


def test_every_method_is_evaluated(pair):
    c = settings(pair, **{"data.demo_buckets": (16, 64)})  # a budget of 16 tokens: two demonstrations fit
    demos = [(tokens(4), tokens(2)) for _ in range(3)]
    task, models = (
        EvalTask("tiny", 13, demos, items(5), True),
        [Nothing.beside(pair.llm), Demonstrations.beside(pair.llm)],
    )
    models += [make(c, pair.llm, 0) for make in (Distiller.init, SoftPrompt.init)]
    scores = {}
    for name, model in zip(("zero_shot", "icl", "mend", "prompt_tuning"), models, strict=True):
        result = evaluate_task(pair.llm, prefix_maker(c, pair.llm, Method(name, model)), task, batch_size=4)
        scores[name] = [value for line in result.lines for value in line["scores"]]
        length = {"zero_shot": 0, "icl": 12, "mend": 4, "prompt_tuning": 4}[name]
        assert len(result.lines) == 5 and result.cost["prefix_length"] == length
    for one, other in (("zero_shot", "icl"), ("icl", "mend"), ("mend", "prompt_tuning")):
        assert not np.allclose(scores[one], scores[other])


def test_an_exported_distiller_reads_alike_here_and_in_pytorch(pair, tmp_path):
    torch = pytest.importorskip("torch")
    from mend_jax.prefixes.mend_distiller import MendDistiller

    distiller = Distiller.init(settings(pair), pair.llm, 0)
    write_folder(distiller, tmp_path)
    again, theirs = read_distiller(tmp_path), MendDistiller.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, again.params, distiller.params)
    assert again.module == distiller.module
    rows = [tokens(12).tolist(), tokens(5).tolist()]
    np.testing.assert_allclose(theirs.distill(rows).numpy(), distiller.distill(rows).embeds, atol=1e-4)
    assert isinstance(theirs.backbone, torch.nn.Module) and not hasattr(theirs.backbone, "decoder")


def test_the_cost_formulas_count_the_products(pair):
    llm, config, P, X, options = pair.llm, pair.llm.config, 12, 16, [3, 2, 1]
    params, T = llm.params, sum(options)
    cache = llm.prefix_cache(params, Prefix(jnp.zeros((1, P, config.width)), jnp.asarray([P])))

    def score(inputs, row):
        states = llm.cached_states(params, cache, inputs, jnp.full(1, X), row, row)
        return llm.logits(params, states)

    ids = jnp.zeros((1, X), jnp.int32), jnp.zeros((1, T), jnp.int32)
    assert costs.count_products(score, *ids) == costs.score_cached(config, P, X, options)
    assert costs.read_prefix(config, P) == 0
    assert costs.cache_bytes(config, P, 4) == cache.embeds.nbytes

    def reread(inputs, targets):
        encoded = encode(config, params, llm.embed(params, inputs), jnp.full(1, P + X))
        return llm.logits(params, decode(config, params, llm.embed(params, targets), encoded, jnp.full(1, P + X)))

    ids = [(jnp.zeros((1, P + X), jnp.int32), jnp.zeros((1, n), jnp.int32)) for n in options]
    counted = sum(costs.count_products(reread, *one) for one in ids)
    assert counted == costs.score_rereading(config, P, X, options)


def test_the_cost_of_a_step_counts_its_products(pair):
    """But for the head's, which is under a while loop, and what is computed twice: attention's scores."""
    c = settings(pair, stage="finetune")
    N, L, Q = bucket(16), c.prefix.length, 16
    distiller = Distiller.init(c, pair.llm, 0)
    query = Query(tokens(1, Q), np.array([Q], np.int32), np.array([0], np.int32), 0)  # x is empty: Y is Q
    rows = Batch(tokens(1, N), np.array([N], np.int32), query, None)
    loss_fn = make_loss_fn(c, pair.llm, distiller)
    count = costs.count_products(loss_fn, distiller.params, pair.llm.params, rows, while_trips=1)
    own, llm = costs.reading(distiller.config, N + L).forward, pair.llm.config
    student, teacher = (costs.query_reading(llm, before, Q, Q).forward for before in (L, N))
    projection = costs.projection(distiller.config.width, llm.width, L)
    assert count == own + projection + student + teacher + 2 * costs.head(llm, Q)
    parts = costs.step(llm, distiller.config, 1, N, Q, L, targets=Q)
    assert parts["teacher"] == teacher and parts["head"] == 3 * costs.head(llm, Q)
    assert parts["total"] == sum(flops for name, flops in parts.items() if name != "total")


def test_what_t5_cannot_do_is_said(pair):
    c = settings(pair, stage="lm")
    with says('"lm"', "decoder-only", "llm.path"):
        check_config(c)
    with says("empty"):
        distiller = Distiller.init(c, pair.llm, 0)
        training_losses(pair.llm, distiller, [1, 2], [], [3])


def test_the_real_tokenizer_joins_texts_as_the_data_does(shared):
    from mend_jax.models.folders import load_tokenizer

    tokenizer = load_tokenizer(shared / "tokenizers" / "t5")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    x, y = " what a great film", " positive"
    assert ids(x) + ids(y) == ids(x + y) and tokenizer.eos_token_id not in ids(x)
    assert ids("\npositive") == ids(y)  # white space is all one to it: the templates give the same tokens
