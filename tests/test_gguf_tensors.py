"""The tensors of a GGUF file: slices of every kind of blocks, in parts on a mesh, a few numbers at once."""

import jax
import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf")
pytest.importorskip("torch")

from gguf_files import MODELS, write  # noqa: E402

from mend_jax.models import weights  # noqa: E402
from mend_jax.models.families import from_hf_config  # noqa: E402
from mend_jax.models.gguf import tensors  # noqa: E402
from mend_jax.models.gguf.header import block_size, read_model  # noqa: E402
from mend_jax.models.split_weights import read_split  # noqa: E402
from mend_jax.run import sharding  # noqa: E402


@pytest.fixture(scope="module", params=["gpt2", "smollm2", "gemma3"])
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "model.gguf"
    write(path, MODELS[request.param], "Q4_0")
    return path


@pytest.mark.parametrize(("dtype", "int8"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_what_is_read_in_parts_is_what_is_read_whole(file, dtype, int8):
    mesh, config = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), from_hf_config(file)
    split = read_split(file, config, dtype, int8, sharding.placer(mesh))
    whole = weights.read_params(file, config, dtype, int8)
    jax.tree.map(np.testing.assert_array_equal, split, whole)
    assert jax.tree.map(lambda a: a.dtype, split) == jax.tree.map(lambda a: a.dtype, whole)


def test_few_numbers_are_dequantised_at_once(file, monkeypatch):
    """But for GPT-2's kernels, which lie in the file turned over and are read whole, one after another."""
    sizes, dequantize = [], tensors.dequantize

    def recorded(*args):
        sizes.append(dequantize(*args).size)
        return dequantize(*args)

    monkeypatch.setattr(tensors, "dequantize", recorded)
    monkeypatch.setattr(weights, "PIECE", 4096)
    config = from_hf_config(file)
    for int8 in (False, True):
        weights.read_params(file, config, int8=int8)
    whole = sum(entry.shape[0] * (entry.shape[1:] or (1,))[0] for entry in weights.key_table(config).values())
    assert sum(sizes) == 2 * whole
    assert max(sizes) == (3 * 256 * 256 if config.family == "gpt2" else 4096)


ALL_KINDS = [kind for kind in gguf_package.GGMLQuantizationType if block_size(kind)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales
@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_blocks_is_read_in_slices(kind, tmp_path):
    numbers, size = gguf_package.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (6, 512 // numbers * size), np.uint8)
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("t", blocks, raw_dtype=kind, raw_shape=blocks.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_model(tmp_path / "m.gguf").tensors["t"]
    assert stored.shape == (6, 512)
    expected = gguf_package.quants.dequantize(blocks, kind)
    order, mapped = np.array([3, 1, 0, 2, 5, 4]), tensors.Mapped(stored.file)
    for rows, columns in ((slice(None), slice(None)), (slice(1, 5), slice(None)), (slice(2, 3), slice(70, 300))):
        read = [tensors.Tensor(mapped, stored, tensors.Layout(*how)) for how in ((), (order,), (None, True))]
        found = read[0][rows, columns], read[1][rows, columns], read[2][columns, rows]
        wanted = expected[rows, columns], expected[order][rows, columns], expected.T[columns, rows]
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, wanted, strict=True))
