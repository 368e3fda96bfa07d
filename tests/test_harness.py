"""lm-evaluation-harness itself, on tasks in local files: with the plain prompt its numbers are those of `--model hf`; with a
distiller the model gets the examples that the task draws, and answers as we do. Runs where the harness is installed."""

import json

import pytest
import tokenizer_files
from facts import says
from test_export import make_workdir

import mend_jax
from mend_jax import harness as command

pytest.importorskip("lm_eval")
pytest.importorskip("torch")

from lm_eval import evaluator  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mend_jax.interchange import harness as module  # noqa: E402
from mend_jax.interchange.harness import HarnessLM, evaluate_harness  # noqa: E402
from mend_jax.prefixes import Chunked  # noqa: E402

pytestmark = pytest.mark.slow
vectors_of = Chunked.vectors_of
TASKS = {
    "moods": """output_type: multiple_choice
doc_to_text: "{{input}}\\nMood:"
doc_to_choice: ["glad", "sad"]
doc_to_target: label
metric_list:
  - metric: acc
""",
    "words": """output_type: generate_until
doc_to_text: "{{input}} ->"
doc_to_target: "{{output}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of the harness, with their data beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    for split, count in (("train", 12), ("test", 5)):
        rows = [{"input": f"w{i} w{i + 1}", "label": i % 2, "output": f"w{i + 2}"} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        data = f"train: {folder / 'train.jsonl'}\n    test: {folder / 'test.jsonl'}"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    {data}\n"
        (folder / f"{name}.yaml").write_text(
            f"{head}training_split: train\nfewshot_split: train\ntest_split: test\n{text}"
        )
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, fields = tmp_path_factory.mktemp("models"), tokenizer_files.GPT2 | {"n_positions": 256}
    made = [
        tokenizer_files.save_model_folder(root / name, "byte", fields | {"n_embd": width}, seed=width)
        for name, width in {"llm": 32, "backbone": 16}.items()
    ]
    for folder in made:  # the harness asks for the end of a text
        tokenizer = tokenizer_files.load(folder)
        tokenizer.eos_token = "<|endoftext|>"
        tokenizer.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def llm(models):
    return mend_jax.load_llm(models[0])


@pytest.fixture(scope="module")
def distiller(models, llm, tmp_path_factory):
    fields = {"data.template": "qa", "prefix.length": 4}
    return mend_jax.load_distiller(make_workdir(tmp_path_factory.mktemp("run"), llm, *models, **fields), llm)


OPTIONS = {"bootstrap_iters": 0, "random_seed": 0, "numpy_random_seed": 0, "fewshot_random_seed": 3}


def answers(found, task):
    """What the model answered, by document."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [[resp for [resp] in sample["resps"]] for sample in samples]


@pytest.mark.parametrize("shots", [0, 3, 12])
def test_with_the_plain_prompt_it_is_hf(shots, folder, models, llm):
    """Scores within 1e-4, whether they are the likeliest, and texts; with 12 examples the prompt is cut."""
    tasks = {"task_manager": TaskManager(include_path=str(folder)), "tasks": list(TASKS), "num_fewshot": shots}
    theirs = evaluator.simple_evaluate(
        "hf", model_args=f"pretrained={models[0]},dtype=float32,device=cpu", batch_size=2, **tasks, **OPTIONS
    )
    ours = evaluate_harness(llm, list(TASKS), include_path=str(folder), batch_size=2, num_fewshot=shots, **OPTIONS)
    for mine, wanted in zip(answers(ours, "moods"), answers(theirs, "moods"), strict=True):
        for (score, likeliest), (expected, greedy) in zip(mine, wanted, strict=True):
            assert score == pytest.approx(expected, abs=1e-4) and likeliest == greedy
    assert answers(ours, "words") == answers(theirs, "words")
    for task in TASKS:
        assert ours["results"][task] == pytest.approx(theirs["results"][task], nan_ok=True)


def test_vectors_are_those_of_the_tasks_examples(folder, llm, distiller):
    """The examples are drawn as in the plain prompt; scores and texts are ours after `distill`."""
    given = {"include_path": str(folder), "num_fewshot": 3, **OPTIONS}
    plain, ours = (
        evaluate_harness(llm, ["moods", "words"], **given),
        evaluate_harness(llm, ["moods", "words"], distiller, **given),
    )
    for task, options in (("moods", [" glad", " sad"]), ("words", None)):
        samples = zip(
            *(sorted(found["samples"][task], key=lambda s: s["doc_id"]) for found in (plain, ours)), strict=True
        )
        for prompt, sample in samples:
            shown, question = prompt["arguments"][0][0], sample["arguments"][0][0]
            assert shown.endswith(question) and "\n\n" not in question
            demos = [part.rsplit(":" if options else "->", 1) for part in shown.split("\n\n")[:3]]
            demos = [(x + (":" if options else "->"), y.strip()) for x, y in demos]
            vectors = distiller.distill(demos)
            if options:
                wanted = mend_jax.score_options(llm, vectors, question, ["glad", "sad"], distiller.template)
                lengths = [len(llm.tokenizer(o, add_special_tokens=False)["input_ids"]) for o in options]
                found = [score for [[score, _]] in sample["resps"]]
                assert found == pytest.approx([w * n for w, n in zip(wanted, lengths, strict=True)], abs=1e-3)
            else:
                said = mend_jax.generate_text(llm, vectors, question, 5, template=distiller.template, stop=["\n\n"])
                assert sample["resps"] == [[said.text]]


def test_a_document_without_examples_is_zero_shot(folder, llm, distiller):
    found = evaluate_harness(llm, ["moods"], distiller, include_path=str(folder), num_fewshot=0, **OPTIONS)
    for sample in found["samples"]["moods"]:
        question = sample["arguments"][0][0]
        nothing = mend_jax.no_prefix(1, llm.config.width)
        glad, sad = mend_jax.score_options(llm, nothing, question, ["glad", "sad"], distiller.template)
        assert (sample["resps"][0][0][0] > sample["resps"][1][0][0]) == (5 * glad > 4 * sad) or abs(
            5 * glad - 4 * sad
        ) < 1e-3


def test_whole_texts_are_scored_window_by_window(llm, models):
    from lm_eval.models.huggingface import HFLM

    text = " ".join(f"w{i % 60}" for i in range(200))
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0), Instance("loglikelihood_rolling", {}, ("w1 w2",), 0)]
    theirs = HFLM(pretrained=str(models[0]), device="cpu", dtype="float32").loglikelihood_rolling(requests)
    assert HarnessLM(llm, batch_size=2).loglikelihood_rolling(requests) == pytest.approx(theirs, abs=2e-3)


