"""The snippets that exported cards print, run as printed, against our own scores; the PyTorch module of chunks.

The tokenizer is of GPT-2's kind, where " I" and "I" differ, and begins texts with a special token unless told not to.
"""

import ast
import json
import re
import sys

import numpy as np
import pytest
import tokenizer_files
from facts import says, states
from test_export import make_config, make_workdir

import mend_jax
from configs import base
from mend_jax.data.templates import TEMPLATES
from mend_jax.interchange import export, model_card, trained
from mend_jax.prefixes import Chunked, Distiller

torch = pytest.importorskip("torch")

DEMOS = [("a great film", "positive"), ("dull", "negative")]
LLMS_EMBEDDINGS, RESIDUAL = "reads with the LLM's embeddings", "added to the LLM's embeddings"
KINDS = {
    "distiller": {},
    LLMS_EMBEDDINGS: {"prefix.train_embeddings": False},  # and its backbone is the LLM
    RESIDUAL: {"prefix.train_embeddings": False, "prefix.residual": True},
    "added behind a projection": {
        "prefix.train_embeddings": False,
        "prefix.residual": True,
        "prefix.projection": "linear",
    },
    "residual in chunks": {
        "prefix.train_embeddings": False,
        "prefix.residual": True,
        "prefix.kind": "chunked",
        "prefix.chunk_demos": 1,
        "prefix.chunk_tokens": 50,
    },
    "one chunk a demonstration": {"prefix.kind": "chunked", "prefix.chunk_demos": 1, "data.max_demo_tokens": 50},
    "mean": {"prefix.kind": "chunked", "prefix.join": "mean", "prefix.chunk_demos": 1, "data.max_demo_tokens": 50},
    "soft prompt": {"prefix.kind": "soft_prompt"},
}


def of_llm(kind: str) -> bool:
    """Whether its backbone must be the LLM."""
    return "prefix.train_embeddings" in KINDS[kind]


