"""The T5 family against PyTorch, on small random weights with the quirks of the real models.

Axes: B batch, P prefix, Q query tokens, Y tokens of y, D width, V vocabulary.
"""

import functools
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from facts import says
from safetensors.numpy import load_file, save_file
from test_int8 import restored

from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models.encoder_decoder import distance_buckets
from mend_jax.models.families import from_hf_config, key_table, to_hf_config
from mend_jax.models.folders import init_params, load_model, save_model
from mend_jax.models.weights import to_tensors
from mend_jax.prefixes.demonstrations import demonstrations_prefix
from mend_jax.prefixes.distiller import Distiller
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.sharding import make_mesh, placer
from mend_jax.scoring.options import score_options

pytestmark = pytest.mark.slow

V1 = {"feed_forward_proj": "relu"}
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# What transformers 5 makes of V11 and writes: the token table is the head, and no lm_head.weight is in the file.
V11_TIED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True, "scale_decoder_outputs": False}
ROWS = {
    "t5-small": V1,
    "t5-small-lm-adapt": V11,
    "t5-large-lm-adapt": V11 | {"num_layers": 3, "num_decoder_layers": 3, "num_heads": 4},
    "flan-t5-base": V11 | {"d_kv": 8},
    "flan-t5-xl": V11 | {"d_kv": 12, "num_decoder_layers": 1},
    "v1.1 as transformers 5 makes it": V11_TIED,
}
COMMON = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}
# Few buckets and a short distance, so that short sequences reach all of them.
DISTANCES = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}


def torch_model(fields, seed=0):
    """The PyTorch model of a config.json's fields; norms random too, and as published a head of its own for v1.1."""
    torch = pytest.importorskip("torch")
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(T5Config(**COMMON | DISTANCES | fields)).eval()
    if not fields.get("tie_word_embeddings", True):  # transformers 5 ties a fresh head whatever the config says
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


DISTINCT = ("t5-small", "flan-t5-xl")  # tied and scaled without a gate; a head and gates, other depths


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return functools.cache(lambda name: make_row(name, tmp_path_factory.mktemp("row")))


@pytest.fixture(params=ROWS)
def row(request, rows):
    return rows(request.param)


def make_row(name, folder):
    """One model: PyTorch's, the folder that transformers saves with the published config.json's fields, our LLM of it."""
    model = torch_model(ROWS[name])
    model.save_pretrained(folder)
    return SimpleNamespace(name=name, torch=model, folder=folder, llm=load_llm(folder))


