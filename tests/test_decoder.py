"""The decoder against PyTorch's GPT-2: parity, padding, prefixes, causality, precision.

Axes: B batch, T any sequence, P prefix, Q query tokens, D width, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from facts import says

from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import init_llm, load_llm
from mend_jax.models.decoder import Decoder, init_params
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix, join


@pytest.fixture(scope="module")
def llm(tiny_llm):
    return load_llm(tiny_llm)


def tokens(*shape):
    return np.random.randint(0, 64, shape).astype(np.int32)


def query(ids, length=None, start=0):
    rows = len(ids)
    return Query(ids, np.full(rows, ids.shape[1]) if length is None else np.asarray(length), np.full(rows, start))


# Parity with PyTorch


def test_logits_are_those_of_pytorch(llm, torch_llm):
    torch = pytest.importorskip("torch")
    ids = tokens(3, 96)  # the whole window
    with torch.no_grad():
        theirs = torch_llm(torch.from_numpy(ids).long()).logits.numpy()
    states = llm.states(llm.params, no_prefix(3, 32), query(ids))
    assert np.abs(llm.logits(llm.params, states) - theirs).max() < 1e-4


@pytest.mark.parametrize(
    "sizes", [{"n_inner": 40}, {"n_head": 1, "layer_norm_epsilon": 1e-3}, {"n_layer": 5, "n_embd": 48}]
)
def test_other_sizes_too(sizes, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**({"n_embd": 24, "n_layer": 1, "n_head": 4, "vocab_size": 64} | sizes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    llm, ids = load_llm(tmp_path), tokens(2, 20)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    states = llm.states(llm.params, no_prefix(2, llm.config.width), query(ids))
    assert np.abs(llm.logits(llm.params, states) - theirs).max() < 1e-4


def test_gradient_of_the_input_embeddings_is_that_of_pytorch(llm, torch_llm):
    torch = pytest.importorskip("torch")
    embeds = (0.3 * np.random.randn(2, 40, 32)).astype(np.float32)
    direction = np.random.randn(2, 40, 64).astype(np.float32)
    theirs = torch.from_numpy(embeds).requires_grad_()
    (torch_llm(inputs_embeds=theirs).logits * torch.from_numpy(direction)).sum().backward()

    def value(embeds):
        return (llm.logits(llm.params, llm.model.apply({"params": llm.params}, embeds)) * direction).sum()

    ours = jax.jit(jax.grad(value))(embeds)
    assert np.abs(ours - theirs.grad.numpy()).max() < 1e-4 * np.abs(theirs.grad.numpy()).max()


# Padding, prefixes and causality


def test_a_right_padded_batch_equals_one_by_one(llm):
    lengths, ids = [5, 30, 17, 1], tokens(4, 30)
    together = jax.jit(llm.states)(llm.params, no_prefix(4, 32), query(ids, lengths))
    for row, length in enumerate(lengths):
        alone = llm.states(llm.params, no_prefix(1, 32), query(ids[row : row + 1, :length]))
        assert np.abs(together[row, :length] - alone[0]).max() < 1e-5


def test_a_batch_of_prefixes_of_different_lengths_equals_one_by_one(llm):
    ids, embeds = tokens(3, 8), (0.2 * np.random.randn(3, 12, 32)).astype(np.float32)
    prefix_lengths, lengths = [12, 4, 0], [8, 3, 6]
    prefix = Prefix(jnp.asarray(embeds), jnp.asarray(prefix_lengths))
    together = jax.jit(llm.states)(llm.params, prefix, query(ids, lengths))
    assert together.shape == (3, 8, 32)
    for row, (before, length) in enumerate(zip(prefix_lengths, lengths, strict=True)):
        one = Prefix(jnp.asarray(embeds[row : row + 1, :before]), jnp.asarray([before]))
        alone = llm.states(llm.params, one, query(ids[row : row + 1, :length]))
        assert np.abs(together[row, :length] - alone[0]).max() < 1e-5


def test_join_puts_rows_right_behind_the_prefix():
    prefix = Prefix(jnp.arange(2 * 3 * 1.0).reshape(2, 3, 1) + 1, jnp.asarray([3, 1]))
    embeds, length = join(prefix, jnp.asarray([[[10.0], [11]], [[20], [21]]]), jnp.asarray([2, 1]))
    assert embeds[0, :5, 0].tolist() == [1, 2, 3, 10, 11] and embeds[1, :3, 0].tolist() == [4, 20, 21]
    assert length.tolist() == [5, 2]


def test_padding_changes_nothing(llm):
    ids = tokens(2, 20)
    other = ids.copy()
    other[:, 11:] = tokens(2, 9)
    embeds = np.random.randn(2, 6, 32).astype(np.float32)
    changed = embeds.copy()
    changed[:, 4:] = 1e3
    run = jax.jit(llm.states)
    one = run(llm.params, Prefix(jnp.asarray(embeds), jnp.asarray([4, 4])), query(ids, [11, 11]))
    two = run(llm.params, Prefix(jnp.asarray(changed), jnp.asarray([4, 4])), query(other, [11, 11]))
    assert np.array_equal(one[:, :11], two[:, :11])


def test_no_gradient_reaches_a_later_input(llm):
    """The state at t is a function of the inputs up to t alone: exactly, in value and gradient."""
    embeds = jnp.asarray(np.random.randn(1, 12, 32), jnp.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(embeds, t):
        return jax.grad(lambda e: (llm.model.apply({"params": llm.params}, e)[0, t] ** 3).sum())(embeds)

    for t in (0, 5, 11):
        size = np.abs(gradient(embeds, t)[0]).max(-1)
        assert np.all(size[: t + 1] > 0) and np.all(size[t + 1 :] == 0)


def test_cached_states_equal_those_of_the_whole_sequence(llm):
    ids, embeds = tokens(2, 9), jnp.asarray(0.2 * np.random.randn(1, 7, 32), jnp.float32)
    cache = llm.prefix_cache(llm.params, Prefix(embeds, jnp.asarray([5])))  # two rows of padding
    # An input of 4 tokens, two options of 2, a column of padding.
    positions = np.asarray([[0, 1, 2, 3, 4, 5, 4, 5, 0]] * 2)
    segments = np.asarray([[0, 0, 0, 0, 1, 1, 2, 2, -1]] * 2)
    cached = jax.jit(llm.cached_states)(llm.params, cache, ids, positions, segments)
    for row in range(2):
        for option in (slice(4, 6), slice(6, 8)):
            alone = np.concatenate([ids[row : row + 1, :4], ids[row : row + 1, option]], 1)
            whole = llm.states(llm.params, Prefix(embeds[:, :5], jnp.asarray([5])), query(alone))
            assert np.abs(cached[row, :4] - whole[0, :4]).max() < 1e-5
            assert np.abs(cached[row, option] - whole[0, 4:]).max() < 1e-5


def test_rematerialisation_changes_no_number(llm):
    embeds = jnp.asarray(np.random.randn(1, 10, 32), jnp.float32)

    def value(embeds, remat):
        return (llm.model.clone(remat=remat).apply({"params": llm.params}, embeds) ** 2).sum()

    plain, again = (jax.jit(jax.grad(functools.partial(value, remat=remat)))(embeds) for remat in (False, True))
    assert np.abs(plain - again).max() <= 1e-5 * np.abs(plain).max()


def test_bfloat16_is_close_and_its_logits_are_float32(tiny_llm, llm):
    half, ids = load_llm(tiny_llm, dtype="bfloat16"), tokens(2, 30)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    states = half.states(half.params, no_prefix(2, 32), query(ids))
    logits = half.logits(half.params, states)
    exact = llm.logits(llm.params, llm.states(llm.params, no_prefix(2, 32), query(ids)))
    assert states.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert np.abs(logits - exact).max() < 0.05 * np.abs(exact).max()


# First values, and a kernel that is not there


def test_the_initial_weights_are_gpt2s(llm):
    params = init_params(llm.config, 0)
    assert np.std(params["embed"]["tokens"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(params["layers"]["out"]["kernel"]) == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.1)
    assert not np.any(params["layers"]["qkv"]["bias"]) and np.all(params["layers"]["norm1"]["scale"] == 1)
    assert jax.tree.structure(params) == jax.tree.structure(llm.params)
    other = init_params(llm.config, 1)
    assert np.any(params["embed"]["tokens"] != other["embed"]["tokens"])
    assert not np.array_equal(params["layers"]["up"]["kernel"][0], params["layers"]["up"]["kernel"][1])
    assert Decoder(llm.config).apply({"params": params}, jnp.zeros((1, 3, 32))).dtype == jnp.float32


def test_cudnn_without_a_gpu_is_refused(tiny_llm):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    for make in (load_llm, lambda *args, **kwargs: init_llm(*args, 0, **kwargs)):
        with says('"cudnn"', "GPU", '"xla"'):
            make(tiny_llm, dtype="bfloat16", attention="cudnn")
