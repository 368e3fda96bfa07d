"""The command line of every command: `run(main)`; the parameters of `main` are the flags.

    def train(config, workdir): ...          # --config=FILE.py[:VARIANT] --workdir=FOLDER --config.section.field=value
    def export(workdir, out, name="mend"):   # --workdir=FOLDER --out=... [--name=mend]
    def experiment(what: Literal["a", "b"], /, repeats=5):   # the word itself, and [--repeats=5]
    def compare(evaluations: list[str], /, metric="score"):   # one word or several, and [--metric=score]
    def generate(pack, stop: list[str] = ()):   # --pack=FILE [--stop=TEXT --stop=TEXT ...]

`run((step, inference))` has several commands in one: the first word is the name of one, which has flags of its own. A user error ends in one sentence and exit code 2.
"""

import ast
import contextlib
import inspect
import os
import re
import signal
import sys
import textwrap
import traceback
from difflib import SequenceMatcher
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from absl import flags, logging
from ml_collections.config_flags import config_flags

from mend_jax.cli import compile_cache
from mend_jax.cli.config_files import plain_overrides, resolved, take_config, wanted
from mend_jax.cli.errors import UserError
from mend_jax.cli.imports import hide_pytorch
from mend_jax.cli.messages import of_the_machine, plain_warnings
from mend_jax.cli.settings import dotted_fields, nearest
from mend_jax.cli.text import shown
from mend_jax.run import distributed
from mend_jax.run.distributed import INTERRUPTED, STOPPED

FAILED, MISTAKE = 1, 2  # exit codes
HELP = {"--help", "-h", "-help"}


def run(main, argv=None, several=False, keeps=False) -> None:
    """Parses the command line, calls `main` with its arguments, and exits with the number that it returns, or 0.

    Args:
        main: its parameter `config` is a file of configs/ and `workdir` a folder. Any other is a flag, whose type is that of
            its annotation or default; it is required if it has no default. A positional-only one is a word without a flag.
            Or a tuple of such functions, of which the first word of the command line names one.
        argv: for tests; None means sys.argv.
        several: whether the command may run as several processes (distributed.py); other commands run as one.
        keeps: whether the same command goes on from what a stopped one had finished; those of several processes always do.
    """
    if argv is None and callable(signal.getsignal(signal.SIGINT)):  # not where it is ignored, as behind nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)  # mend_jax/__init__.py has another for the imports
    if several and argv is None:  # training and evaluation, which compute nothing with it
        hide_pytorch()
    code = _code_of(main, sys.argv if argv is None else argv, several, keeps or several)
    distributed.leave(code)
    sys.exit(code)


def _code_of(main, argv: list[str], several: bool, keeps: bool) -> int:
    """Runs `main` and returns the exit code; prints errors."""
    logging.set_verbosity(logging.WARNING)  # libraries report their every step at INFO
    plain_warnings()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about PyTorch, which is missing on purpose
    try:
        if text := _help_asked_for(main, argv):
            print(text)
            return 0
        main, argv = chosen(main, argv)
        arguments = parse(main, argv)
        if several:
            distributed.start()
        # With several processes, training asks JAX at each step whether all are to stop (`told_to_stop`).
        stops = contextlib.nullcontext() if distributed.is_running() else distributed.stops_at_sigterm(keeps)
        with stops, compile_cache.mended():
            code = main(*arguments)
        return code if isinstance(code, int) else 0
    except distributed.Stopped:
        distributed.say_stopped(keeps)
        return STOPPED
    except UserError as error:
        print(f"{distributed.label()}error: {shown(str(error))}", file=sys.stderr)
        return MISTAKE
    except BrokenPipeError:  # the output went to a program, such as head, that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print(f"\n{distributed.stopped(keeps)}", file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:
        if sentence := of_the_machine(error):
            print(f"{distributed.label()}error: {shown(sentence)}", file=sys.stderr)
            return MISTAKE
        if not distributed.is_running() or not isinstance(error, Exception):
            raise
        traceback.print_exc()  # here, because `leave` may end the process before Python would print it
        return FAILED


def chosen(commands, argv: list[str]) -> tuple:
    """(that of several functions whose name is the first word, argv without the word); a single one as it is. Raises UserError."""
    if not isinstance(commands, tuple):
        return commands, argv
    names = {command.__name__: command for command in commands}
    word = argv[1] if argv[1:] and not argv[1].startswith("-") else None
    return names[_one_of(names, word)], [argv[0], *argv[2:]]