def tokens(*shape):
    return np.random.randint(1, COMMON["vocab_size"], shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(llm, embeds, length, query, direction):
    """Logits (B,Y,V) after the prefixes, and the gradient (B,P,D) of their products with `direction`."""

    def value(embeds):
        logits = llm.logits(llm.params, llm.states(llm.params, Prefix(embeds, length), query))
        return (logits * direction).sum(), logits

    gradient, logits = jax.grad(value, has_aux=True)(embeds)
    return logits, gradient


@pytest.mark.parametrize(
    ("row", "input_columns"), [*((name, 7) for name in ROWS), *((name, None) for name in DISTINCT)], indirect=["row"]
)
def test_a_padded_batch_of_prefixes_gives_what_pytorch_gives_one_by_one(row, input_columns):
    """Logits, and the gradient with respect to the prefix; the last row has no prefix, the first no x."""
    torch = pytest.importorskip("torch")
    llm, B, P, Q, D = row.llm, 3, 40, 16, row.llm.config.width
    prefix_lengths, lengths, starts = np.array([40, 9, 0]), np.array([10, 16, 12]), np.array([0, 7, 5])
    ids, embeds = tokens(B, Q), np.random.randn(B, P, D).astype(np.float32)
    direction = np.random.randn(B, Q, COMMON["vocab_size"]).astype(np.float32)
    direction *= (np.arange(Q) < (lengths - starts)[:, None])[..., None]
    query = Query(ids, lengths, starts, input_columns)
    logits, gradient = logits_and_gradient(llm, embeds, prefix_lengths, query, direction)
    for i, (before, start, length) in enumerate(zip(prefix_lengths, starts, lengths, strict=True)):
        theirs = torch.from_numpy(embeds[i : i + 1, :before]).requires_grad_()
        whole = torch.from_numpy(ids[i : i + 1, :length]).long()
        read = torch.cat([theirs, row.torch.get_input_embeddings()(whole[:, :start])], 1)
        expected = row.torch(inputs_embeds=read, labels=whole[:, start:]).logits  # shifted to the right by the model
        Y = length - start
        assert np.abs(logits[i, :Y] - expected[0].detach().numpy()).max() < 1e-4
        if before:
            (expected * torch.from_numpy(direction[i : i + 1, :Y])).sum().backward()
            wanted = theirs.grad[0].numpy()
            assert np.abs(gradient[i, :before] - wanted).max() < 1e-3 * np.abs(wanted).max()
        assert not np.any(gradient[i, before:])
    target = llm.targets(query)
    np.testing.assert_array_equal(target.length, lengths - starts)
    np.testing.assert_array_equal(target.tokens[1, :9], ids[1, 7:])


@pytest.mark.parametrize("row", DISTINCT, indirect=True)
def test_padding_changes_no_number(row):
    llm, ids, embeds = row.llm, tokens(1, 12), np.random.randn(1, 9, row.llm.config.width).astype(np.float32)
    query = Query(ids, np.array([12]), np.array([5]), input_columns=5, target_columns=7)
    alone = llm.states(llm.params, Prefix(embeds, np.array([9])), query)
    assert alone.shape[1] == 7
    wider = Query(np.pad(ids, ((0, 0), (0, 8)), constant_values=3), query.length, query.target_start)
    garbage = np.pad(embeds, ((0, 0), (0, 6), (0, 0)), constant_values=1e3)
    padded = llm.states(llm.params, Prefix(garbage, np.array([9])), wider)[:, :7]
    np.testing.assert_allclose(alone, padded, atol=2e-5)


@pytest.mark.parametrize("row", [*DISTINCT, "v1.1 as transformers 5 makes it"], indirect=True)
def test_options_scored_after_one_reading_of_x_are_those_of_reading_everything(row):
    torch = pytest.importorskip("torch")
    demos, x, options = tokens(20).tolist(), [5, 6, 7], [[8, 9, 10], [11], [12, 13]]
    for before in ([], demos):
        prefix = demonstrations_prefix(row.llm, before) if before else no_prefix(1, row.llm.config.width)
        expected = []
        for option in options:
            with torch.no_grad():
                logits = row.torch(torch.tensor([before + x]), labels=torch.tensor([option])).logits[0].double()
            picked = torch.log_softmax(logits, -1)[torch.arange(len(option)), torch.tensor(option)]
            expected.append(picked.mean().item())
        np.testing.assert_allclose(score_options(row.llm, prefix, x, options), expected, atol=1e-4)


def test_distances_fall_into_the_buckets_of_pytorch():
    pytest.importorskip("torch")
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    config, at = from_hf_config(PUBLISHED["t5-small"][0]), torch.arange(600)
    for both_ways in (True, False):
        theirs = T5Attention._relative_position_bucket(at[None] - at[:, None], both_ways, 32, 128)
        np.testing.assert_array_equal(distance_buckets(600, config, both_ways), theirs.numpy())


def test_a_folder_goes_in_and_out_with_the_same_bytes(row, tmp_path):
    before = load_file(row.folder / "model.safetensors")
    model = load_model(row.folder)
    save_model(tmp_path, model.config, model.params, row.folder)
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    again = from_hf_config(tmp_path)
    assert again == model.config == from_hf_config(to_hf_config(model.config))
    assert again.tied_head == ("lm_head.weight" not in before)
    assert again.scaled_head == (row.name == "t5-small")


def test_transformers_reads_what_we_write(row, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import T5ForConditionalGeneration

    save_model(tmp_path, row.llm.config, row.llm.params, row.folder)
    model = T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids, labels = torch.tensor(tokens(1, 9)), torch.tensor(tokens(1, 4)).long()
    with torch.no_grad():
        assert torch.equal(model(ids, labels=labels).logits, row.torch(ids, labels=labels).logits)


# config.json's tie_word_embeddings and scale_decoder_outputs, where they are there; whether the file holds a head.
SAID = [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"tie_word_embeddings": None}]
SAID += [said | {"scale_decoder_outputs": scaled} for said in SAID for scaled in (True, False)]


@pytest.mark.parametrize("own", [False, True])
def test_the_head_is_what_transformers_takes_for_it_whatever_config_json_says(own, tmp_path):
    """Where they cannot agree, a head of its own in the file of a v1.0, it is refused."""
    pytest.importorskip("torch")
    from transformers import T5ForConditionalGeneration

    torch_model(V11 if own else V11_TIED).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert own == ("lm_head.weight" in load_file(tmp_path / "model.safetensors"))
    fields = {name: value for name, value in fields.items() if name not in SAID[-1]}
    for said in SAID:
        (tmp_path / "config.json").write_text(json.dumps(fields | said))
        theirs = T5ForConditionalGeneration.from_pretrained(tmp_path)
        scaled = theirs.config.scale_decoder_outputs
        if own and scaled and said.get("tie_word_embeddings") is not False:
            with says(tmp_path, "lm_head.weight", "token table", "tie_word_embeddings"):
                load_model(tmp_path)
            continue
        llm = load_llm(tmp_path)
        assert (llm.config.tied_head, llm.config.scaled_head) == (not own, scaled), said
        np.testing.assert_array_equal(llm.head(llm.params), theirs.lm_head.weight.detach().numpy())


def test_a_v11_without_a_head_in_8_bits_and_over_a_mesh(tmp_path):
    """Read whole and in parts; the logits in 8 bits are PyTorch's with the numbers that 8 bits hold."""
    torch = pytest.importorskip("torch")
    model = torch_model(V11_TIED | {"d_model": 32, "num_heads": 4, "d_kv": 8, "vocab_size": 64})
    model.save_pretrained(tmp_path)
    ids, place = tokens(1, 14), placer(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    query, whole = Query(ids, np.array([14]), np.array([9]), 9, 5), load_llm(tmp_path, weights="int8")
    for weights, expected in (("full", load_llm(tmp_path)), ("int8", whole)):
        split = load_llm(tmp_path, weights=weights, place=place)
        assert split.config == expected.config and split.config.tied_head and not split.config.scaled_head
        jax.tree.map(np.testing.assert_array_equal, split.params, expected.params)
    numbers = to_tensors(whole.config, restored(whole.params)).items()
    model.load_state_dict({name: torch.tensor(np.array(numbers)) for name, numbers in numbers}, strict=False)
    with torch.no_grad():
        expected = model(torch.tensor(ids[:, :9]), labels=torch.tensor(ids[:, 9:]).long()).logits.numpy()
    states = whole.states(whole.params, no_prefix(1, whole.config.width), query)
    np.testing.assert_allclose(whole.logits(whole.params, states), expected, atol=1e-4)


def test_copies_of_the_token_table_and_what_nobody_reads_are_passed_over(row, tmp_path):
    tensors = load_file(row.folder / "model.safetensors")
    for side in ("encoder", "decoder"):
        tensors[f"{side}.embed_tokens.weight"] = tensors["shared.weight"].copy()
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = np.zeros((8, row.llm.config.heads), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((row.folder / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path).params, row.llm.params)


def test_the_distiller_is_the_encoder_with_placeholders_behind_the_demonstrations(row):
    torch = pytest.importorskip("torch")
    from configs.base import get_config

    config = get_config()
    config.prefix.backbone, config.prefix.length, config.prefix.rms = str(row.folder), 4, 0.0
    distiller = Distiller.init(config, row.llm, 0)
    assert set(distiller.params["backbone"]) == {"embed", "encoder"} and distiller.projection == "identity"
    rows = [tokens(12).tolist(), tokens(5).tolist()]
    vectors = distiller.distill(rows)
    for ids, made in zip(rows, vectors.embeds, strict=True):
        read = row.torch.get_input_embeddings()(torch.tensor([ids]))
        placeholders = torch.from_numpy(np.array(distiller.params["placeholders"]))[None]
        with torch.no_grad():
            states = row.torch.encoder(inputs_embeds=torch.cat([read, placeholders], 1)).last_hidden_state
        np.testing.assert_allclose(made, states[0, len(ids) :], atol=1e-4)


def _published(layers, width, d_kv, d_ff, heads, v1=False):
    sizes = {"num_layers": layers, "d_model": width, "d_kv": d_kv, "d_ff": d_ff, "num_heads": heads}
    fixed = {"model_type": "t5", "vocab_size": 32128, "decoder_start_token_id": 0, "pad_token_id": 0}
    return fixed | sizes | (V1 if v1 else V11 | {"num_decoder_layers": layers})


PUBLISHED = {
    "t5-small": (_published(6, 512, 64, 2048, 8, v1=True), 60_506_624),
    "t5-base": (_published(12, 768, 64, 3072, 12, v1=True), 222_903_552),
    "t5-large": (_published(24, 1024, 64, 4096, 16, v1=True), 737_668_096),
    "t5-small-lm-adapt": (_published(8, 512, 64, 1024, 6), 76_961_152),
    "t5-large-lm-adapt": (_published(24, 1024, 64, 2816, 16), 783_150_080),
    "flan-t5-base": (_published(12, 768, 64, 2048, 12), 247_577_856),
    "flan-t5-xl": (_published(24, 2048, 64, 5120, 32), 2_849_757_184),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_full_size_has_the_published_number_of_parameters(name):
    fields, published = PUBLISHED[name]
    config = from_hf_config(fields)
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published
    assert sum(int(np.prod(entry.shape)) for entry in key_table(config).values()) == published


def test_an_encoder_alone_is_no_llm(row, tmp_path):
    config = row.llm.config.headless
    encoder = {"embed": {"tokens": row.llm.params["embed"]["tokens"]}, "encoder": row.llm.params["encoder"]}
    save_model(tmp_path, config, encoder, row.folder)
    assert load_model(tmp_path).config == config
    with says(tmp_path, "encoder alone"):
        load_llm(tmp_path)


def test_what_is_not_t5_is_refused(row, tmp_path):
    with says("config.json", "feed_forward_proj='gated-silu'", "relu, gated-gelu"):
        from_hf_config(PUBLISHED["t5-small"][0] | {"feed_forward_proj": "gated-silu"})
    with says("config.json", "t5", "'d_kv'"):
        from_hf_config({name: value for name, value in PUBLISHED["t5-small"][0].items() if name != "d_kv"})
    wrong = json.loads((row.folder / "config.json").read_text()) | {"num_decoder_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    save_file(load_file(row.folder / "model.safetensors"), tmp_path / "model.safetensors")
    with says(tmp_path, re.compile(r"lacks decoder\.block\.[123]\.layer")):
        load_model(tmp_path)
