"""Distil and score as programs of JAX, called where our code is not: the same vectors and scores."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import test_t5
import tokenizer_files
from facts import says
from safetensors.flax import load_file
from test_export import make_workdir
from tiny_training import write_tokenizer

import mend_jax
from mend_jax import export
from mend_jax.interchange.jax_export import export_jax

DEMOS = [("a great film", "positive"), ("dull", "negative")]  # of the card
OPTIONS = ["positive", "negative"]


def models(kind, folder):
    """An LLM and a backbone that read any text."""
    if kind == "t5":
        words = sorted({word for pair in DEMOS for text in pair for word in text.split()} | {"I", "loved", "it"})
        for name in ("llm", "backbone"):
            test_t5.torch_model(test_t5.ROWS["t5-small"]).save_pretrained(folder / name)
            write_tokenizer(folder / name, [*words, *(f"w{i}" for i in range(61 - len(words)))])
        return folder / "llm", folder / "backbone"
    fields = tokenizer_files.GPT2
    make = tokenizer_files.save_model_folder
    return [make(folder / name, "byte", fields | {"n_embd": w}, seed=w) for name, w in (("llm", 32), ("backbone", 16))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, template, chunks",
    [
        ("gpt2", "qa", {}),
        ("t5", "space", {}),
        ("gpt2", "qa", {"prefix.kind": "chunked", "prefix.chunk_demos": 1, "prefix.residual": True}),
    ],
)
def test_the_cards_snippet_gives_our_scores_without_our_code(kind, template, chunks, tmp_path):
    llm_folder, backbone = models(kind, tmp_path)
    llm = mend_jax.load_llm(llm_folder)
    fields = {"data.template": template, "prefix.length": 4} | chunks
    workdir = make_workdir(tmp_path / "run", llm, llm_folder, llm_folder if chunks else backbone, **fields)
    export.main(str(tmp_path / "out"), workdir=str(workdir), format="jax", chunks=3 if chunks else 0)
    [snippet] = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    program = f"import sys\nfolder = {str(tmp_path / 'out')!r}\n{snippet}\nassert not [m for m in sys.modules if 'mend' in m]\n"
    program += "np.savez('found', vectors=vectors, count=count, scores=scores)\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, distiller = np.load(tmp_path / "found.npz"), mend_jax.load_prefix(workdir, llm)
    vectors = distiller.distill(DEMOS)
    count = int(vectors.length[0])
    assert count == found["count"] == (8 if chunks else 4) and len(found["vectors"]) == (12 if chunks else 4)
    np.testing.assert_allclose(found["vectors"][:count], vectors.embeds[0], rtol=1e-4, atol=1e-5)
    wanted = mend_jax.score_options(llm, vectors, "I loved it", OPTIONS, distiller.template)
    assert found["scores"].tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    llm_folder, backbone = models("gpt2", root)
    return make_workdir(root / "run", mend_jax.load_llm(llm_folder), llm_folder, backbone, **{"prefix.length": 4})


@pytest.mark.slow
def test_what_is_written(workdir, tmp_path):
    """In bfloat16, of an exported distiller whose LLM is named; nothing tells where it was made."""
    export.main(str(tmp_path / "exported"), workdir=str(workdir))
    with says(tmp_path / "exported", "--llm"):
        export_jax(tmp_path / "exported", tmp_path / "out")
    llm = json.loads((workdir / "config.json").read_text())["llm"]["path"]
    said = export_jax(tmp_path / "exported", tmp_path / "out", llm, "bfloat16", rows=3, query_columns=20)
    assert str(tmp_path / "out") in said
    sizes = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (sizes["rows"], sizes["query_columns"], sizes["num_vectors"], sizes["width"]) == (3, 20, 4, 32)
    for file in (tmp_path / "out").iterdir():
        assert str(workdir).encode() not in file.read_bytes() and llm.encode() not in file.read_bytes()
    with says(tmp_path / "out", "there already"):
        export_jax(workdir, tmp_path / "out")


@pytest.mark.slow
def test_the_commands_flags_and_what_the_cards_snippet_refuses(workdir, tmp_path):
    """Too many tokens are refused, not cut: the scores would be of another question."""
    flags = {"dtype": "bfloat16", "rows": 3, "query_columns": 20}
    export.main(str(tmp_path / "out"), workdir=str(workdir), format="jax", **flags)
    sizes = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (sizes["rows"], sizes["query_columns"]) == (3, 20)
    assert {str(a.dtype) for a in load_file(tmp_path / "out" / "llm.safetensors").values()} == {"bfloat16"}
    [code] = re.findall(r"^def padded.*?^    return tokens$", (tmp_path / "out" / "README.md").read_text(), re.M | re.S)
    names = {"np": np}
    exec(code, names)
    assert names["padded"]([[5, 6], [7]], 3, 2).tolist() == [[5, 6], [7, 0], [0, 0]]
    with pytest.raises(AssertionError, match="3 tokens, where 2 fit"):
        names["padded"]([[5], [6, 7, 8]], 3, 2)
    with pytest.raises(AssertionError, match="4 rows, where 3 fit"):
        names["padded"]([[1]] * 4, 3, 2)


def test_mistakes_are_one_sentence(workdir, tmp_path):
    with says("rows is 0"):
        export_jax(workdir, tmp_path / "out", rows=0)
    with says("--workdir", "--llm"):
        export.main(str(tmp_path / "out"), pack="p", format="jax")
    for name, value in (("chunks", 3), ("dtype", "bfloat16"), ("rows", 3), ("query_columns", 20)):
        with says(f"--{name}={value}", "--format=jax"):
            export.main(str(tmp_path / "out"), workdir=str(workdir), **{name: value})
    with says(workdir, "--chunks=3", "one context"):
        export.main(str(tmp_path / "out"), workdir=str(workdir), format="jax", chunks=3)
    assert not (tmp_path / "out").exists()
