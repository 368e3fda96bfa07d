"""A GGUF file where a Hugging Face folder can stand: exported, in parts; and those of packages."""

import hashlib
import json

import numpy as np
import pytest

gguf_package = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")

from facts import says  # noqa: E402
from gguf_files import MODELS, WORD_VOCABULARY, copy_part, write_with_words  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from test_gguf import logits, theirs  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from mend_jax import export  # noqa: E402
from mend_jax.llm.decoder_only import load_llm  # noqa: E402
from mend_jax.models import weights  # noqa: E402
from mend_jax.models.folders import fingerprint, local_folder  # noqa: E402
from mend_jax.models.gguf import packaged  # noqa: E402
from mend_jax.models.gguf.header import parts, read_model  # noqa: E402


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_with_words(path)
    return path


# As a folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_the_exported_folder_is_read_by_transformers(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "SHARD_BYTES", 1 << 20)
    model = write_with_words(tmp_path / "model.gguf", name)
    export.main(str(tmp_path / "out"), llm=str(tmp_path / "model.gguf"))
    assert "AutoModelForCausalLM" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    tokens = np.random.randint(0, WORD_VOCABULARY, (1, 20)).astype(np.int32)
    assert np.array_equal(logits(load_llm(tmp_path / "out"), tokens), logits(load_llm(tmp_path / "model.gguf"), tokens))
    assert np.abs(theirs(again, tokens) - theirs(model, tokens)).max() < 1e-4  # positions too, which are no tensors


def test_a_single_file_is_written_where_the_weights_are_small(file, tmp_path):
    export.main(str(tmp_path / "out"), llm=str(file))
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == len(read_model(file).tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    with says(tmp_path / "out", "already"):
        export.main(str(tmp_path / "out"), llm=str(file))
    with says(tmp_path / "out", "Hugging Face folder"):
        export.main(str(tmp_path / "again"), llm=str(tmp_path / "out"))
    assert not (tmp_path / "again").exists()
    for flags in ({}, {"workdir": "w", "pack": "p"}):
        with says("--workdir", "--llm"):
            export.main(str(tmp_path / "again"), **flags)


def test_parts_are_one_model(file, tmp_path):
    names = split(file, tmp_path)
    whole, ours = read_model(file), load_llm(file)
    for name in names:
        assert read_model(name).tensors.keys() == whole.tensors.keys()
        assert parts(name) == names
    tokens = np.random.randint(0, WORD_VOCABULARY, (1, 20)).astype(np.int32)
    assert np.array_equal(logits(load_llm(names[0]), tokens), logits(ours, tokens))
    names[1].unlink()
    with says(names[1], "not there", names[0].name):
        load_llm(names[0])


def split(file, folder):
    """The file as three, as llama.cpp's gguf-split makes them; returns their paths."""
    names = [folder / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for number, name in enumerate(names):
        copy_part(file, name, slice(number, None, 3), {"split.no": number, "split.count": 3}, tokenizer=number == 0)
    return names


def test_the_fingerprint_is_of_every_byte(file, tmp_path):
    before = fingerprint(file)
    (tmp_path / "moved.gguf").write_bytes(file.read_bytes())
    assert fingerprint(tmp_path / "moved.gguf") == before
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    (tmp_path / "other.gguf").write_bytes(content)
    assert fingerprint(tmp_path / "other.gguf") != before
    names = split(file, tmp_path)
    assert fingerprint(names[0]) == fingerprint(names[2]) != before


# Of packages


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that holds a file in two pieces; returns the entry that finds it, and what the file is."""
    whole = bytes(range(256)) * 40
    for part, content in enumerate((whole[:5000], whole[5000:])):
        (tmp_path / f"mend_jax_test_part{part}").mkdir()
        (tmp_path / f"mend_jax_test_part{part}" / "x.part").write_bytes(content)
        (tmp_path / f"mend_jax_test_part{part}" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packaged, "CACHE", tmp_path / "cache")
    modules = ("mend_jax_test_part0", "mend_jax_test_part1")
    return packaged.Packaged(modules, ("x.part",) * 2, "pip install x", hashlib.sha256(whole).hexdigest()), whole


def test_a_name_that_no_package_has_leads_to_the_one_that_is_there():
    with says("gemma3-270m-it", "gemma3-270m is there"):
        local_folder("gemma3-270m-it")


def test_a_packaged_file_is_found_by_its_name(package, tmp_path, monkeypatch):
    entry, whole = package
    monkeypatch.setitem(packaged.PACKAGED, "mine", entry)
    monkeypatch.setitem(packaged.PACKAGED, "first", entry._replace(modules=entry.modules[:1], files=("x.part",)))
    path = local_folder("mine")
    assert path.read_bytes() == whole and path.suffix == ".gguf" and local_folder("mine") == path
    assert local_folder("first") == tmp_path / "mend_jax_test_part0" / "x.part"
    path.unlink()
    (tmp_path / "mend_jax_test_part1" / "x.part").write_bytes(b"other")
    with says("mine", "pip install x --force-reinstall"):
        local_folder("mine")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "mend_jax_test_part1" / "x.part").unlink()
    with says("x.part", "pip install x"):
        local_folder("mine")
    monkeypatch.setitem(packaged.PACKAGED, "mine", entry._replace(modules=("mend_jax_no_such",) * 2))
    with says("mine", "not installed", "pip install x"):
        local_folder("mine")
