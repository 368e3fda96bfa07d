"""The command line: what it accepts, and the sentence that each mistake ends in."""

import errno
import logging
import os
import re
import signal
import time
from typing import Literal

import pytest
from facts import says, states

from mend_jax.cli import command_line as cli
from mend_jax.cli import config_files, messages
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES, NOT_REACHED, RANGES, TUPLES, check, dotted_fields, nearest
from mend_jax.objectives import OBJECTIVES, STATE_OBJECTIVES
from mend_jax.prefixes import KINDS

BASE = str(config_files.ROOT / "configs" / "base.py")


def command(config, workdir):
    """A command as `mend_jax.train` has it."""
    return config, workdir


def export(workdir, out, name="mend", repeats=5, share: float = 0.5, verbose: bool = False):
    return workdir, out, name, repeats, share, verbose


def benchmark(what: Literal["step", "inference"], /, size: Literal["small", "big"] = "small"):
    return what, size


@pytest.fixture(autouse=True)
def no_world(monkeypatch):
    """`resolve` writes the small world where it is named: not here."""
    monkeypatch.setattr("mend_jax.data.small_world.resolve", lambda config: config)


@pytest.fixture
def parsed(tmp_path):
    def parse(*arguments):
        return cli.parse(command, ["train", f"--config={BASE}", f"--workdir={tmp_path}", *arguments])[0]

    return parse


@pytest.fixture
def refused(parsed):
    def refuse(arguments, facts):
        with says(*facts):
            parsed(*arguments)

    return refuse


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--config.train.steps=7"], "train.steps", 7),
        (["--config.train.steps", "7"], "train.steps", 7),
        (["--config.train.steps=7", "--config.train.steps=8"], "train.steps", 8),
        (["--config.optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
        (["--config.llm.remat"], "llm.remat", True),
        (["--config.llm.remat=true"], "llm.remat", True),
        (["--noconfig.llm.remat"], "llm.remat", False),
        (["--config.llm.path=a=b,c"], "llm.path", "a=b,c"),
        (["--config.evaluate.seeds=13,21"], "evaluate.seeds", (13, 21)),
        (["--config.evaluate.seeds=(13,)"], "evaluate.seeds", (13,)),
        (["--config.evaluate.seeds=13"], "evaluate.seeds", (13,)),
        (["--config.evaluate.tasks=a", "--config.evaluate.tasks=b"], "evaluate.tasks", ("a", "b")),
        (["--config.evaluate.tasks="], "evaluate.tasks", ()),
        (["--config.evaluate.methods=icl,mend=runs/a-b.1"], "evaluate.methods", ("icl", "mend=runs/a-b.1")),
    ],
)
def test_overrides(parsed, arguments, key, value):
    found = dotted_fields(parsed(*arguments))[key]
    assert found == value and type(found) is type(value)


def test_overrides_may_stand_before_the_config(tmp_path):
    config, workdir = cli.parse(command, ["x", "--config.seed=3", f"--workdir={tmp_path}", f"--config={BASE}"])
    assert config.seed == 3 and workdir == str(tmp_path)


def test_the_config_is_locked(parsed):
    with pytest.raises(AttributeError):
        parsed().train.stepz = 1


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.train.step=4", ["--config.train.step:", "--config.train.steps?"]),
        ("--config.learning_rate=4", ["--config.optimizer.learning_rate?"]),
        ("--config.train=4", ["section", "--config.train."]),
        ("--config.train.steps=abc", ["--config.train.steps", "whole number", '"abc" (text)']),
        ("--config.train.steps=1.5", ["whole number", '"1.5" (a fraction)']),
        ("--config.train.steps", ["--config.train.steps needs a value", "whole number"]),
        ("--config.optimizer.learning_rate=fast", ["--config.optimizer.learning_rate", "a number", '"fast" (text)']),
        ("--config.llm.remat=maybe", ["true or false", '"maybe" (text)']),
        ("--noconfig.llm.remat=true", ["--config.llm.remat=false"]),
        ("--config.evaluate.seeds=13,x", ["evaluate.seeds", "whole numbers", "'x'"]),
        ("--config.evaluate.tasks=1,2", ["evaluate.tasks", "names", "1"]),
        ("--config.evaluate.seeds=", ["evaluate.seeds", "at least one"]),
        ("--config.data.demo_buckets=0,5", ["data.demo_buckets", "at least 1", "0"]),
        ("--config.stage=pretraining", ["stage", "pretrain, finetune, lm", 'did you mean "pretrain"']),
        ("--config.experiment.methods=icl,mendd", ["experiment.methods", 'did you mean "mend"']),
        ("--config.data.beta=1", ["data.beta", "more than 0 and less than 1", "1.0"]),
        ("--config.train.steps=0", ["train.steps", "at least 1", "0"]),
        ("--config.optimizer.learning_rate=nan", ["optimizer.learning_rate", "more than 0", "nan"]),
        ("--config.optimizer.clip=inf", ["optimizer.clip", "inf"]),
        ("--seed=1", ["no flag --seed", "--config", "--workdir"]),
        ("--workdirr=1", ["no flag --workdirr", "did you mean --workdir?"]),
        ("finetune", ['"finetune" is not understood', "--name=value"]),
    ],
)
def test_mistakes(refused, argument, words):
    refused([argument], words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["loss.kd=0", "loss.pred=0"], ["loss.kd and loss.pred", "finetune"]),
        (["stage=pretrain", "loss.kd=0"], ["loss.kd and loss.clm", "pretrain"]),
        (
            ["stage=lm", "data.text=a", "data.tasks=b", "data.text_share=0.1"],
            ["data.text_share", "batch_size", "0.125"],
        ),
        (["llm.attention=cudnn"], ["cudnn", "llm.dtype=bfloat16"]),
        (["experiment.training_seeds=0,1,0"], ["experiment.training_seeds", "0 twice"]),
        (["evaluate.seeds=13,13"], ["evaluate.seeds", "13 twice"]),
        (["llm.attention=cudnn", "llm.dtype=bfloat16"], ["cudnn", "prefix.dtype=bfloat16"]),
    ],
)
def test_values_that_do_not_go_together(refused, arguments, words):
    refused([f"--config.{argument}" for argument in arguments], words)