def parse(main, argv) -> list:
    """The arguments of `main`, in the order of its parameters. Raises UserError for any mistake in `argv`."""
    parameters = _parameters(main)
    values = flags.FlagValues()
    argv, fields = list(argv), {}
    if "config" in parameters:
        argv, config = take_config(argv)
        fields = dotted_fields(config)
        argv = plain_overrides(argv, fields)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=argv)
    for name, parameter in parameters.items():
        if name != "config" and parameter.kind is not parameter.POSITIONAL_ONLY:
            _define(name, parameter, values)
    try:
        words = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise _unknown_flag(error.flagname, parameters) from None
    except flags.IllegalFlagValueError as error:
        raise _wrong_value(str(error), argv, fields, parameters) from None
    except flags.Error as error:
        raise UserError(f"{str(error).rstrip('.')}: see --help.") from None
    flags.FLAGS.mark_as_parsed()  # grain's worker processes ask for it
    return _arguments(main, values, words)


def _parameters(main) -> dict[str, inspect.Parameter]:
    """The parameters of `main` with resolved annotations: a type, or a Literal of words."""
    hints = get_type_hints(main)
    parameters = {}
    for name, parameter in inspect.signature(main).parameters.items():
        default = parameter.default
        kind = hints.get(name, str if default in (parameter.empty, None) else type(default))
        parameters[name] = parameter.replace(annotation=kind)
    return parameters


def _define(name: str, parameter: inspect.Parameter, values: flags.FlagValues) -> None:
    default = None if parameter.default is parameter.empty else parameter.default
    if get_origin(parameter.annotation) is Literal:
        flags.DEFINE_enum(name, default, [str(word) for word in get_args(parameter.annotation)], "", flag_values=values)
        return
    if _is_list(parameter):
        flags.DEFINE_multi_string(name, default, "", flag_values=values)
        return
    define = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}
    define.get(parameter.annotation, flags.DEFINE_string)(name, default, "", flag_values=values)


def _arguments(main, values, words: list[str]) -> list:
    arguments, words = [], list(words)
    for name, parameter in _parameters(main).items():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            arguments.append(_words(main, parameter, words))
        elif name == "config":
            arguments.append(resolved(values.config))
        else:
            arguments.append(_flag(main, name, parameter, values[name].value))
    if words:
        raise UserError(f'"{words[0]}" is not understood: flags are written --name=value; see --help.')
    return arguments


def _words(main, parameter: inspect.Parameter, words: list[str]):
    """What a parameter without a flag is given; it is taken from `words`."""
    if get_origin(parameter.annotation) is Literal:
        return _word(parameter, words.pop(0) if words else None)
    if not words:
        described = _described(main).get(parameter.name, "see --help").rstrip(".")
        raise UserError(f"{_placeholder(parameter)} is missing: give {described}.")
    given = [words.pop(0) for _ in range(len(words) if _is_list(parameter) else 1)]
    return given if _is_list(parameter) else given[0]


def _is_list(parameter: inspect.Parameter) -> bool:
    """Whether it is given as several words, or by a flag that stands several times."""
    return get_origin(parameter.annotation) is list


def _placeholder(parameter: inspect.Parameter) -> str:
    """How help writes a word that is not one of a few."""
    name = parameter.name.upper()
    return f"{name.removesuffix('S')} [{name.removesuffix('S')} ...]" if _is_list(parameter) else name


def _word(parameter: inspect.Parameter, word: str | None):
    if word is None and parameter.default is not parameter.empty:
        return parameter.default
    return _one_of(get_args(parameter.annotation), word)


def _one_of(choices, word: str | None) -> str:
    if word in choices:
        return word
    given = "The first word is missing" if word is None else f'"{word}" is not understood as the first word'
    raise UserError(f"{given}: give one of {', '.join(choices)}.")


def _flag(main, name: str, parameter: inspect.Parameter, value):
    if parameter.default is parameter.empty and value in (None, ""):
        raise UserError(f"--{name} is required: {_described(main).get(name, 'see --help').rstrip('.')}.")
    if name == "workdir" and value:
        value = str(Path(value).expanduser())
        if Path(value).exists() and not Path(value).is_dir():
            raise UserError(f'--workdir="{value}" is a file: name a folder, new or of an earlier run.')
    return value


