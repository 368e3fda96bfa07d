"""Which trainings of a method are the same but for their seed, by the config.json that each of them left.

An experiment's evaluation may hold MEND trained with ten values of beta, and each with three seeds: names alone (mend-1a2b3c4d) do
not say which of them are trainings of one method.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import dotted_fields
from mend_jax.cli.text import shown
from mend_jax.interchange.trained import is_exported, method_spec
from mend_jax.run import resume, saved_config

Settings = dict[str, Any]  # {"section.field": value}; those of what a training began with are "STAGE section.field"
UNKNOWN = "settings not known"


def settings_of(spec: str, evaluation: Path) -> Settings | None:
    """All that decides a training but its seed, with that of the training that it began with; None where no config of it is left.

    Args:
        spec: the method's "path" in scores.json. It may have moved, together with the evaluation.
        evaluation: the folder of the evaluation.
    """
    return _settings(Path(method_spec(spec).path).expanduser(), evaluation)


def apart(variants: Sequence[Settings | None]) -> tuple[list[str], Settings]:
    """([what tells each of several settings from the usual ones: "data.beta=0.5, loss.kd=1"; "" of the usual ones], the usual values
    of the fields that differ), where the usual value of a field is the one that most of them have."""
    known = [one for one in variants if one is not None]
    usual, differing = {}, []
    for name in dict.fromkeys(name for one in known for name in one):
        values = [one[name] for one in known if name in one]
        [(most, _)] = Counter(map(json.dumps, values)).most_common(1)
        usual[name] = json.loads(most)
        if any(value != usual[name] for value in values):
            differing.append(name)
    labels = [UNKNOWN if one is None else _label(one, usual, differing) for one in variants]
    return labels, {name: usual[name] for name in differing if _own(name) not in differing or _own(name) == name}


def described(settings: Settings) -> str:
    """Fields with their values, as one text."""
    return ", ".join(
        shown(f"{name}={value if isinstance(value, str) else json.dumps(value)}") for name, value in settings.items()
    )


def _label(one: Settings, usual: Settings, differing: Sequence[str]) -> str:
    own = {name: one[name] for name in differing if name in one and one[name] != usual[name]}
    # What all stages have instead is said once.
    return described({n: v for n, v in own.items() if _own(n) == n or own.get(_own(n)) != v})


def _own(name: str) -> str:
    """The field itself, of "STAGE section.field"."""
    return name.rpartition(" ")[2]


def _settings(path: Path, beside: Path) -> Settings | None:
    found = next(_configs(path, beside), None)
    if found is None:
        return None
    folder, saved = found
    try:
        return _without_seed(resume.defaults() | dotted_fields(saved), folder)
    except (UserError, AttributeError, KeyError, TypeError, ValueError, RecursionError):  # not a config of ours
        return None


def _without_seed(fields: Settings, folder: Path) -> Settings:
    config, sources = nested(fields), resume.read_sources(folder)
    kept = {name: value for name, value in fields.items() if name != "seed" and resume.matters(name, config)}
    if sources:  # what was read, wherever it was
        read = {name: one.get("fingerprint", one["folder"]) for name, one in sources.items()}
        kept = {name: value for name, value in kept.items() if name not in resume.PATHS or name in read} | read
    return kept | _of_start(str(fields[resume.START] or ""), folder)


def _of_start(start: str, folder: Path) -> Settings:
    if not start:
        return {resume.START: "nothing"}
    before = _settings(Path(start), folder)
    if before is None:  # two that are not here cannot be told apart, two exported folders can
        return {resume.START: start if is_exported(start) else "a training that is not here"}
    stage = before["stage"]
    return {resume.START: stage} | {f"{stage} {name}": value for name, value in before.items()}


def _configs(path: Path, beside: Path) -> Iterator[tuple[Path, dict]]:
    """(folder, its config) where a training may be: at its path, or in the same workdir as `beside`, if both have moved."""
    inside = path.parts[-2:]  # "trainings/finetune-1a2b3c4d", "mend/finetune"
    for folder in (path, *(root.joinpath(*inside) for root in (beside.parent, beside.parent.parent))):
        try:
            yield folder, saved_config.read_config(folder)
        except (OSError, UserError):
            continue


def nested(fields: Settings) -> ConfigDict:
    """The config of {"section.field": value}."""
    made: dict = {}
    for name, value in fields.items():
        *sections, last = name.split(".")
        place = made
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return ConfigDict(made)
