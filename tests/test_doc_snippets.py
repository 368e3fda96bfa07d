"""The Python that README.md and docs/ print, run as printed: of each document all blocks, one after another.

The models that they name are large, or trained by a reader who follows the text; small ones with random vectors stand at
their places here. No block is left out.
"""

import re
import tomllib

import numpy as np
import pytest
import tokenizer_files
from conftest import ROOT
from test_export import make_workdir

import mend_jax
from mend_jax.cli.settings import check
from mend_jax.interchange.export import export

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = {
    str(path.relative_to(ROOT)): blocks
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if (blocks := BLOCK.findall(path.read_text()))
}
PACKAGED = ROOT / "mend_jax" / "small_world"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{what the documents name: the folder that stands there}."""
    root = tmp_path_factory.mktemp("models")
    sizes = tokenizer_files.GPT2 | {"n_positions": 512}
    llm, backbone = (
        tokenizer_files.save_model_folder(root / name, "byte", sizes, name == "llm") for name in ("llm", "b")
    )
    small, large = mend_jax.load_llm(PACKAGED / "llm"), mend_jax.load_llm(llm)
    quickstart = make_workdir(root / "quickstart", small, small.path, PACKAGED / "backbone", **{"prefix.length": 8})
    distiller, demos = mend_jax.load_distiller(quickstart, small), 4 * [("fudi megu", "ivory"), ("meda fepo", "maroon")]
    mend_jax.make_packs(small, distiller, [demos], quickstart)[0].save(root / "colours.pack.safetensors")
    mine = make_workdir(root / "mine", large, llm, backbone)
    export(mine, root / "exported")
    return {
        'load_llm("smollm2-135m-instruct': f'load_llm("{llm}',  # before the distiller of this name
        "smollm2-135m-instruct": mine,
        "mend_jax/distillers/smollm2-135m-instruct": root / "exported",
        "runs/smollm2": llm,
        "reviews.pack.safetensors": root / "reviews.pack.safetensors",
        "colours.pack.safetensors": root / "colours.pack.safetensors",
        "gpt2-large": llm,
        "runs/mine/mend/finetune": mine,
    }


def quoted(text) -> str:
    """As it stands in a block; a call's beginning has its own quotes."""
    return str(text) + '"' if '"' in str(text) else f'"{text}"'


def run(document, places):
    """The names that the document's blocks leave."""
    names = {}
    for number, block in enumerate(DOCUMENTS[document], 1):
        for name, folder in places.items():
            block = block.replace(quoted(name), quoted(folder))
        exec(compile(block, f"{document}, Python block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
@pytest.mark.slow
def test_the_blocks_of_a_document_run(document, places, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(document, places)


def test_what_is_named_stands_in_a_document(places):
    blocks = "".join(block for blocks in DOCUMENTS.values() for block in blocks)
    assert [name for name in places if quoted(name) not in blocks] == []
    assert DOCUMENTS.keys() >= {"README.md", "docs/python.md", "docs/running.md"}


def test_the_readme_makes_the_same_vectors_in_jax_and_pytorch(places, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run("README.md", places)
    assert names["pack"].num_demonstrations == len(names["demos"]) == 2
    np.testing.assert_allclose(names["vectors"][0], names["pack"].vectors, atol=1e-5)


def test_chunks_are_removed_in_the_docs(places):
    names = run("docs/python.md", places)
    assert len(names["parts"]) == len(names["chunks"]) == 5  # 80 demonstrations, 16 in a chunk
    assert names["vectors"].length.tolist() == [4 * 6]


def test_the_packs_of_the_docs_answer(places, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run("docs/packs.md", places)
    assert names["pack"].num_vectors == 8 and names["request"].keys() == {"model", "prompt_embeds", "max_tokens"}


def test_every_extra_stands_in_the_docs_and_no_other():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    docs = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
    listed = docs["install"].partition('".[NAME]"`')[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)` \(", listed)) == extras.keys()
    assert {name for text in docs.values() for name in re.findall(r'"\.\[(\w+)\]"', text)} - {"NAME"} <= extras.keys()


def test_the_config_of_the_docs_is_one(places):
    config = run("docs/running.md", places)["get_config"]()
    check(config)
    assert config.llm.path == "gpt2-xl"