# Each with one template at least, the four of them with the distiller.
CASES = [
    *((kind, template) for kind in KINDS if not of_llm(kind) for template in ("space", "newline", "qa")),
    *((kind, "question") for kind in KINDS if kind == "distiller" or of_llm(kind)),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of the LLM and of the backbone."""
    return models(tmp_path_factory.mktemp("gpt2"), tokenizer_files.GPT2, "n_embd")


@pytest.fixture(scope="module")
def t5_folders(tmp_path_factory):
    """The same of T5's family."""
    return models(tmp_path_factory.mktemp("t5"), tokenizer_files.T5, "d_model")


def models(parent, fields, width_field):
    from tokenizers import Tokenizer, processors

    made = []
    for name, width in (("llm", 32), ("backbone", 16)):
        folder = parent / name
        tokenizer_files.save_model_folder(folder, "byte", fields | {width_field: width}, seed=width)
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


def run_card(folder, llm_folder, llm_class="AutoModelForCausalLM", device="cpu"):
    """The names that the card's snippet leaves, given those that its text says are there."""
    import transformers

    [_, snippet] = (folder / "README.md").read_text().split("```python\n")
    names = {"folder": str(folder)}
    if llm_folder is not None:
        names["llm"] = getattr(transformers, llm_class).from_pretrained(llm_folder).eval().to(device)
        names["tokenizer"] = transformers.AutoTokenizer.from_pretrained(llm_folder)
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


@pytest.mark.parametrize(("kind", "template"), CASES)
@pytest.mark.slow
def test_the_snippet_of_a_prefixs_card_gives_our_scores(kind, template, llm, folders, tmp_path):
    folder, backbone = folders
    backbone = folder if of_llm(kind) else backbone
    run = make_workdir(tmp_path / "run", llm, folder, backbone, **{"data.template": template, **KINDS[kind]})
    prefix = assert_the_snippet_gives_our_scores(run, tmp_path / "out", llm, folder, template)
    if kind == "distiller":
        module = exported_module(tmp_path / "out")
        assert module.first_ids(mend_jax.load_llm(folder).tokenizer).shape == (1, 0)
    assert prefix.embeds.shape[1] == (12 if "chunk" in kind else 6)
    if kind != "soft prompt":
        [said] = re.findall(
            r"distill\(.+\)  # (\(1, .+\))$", (tmp_path / "out" / "README.md").read_text(), re.MULTILINE
        )
        assert ast.literal_eval(said) == prefix.embeds.shape


@pytest.mark.parametrize(
    ("kind", "template", "moved"),
    [("distiller", "question", False), ("soft prompt", "space", False), ("soft prompt", "space", True)],
)
@pytest.mark.slow
def test_the_snippet_for_an_encoder_decoder_gives_our_scores(kind, template, moved, t5_folders, tmp_path):
    """Also where the LLM has moved since the training, so that the export cannot see what it is."""
    llm = mend_jax.load_llm(t5_folders[0])
    fields = {"llm.path": str(tmp_path / "moved")} if moved else {}
    run = make_workdir(tmp_path / "run", llm, *t5_folders, **fields, **{"data.template": template, **KINDS[kind]})
    out = tmp_path / "out"
    assert_the_snippet_gives_our_scores(run, out, llm, t5_folders[0], template, "T5ForConditionalGeneration")
    assert ("if llm.config.is_encoder_decoder" in (out / "README.md").read_text()) == moved


def assert_the_snippet_gives_our_scores(run, out, llm, llm_folder, template, llm_class="AutoModelForCausalLM"):
    """Of the card that `run` is exported with; returns the prefix that the workdir's model makes."""
    export.export(run, out)
    names, model = run_card(out, llm_folder, llm_class), trained.load_trained(run, llm)
    prefix = model.distill(DEMOS)
    assert model.template == trained.read_trained(out).template == TEMPLATES[template]
    assert names["vectors"].shape == prefix.embeds.shape
    np.testing.assert_allclose(names["vectors"], prefix.embeds, atol=1e-5)
    assert_same_scores(llm, prefix, TEMPLATES[template], names["logits"])
    np.testing.assert_allclose(run_line(out, llm_folder).embeds, prefix.embeds, atol=1e-6)
    return prefix


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """The folder of an LLM whose tokenizer transformers reads otherwise than we do: " I" as an empty word and a word."""
    folder = tmp_path_factory.mktemp("spaced") / "llm"
    return tokenizer_files.save_model_folder(folder, "spaced", tokenizer_files.GPT2 | {"n_embd": 32}, seed=4)


@pytest.mark.parametrize("kind", ["distiller", LLMS_EMBEDDINGS, "residual in chunks", "soft prompt"])
@pytest.mark.slow
def test_the_snippet_reads_no_empty_word_before_a_space(kind, spaced, folders, tmp_path):
    """With the LLM's own tokenizer as its folder has it, beside a backbone with another one too."""
    llm = mend_jax.load_llm(spaced)
    assert len(tokenizer_files.load(spaced)(" I").input_ids) == 2 and len(llm.tokenizer(" I").input_ids) == 1
    backbone = spaced if of_llm(kind) else folders[1]
    run = make_workdir(tmp_path / "run", llm, spaced, backbone, **KINDS[kind])
    assert_the_snippet_gives_our_scores(run, tmp_path / "out", llm, spaced, "space")
    if kind != "soft prompt":
        return
    again = trained.load_trained(tmp_path / "out", llm)  # and what is written from the folder holds the tokenizer too
    again.write(tmp_path, "float32")
    assert len(tokenizer_files.load(tmp_path)(" I").input_ids) == 1


@pytest.mark.slow
def test_an_exported_llm_reads_no_empty_word_before_a_space(spaced, tmp_path):
    llm = mend_jax.load_llm(spaced)
    run = make_workdir(tmp_path / "run", llm, spaced, spaced, llm.params, stage="lm")
    export.export(run, tmp_path / "out")
    ours = mend_jax.load_llm(tmp_path / "out")
    prefix = mend_jax.demonstrations_prefix(ours, DEMOS)
    assert_same_scores(ours, prefix, "space", run_card(tmp_path / "out", None)["logits"])


@pytest.mark.parametrize("kind", ["distiller", RESIDUAL, "soft prompt"])
@pytest.mark.slow
def test_the_snippet_runs_with_an_llm_in_bfloat16_or_on_another_device(kind, folders, tmp_path, monkeypatch):
    """ "meta" is a device without numbers; the vectors themselves are made in 32 bits."""
    from transformers import AutoModelForCausalLM

    folder, backbone = folders
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path / "llm")
    tokenizer_files.load(folder).save_pretrained(tmp_path / "llm")
    llm = mend_jax.load_llm(tmp_path / "llm")
    backbone = tmp_path / "llm" if of_llm(kind) else backbone
    fields = KINDS[kind] | {"data.bos": "auto" if kind == "distiller" else "false"}
    run = make_workdir(tmp_path / "run", llm, tmp_path / "llm", backbone, **fields)
    export.export(run, tmp_path / "out")
    names = run_card(tmp_path / "out", tmp_path / "llm")
    assert names["llm"].dtype == names["logits"].dtype == torch.bfloat16
    reads = mend_jax.load_llm(tmp_path / "llm", bos=fields["data.bos"])
    prefix = trained.load_trained(run, reads).distill(DEMOS)
    np.testing.assert_allclose(names["vectors"], prefix.embeds, atol=1e-5)
    ours = mend_jax.score_options(reads, prefix, "I loved it", [[token] for token in range(261)], "space")
    np.testing.assert_allclose(ours, names["logits"][0, -1].float().log_softmax(-1), atol=0.05)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)  # it reads numbers
    moved = run_card(tmp_path / "out", tmp_path / "llm", device="meta")
    assert moved["logits"].shape == names["logits"].shape and moved["logits"].device.type == "meta"


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
    names = run_card(tmp_path / "out", None if kind == "lm" else folders[0])
    logits = names["logits"]
    if kind == "distiller":
        begin = names["tokenizer"].bos_token_id
        assert names["distiller"].first_ids(names["tokenizer"]).tolist() == [[begin]]
    if kind == "lm":
        reads = mend_jax.load_llm(tmp_path / "out", bos=bos)
        assert_same_scores(reads, mend_jax.demonstrations_prefix(reads, DEMOS), " ", logits)
        return
    reads = mend_jax.load_llm(folders[0], bos=bos)
    for path in (run, tmp_path / "out"):
        with says(path, "BOS", f"--config.data.bos={bos}", "load_llm"):
            trained.load_trained(path, llm)
        model = trained.load_trained(path, reads)
        prefix = model.distill(DEMOS)
        assert_same_scores(reads, prefix, " ", logits)
    assert_same_scores(reads, run_line(tmp_path / "out", folders[0]), " ", logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert kind != "soft prompt" or f"FOLDER --config.data.bos={bos}` scores" in card


def test_the_card_says_how_much_is_read(llm, folders):
    """One context: the backbone's positions but for the vectors; chunks: any number, each of so many tokens."""
    made = Distiller.init(make_config(*folders), llm, seed=0)
    said = made.card("gpt2", "")[1]
    assert "into 6 vectors that" in said and "reads at most 94 demonstration tokens." in said
    for join, vectors in (("concat", "into 6 vectors of each chunk that"), ("mean", "into 6 vectors that")):
        said = Chunked.around(made, join, 2, 50).card("gpt2", "")[1]
        assert vectors in said and "reads any number of demonstration tokens, 50 in each chunk at most." in said
        assert "in chunks of at most 2 demonstrations and 50 tokens" in said


def test_the_card_of_demonstrations_read_one_by_one_speaks_of_them_and_not_of_chunks(llm, folders):
    """The vectors of its example are counted too: it has two demonstrations."""
    made = Distiller.init(make_config(*folders), llm, seed=0)
    said = Chunked.around(made, "concat", 1, 50).card("gpt2", "")[1]
    assert "Turns each demonstration (x, y) into 6 vectors that" in said and "in its place" in said
    assert "one by one, each of at most 50 tokens: 6 vectors for each, one after another." in said
    assert "# (1, 12, 32)" in said and "chunk" not in said
    said = Chunked.around(made, "mean", 1, 50).card("gpt2", "")[1]
    assert "Turns demonstrations (x, y) into 6 vectors that" in said and "# (1, 6, 32)" in said
    assert "one by one, each of at most 50 tokens: the mean of their vectors." in said and "chunk" not in said


def test_a_card_says_one_vector(llm, folders):
    config = make_config(*folders, **{"prefix.length": 1})
    made = Distiller.init(config, llm, seed=0)
    for model in (made, Chunked.around(made, "concat", 1, 50), Chunked.around(made, "concat", 2, 50)):
        said = model.card("gpt2", "")[1]
        assert "into 1 vector" in said and not re.search(r"\b1 \w+s\b", said)


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
    with pytest.warns(UserWarning) as said:
        found = theirs.distill([[1], [2] * 95])
    states(str(said[0].message), "demonstration 2", "95 tokens", tokens)
    np.testing.assert_allclose(found, theirs.distill([[1]]), atol=1e-6)


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
        ({"loss.kd_tokens": "outputs"}, ["1.0 L_distill (loss.kd_tokens=outputs) |"]),
        ({"stage": "pretrain", "loss.kd_tokens": "outputs"}, ["1.0 L_distill + 0.0 L_CLM |"]),
        ({"loss.kd": 0.0, "loss.objective": "skewed_kl"}, ["| loss | 1.0 L_pred + 0.0 L_distill |"]),
        ({"prefix.start_from": "/home/me/runs/first", **KINDS["soft prompt"]}, ["| began with | first |"]),
        ({"data.symbols": 0.5}, ["16 demonstrations per context, 50% of them with words for labels |"]),
    ],
)
def test_the_card_names_start_and_objective(fields, rows, llm, folders, tmp_path):
    run = make_workdir(tmp_path / "run", llm, *folders, **fields)
    export.export(run, tmp_path / "out")
    card = re.sub(" +", " ", (tmp_path / "out" / "README.md").read_text())  # columns are aligned
    assert all(row in card for row in rows)


def test_the_card_of_an_llm_says_what_it_was_trained_to_predict(tmp_path):
    config = base.get_config()
    config.stage, config.data.symbols, config.loss.clm_tokens = "lm", 0.5, "outputs"
    card = re.sub(" +", " ", model_card.llm_card(config.to_dict(), {"step": 3}, tmp_path))
    assert "50% of them with words for labels |" in card and "| loss | cross-entropy of the outputs |" in card
    config.data.symbols, config.loss.clm_tokens = 0.0, "all"
    card = model_card.llm_card(config.to_dict(), {"step": 3}, tmp_path)
    assert "words for labels" not in card and "| loss" not in card


def test_a_soft_prompt_began_with_no_backbone(llm, folders, tmp_path):
    export.export(make_workdir(tmp_path / "run", llm, *folders, **KINDS["soft prompt"]), tmp_path / "out")
    assert "began with" not in (tmp_path / "out" / "README.md").read_text()