def test_an_example_longer_than_a_chunk_is_left_out_alone(folder, llm, distiller, caplog):
    """Vectors live as long as their questions are answered, and rows are padded to their number alone."""
    model = HarnessLM(llm, Chunked.around(distiller, chunk_demos=1, chunk_tokens=30))
    docs = [{"input": f"w{i}"} for i in range(20)]
    long = ("w1 w2", "w3 " * 40)
    for i, doc in enumerate(docs):
        model.examples[id(doc)] = doc, [("w5", "w6"), *[long] * (i == 7), (f"w{i}", "w8")] if i != 3 else [long]
    asked = [Instance("loglikelihood", doc, ("w4", " w9"), 0) for doc in docs]
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        answers_of = module._answers
        patch.setattr(module, "_answers", lambda *given: rows.append(given[3].shape[0]) or answers_of(*given))
        made = []
        patch.setattr(Chunked, "vectors_of", lambda self, some: made.append(len(rows)) or vectors_of(self, some))
        found = model.loglikelihood(asked)
    assert rows == [1] * 20 and made == [0, 8, 16]  # distilled in slices, each scored before the next
    assert "Of 2 of 20 questions" in caplog.text and "2 in all" in caplog.text
    assert "Where none is read: " in caplog.text and "the distiller reads at once" in caplog.text

    def alone(prefix):
        return mend_jax.score_options(llm, prefix, "w4", ["w9"], distiller.template)[0]

    count = len(llm.tokenizer(" w9", add_special_tokens=False)["input_ids"])
    for i, prefix in ((3, mend_jax.no_prefix(1, 32)), (7, model.distiller.distill([("w5", "w6"), ("w7", "w8")]))):
        assert found[i][0] == pytest.approx(count * alone(prefix), abs=1e-3)


def test_the_command(folder, models, tmp_path, capsys):
    given = {"tasks": "moods", "llm": str(models[0]), "include_path": str(folder), "num_fewshot": 2, "limit": 2}
    command.harness(**given, out=str(tmp_path / "found.json"))
    assert "moods" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())["results"]["moods"]["alias"] == "moods"
    with says("modds", "--include_path"):
        command.harness(**given | {"tasks": "modds"})
    with says("--llm"):
        command.harness(tasks="moods")
    with says(tmp_path / "found.json" / "a.json", "--out"):  # before anything is loaded
        command.harness(**given | {"llm": "none"}, out=str(tmp_path / "found.json" / "a.json"))


def test_of_examples_longer_than_the_window_the_first_are_read(llm, distiller):
    model = HarnessLM(llm, distiller)
    examples = [("w1 w2 " * 10, f"w{i}") for i in range(12)]
    told = module.LeftOut()
    read = model._reading(examples, told).read
    assert read == tuple(range(len(read))) and 0 < len(read) < 12 and told == module.LeftOut(1, 12 - len(read))
    distiller.distill(examples[: len(read)])
    with says("tokens", distiller.window):
        distiller.distill(examples[: len(read) + 1])
    assert model._reading([("w1", "w2 " * 300)], told) is None  # its question stands alone, and the others go on
    assert (told.questions, told.examples) == (2, 13 - len(read)) and "619 tokens" in told.why
    with says("batch_size", 0):
        HarnessLM(llm, distiller, batch_size=0)
