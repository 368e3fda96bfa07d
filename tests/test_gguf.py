"""What a GGUF file holds is what PyTorch computes with, whatever the blocks."""

import functools

import jax
import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from gguf_files import KINDS, MODELS, VOCABULARY, torch_model, write  # noqa: E402

from mend_jax.data.query import Query  # noqa: E402
from mend_jax.llm.decoder_only import LLM  # noqa: E402
from mend_jax.models import weights  # noqa: E402
from mend_jax.models.families import from_hf_config  # noqa: E402
from mend_jax.prefixes.nothing import no_prefix  # noqa: E402

pytestmark = pytest.mark.slow


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, tokens):
    llm = LLM(config, params, None, "", "float32")
    query = Query(tokens, np.full(len(tokens), tokens.shape[1], np.int32), np.zeros(len(tokens), np.int32))
    return llm.logits(params, llm.states(params, no_prefix(len(tokens), config.width), query))


def logits(llm, tokens):
    return np.asarray(_logits(llm.config, llm.params, tokens))


def theirs(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


@pytest.fixture(scope="module", params=MODELS)
def random_model(request):
    return MODELS[request.param], torch_model(MODELS[request.param])


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_pytorch_on_the_same_numbers(random_model, kind, tmp_path):
    fields, model = random_model
    path = tmp_path / "model.gguf"
    model = write(path, fields, kind, model)
    tokens = np.random.randint(0, VOCABULARY, (2, 40)).astype(np.int32)
    assert np.abs(logits(load_llm_without_tokenizer(path), tokens) - theirs(model, tokens)).max() < 1e-4


def load_llm_without_tokenizer(path):
    config = from_hf_config(path)
    params = weights.read_params(path, config)
    return LLM(weights.as_read(config, params), params, None, str(path), "float32")
