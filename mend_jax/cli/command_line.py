"""The command line of every command: `run(main)`; the parameters of `main` are the flags.

    def train(config, workdir): ...          # --config=FILE.py[:VARIANT] --workdir=FOLDER --config.section.field=value
    def export(workdir, out, name="mend"):   # --workdir=FOLDER --out=... [--name=mend]
    def benchmark(what: Literal["step", "inference"], /, repeats=5):   # the word itself, and [--repeats=5]
    def compare(evaluations: list[str], /, metric="score"):   # one word or several, and [--metric=score]
    def generate(pack, stop: list[str] = ()):   # --pack=FILE [--stop=TEXT --stop=TEXT ...]

A user error ends in one sentence and exit code 2.
"""

import ast
import contextlib
import importlib.util
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
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from mend_jax.cli import compile_cache
from mend_jax.cli.errors import UserError
from mend_jax.cli.imports import hide_pytorch
from mend_jax.cli.messages import of_the_machine, plain_warnings
from mend_jax.cli.settings import PATHS, check, check_choice, dotted_fields, nearest
from mend_jax.cli.text import shown
from mend_jax.run import distributed
from mend_jax.run.distributed import STOPPED

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds configs/ and the package
OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(=(.*))?", re.DOTALL)
FAILED, MISTAKE, INTERRUPTED = 1, 2, 130  # exit codes


def run(main, argv=None, several=False) -> None:
    """Parses the command line, calls `main` with its arguments, and exits with the number that it returns, or 0.

    Args:
        main: its parameter `config` is a file of configs/ and `workdir` a folder. Any other is a flag, whose type is that of
            its annotation or default; it is required if it has no default. A positional-only one is a word without a flag.
        argv: for tests; None means sys.argv.
        several: whether the command may run as several processes (distributed.py); other commands run as one.
    """
    if argv is None and callable(signal.getsignal(signal.SIGINT)):  # not where it is ignored, as behind nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)  # mend_jax/__init__.py has another for the imports
    if several and argv is None:  # training and evaluation, which compute nothing with it
        hide_pytorch()
    code = _code_of(main, sys.argv if argv is None else argv, several)
    distributed.leave(code)
    sys.exit(code)


def _code_of(main, argv: list[str], several: bool) -> int:
    """Runs `main` and returns the exit code; prints errors."""
    logging.set_verbosity(logging.WARNING)  # libraries report their every step at INFO
    plain_warnings()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about PyTorch, which is missing on purpose
    try:
        if {"--help", "-h", "-help"} & set(argv[1:]):
            print(_help(main))
            return 0
        arguments = parse(main, argv)
        if several:
            distributed.start()
        # With several processes, training asks JAX at each step whether all are to stop (`told_to_stop`).
        stops = contextlib.nullcontext() if distributed.is_running() else distributed.stops_at_sigterm()
        with stops, compile_cache.mended():
            code = main(*arguments)
        return code if isinstance(code, int) else 0
    except distributed.Stopped:
        distributed.say_stopped()
        return STOPPED
    except UserError as error:
        print(f"{distributed.label()}error: {shown(str(error))}", file=sys.stderr)
        return MISTAKE
    except BrokenPipeError:  # the output went to a program, such as head, that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes where it stopped.", file=sys.stderr)
        return INTERRUPTED
    except BaseException as error:
        if sentence := of_the_machine(error):
            print(f"{distributed.label()}error: {shown(sentence)}", file=sys.stderr)
            return MISTAKE
        if not distributed.is_running() or not isinstance(error, Exception):
            raise
        traceback.print_exc()  # here, because `leave` may end the process before Python would print it
        return FAILED


def parse(main, argv) -> list:
    """The arguments of `main`, in the order of its parameters. Raises UserError for any mistake in `argv`."""
    parameters = _parameters(main)
    values = flags.FlagValues()
    argv, fields = list(argv), {}
    if "config" in parameters:
        argv, config = _take_config(argv)
        fields = dotted_fields(config)
        argv = _plain_overrides(argv, fields)
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


def load_config(name: str) -> ConfigDict:
    """The config that FILE.py's get_config makes, for FILE.py or FILE.py:VARIANT; it has exactly the fields of configs/base.py.

    Raises UserError for a missing or broken file, an unknown variant, or fields that differ from those of configs/base.py.
    """
    path, _, variant = name.partition(":")
    get_config = _get_config(path)
    takes_variant = bool(inspect.signature(get_config).parameters)
    if variant and not takes_variant:
        raise UserError(f'{path} has no variants: leave ":{variant}" out.')
    try:
        config = get_config(variant) if variant else get_config()
    except UserError:
        raise
    except (ValueError, KeyError) as error:
        if not variant:
            raise UserError(f"{path} fails: {_reason(error)}.") from error
        own_words = isinstance(error, ValueError) and variant in str(error)
        raise UserError(f"{'' if own_words else f'{path} has no variant {variant}: '}{_reason(error)}.") from error
    except Exception as error:
        raise UserError(f"{path} fails: {_reason(error)}.") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} must return an ml_collections ConfigDict, as configs/base.py does.")
    base = base_config()
    if base is not None:
        _compare_fields(path, config, base)
    return config


def base_config() -> ConfigDict | None:
    """The config of configs/base.py: every field with its default. None if the package is installed without configs/."""
    base = ROOT / "configs" / "base.py"
    return _get_config(str(base))() if base.is_file() else None