@pytest.mark.parametrize(
    "arguments",
    [
        ["loss.kd=0"],
        ["stage=pretrain", "loss.kd=0", "loss.clm=1"],
        ["stage=lm", "loss.kd=0", "loss.pred=0"],
        ["stage=lm", "data.text=a", "data.tasks=b", "data.text_share=0.125"],
        ["stage=lm", "data.text=a", "data.text_share=0.1"],  # no tasks: every row is text
        ["llm.attention=cudnn", "llm.dtype=bfloat16", "prefix.dtype=bfloat16"],
    ],
)
def test_values_that_go_together(parsed, arguments):
    parsed(*(f"--config.{argument}" for argument in arguments))


KNOWN = CHOICES | {"prefix.kind": list(KINDS), "loss.objective": [*OBJECTIVES, *STATE_OBJECTIVES]}


@pytest.mark.parametrize("key", KNOWN)
def test_every_choice_is_checked(refused, key):
    name = KNOWN[key][-1]
    refused([f"--config.{key}={name}x"], [key, f'did you mean "{name}"'])


def test_a_kind_or_an_objective_that_is_entered_may_be_set(parsed, monkeypatch):
    monkeypatch.setitem(KINDS, "toy", KINDS["soft_prompt"])
    monkeypatch.setitem(OBJECTIVES, "mine", OBJECTIVES["forward_kl"])
    config = parsed("--config.prefix.kind=toy", "--config.loss.objective=mine")
    assert (config.prefix.kind, config.loss.objective) == ("toy", "mine")


def test_every_number_and_tuple_is_checked(parsed):
    """Nothing of the tables is misspelt, and a number that is not in them may not be 0."""
    fields = dotted_fields(parsed())
    assert RANGES.keys() | CHOICES.keys() | TUPLES.keys() <= fields.keys() and NOT_REACHED.keys() <= RANGES.keys()
    assert TUPLES.keys() == {key for key, value in fields.items() if isinstance(value, tuple)}
    for key, value in fields.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            config = parsed()
            with config.ignore_type():
                config.update_from_flattened_dict({key: RANGES.get(key, (0,))[0] - 1})
            with says(key):
                check(config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no config file", "base.py"]),
        ("def get_config(:", ["cannot be read", "line 1"]),
        ("import no_such_module", ["cannot be read", "no_such_module"]),
        ("x = 1", ["no function get_config"]),
        ("def get_config(): return 5", ["must return", "ConfigDict"]),
        ("def get_config(): return {}['lr']", ["fails", "lr"]),
        ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 1})", ["has no field"]),
        (
            "from configs import base\ndef get_config():\n  c = base.get_config()\n  c.train.stepz = 1\n  return c",
            ["train.stepz", "train.steps"],
        ),
    ],
)
def test_config_files(tmp_path, content, words):
    path = tmp_path / "bas.py"
    if content is not None:
        path.write_text(content)
    with says(path, *words):
        config_files.load_config(str(path))


def test_variants(monkeypatch):
    monkeypatch.chdir(config_files.ROOT)
    with says("configs/small_world.py", "quik", "quick"):
        config_files.load_config("configs/small_world.py:quik")
    with says("configs/base.py", '":quick"'):
        config_files.load_config("configs/base.py:quick")
    with says("configs/smal_world.py", "configs/small_world.py"):
        config_files.load_config("configs/smal_world.py:quick")


