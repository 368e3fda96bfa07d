"""The distillers that the package carries, by the names of their LLMs."""

import json
import re

import pytest
from facts import says

from mend_jax.interchange.export import export
from mend_jax.interchange.trained import CARRIED, own_llm, read_trained, trained_fingerprint, trained_path
from mend_jax.models.gguf.packaged import PACKAGED
from mend_jax.run.sealed import require_unchanged

NAMES = sorted(folder.name for folder in CARRIED.iterdir())
LARGEST = 30e6  # bytes


def test_there_are_some_and_a_missing_one_names_them():
    assert "smollm2-135m-instruct" in NAMES
    for read in (own_llm, read_trained):
        with says("smollm2-135m ", "does not exist", *NAMES):
            read("smollm2-135m")


@pytest.mark.parametrize("name", NAMES)
def test_a_carried_distiller_is_found_by_the_name_of_its_llm(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = CARRIED / name
    assert trained_path(name) == folder and own_llm(name) == name in PACKAGED
    assert trained_fingerprint(name) == trained_fingerprint(folder)
    (tmp_path / name).mkdir()
    assert str(trained_path(name)) == name  # a folder of one's own comes first


@pytest.mark.parametrize("name", NAMES)
def test_a_carried_distiller_is_exported_by_its_name(name, tmp_path):
    with says(f"{name}s", "does not exist", name):
        export(f"{name}s", tmp_path / "out")
    export(name, tmp_path / "out", weights="bfloat16")
    assert read_trained(tmp_path / "out").settings() == read_trained(name).settings()
    assert own_llm(tmp_path / "out") == own_llm(name)
    cards = [(folder / "README.md").read_text().partition("## Use") for folder in (CARRIED / name, tmp_path / "out")]
    assert cards[0][0] == cards[1][0] and "## Limits" in cards[0][2]
    # But for the LLM's own part, the snippet's last lines, which are others where the LLM's package is not there.
    written, now = (re.sub("^(?:inputs|logits) = .+?^```$", "```", card[2], flags=re.M | re.S) for card in cards)
    assert written == now and "MendDistiller" in now and "inputs_embeds" not in now


@pytest.mark.parametrize("name", NAMES)
def test_a_carried_distiller_is_whole_and_small(name):
    files = [path for path in (CARRIED / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST
    require_unchanged(CARRIED / name)
    distiller = read_trained(name)
    settings = json.loads((CARRIED / name / "distiller_config.json").read_text())
    assert distiller.num_vectors == settings["num_vectors"] == len(distiller.params["placeholders"])
    assert name in (CARRIED / name / "README.md").read_text()
    module = "mend_distiller.py"  # a copy, as every export has one
    assert (CARRIED / name / module).read_bytes() == (CARRIED.parent / "prefixes" / module).read_bytes()
