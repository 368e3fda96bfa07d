"""The public release's own files: read, and written back byte for byte."""

import jax
import numpy as np
import pytest
from facts import says
from safetensors.numpy import load_file, save_file

from mend_jax.interchange import trained
from mend_jax.prefixes import release
from mend_jax.prefixes.distiller_folder import write_folder


@pytest.mark.parametrize("name", ["gpt2", "gpt2_same_width"])
def test_safetensors_of_the_release_survive_byte_for_byte(golden, tmp_path, name):
    original = golden / name / "distiller_official.safetensors"
    distiller = trained.read_release(original, golden / name / "distiller_backbone")
    release.write_release(distiller, tmp_path / original.name)
    assert (tmp_path / original.name).read_bytes() == original.read_bytes()


def test_bin_of_the_release_survives_byte_for_byte(golden, tmp_path):
    torch = pytest.importorskip("torch")
    original, written = golden / "gpt2" / "distiller_official.bin", tmp_path / "distiller_official.bin"
    release.write_release(trained.read_release(original, golden / "gpt2" / "distiller_backbone"), written)
    wanted, found = (torch.load(path, weights_only=True) for path in (original, written))
    assert list(wanted) == list(found)
    assert all(wanted[name].dtype == found[name].dtype for name in wanted)
    assert all(wanted[name].numpy().tobytes() == found[name].numpy().tobytes() for name in wanted)
    (tmp_path / "again").mkdir()
    torch.save(wanted, tmp_path / "again" / original.name)
    if (
        tmp_path / "again" / original.name
    ).read_bytes() == original.read_bytes():  # this PyTorch writes as that one did
        assert written.read_bytes() == original.read_bytes()


def test_bin_and_safetensors_of_the_release_hold_the_same(golden):
    pytest.importorskip("torch")
    folder = golden / "gpt2"
    files = (folder / f"distiller_official{suffix}" for suffix in (".bin", ".safetensors"))
    one, other = (trained.read_release(path, folder / "distiller_backbone") for path in files)
    assert jax.tree.all(jax.tree.map(np.array_equal, one.params, other.params))


def test_the_golden_distillers_survive_the_folder_too(golden, tmp_path):
    """Release file -> Hugging Face folder -> release file, byte for byte."""
    original = golden / "gpt2" / "distiller_official.safetensors"
    write_folder(trained.read_release(original, golden / "gpt2" / "distiller_backbone"), tmp_path / "folder")
    release.write_release(trained.read_distiller(tmp_path / "folder"), tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == original.read_bytes()


def test_buffers_of_old_releases_are_passed_over(golden, tmp_path):
    folder = golden / "gpt2"
    tensors = load_file(folder / "distiller_official.safetensors")
    tensors["hypernet.h.0.attn.bias"] = np.ones((1, 1, 192, 192), bool)
    tensors["hypernet.h.0.attn.masked_bias"] = np.full((1,), -1e4, np.float32)
    save_file(tensors, tmp_path / "old.safetensors")
    trained.read_release(tmp_path / "old.safetensors", folder / "distiller_backbone")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t | {"hypernet.h.7.ln_1.bias": t["hypernet.ln_f.bias"]}, "h.7.ln_1.bias"),
        (lambda t: t | {"model.wte.weight": t["hypernet.wte.weight"]}, "model.wte.weight"),
        (lambda t: t | {"hypernet.transformer.ln_f.bias": t["hypernet.ln_f.bias"]}, "ln_f.bias"),
        (lambda t: {k: v for k, v in t.items() if "init_prompt" not in k}, "init_prompt_weight"),
        (lambda t: {k: v for k, v in t.items() if k != "hypernet.h.1.attn.c_proj.bias"}, "h.1.attn.c_proj.bias"),
        (lambda t: {k: v for k, v in t.items() if k != "hypernet.adap_pooler.dense.bias"}, "adap_pooler.dense.bias"),
        (lambda t: t | {"hypernet.wpe.weight": np.zeros((100, 48), np.float32)}, "wpe.weight"),
        (lambda t: t | {"hypernet.init_prompt_weight": np.zeros((8, 47), np.float32)}, "init_prompt_weight"),
        (lambda t: t | {"hypernet.adap_pooler.dense.bias": np.zeros(63, np.float32)}, "adap_pooler.dense.bias"),
    ],
)
def test_keys_that_do_not_fit_are_refused_by_name(golden, tmp_path, change, named):
    folder = golden / "gpt2"
    save_file(change(load_file(folder / "distiller_official.safetensors")), tmp_path / "bad.safetensors")
    with says(named):
        trained.read_release(tmp_path / "bad.safetensors", folder / "distiller_backbone")
