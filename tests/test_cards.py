"""The snippets that exported cards print, run as printed, against our own scores; the PyTorch module of chunks.

The tokenizer is of GPT-2's kind, where " I" and "I" differ, and begins texts with a special token unless told not to.
"""

import json
import re
import sys

import numpy as np
import pytest
import tokenizer_files
from test_export import make_workdir

import mend_jax
from mend_jax.cli.errors import UserError
from mend_jax.data.templates import TEMPLATES
from mend_jax.interchange import export, trained
from mend_jax.prefixes import Chunked

torch = pytest.importorskip("torch")

DEMOS = [("a great film", "positive"), ("dull", "negative")]
KINDS = {
    "distiller": {},
    "one chunk a demonstration": {"prefix.kind": "chunked", "prefix.chunk_demos": 1, "data.max_demo_tokens": 50},
    "mean": {"prefix.kind": "chunked", "prefix.join": "mean", "prefix.chunk_demos": 1, "data.max_demo_tokens": 50},
    "soft prompt": {"prefix.kind": "soft_prompt"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of the LLM and of the backbone."""
    from tokenizers import Tokenizer, processors

    made = []
    for name, width in (("llm", 32), ("backbone", 16)):
        folder = tmp_path_factory.mktemp("models") / name
        tokenizer_files.save_model_folder(folder, "byte", tokenizer_files.GPT2 | {"n_embd": width}, seed=width)
        file = str(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(file)
        begin = "<|endoftext|>"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
        tokenizer.save(file)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": begin}))
        made.append(folder)
    ids = [tokenizer_files.load(made[0])(text).input_ids for text in ("I", " I")]
    assert ids[0][0] == ids[1][0] == 260 and ids[0] != ids[1]
    return made


@pytest.fixture(scope="module")
def llm(folders):
    model = mend_jax.load_llm(folders[0])
    assert model.config.vocab_size == 261
    return model


def run_card(folder, llm_folder):
    """The names that the card's snippet leaves, given those that its text says are there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [_, snippet] = (folder / "README.md").read_text().split("```python\n")
    names = {"folder": str(folder)}
    if llm_folder is not None:
        names["llm"] = AutoModelForCausalLM.from_pretrained(llm_folder).eval()
        names["tokenizer"] = AutoTokenizer.from_pretrained(llm_folder)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("sys.path", [*sys.path])
        patch.delitem(sys.modules, "mend_distiller", raising=False)
        exec(snippet.split("```")[0], names)
    return names


def run_line(folder, llm_folder):
    """The prefix that the card's line for JAX makes."""
    [line] = re.findall(r"^In JAX: `(.+)`\.$", (folder / "README.md").read_text(), re.MULTILINE)
    return eval(line, {"mend_jax": mend_jax, "folder": folder, "llm_folder": llm_folder, "demos": DEMOS})


def assert_same_scores(llm, prefix, template, logits):
    """Of every token as an answer of its own, behind the query that the cards show."""
    answers = [[token] for token in range(llm.config.vocab_size)]
    ours = mend_jax.score_options(llm, prefix, "I loved it", answers, template)
    np.testing.assert_allclose(ours, logits[0, -1].log_softmax(-1).numpy(), atol=1e-4)


@pytest.mark.parametrize("template", ["space", "newline", "qa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_snippet_of_a_prefixs_card_gives_our_scores(kind, template, llm, folders, tmp_path):
    run = make_workdir(tmp_path / "run", llm, *folders, **{"data.template": template, **KINDS[kind]})
    export.export(run, tmp_path / "out")
    names, model = run_card(tmp_path / "out", folders[0]), trained.load_trained(run, llm)
    prefix = model.distill(DEMOS)
    assert model.template == trained.read_trained(tmp_path / "out").template == TEMPLATES[template]
    assert names["vectors"].shape == prefix.embeds.shape
    assert prefix.embeds.shape[1] == (12 if kind == "one chunk a demonstration" else 6)
    np.testing.assert_allclose(names["vectors"], prefix.embeds, atol=1e-5)
    assert_same_scores(llm, prefix, TEMPLATES[template], names["logits"])
    line = run_line(tmp_path / "out", folders[0])
    np.testing.assert_allclose(line.embeds, prefix.embeds, atol=1e-6)


@pytest.mark.parametrize("template", ["space", "newline", "qa"])
@pytest.mark.slow
def test_the_snippet_of_an_llms_card_gives_our_scores(template, llm, folders, tmp_path):
    run = make_workdir(tmp_path / "run", llm, *folders, llm.params, stage="lm", **{"data.template": template})
    export.export(run, tmp_path / "out")
    ours = mend_jax.load_llm(tmp_path / "out")
    prefix = mend_jax.demonstrations_prefix(ours, DEMOS, TEMPLATES[template])
    assert_same_scores(ours, prefix, TEMPLATES[template], run_card(tmp_path / "out", None)["logits"])


@pytest.mark.parametrize("bos", ["auto", "true"])
@pytest.mark.parametrize("kind", ["distiller", "soft prompt", "lm"])
@pytest.mark.slow
def test_the_snippet_puts_what_training_put_before_everything(kind, bos, llm, folders, tmp_path):
    """And what was trained behind a BOS is refused by an LLM that reads without, from the workdir and the export."""
    fields = {"stage": "lm"} if kind == "lm" else KINDS[kind]
    params = llm.params if kind == "lm" else None
    run = make_workdir(tmp_path / "run", llm, *folders, params, **{"data.bos": bos, **fields})
    export.export(run, tmp_path / "out")
    logits = run_card(tmp_path / "out", None if kind == "lm" else folders[0])["logits"]
    if kind == "lm":
        reads = mend_jax.load_llm(tmp_path / "out", bos=bos)
        assert_same_scores(reads, mend_jax.demonstrations_prefix(reads, DEMOS), " ", logits)
        return
    reads = mend_jax.load_llm(folders[0], bos=bos)
    for path in (run, tmp_path / "out"):
        with pytest.raises(
            UserError, match=f"stands behind the LLM's BOS, which .* --config.data.bos={bos}, or load_llm"
        ):
            trained.load_trained(path, llm)
        model = trained.load_trained(path, reads)
        prefix = model.distill(DEMOS)
        assert_same_scores(reads, prefix, " ", logits)
    assert_same_scores(reads, run_line(tmp_path / "out", folders[0]), " ", logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert kind != "soft prompt" or f"FOLDER --config.data.bos={bos}` scores" in card


@pytest.mark.parametrize("join", ["concat", "mean"])
@pytest.mark.parametrize("demos, tokens", [(1, 30), (3, 30), (16, 12), (16, 94)])
@pytest.mark.slow
def test_pytorch_reads_in_the_same_chunks(join, demos, tokens, llm, folders, tmp_path):
    """As texts and as ids, in chunks that demonstrations or that tokens fill."""
    fields = {
        "prefix.kind": "chunked",
        "prefix.join": join,
        "prefix.chunk_demos": demos,
        "data.max_demo_tokens": tokens,
    }
    run = make_workdir(tmp_path / "run", llm, *folders, **fields)
    export.export(run, tmp_path / "out")
    model, theirs = trained.read_trained(run), exported_module(tmp_path / "out")
    assert isinstance(model, Chunked)
    pairs = [(f"w{i}" * (i % 3), "w12") for i in range(9)]
    ids = [np.random.randint(0, 261, size).tolist() for size in (3, 12, 1, 1, 9, 2, 5, 5, 7)]
    for given in (pairs, ids, ids[:1], ids[1]):
        ours = model.distill(given).embeds
        assert ours.shape == theirs.distill(given).shape
        np.testing.assert_allclose(theirs.distill(given), ours, atol=1e-5)
    with pytest.raises(ValueError, match=f"demonstration 1 has 95 tokens, but a chunk holds {tokens}"):
        theirs.distill([[1], [2] * 95])


def exported_module(folder):
    names = {"__name__": "mend_distiller"}
    exec((folder / "mend_distiller.py").read_text(), names)
    return names["MendDistiller"].from_pretrained(folder)


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, ["| began with | backbone |", "| loss | 1.0 L_pred + 1.0 L_distill |"]),
        ({"loss.mix": 0.3}, ["L_distill |"]),  # which the paper's objective does not read
        ({"loss.temperature": 2.0}, ["L_distill (loss.objective=forward_kl, loss.temperature=2.0, loss.mix=0.5, "]),
        (
            {"stage": "pretrain", "loss.objective": "skewed_kl", "loss.mix": 0.1},
            [
                "1.0 L_distill (loss.objective=skewed_kl, loss.temperature=1.0, loss.mix=0.1, loss.top_k=64) + 0.0 L_CLM |"
            ],
        ),
        ({"loss.kd": 0.0, "loss.objective": "skewed_kl"}, ["| loss | 1.0 L_pred + 0.0 L_distill |"]),
        ({"prefix.start_from": "/home/me/runs/first", **KINDS["soft prompt"]}, ["| began with | first |"]),
    ],
)
def test_the_card_names_start_and_objective(fields, rows, llm, folders, tmp_path):
    run = make_workdir(tmp_path / "run", llm, *folders, **fields)
    export.export(run, tmp_path / "out")
    card = re.sub(" +", " ", (tmp_path / "out" / "README.md").read_text())  # columns are aligned
    assert all(row in card for row in rows)


def test_a_soft_prompt_began_with_no_backbone(llm, folders, tmp_path):
    export.export(make_workdir(tmp_path / "run", llm, *folders, **KINDS["soft prompt"]), tmp_path / "out")
    assert "began with" not in (tmp_path / "out" / "README.md").read_text()
