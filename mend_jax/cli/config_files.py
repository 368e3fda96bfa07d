"""Config files on the command line: FILE.py or FILE.py:VARIANT, and --config.section.field=value over them."""

import ast
import importlib.util
import inspect
import os
import re
import sys
from pathlib import Path

from ml_collections import ConfigDict

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import PATHS, check, check_choice, dotted_fields, nearest

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds configs/ and the package
OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(=(.*))?", re.DOTALL)


def load_config(name: str) -> ConfigDict:
    """The config that FILE.py's get_config makes, for FILE.py or FILE.py:VARIANT; it has exactly the fields of configs/base.py.

    Raises UserError for a missing or broken file, an unknown variant, or fields that differ from those of configs/base.py.
    """
    path, _, variant = name.partition(":")
    get_config = _get_config(_found(path))
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


def _found(path: str) -> str:
    """The path of a config file, or, of a relative one that is not there, beside the package: commands run in any folder."""
    for folder in (Path(), ROOT):
        if (folder / path).is_file():
            return str(folder / path)
    here = {str(p) for folder in {Path(path).parent, Path("configs")} for p in folder.glob("*.py")}
    there = sorted(here | {str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py")})
    hint = f"did you mean {nearest(path, there)}?" if there else "give the path of a file like configs/base.py."
    raise UserError(f'There is no config file "{path}": {hint}')


def _get_config(path: str):
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


def take_config(argv: list[str]):
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


def plain_overrides(argv: list[str], fields: dict) -> list[str]:
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
                raise UserError(f"--config.{key} needs a value: {wanted(fields[key])}.")
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


def resolved(config: ConfigDict) -> ConfigDict:
    """The config as a command reads it: checked, and its paths resolved.

    The public functions can be called without a command line, so they resolve the paths they are given themselves.
    """
    from mend_jax.data.small_world import resolve

    if not config.llm.path:
        raise UserError(
            "The config names no LLM: set --config.llm.path= to a folder, a hub name or a GGUF file, and --config.prefix.backbone= to the"
            " model that the distiller starts from."
        )
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


def wanted(value) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return words.get(type(value), "a list like a,b")
