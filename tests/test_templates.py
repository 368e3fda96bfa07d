"""Templates: the same texts around x and y wherever examples are read, and the old separators as they ever were.

The byte tokenizer gives back every text that it reads; the others do not know the templates' words.
"""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizer_files
from data_files import make_world, tiny_config
from facts import says, states
from test_cards import exported_module
from test_export import make_workdir

import mend_jax
from mend_jax import evaluate, train
from mend_jax.cli.settings import check
from mend_jax.data import metaicl, prepared
from mend_jax.data.batches import make_batches
from mend_jax.data.evaluation import load_tasks, read_twice
from mend_jax.data.readers import Readers
from mend_jax.data.rows.windows import check_windows
from mend_jax.data.stores import TaskStore
from mend_jax.data.templates import TEMPLATES, Template, chosen
from mend_jax.data.tokenize import fingerprint, tokenizer_text
from mend_jax.interchange import export, trained
from mend_jax.models import weights
from mend_jax.prefixes import Chunked, SoftPrompt
from mend_jax.run import reporting

SEPARATORS, OTHERS = {"space": " ", "newline": "\n"}, ("qa", "question")
PAIRS = [("w1 w2", "w50"), ("w3", "w51")]
KINDS = {
    "distiller": {},
    "chunked": {"prefix.kind": "chunked"},
    "soft_prompt": {"prefix.kind": "soft_prompt"},
    "lm": {"stage": "lm"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of an LLM and of a backbone, both with the byte tokenizer."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"llm": 32, "backbone": 16}
    make = tokenizer_files.save_model_folder
    return [
        make(root / name, "byte", tokenizer_files.GPT2 | {"n_embd": width}, seed=width) for name, width in sizes.items()
    ]


@pytest.fixture(scope="module")
def llm(folders):
    return mend_jax.load_llm(folders[0])


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def tasks_of(world, tokenizer, template, split="test", **data):
    reads = SimpleNamespace(tokenizer=tokenizer, path="llm", config=SimpleNamespace(vocab_size=len(tokenizer)))
    return load_tasks(tiny_config(world, "finetune", template=template, **data), reads, split)[0]


def examples_of(world, name):
    return metaicl.read_file(world / "metaicl" / "data" / name)


# Texts


def test_the_pieces_of_an_example():
    assert TEMPLATES["qa"].example("a", "b") == ["\n\nInput: a", "\nOutput:", " b"]
    assert TEMPLATES["question"].query("a") == ["\n\nQuestion: a", "\nAnswer:"]
    for name, text in SEPARATORS.items():
        assert TEMPLATES[name].example("a", "b") == [text + "a", text + "b"] and TEMPLATES[name].separator == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_evaluation_reads_these_texts(name, world, tokenizers):
    read, template = tokenizers["byte"].decode, TEMPLATES[name]
    for task in tasks_of(world, tokenizers["byte"], name, max_input_tokens=99):
        rows = examples_of(world, f"t/t_4_{task.seed}_train.jsonl")
        said = "".join(read(part) for pair in task.demos for part in pair)
        assert said == "".join(template.before + e.input + template.between + template.answer + e.output for e in rows)
        asked = examples_of(world, f"t/t_4_{task.seed}_test.jsonl")
        for item, e in zip(task.items, asked, strict=True):
            assert read(item.x_tokens) == template.before + e.input + template.between
            assert [read(option) for option in item.options_tokens] == [template.answer + o for o in e.options]


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_reads_these_texts(name, world, tokenizers):
    """Contexts, queries with their y, and the sequences of stage "lm"."""
    read, template = tokenizers["byte"].decode, TEMPLATES[name]
    data = {"max_input_tokens": 99, "max_demo_tokens": 900, "demo_buckets": (900,), "query_buckets": (99,)}
    config = tiny_config(world, "finetune", template=name, **data)
    made = make_batches(config, Readers(tokenizers["byte"], 1000, 1000))
    batch, rows = made[0], {t: examples_of(world, f"{t}/{t}_16384_100_train.jsonl") for t in "abc"}

    def text(e):
        return "".join(template.example(e.input, e.output))

    for row, number in enumerate(batch.ids):
        task, shown, [asked], *_ = made.rows.draw(int(number))
        e, start, length = rows["abc"[task]][asked], batch.query.target_start[row], batch.query.length[row]
        assert read(batch.demos[row, : batch.demos_length[row]]) == "".join(text(rows["abc"[task]][i]) for i in shown)
        assert read(batch.query.tokens[row, :start]) == template.before + e.input + template.between
        assert read(batch.query.tokens[row, start:length]) == template.answer + e.output
    config.stage, config.data.text_share, config.data.sequence_length = "lm", 0.0, 400
    made = make_batches(config, Readers(tokenizers["byte"], 1000))
    for row, number in enumerate(made[0].ids):
        task, shown, _ = made.rows.draw(int(number))
        sequence = made[0].query.tokens[row, : made[0].query.length[row]]
        assert read(sequence) == "".join(text(rows["abc"[task]][i]) for i in shown)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prepared_and_evaluated_tokens_are_the_same(name, world, tokenizers):
    """Where inputs are cut too: what stands between x and y is behind the cut."""
    tokenizer, template, limit = tokenizers["byte"], TEMPLATES[name], 6
    config = tiny_config(world, "finetune", template=name, max_input_tokens=limit)
    manifest = prepared.prepare_tasks(config, tokenizer, ["t"], "dev")
    store = TaskStore(manifest["shards"][0], manifest["dtype"], manifest["between"])
    tasks = tasks_of(world, tokenizer, name, "dev", max_input_tokens=limit)
    rows = [e for seed in (13, 21) for e in examples_of(world, f"t/t_4_{seed}_dev.jsonl")]
    cuts = 0
    for i, (item, e) in enumerate(zip([item for task in tasks for item in task.items], rows, strict=True)):
        x, y = store.example(i, limit)
        whole = ids(tokenizer, template.before + e.input)
        cuts += len(whole) > limit
        assert item.x_tokens.tolist() == x.tolist() == whole[:limit] + ids(tokenizer, template.between)
        assert item.options_tokens[item.label].tolist() == y.tolist() == ids(tokenizer, template.answer + e.output)
        assert store.cut_lengths(limit)[i] == len(x) + len(y) == store.shown_lengths(store.shared_inputs(limit))[i, 0]
    assert cuts


@pytest.mark.parametrize("llm_kind, own_kind", [("byte", "word"), ("word", "byte"), ("piece", "byte")])
def test_two_tokenizers_read_what_each_makes_of_the_texts(llm_kind, own_kind, world, tokenizers):
    pair, template = (tokenizers[llm_kind], tokenizers[own_kind]), TEMPLATES["qa"]
    data = {"max_demo_tokens": 900, "demo_buckets": (900,), "query_buckets": (99,)}
    for limit in (99, 9):
        config = tiny_config(world, "finetune", template="qa", max_input_tokens=limit, **data)
        made = make_batches(config, Readers(pair[0], 1000, 1000, pair[1]))
        batch = made[0]
        for row, number in enumerate(batch.ids):
            task, shown, [asked], *_ = made.rows.draw(int(number))
            rows = examples_of(world, f"{'abc'[task]}/{'abc'[task]}_16384_100_train.jsonl")
            chosen_rows = [rows[i] for i in shown]
            texts = tuple((template.before + e.input, template.answer + e.output) for e in chosen_rows)
            wanted = [
                [int(i) for example in own for part in example for i in part]
                for own in read_twice(texts, pair, limit, template.between)
            ]
            found = batch.teacher_demos[row, : batch.teacher_demos_length[row]], batch.demos[row]
            assert [found[0].tolist(), found[1][: batch.demos_length[row]].tolist()] == wanted
            assert len(found[0]) == made.rows.teacher_length(int(number)) and len(shown) == 4
            for tokenizer, own in zip(pair, wanted, strict=True):
                pieces = [[ids(tokenizer, p) for p in template.example(e.input, e.output)] for e in chosen_rows]
                whole = [i for example in pieces for piece in example for i in piece]
                assert own == whole if limit == 99 else len(own) < len(whole)
            x = ids(pair[0], template.before + rows[asked].input)[:limit] + ids(pair[0], template.between)
            assert batch.query.tokens[row, : batch.query.target_start[row]].tolist() == x


# As it was: hashes of the version before there were templates of more than a separator


@pytest.mark.parametrize("name, digest", [("space", "6e4d5e2180e5e9af"), ("newline", "f593b71952e988b0")])
def test_separators_give_the_tokens_that_they_gave(name, digest, world, tokenizers):
    read, own, found = tokenizers["byte"], tokenizers["word"], hashlib.sha256()

    def add(array):
        found.update(str((array.shape, array.dtype.str)).encode() + array.tobytes())

    for stage, other in (("finetune", None), ("finetune", own), ("lm", None)):
        made = make_batches(tiny_config(world, stage, template=name), Readers(read, 96, 80, other))
        for step in range(4):
            batch = made[step]
            query = batch.query
            for array in (batch.demos, batch.demos_length, query.tokens, query.length, query.target_start):
                add(array)
            if other is not None:
                add(batch.teacher_demos)
    for task in tasks_of(world, read, name):
        items = [(item.x_tokens, *item.options_tokens) for item in task.items]
        twice = read_twice(task.texts, (read, own), 6)
        for part in (*task.demos, *items, *twice[0], *twice[1]):
            for array in part:
                add(array)
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("name, text", SEPARATORS.items())
def test_separators_find_the_shards_of_before(name, text, world, tokenizers):
    config, pair = tiny_config(world, "finetune", template=name), (tokenizers["byte"], tokenizers["word"])
    texts = [tokenizer_text(tokenizer) for tokenizer in pair]
    for count in (1, 2):
        manifest = prepared.prepare_tasks(config, pair[0], ["a"], distiller_tokenizer=pair[1] if count == 2 else None)
        key = fingerprint(1, texts[0], text, "uint16", *texts[1:count])
        assert f"/shards-{key}/" in manifest["shards"][0]["path"] and manifest["between"] == [[]] * count


def test_every_template_has_shards_of_its_own(world, tokenizers):
    paths = set()
    for name in TEMPLATES:
        config = tiny_config(world, "finetune", template=name)
        paths.add(prepared.prepare_tasks(config, tokenizers["byte"], ["a"])["shards"][0]["path"])
    assert len(paths) == len(TEMPLATES)


def exported(tmp_path, llm, folders, kind, name):
    params = llm.params if kind == "lm" else None
    run = make_workdir(tmp_path / "run", llm, *folders, params, **{"data.template": name, **KINDS[kind]})
    export.export(run, tmp_path / "out")
    return run, tmp_path / "out"


@pytest.mark.parametrize(
    "name, kind, digest",
    [
        ("space", "distiller", "7e9704f5782f1d59"),
        ("space", "chunked", "4d0353ff887c171e"),
        ("space", "soft_prompt", "64c4af332216e3e5"),
        ("newline", "distiller", "9d79cff858585960"),
        ("newline", "chunked", "ef153f28d4f57abe"),
        ("newline", "soft_prompt", "baf782a88e4d68e2"),
    ],
)
@pytest.mark.slow
def test_separators_give_the_settings_that_they_gave(name, kind, digest, llm, folders, tmp_path):
    """What a program reads; the card's words are for people and may change."""
    _, out = exported(tmp_path, llm, folders, kind, name)
    if kind == "soft_prompt":
        said = json.dumps(weights.read_metadata(out / "soft_prompt.safetensors"), sort_keys=True)
    else:
        fields = json.loads((out / "distiller_config.json").read_text())
        assert fields.pop("max_input_tokens") > 0  # which older folders do not say
        said = json.dumps(fields, indent=2) + "\n"
    assert hashlib.sha256(said.encode()).hexdigest()[:16] == digest


# In files


@pytest.mark.parametrize("kind", ["distiller", "chunked", "soft_prompt"])
def test_the_template_stays_with_what_was_trained(kind, llm, folders, tmp_path):
    run, out = exported(tmp_path, llm, folders, kind, "qa")
    for path in (run, out):
        model = trained.load_trained(path, llm)
        assert model.template == TEMPLATES["qa"]
        with says("more than a separator", "`template`"):
            model.separator  # noqa: B018
    if kind != "soft_prompt":
        said = json.loads((out / "distiller_config.json").read_text())
        assert said["template"] == {"before": "\n\nInput: ", "between": "\nOutput:", "answer": " "}
        assert "separator" not in said


def test_the_exported_module_reads_queries_and_options(llm, folders, tmp_path):
    pytest.importorskip("torch")
    for name in ("newline", "qa"):
        (tmp_path / name).mkdir()
        _, out = exported(tmp_path / name, llm, folders, "distiller", name)
        theirs, ours, template = exported_module(out), trained.read_trained(out), TEMPLATES[name]
        np.testing.assert_allclose(theirs.distill(PAIRS), ours.distill(PAIRS).embeds, atol=1e-5)
        wanted = [i for piece in template.query("w7") for i in ids(llm.tokenizer, piece)]
        assert theirs.query_ids(llm.tokenizer, "w7").tolist() == [wanted]
        assert theirs.output_ids(llm.tokenizer, "w7").tolist() == [ids(llm.tokenizer, template.answer + "w7")]
        if name == "newline":
            assert theirs.separator == "\n"
            continue
        with pytest.raises(ValueError, match="query_ids"):
            theirs.separator  # noqa: B018


# From Python


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.slow
def test_prefixes_scores_and_losses_of_texts_are_those_of_their_tokens(name, llm, folders):
    template, read = TEMPLATES[name], llm.tokenizer
    x, y = (
        [i for piece in pieces for i in ids(read, piece)] for pieces in (template.query("w4 w5"), template.output("w6"))
    )
    demos = [i for pair in PAIRS for piece in template.example(*pair) for i in ids(read, piece)]
    shown = mend_jax.demonstrations_prefix(llm, PAIRS, template=name)
    np.testing.assert_array_equal(shown.embeds, mend_jax.demonstrations_prefix(llm, demos).embeds)
    said = mend_jax.score_options(llm, shown, "w4 w5", ["w6"], template=template)
    assert said == mend_jax.score_options(llm, shown, x, [y])
    config = tiny_config(folders[0], "finetune", template=name)
    config.prefix.backbone = str(folders[1])
    model = mend_jax.Distiller.init(config, llm, seed=0)
    losses = mend_jax.training_losses(llm, model, PAIRS, "w4 w5", "w6")
    assert losses == mend_jax.training_losses(llm, model, demos, x, y)
    np.testing.assert_array_equal(model.distill(PAIRS).embeds, model.distill(demos).embeds)
    chunked = Chunked.around(model, chunk_demos=1)
    assert [len(chunk) for chunk in chunked.chunks(PAIRS)] == [
        sum(len(ids(read, piece)) for piece in template.example(*pair)) for pair in PAIRS
    ]


@pytest.mark.parametrize("name, text", SEPARATORS.items())
def test_separators_are_given_as_before(name, text, llm):
    shown = mend_jax.demonstrations_prefix(llm, PAIRS, name)
    for arguments, keywords in (((), {"separator": text}), ((text,), {})):
        np.testing.assert_array_equal(
            mend_jax.demonstrations_prefix(llm, PAIRS, *arguments, **keywords).embeds, shown.embeds
        )
        assert mend_jax.score_options(llm, shown, "w4", ["w6"], *arguments, **keywords) == mend_jax.score_options(
            llm, shown, "w4", ["w6"], template=name
        )


@pytest.mark.slow
def test_an_encoder_decoder_reads_what_is_between_in_its_encoder(tmp_path, world):
    folder = tokenizer_files.save_model_folder(tmp_path / "t5", "byte", tokenizer_files.T5, seed=1)
    t5, template = mend_jax.load_llm(folder), TEMPLATES["qa"]
    x, y = (
        [i for p in pieces for i in ids(t5.tokenizer, p)] for pieces in (template.query("w4"), template.output("w6"))
    )
    shown = mend_jax.demonstrations_prefix(t5, PAIRS, "qa")
    assert mend_jax.score_options(t5, shown, "w4", ["w6"], "qa") == mend_jax.score_options(t5, shown, x, [y])
    batch = make_batches(
        tiny_config(world, "finetune", template="qa", max_demo_tokens=200, query_buckets=(64,)),
        Readers(t5.tokenizer, 1000, 1000, separate_targets=True),
    )[0]
    between = ids(t5.tokenizer, template.between)
    assert batch.query.input_columns == 6 + len(between) == batch.query.target_start.max()
    for tokens, start in zip(batch.query.tokens, batch.query.target_start, strict=True):
        assert tokens[start - len(between) : start].tolist() == between


@pytest.mark.slow
def test_training_and_evaluation(world, folders, tmp_path, caplog):
    c = tiny_config(world, "finetune", template="qa", cache=str(tmp_path / "cache"), max_demo_tokens=80)
    c.data.demo_buckets, c.data.query_buckets, c.data.max_input_tokens, c.data.k = (80,), (64,), 20, 4
    c.llm.path, c.prefix.backbone, c.loss.chunk = *map(str, folders), 16
    c.train.batch_size, c.train.steps, c.train.eval_every = 8, 1, 1
    assert train.train(c, tmp_path / "run") == 0
    [step, scored] = (
        [row for row in reporting.read_lines(tmp_path / "run" / "metrics.jsonl") if name in row]
        for name in ("kd", "dev_score")
    )
    assert step[0]["kd"] > 0 and np.isfinite(step[0]["loss"]) and np.isfinite(scored[0]["dev_score"])
    c.evaluate.methods, c.evaluate.seeds = ("icl", f"mend={tmp_path / 'run'}"), (13,)
    assert set(evaluate.evaluate(c, tmp_path / "scores")["methods"]) == {"icl", "mend"}
    of_templates = lambda: [message for message in caplog.messages if "template" in message]  # noqa: E731
    assert not of_templates()
    c.data.template = "newline"
    evaluate.evaluate(c, tmp_path / "others")
    states(of_templates()[0], tmp_path / "run", "newline", "lowers", "--config.data.template=qa")


# Mistakes


def test_mistakes_are_one_sentence(llm, folders, world, tmp_path):
    config = tiny_config(world, "finetune", template="qb")
    with says("data.template", "space, newline, qa, question", '"qb"', 'did you mean "qa"'):
        check(config)
    for call in (
        lambda: mend_jax.demonstrations_prefix(llm, PAIRS, "qb"),
        lambda: mend_jax.score_options(llm, mend_jax.no_prefix(1, 32), "w1", ["w2"], template="qb"),
        lambda: chosen(None, "qb"),
    ):
        with says("space, newline, qa, question", "'qb'"):
            call()
    with says("'qa'", "' '", "one of them"):
        mend_jax.demonstrations_prefix(llm, PAIRS, "qa", separator=" ")
    with says("not 3"):
        chosen(3)


def test_a_damaged_template_in_a_file_is_one_sentence(llm, folders, tmp_path):
    _, out = exported(tmp_path, llm, folders, "distiller", "qa")
    settings = json.loads((out / "distiller_config.json").read_text())
    (out / "checksums.json").unlink(missing_ok=True)  # it would already say that the file has changed
    for wrong in ({"before": "a"}, {"before": 1, "between": "", "answer": ""}, "qa", None):
        (out / "distiller_config.json").write_text(json.dumps(settings | {"template": wrong}))
        with says(out / "distiller_config.json", "export the distiller again"):
            trained.read_trained(out)
    SoftPrompt({"vectors": np.zeros((2, 32), np.float32)}, template=Template("Q ", "", "A ")).write(tmp_path)
    assert trained.read_trained(tmp_path).template == Template("Q ", "", "A ")
    tensors = {"vectors": np.zeros((2, 32), np.float32)}
    weights.write_file(tensors, tmp_path / "soft_prompt.safetensors", weights.FORMAT | {"template": "{"})
    with says(tmp_path / "soft_prompt.safetensors", "export the soft prompt again"):
        trained.read_trained(tmp_path)


def test_the_window_holds_what_is_between_too(world):
    config = tiny_config(world, "finetune", max_input_tokens=91)
    check_windows(config, SimpleNamespace(window=96))
    config.data.template = "qa"
    with says("data.max_input_tokens = 91", "less than 91"):
        check_windows(config, SimpleNamespace(window=96))
