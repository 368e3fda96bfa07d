"""Rotary positions and their scalings against transformers."""

import json

import numpy as np
import pytest
from family_rows import COMMON, LLAMA, LLAMA3, YARN, tokens, torch_model

from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import load_llm
from mend_jax.models.rope import frequencies, read_rope
from mend_jax.prefixes.nothing import no_prefix


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
        YARN | {"original_max_position_embeddings": 32768},
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 4096},
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 4096},
        YARN | {"attention_factor": 1.5},
    ],
)
def test_angles_are_those_of_transformers(scaling):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {"max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": scaling}
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=256, num_attention_heads=2, **json.loads(json.dumps(fields))))
    angle, factor = frequencies(read_rope(fields), 128)
    np.testing.assert_allclose(angle, theirs.inv_freq.numpy(), rtol=1e-6)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_logits_with_other_scalings(kind, tmp_path):
    torch = pytest.importorskip("torch")
    model = torch_model(LLAMA | {"num_key_value_heads": 2, "rope_scaling": {"rope_type": kind, "factor": 3.0}})
    model.save_pretrained(tmp_path)
    llm, ids = load_llm(tmp_path), tokens(1, COMMON["max_position_embeddings"])
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long()).logits.numpy()
    query = Query(ids, np.array([ids.shape[1]]), np.zeros(1, np.int32))
    states = llm.states(llm.params, no_prefix(1, llm.config.width), query)
    assert np.abs(llm.logits(llm.params, states) - theirs).max() < 1e-4
