"""Every config file loads in all its variants, and every command that is written anywhere is one that runs."""

import ast
import re
import runpy
import shlex

import pytest
from data_files import make_world, tiny_config, words, write_examples
from facts import says

from mend_jax.cli import command_line as cli
from mend_jax.cli import config_files
from mend_jax.cli.settings import METHODS, check
from mend_jax.data.metaicl import validation_seeds
from mend_jax.data.small_world import PACKAGED_MODELS
from mend_jax.experiments import methods

ROOT = config_files.ROOT
PARTITIONS = [
    "class_to_class",
    "non_class_to_class",
    "qa_to_qa",
    "non_qa_to_qa",
    "non_nli_to_nli",
    "hr_to_lr",
    "non_paraphrase_to_paraphrase",
]
VARIANTS = {
    "base": [],
    "small_world": ["quick", "pretrain", "finetune", "full", "experiments", "llm", "backbone"],
    "c4_metaicl": ["methods", "llm"],
    "smollm2_135m": ["gpu", "tokens", "cpu", "metaicl"],
    "own_llm": ["chunked", "try"],
    "gemma3_270m": ["chunked"],
    **dict.fromkeys(
        ["gpt2_large", "gpt2_xl", "t5_large", "flan_t5_xl", "opt_6_7b", "smollm2", "gemma3_1b", "llama_2_7b"],
        PARTITIONS,
    ),
}
NAMES = [f"configs/{file}.py{v and ':'}{v}" for file, variants in VARIANTS.items() for v in ["", *variants]]
TEXTS = ["README.md", "docs/*.md", "configs/*.py", "mend_jax/*.py", "mend_jax/*/*.py", "launch/*.sh"]
COMMAND = re.compile(r"^ *(?:[\w./]*/)?python -m (mend_jax[\w.]*)((?: (?:\\{1,2}\n|[^\n`])*)?)$", re.MULTILINE)