def test_a_config_that_is_not_here_is_looked_for_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # any folder, after pip install -e
    assert config_files.load_config("configs/gpt2_large.py:qa_to_qa").data.partition == "qa_to_qa"
    with says("configs/smal_world.py", "configs/small_world.py"):
        config_files.load_config("configs/smal_world.py")
    (tmp_path / "configs").mkdir()
    text = (config_files.ROOT / "configs" / "base.py").read_text()
    (tmp_path / "configs" / "gpt2_large.py").write_text(text.replace("c.seed = 0", "c.seed = 7"))
    assert config_files.load_config("configs/gpt2_large.py").seed == 7  # the user's own comes first
    with says(tmp_path / "configs/t5_large.py"):
        config_files.load_config(str(tmp_path / "configs/t5_large.py"))  # a whole path means one file


@pytest.mark.parametrize("variant", ["", ":try"])
def test_own_llm_without_an_llm_is_refused_before_any_is_looked_for(variant, parsed, monkeypatch):
    monkeypatch.setattr("mend_jax.models.folders.local_folder", lambda *_: pytest.fail("looked for a model"))
    words = [f"--config={config_files.ROOT}/configs/own_llm.py{variant}"]
    with says("no LLM", "--config.llm.path=", "--config.prefix.backbone="):
        parsed(*words)
    config = parsed(*words, "--config.llm.path=LLM")
    for kind in ("chunked", "distiller"):
        with says("--config.prefix.backbone="):
            KINDS[kind].backbone(config)
    assert KINDS["soft_prompt"].backbone(config) == ""


def test_config_and_workdir_are_needed(tmp_path):
    with says("--config=FILE.py"):
        cli.parse(command, ["x", f"--workdir={tmp_path}"])
    with says("--workdir"):
        cli.parse(command, ["x", f"--config={BASE}"])
    (tmp_path / "file").write_text("")
    with says(f'--workdir="{tmp_path}/file"', "file"):
        cli.parse(command, ["x", f"--config={BASE}", f"--workdir={tmp_path}/file"])


def test_flags_of_a_command():
    assert cli.parse(export, ["x", "--workdir=w", "--out=o"]) == ["w", "o", "mend", 5, 0.5, False]
    everything = ["--workdir=w", "--out=o", "--name=n", "--repeats=2", "--share=1", "--verbose"]
    assert cli.parse(export, ["x", *everything]) == ["w", "o", "n", 2, 1.0, True]
    assert cli.parse(benchmark, ["x", "step", "--size=big"]) == ["step", "big"]


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (export, ["--workdir=w"], ["--out is required"]),
        (export, ["--workdir=w", "--out=o", "--repeats=x"], ["--repeats", "whole number", '"x" (text)']),
        (export, ["--workdir=w", "--out=o", "--nam=x"], ["no flag --nam", "--name?"]),
        (export, ["--workdir=w", "--out=o", f"--config={BASE}"], ["takes no --config"]),
        (export, ["--workdir=w", "--out=o", "--config.seed=1"], ["takes no --config"]),
        (benchmark, [], ["step, inference", "missing"]),
        (benchmark, ["stp"], ["step, inference", '"stp"']),
        (benchmark, ["step", "inference"], ['"inference" is not understood']),
        (benchmark, ["step", "--size=bigg"], ["small, big", 'did you mean "big"']),
    ],
)
def test_mistakes_in_the_flags_of_a_command(main, arguments, words):
    with says(*words):
        cli.parse(main, ["x", *arguments])


def run_with(monkeypatch, capsys, outcome):
    def main(workdir="w"):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as stopped:
        cli.run(main, ["x"])
    return stopped.value.code, capsys.readouterr()


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (75, 75), ({"a": 1}, 0)])
def test_exit_code(monkeypatch, capsys, returned, code):
    assert run_with(monkeypatch, capsys, returned)[0] == code


@pytest.mark.parametrize(
    ("error", "code", "facts"),
    [
        (UserError("The sky is green: look up."), 2, ["error:", "The sky is green: look up."]),
        (KeyboardInterrupt(), 130, ["Stopped"]),
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["error:", "disk", "full"]),
    ],
)
def test_what_a_person_sees(monkeypatch, capsys, error, code, facts):
    found, output = run_with(monkeypatch, capsys, error)
    assert found == code and output.out == ""
    states(output.err.strip(), *facts)


def test_errors_of_the_program_keep_their_trace():
    def main():
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError):
        cli.run(main, ["x"])