def _get_config(path: str):
    if not Path(path).is_file():
        there = sorted(str(p) for folder in {Path(path).parent, Path("configs")} for p in folder.glob("*.py"))
        hint = f"did you mean {nearest(path, there)}?" if there else "give the path of a file like configs/base.py."
        raise UserError(f'There is no config file "{path}": {hint}')
    for folder in (str(ROOT), str(Path.cwd())):  # a variant says "from configs import base"
        if folder not in sys.path:
            sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    if spec is None:
        raise UserError(f'"{path}" is not a config file: give a Python file like configs/base.py.')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}.") from error
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no function get_config: see configs/base.py.")
    return module.get_config


def _compare_fields(path: str, config: ConfigDict, base: ConfigDict) -> None:
    ours, theirs = dotted_fields(base), dotted_fields(config)
    for key in theirs:
        if key not in ours:
            raise UserError(f"{path} sets {key}, which is not in configs/base.py: did you mean {nearest(key, ours)}?")
    for key in ours:
        if key not in theirs:
            raise UserError(f"{path} has no field {key}: start from configs.base.get_config() and change what differs.")


def _reason(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip().rstrip(".")
    line = getattr(error, "lineno", None)
    return " ".join(f"{'' if line is None else f'line {line}: '}{text or type(error).__name__}".split())


def _take_config(argv: list[str]):
    """argv without --config, and the config that it names."""
    rest, name = [], None
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("--config", "-config"):
            name = next(arguments, "")
        elif argument.startswith(("--config=", "-config=")):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    if not name:
        raise UserError("A config is needed: add --config=FILE.py, for example --config=configs/small_world.py:quick.")
    return rest, load_config(name)


def _plain_overrides(argv: list[str], fields: dict) -> list[str]:
    """argv with every override as --config.key=value, its key checked and tuples written as in Python."""
    plain = []
    arguments = iter(argv)
    for argument in arguments:
        match = OVERRIDE.fullmatch(argument)
        if not match:
            plain.append(argument)
            continue
        negated, key, has_value, value = match.groups()
        if key not in fields:
            raise _unknown_field(key, fields)
        if not has_value and not isinstance(fields[key], bool):
            value = next(arguments, None)
            if value is None:
                raise UserError(f"--config.{key} needs a value: {_wanted(fields[key])}.")
        elif not has_value:
            value = "false" if negated else "true"
        elif negated:
            raise UserError(f"--noconfig.{key} takes no value: write --config.{key}=false.")
        if isinstance(fields[key], tuple):
            value = repr(_tuple(value))
        plain.append(f"--config.{key}={value}")
    return plain


def _tuple(text: str) -> tuple:
    """A tuple from its text: "(13, 21)", "13,21" and "zero_shot,mend=runs/mend" are all understood."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        parts = [part.strip() for part in text.split(",") if part.strip()]
        value = tuple(int(part) if part.isdecimal() else part for part in parts)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _unknown_field(key: str, fields: dict) -> UserError:
    within = [name for name in fields if name.startswith(f"{key}.")]
    if within:
        return UserError(f"--config.{key} is a section: set one of its fields, for example --config.{within[0]}.")
    return UserError(
        f"There is no --config.{key}: did you mean --config.{nearest(key, fields)}? (configs/base.py lists all fields.)"
    )


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
            arguments.append(_resolved(values.config))
        else:
            arguments.append(_flag(main, name, parameter, values[name].value))
    if words:
        raise UserError(f'"{words[0]}" is not understood: flags are written --name=value; see --help.')
    return arguments


def _resolved(config: ConfigDict) -> ConfigDict:
    """The config as a command reads it: checked, and its paths resolved.

    The public functions can be called without a command line, so they resolve the paths they are given themselves.
    """
    from mend_jax.data.small_world import resolve

    check(config)
    for key, names in _named().items():
        check_choice(key, dotted_fields(config)[key], names)
    for key in PATHS:
        section, name = key.split(".")
        config[section][name] = os.path.expanduser(config[section][name])
    config.evaluate.methods = tuple(
        re.sub(r"(?<=[=:])~", os.path.expanduser("~"), spec) for spec in config.evaluate.methods
    )
    return resolve(config).lock()


def _named() -> dict[str, list[str]]:
    """{field: the names that it may have}, from the dicts in which kinds and objectives are registered."""
    from mend_jax.objectives import OBJECTIVES, STATE_OBJECTIVES
    from mend_jax.prefixes import KINDS

    kinds = [name for name, kind in KINDS.items() if kind.begins_with]  # those that can be trained
    return {"prefix.kind": kinds, "loss.objective": [*OBJECTIVES, *STATE_OBJECTIVES]}


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
    choices = get_args(parameter.annotation)
    if word in choices:
        return word
    if word is None and parameter.default is not parameter.empty:
        return parameter.default
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
        return UserError(f"--{name} must be {_wanted(fields[name.removeprefix('config.')])}, not {_given(given)}.")
    parameter = parameters[name]
    if get_origin(parameter.annotation) is Literal:
        choices = [str(word) for word in get_args(parameter.annotation)]
        return UserError(
            f'--{name} must be one of {", ".join(choices)}, not "{given}": did you mean "{nearest(given, choices)}"?'
        )
    return UserError(f"--{name} must be {_wanted(parameter.annotation())}, not {_given(given)}.")


def _wanted(value) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(type(value), "a list like a,b")


def _given(text: str) -> str:
    try:
        kind = type(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        kind = str
    words = {bool: "a truth value", int: "a whole number", float: "a fraction", tuple: "a list", str: "text"}
    return f'"{text}" ({words.get(kind, kind.__name__)})'


def _help(main) -> str:
    doc = inspect.cleandoc(sys.modules[main.__module__].__doc__ or main.__doc__ or "")
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