def test_no_config_file_is_forgotten():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == VARIANTS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_loads(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = config_files.load_config(name)
    check(config)
    assert config.data.demo_buckets[-1] >= config.data.max_demo_tokens


@pytest.mark.parametrize("file", VARIANTS)
def test_the_docstring_says_how_to_run_it_and_what_comes_out(file):
    said = ast.get_docstring(ast.parse((ROOT / "configs" / f"{file}.py").read_text()))
    for wanted in (rf"python -m mend_jax\S* --config=configs/{file}\.py", "device|core", "[Tt]ime|minutes"):
        assert re.search(wanted, said), wanted
    assert re.search(r"\d\d\.\d|MEND \d|no number|Expected: as configs/", said)


SETTINGS = {  # the paper's Tables 5 and 6: LLM, backbone, dtype, weights, (steps, sequences) of pretraining, of finetuning
    "gpt2_large": ("gpt2-large", "gpt2", "bfloat16", "int8", (30_000, 8), (30_000, 8)),
    "gpt2_xl": ("gpt2-xl", "gpt2", "bfloat16", "int8", (30_000, 8), (30_000, 8)),
    "t5_large": ("google/t5-large-lm-adapt", "google/t5-small-lm-adapt", "float32", "full", (5_000, 64), (30_000, 8)),
    "flan_t5_xl": ("google/flan-t5-xl", "google/flan-t5-base", "float32", "full", (5_000, 64), (30_000, 8)),
    "opt_6_7b": ("facebook/opt-6.7b", "facebook/opt-125m", "bfloat16", "int8", (30_000, 8), (30_000, 8)),
}


@pytest.mark.parametrize("file", SETTINGS)
def test_the_papers_settings(file, monkeypatch):
    config = load(f"configs/{file}.py:qa_to_qa", monkeypatch)
    runs = dict(methods.stage_configs(config, "mend"))
    sizes = [(runs[stage].train.steps, runs[stage].train.batch_size) for stage in ("pretrain", "finetune")]
    found = (config.llm.path, config.prefix.backbone, config.llm.dtype, config.llm.weights, *sizes)
    assert found == SETTINGS[file] and config.prefix.dtype == config.llm.dtype
    c = config
    assert (c.optimizer.learning_rate, c.train.patience, c.data.beta, c.loss.kd) == (5e-5, 5, 0.8, 1.0)
    assert (c.prefix.length, c.data.k, c.data.max_demo_tokens, c.data.max_input_tokens) == (100, 16, 900, 256)
    assert c.data.partition == "qa_to_qa"


def commands():
    """(file, module, arguments) of every `python -m mend_jax...` in the documentation, docstrings and scripts."""
    found = []
    for pattern in TEXTS:
        for path in sorted(ROOT.glob(pattern)):
            for module, rest in COMMAND.findall(path.read_text()):
                words = shlex.split(re.sub(r"\\{1,2}\n", " ", rest), comments=True)
                if not any("$" in word or "..." in word for word in words):
                    found.append(pytest.param(module, words, id=f"{path.name}:{module}:{len(found)}"))
    return found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runpy: the module is imported already
@pytest.mark.parametrize(("module", "arguments"), commands())
def test_written_commands_run(module, arguments, monkeypatch):
    """Up to the point where the work starts: the module exists, its flags are right, the config takes the overrides."""
    mains = []
    monkeypatch.setattr("mend_jax.cli.command_line.run", lambda main, *_, **__: mains.append(main))
    monkeypatch.setattr("mend_jax.data.small_world.resolve", lambda config: config)
    monkeypatch.setattr("sys.argv", [module, "--out=unused"])
    monkeypatch.chdir(ROOT)
    if module == "mend_jax.data.small_world":  # has a parser of its own
        return
    runpy.run_module(module, run_name="__main__")
    if arguments:
        cli.parse(*cli.chosen(mains[0], [module, *arguments]))


def load(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    return config_files.load_config(name)


def test_methods_are_the_papers(monkeypatch):
    config = load("configs/small_world.py:quick", monkeypatch)
    config.loss.kd = 10.0
    weights = {
        method: [
            (stage, c.prefix.kind, c.loss.kd, c.loss.pred, c.loss.clm)
            for stage, c in methods.stage_configs(config, method)
        ]
        for method in METHODS
    }
    assert weights == {
        "zero_shot": [],
        "icl": [],
        "prompt_tuning": [("finetune", "soft_prompt", 0.0, 1.0, 0.0)],
        "hypertuning": [("pretrain", "distiller", 0.0, 0.0, 1.0), ("finetune", "distiller", 0.0, 1.0, 0.0)],
        "mend": [("pretrain", "distiller", 1.0, 0.0, 0.0), ("finetune", "distiller", 10.0, 1.0, 0.0)],
    }


def test_the_stages_that_the_docs_write_out_are_the_experiments(monkeypatch):
    monkeypatch.setattr("mend_jax.data.small_world.resolve", lambda config: config)
    monkeypatch.chdir(ROOT)
    found = {}
    for _, rest in COMMAND.findall((ROOT / "docs" / "running.md").read_text()):
        arguments = shlex.split(re.sub(r"\\\n", " ", rest))
        if any("configs/small_world.py:" in word and "methods" not in word for word in arguments):
            config, workdir = cli.parse(lambda config, workdir: None, ["train", *arguments])
            c = config.loss
            found[workdir] = (config.stage, config.prefix.kind, c.kd, c.pred * (config.stage == "finetune"), c.clm)
    config = load("configs/small_world.py:quick", monkeypatch)
    for method, workdirs in {
        "prompt_tuning": ["runs/prompt_tuning"],
        "hypertuning": ["runs/hyper_pretrain", "runs/hypertuning"],
        "mend": ["runs/pretrain", "runs/finetune"],
    }.items():
        wanted = [
            (stage, c.prefix.kind, c.loss.kd, c.loss.pred, c.loss.clm)
            for stage, c in methods.stage_configs(config, method)
        ]
        assert [found[workdir] for workdir in workdirs] == wanted


def test_stage_configs_take_the_experiments_steps_and_leave_it_alone(monkeypatch):
    config = load("configs/small_world.py:quick", monkeypatch)
    before = config.to_json()
    (first, pretrain), (second, finetune) = methods.stage_configs(config, "mend")
    assert (first, second) == (pretrain.stage, finetune.stage) == ("pretrain", "finetune")
    assert pretrain.train.steps == config.experiment.pretrain_steps
    assert finetune.train.steps == config.experiment.finetune_steps
    assert config.to_json() == before
    assert pretrain.data.to_dict() == finetune.data.to_dict() == config.data.to_dict() and pretrain.seed == config.seed


@pytest.mark.parametrize(("method", "split"), [("mend", "dev"), ("mend", "test"), ("icl", "test")])
def test_bad_evaluation_data_is_found_before_training(tmp_path, tiny_llm, tiny_backbone, monkeypatch, method, split):
    monkeypatch.setattr("mend_jax.train.train", lambda *_: pytest.fail("trained before the test data was read"))
    config = tiny_config(make_world(tmp_path), "finetune")
    config.llm.path, config.prefix.backbone, config.experiment.methods = str(tiny_llm), str(tiny_backbone), (method,)
    config.train.batch_size = 8
    path = tmp_path / "metaicl" / "data" / "t" / f"t_4_21_{split}.jsonl"
    path.write_text("{\n")
    with says(f"{path}, line 1", "JSON"):
        methods.main(config, str(tmp_path / "run"))
    if method == "mend":
        write_examples(path, "t", [("w1", "w2")] * 4, ["w2", words(0, 120)])
        with says(f"t, seed 21, {split}", "124 positions"):
            methods.main(config, str(tmp_path / "run"))
        config.prefix.length = 80
        with says("distiller", "80 tokens", "config.prefix.length = 80"):
            methods.main(config, str(tmp_path / "run"))


def test_a_try_with_the_first_seed_asks_for_the_files_of_all(tmp_path, tiny_llm, tiny_backbone, monkeypatch):
    """So that the whole recipe, begun after it, does not refuse the folder that the try was content with."""
    read = []
    monkeypatch.setattr("mend_jax.train.train", lambda c, _: read.append((c.evaluate.seeds, validation_seeds(c))) or 0)
    monkeypatch.setattr("mend_jax.evaluate.evaluate", lambda c, _: read.append((c.evaluate.seeds,)))
    config = tiny_config(make_world(tmp_path), "finetune")
    config.llm.path, config.prefix.backbone, config.experiment.methods = str(tiny_llm), str(tiny_backbone), ("mend",)
    config.train.batch_size = 8
    config.experiment.first_seeds = load("configs/own_llm.py:try", monkeypatch).experiment.first_seeds
    config.evaluate.seeds = (13, 21, 42)
    with says("13, 21", "none for 42", "--config.evaluate.seeds=13,21"):
        methods.main(config, str(tmp_path / "run"))
    assert not read
    config.evaluate.seeds = (13, 21)
    assert methods.main(config, str(tmp_path / "run")) == 0
    assert read == [((13,), (13,))] * 2 + [((13,),)]
    (tmp_path / "metaicl" / "data" / "t" / "t_4_21_dev.jsonl").unlink()
    with says("seed 13", "none for 21", "dev"):
        methods.main(config, str(tmp_path / "run"))


def test_bad_training_data_is_found_before_any_training(tmp_path, tiny_llm, tiny_backbone, monkeypatch):
    """A mistake in what the second stage reads, before the first one's days."""
    monkeypatch.setattr("mend_jax.train.train", lambda *_: pytest.fail("trained before the training data was read"))
    config = tiny_config(make_world(tmp_path), "finetune")
    config.llm.path, config.prefix.backbone, config.experiment.methods = str(tiny_llm), str(tiny_backbone), ("mend",)
    config.train.batch_size = 8
    path = tmp_path / "metaicl" / "data" / "b" / "b_16384_100_train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:8], "{", *lines[9:]]))
    with says(f"{path}, line 9", "JSON"):
        methods.main(config, str(tmp_path / "run"))
    path.write_text("\n".join(lines[:3]))
    with says("'b'", "3 examples", "config.data.k"):
        methods.main(config, str(tmp_path / "run"))


def test_sequences_a_step_of_pretraining_are_its_own(tiny_llm, tiny_backbone, tmp_path, monkeypatch):
    config = load("configs/base.py", monkeypatch)
    sizes = lambda: [c.train.batch_size for _, c in methods.stage_configs(config, "hypertuning")]  # noqa: E731
    assert sizes() == [8, 8]
    config.experiment.pretrain_batch_size = 20
    assert sizes() == [20, 8]
    config.llm.path, config.prefix.backbone, config.prefix.length = str(tiny_llm), str(tiny_backbone), 4
    config.data.max_text_tokens = config.data.max_demo_tokens = 40
    config.data.max_input_tokens, config.data.query_buckets = 8, (16,)
    with says("experiment.pretrain_batch_size=20", "8 devices", "train.accumulate=1"):
        methods.main(config, str(tmp_path))


def test_an_experiment_in_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with says(tmp_path / "file/run", "Not a directory"):
        methods.main(load("configs/small_world.py:quick", monkeypatch), str(tmp_path / "file" / "run"))


def test_an_experiment_trains_then_evaluates_in_order(tmp_path, monkeypatch):
    calls = []

    def train(config, workdir):
        calls.append((workdir, config.stage, config.prefix.start_from))
        return 0

    def evaluate(config, workdir):
        calls.append((workdir, config.evaluate.methods))
        return {}

    monkeypatch.setattr("mend_jax.train.train", train)
    monkeypatch.setattr("mend_jax.evaluate.evaluate", evaluate)
    config = load("configs/small_world.py:quick", monkeypatch)
    monkeypatch.setattr("mend_jax.run.checks.check_experiment", lambda *_: calls.append("checked"))
    monkeypatch.setattr(methods, "_prepare_training_data", lambda config, folder: calls.append("prepared"))
    config.experiment.methods = ("zero_shot", "prompt_tuning", "icl", "mend")
    assert methods.main(config, str(tmp_path)) == 0
    run = str(tmp_path / "mend" / "pretrain")
    tuned, mend = str(tmp_path / "prompt_tuning" / "finetune"), str(tmp_path / "mend" / "finetune")
    assert calls == [
        "checked",
        "prepared",
        (tuned, "finetune", ""),
        (run, "pretrain", ""),
        (mend, "finetune", run),
        (str(tmp_path / "evaluation"), ("zero_shot", f"prompt_tuning={tuned}", "icl", f"mend={mend}")),
    ]
    assert list(methods.Times(tmp_path / "times.json").parts) == [
        "prompt_tuning/finetune",
        "mend/pretrain",
        "mend/finetune",
        "evaluation",
    ]


def test_a_text_that_is_not_there_is_said_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr("mend_jax.run.checks.load_tasks", lambda *_: ([], []))
    monkeypatch.setattr("mend_jax.train.train", lambda *_: pytest.fail("trained"))
    config = load("configs/small_world.py:full", monkeypatch)
    config.data.text, config.data.tasks = str(tmp_path / "nowhere"), str(make_world(tmp_path / "world") / "metaicl")
    config.data.partition = "tiny"
    config.llm.path, config.prefix.backbone = (str(PACKAGED_MODELS / name) for name in ("llm", "backbone"))
    with says(tmp_path / "nowhere", "config.data.text"):
        methods.main(config, str(tmp_path / "run"))


def test_an_experiment_stops_with_its_training(tmp_path, monkeypatch):
    monkeypatch.setattr("mend_jax.train.train", lambda config, workdir: 75)
    monkeypatch.setattr("mend_jax.run.checks.check_experiment", lambda *_: None)
    monkeypatch.setattr(methods, "_prepare_training_data", lambda config, folder: None)
    monkeypatch.setattr("mend_jax.evaluate.evaluate", lambda *_: pytest.fail("evaluated a training that was stopped"))
    config = load("configs/small_world.py:quick", monkeypatch)
    assert methods.main(config, str(tmp_path)) == 75
    assert not methods.Times(tmp_path / "times.json").parts["mend/pretrain"]["finished"]


def test_times_of_an_interrupted_part_add_up(tmp_path, monkeypatch):
    clock = iter([0, 3, 10, 14, 20, 25])
    monkeypatch.setattr(methods.time, "monotonic", lambda: next(clock))

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        methods.Times(tmp_path / "times.json").run("a", stopped)
    assert methods.Times(tmp_path / "times.json").run("a", lambda: None) == 0
    methods.Times(tmp_path / "times.json").run("a", lambda: None)  # finished: nothing to do, and nothing to add
    assert methods.Times(tmp_path / "times.json").parts == {"a": {"seconds": 7.0, "finished": True}}