def _unknown_flag(name: str, parameters) -> UserError:
    if name.partition(".")[0] in ("config", "noconfig"):
        return UserError(f"This command takes no --config: it takes {_flag_names(parameters)}.")
    known = [n for n, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY]
    closest = nearest(name, known) if known else ""
    if closest and SequenceMatcher(None, name, closest).ratio() > 0.5:
        return UserError(f"There is no flag --{name}: did you mean --{closest}?")
    return UserError(f"There is no flag --{name}: this command takes {_flag_names(parameters)}.")


def _flag_names(parameters) -> str:
    names = [f"--{n}" for n, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY]
    return ", ".join(names) + (" and --config.section.field" if "config" in parameters else "")


def _wrong_value(message: str, argv: list[str], fields: dict, parameters) -> UserError:
    match = re.match(r"flag --([\w.]+)=", message)
    if not match:
        return UserError(message)
    name = match[1]
    parts = [argument.lstrip("-").partition("=") for argument in argv]
    values = [
        value for flag, _, value in parts if flag == name and value
    ]  # if a flag is given twice, the message has the wrong one
    given = next((v for v in values if message.startswith(f"flag --{name}={v}:")), values[0] if values else "")
    if name.startswith("config."):
        return UserError(f"--{name} must be {wanted(fields[name.removeprefix('config.')])}, not {_given(given)}.")
    parameter = parameters[name]
    if get_origin(parameter.annotation) is Literal:
        choices = [str(word) for word in get_args(parameter.annotation)]
        return UserError(
            f'--{name} must be one of {", ".join(choices)}, not "{given}": did you mean "{nearest(given, choices)}"?'
        )
    return UserError(f"--{name} must be {wanted(parameter.annotation())}, not {_given(given)}.")


def _given(text: str) -> str:
    try:
        kind = type(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        kind = str
    words = {bool: "a truth value", int: "a whole number", float: "a fraction", tuple: "a list", str: "text"}
    return f'"{text}" ({words.get(kind, kind.__name__)})'


def _help_asked_for(main, argv: list[str]) -> str:
    """Empty if it is not asked for."""
    if not HELP & set(argv[1:]):
        return ""
    if isinstance(main, tuple) and argv[1] in HELP:
        return _overview(main)
    return _help(chosen(main, argv)[0], isinstance(main, tuple))


def _overview(commands: tuple) -> str:
    """The help of a command that has several."""
    doc = inspect.cleandoc(sys.modules[commands[0].__module__].__doc__ or "")
    names = [command.__name__ for command in commands]
    return f"{doc}\n\n{', '.join(names[:-1])} or {names[-1]}: with --help behind it, each prints its flags."


def _help(main, of_several: bool) -> str:
    own = inspect.cleandoc(main.__doc__ or "").partition("\nArgs:")[0].rstrip()
    doc = own if of_several else inspect.cleandoc(sys.modules[main.__module__].__doc__ or main.__doc__ or "")
    lines = [doc, "", "Flags:"]
    for name, parameter in _parameters(main).items():
        if name == "config":
            lines += ["  --config=FILE.py[:VARIANT]", "  --config.section.field=value   any field of configs/base.py"]
            continue
        choices = get_args(parameter.annotation) if get_origin(parameter.annotation) is Literal else ()
        kind = get_args(parameter.annotation)[0] if _is_list(parameter) else parameter.annotation
        value = "|".join(map(str, choices)) if choices else getattr(kind, "__name__", "value")
        if parameter.kind is parameter.POSITIONAL_ONLY and not choices:
            value = _placeholder(parameter)
        text = value if parameter.kind is parameter.POSITIONAL_ONLY else f"--{name}={value}"
        lines.append(
            f"  {text}" + ("" if parameter.default in (parameter.empty, ()) else f"   (default {parameter.default!r})")
        )
        lines += ["      " + line for line in textwrap.wrap(_described(main).get(name, ""), 110)]
    return "\n".join(lines)


def _described(main) -> dict[str, str]:
    """{parameter: its description under Args in the docstring of `main`}; "a, b: text" describes both."""
    args = inspect.cleandoc(main.__doc__ or "").partition("Args:\n")[2].partition("\nReturns:")[0]
    found = {"workdir": "the folder of the run: a new one, or that of an earlier run, which is resumed."}
    for names, text in re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", args, re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