def test_warnings_are_sentences_and_said_once(monkeypatch, capsys):
    logger = logging.Logger("in the place of the root")
    monkeypatch.setattr(messages, "getLogger", lambda: logger)
    basic = logging.StreamHandler()
    basic.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logger.addHandler(basic)  # as a library's basicConfig does
    for _ in range(2):
        messages.plain_warnings()
        logger.warning("%s is missing", "t")
    logger.warning("so is u")
    assert capsys.readouterr().err == "warning: t is missing\nwarning: so is u\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.run(export, ["x", "--help"])
    assert stopped.value.code == 0
    assert "--repeats=int   (default 5)" in capsys.readouterr().out


def test_nearest():
    assert nearest("train.step", ["train.steps", "train.batch_size"]) == "train.steps"
    assert nearest("steps", ["llm.path", "train.steps"]) == "train.steps"


@pytest.mark.parametrize("several", [True, False])
def test_sigterm_ends_a_command_with_the_code_that_asks_for_a_restart(several, capsys):
    def told():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        cli.run(told, ["evaluate"], several)
    assert left.value.code == 75 and signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().err
    assert said.startswith("Stopped. ") and said.count("\n") == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_says_whether_it_begins_anew(how, capsys):
    def told():
        if how == signal.SIGINT:
            raise KeyboardInterrupt
        os.kill(os.getpid(), how)
        time.sleep(60)

    said = {}
    for settings in ({}, {"keeps": True}, {"several": True}):
        with pytest.raises(SystemExit):
            cli.run(told, ["evaluate"], **settings)
        said[tuple(settings)] = capsys.readouterr().err.strip()
    states(said[()], "Stopped. The same command", "begins anew")
    states(said["keeps",], "Stopped. The same command", "goes on from what is finished")
    assert said["several",] == said["keeps",]


def test_commands_go_on_where_they_have_a_workdir_or_a_cache():
    """Of each module that is a command: what `run` is told at its end."""
    kept, expected = set(), {"train", "evaluate", "prepare", "distill", "accelerator"}
    for file in (config_files.ROOT / "mend_jax").rglob("*.py"):
        text, _, end = file.read_text(encoding="utf-8").partition('if __name__ == "__main__":\n')
        if re.search(r"\b(several|keeps)=True\b", end):
            kept.add(file.stem)
        if file.parent.name == "experiments" and re.search(r"^def main\(config\b.*\bworkdir\b", text, re.MULTILINE):
            expected.add(file.stem)
    assert kept == expected and len(kept) > 15


def test_a_flag_given_twice_names_the_wrong_value():
    argv = ["train", f"--config={BASE}", "--workdir=w", "--config.train.steps=4", "--config.train.steps=abc"]
    with says("train.steps", "whole number", '"abc"'):
        cli.parse(command, argv)


def test_help_says_what_each_flag_is(capsys):
    from mend_jax.benchmark import COMMANDS

    with pytest.raises(SystemExit):
        cli.run(COMMANDS, ["benchmark", "step", "--help"])
    said = capsys.readouterr().out
    assert said.startswith("Seconds, memory") and "inference" not in said
    entries = {entry.partition("=")[0]: " ".join(entry.split()) for entry in said.split("\n  --")[1:]}
    states(entries["repeats"], "int", "default 5", "timed runs")
    for name in ("llm", "distiller"):  # described together
        states(entries[name], "gpt2", "opt-6.7b", "folder")
    with pytest.raises(SystemExit):
        cli.run(COMMANDS, ["benchmark", "--help"])
    said = capsys.readouterr().out
    assert said.rstrip().endswith("quantization or serving: with --help behind it, each prints its flags.")


def test_a_flag_of_several_values_stands_several_times(capsys):
    def several(pack, stop: list[str] = ()):
        """Args:
        stop: where it ends.
        """

    assert cli.parse(several, ["x", "--pack=p", "--stop=a,b", "--stop=\n"]) == ["p", ["a,b", "\n"]]
    assert not cli.parse(several, ["x", "--pack=p"])[1]
    with pytest.raises(SystemExit):
        cli.run(several, ["x", "--help"])
    assert "--stop=str\n" in capsys.readouterr().out


def test_home_is_resolved_in_the_command_line(parsed, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    given = [
        "--config.llm.path=~/llm",
        "--config.data.tasks=~/tasks",
        "--config.evaluate.methods=icl,a=~/run,b=chunked:~/run",
    ]
    config = parsed(*given)
    assert (config.llm.path, config.data.tasks) == ("/home/someone/llm", "/home/someone/tasks")
    assert config.evaluate.methods == ("icl", "a=/home/someone/run", "b=chunked:/home/someone/run")
    assert config.data.cache == "/home/someone/.cache/mend_jax"
