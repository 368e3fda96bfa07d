"""Whether a run may resume with a config, and whether it may start from another run's result.

Beside config.json is sources.json: where the folders that the config names were, and fingerprints of their contents. So a
run resumes if its folders have moved, but not if another model or other data have taken an old path.
"""

import functools
import json
import logging
from pathlib import Path

from mend_jax.cli.config_files import base_config
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import dotted_fields
from mend_jax.data.bos import NONE
from mend_jax.interchange.trained import is_exported
from mend_jax.models.families import from_hf_config
from mend_jax.models.folders import fingerprint, local_folder
from mend_jax.prefixes import kind_of
from mend_jax.run import checkpoint, saved_config, saved_steps
from mend_jax.run.sealed import read_sealed, write_sealed
from mend_jax.scoring.results import tree_hash

SOURCES = "sources.json"
MODELS = ("llm.path", "prefix.backbone")
DATA = ("data.text", "data.tasks")
START = "prefix.start_from"
VALIDATION_SEEDS = "data.validation_seeds"
BEFORE = {"data.bos": NONE}  # what a field meant before it existed, where its default may change
# What may change when a run goes on: where and how fast it computes, what it prints, what it began with, what the experiment does
# later.
FREE_FIELDS = (
    "train.log_every", "train.save_every", "train.parallel", "train.accumulate", "data.cache", "data.processes",
    "data.prefetch", "prefix.rms", "llm.attention", "llm.remat", "prefix.remat", "loss.chunk", "mesh.",
    "experiment.",
)  # fmt: skip

PARTS = ("train.parallel", "train.accumulate", "mesh.")  # the parts of a batch, whose queries info_nce contrasts


def check_resume(workdir, config, finished: bool) -> None:
    """Raises UserError, which names the field and both values, if a run would resume with other settings that matter.

    A field that the saved config lacks had the default of configs/base.py. `finished`: nothing will be computed.
    """
    saved, wanted = dotted_fields(saved_config.read_config(workdir)), dotted_fields(json.loads(config.to_json()))
    saved, recorded = defaults() | saved, read_sources(workdir)
    read = _paths_read(config)
    for name in sorted(saved.keys() | wanted.keys()):
        there, here = saved.get(name), wanted.get(name)
        if not matters(name, config, finished) or (there == here and (finished or name not in MODELS)):
            continue
        if name in PATHS and (name not in read or _same_source(name, there, here, recorded.get(name, {}))):
            continue
        if name == "loss.teacher_cache" and bool(there) == bool(here):
            continue  # what it holds is found by its content
        if name in DATA and there and here and not finished and "fingerprint" in recorded.get(name, {}):
            continue  # their path does not matter: `check_data` checks their content
        if name not in wanted and finished:
            continue
        there, here = (_describe(name, c, recorded if c is saved else {}) for c in (saved, wanted))
        if name not in wanted:
            raise UserError(
                f"{workdir} was trained with {name}={there}, which this version no longer has: use the version that "
                "began the run, or another workdir."
            )
        raise UserError(
            f"{workdir} was trained with {name}={there}, now it is {here}: set it back, or use another workdir."
        )


def check_start(config) -> None:
    """Raises UserError unless config.prefix.start_from is a run whose result can be the start of this run's model."""
    given = config.prefix.start_from
    if is_exported(given):
        return  # it is compared when it is read (build.py)
    folder = Path(given)
    if not (folder / saved_config.CONFIG).is_file():
        what = "is not a training workdir: it has no config.json" if folder.is_dir() else "is not a folder"
        raise UserError(f"{START}={given} {what}; name the workdir of the earlier training.")
    if not saved_steps.has_checkpoint(folder):
        raise UserError(f"{START}={given} holds no complete checkpoint: train there first, or name another workdir.")
    saved, wanted = dotted_fields(saved_config.read_config(folder)), dotted_fields(json.loads(config.to_json()))
    saved, recorded = defaults() | saved, read_sources(folder)
    if saved["stage"] == "lm":
        raise UserError(
            f'{START}={given} was trained with stage="lm", so it holds an LLM: set llm.path or prefix.backbone to its '
            "folder llm, or name the workdir of a distiller or soft prompt."
        )
    kind = kind_of(config)
    for name in ("prefix.kind", *kind.same_fields):
        there, here = saved[name], wanted[name]
        if name == "prefix.kind" and there in kind.begins_with:
            continue
        if name in MODELS:
            same = _same_source(name, there, here, recorded.get(name, {}))
        else:
            there, here = _resolved_fields(config, name, there, here)
            same = there == here
        if not same:
            there, here = (_describe(name, c, recorded if c is saved else {}) for c in (saved, wanted))
            raise UserError(
                f"{START}={given} was trained with {name}={there}, now it is {here}: set it back, or start from "
                "another workdir."
            )


def check_llm(workdir, path) -> None:
    """Warns if the LLM at `path` is not the one that a workdir's run was trained for; other folders do not record theirs."""
    known = read_sources(workdir).get("llm.path", {}) if Path(workdir).is_dir() else {}
    if known.get("fingerprint", (here := fingerprint(path))) != here:
        logging.warning(
            "The model in %s was trained for the LLM in %s, not for that in %s, to which its vectors may mean nothing.",
            workdir,
            known["folder"],
            path,
        )


def check_data(workdir, config, contents: dict[str, str]) -> None:
    """Raises UserError if a run would resume with other texts or examples than it began with.

    `contents` is that of `Batches`. Runs of earlier versions of this program recorded nothing and are not checked.
    """
    recorded, fields = read_sources(workdir), dotted_fields(config.to_dict())
    for name, content in contents.items():
        if recorded.get(name, {}).get("fingerprint", content) != content:
            raise UserError(
                f"{name}={fields[name]} does not hold the data that {workdir} was trained with (then in"
                f" {recorded[name]['folder']}): put the files back, or use another workdir."
            )


def write_sources(workdir, config, contents: dict[str, str], start_hash: str | None = None) -> None:
    """Writes sources.json. `contents` is that of `Batches`; `start_hash` is the `tree_hash` of the params that the run began
    with, or None if it resumes."""
    fields, before = dotted_fields(config.to_dict()), read_sources(workdir)
    sources = {}
    for name in _paths_read(config):
        entry = sources[name] = {"folder": _absolute(fields[name])}
        if name in MODELS:
            entry["fingerprint"] = fingerprint(fields[name])
        elif name in contents:
            entry["fingerprint"] = contents[name]
        elif name == START and start_hash is not None:
            entry["fingerprint"] = start_hash
        elif name == START and "fingerprint" in before.get(name, {}):
            entry["fingerprint"] = before[name]["fingerprint"]
    write_sealed(Path(workdir) / SOURCES, sources, sort_keys=True)


def read_sources(workdir) -> dict:
    """{field: {"folder", "fingerprint" of a model or of data}}; {} if an earlier version of this program wrote the workdir."""
    path = Path(workdir) / SOURCES
    try:
        found = read_sealed(path, "restore it, or delete it")
    except FileNotFoundError:
        return {}
    if not all(
        isinstance(e, dict) and all(isinstance(v, str) for v in e.values()) and "folder" in e for e in found.values()
    ):
        raise UserError(f"{path} does not say of each source where it is: restore it, or delete it.")
    return found


PATHS = (*MODELS, START, *DATA)


def _paths_read(config) -> list[str]:
    """The names of the fields whose folders a run of this config reads."""
    distils = config.stage != "lm" and bool(kind_of(config).backbone(config))
    reads = {
        "llm.path": True,
        "prefix.backbone": distils,
        START: config.stage != "lm" and config.prefix.start_from,
        "data.text": config.stage != "finetune",
        "data.tasks": config.stage != "pretrain",
    }
    return [name for name in PATHS if reads[name]]


def matters(name: str, config, finished: bool = False) -> bool:
    """Whether another value of a field changes the rest of a run; what validation alone reads does where it reads it."""
    if name.startswith(PARTS) and config.loss.objective == "info_nce" and config.loss.kd:
        return True
    if name.startswith(FREE_FIELDS):
        return False
    if name == "loss.kd_tokens":
        return config.stage == "finetune" and bool(config.loss.kd)
    if not name.startswith("evaluate.") and name != VALIDATION_SEEDS:
        return True
    validation, seeds = [], [VALIDATION_SEEDS, *([] if config.data.validation_seeds else ["evaluate.seeds"])]
    if config.stage == "finetune":
        validation = ["evaluate.tasks", "evaluate.limit", "evaluate.option_score", *seeds]
        validation += ["evaluate.demos"] if config.evaluate.demos == "pool" else []  # data/demonstrations.py
        validation += ["evaluate.shuffle_demos"] if kind_of(config).reads_demos else []
    elif config.stage == "lm" and config.data.text_share < 1:
        validation = seeds  # held-out sequences are the dev examples of these
    return name in validation and not finished


def _same_source(name: str, there: str, here: str, recorded: dict) -> bool:
    """Whether a path of the saved config and one of the current config name the same source."""
    if not there or not here:
        return there == here
    folder = recorded.get("folder", _absolute(there))
    same_place, known = there == here or folder == _absolute(here), recorded.get("fingerprint")
    if name in MODELS:
        if known is None and not same_place and Path(folder).exists():
            known = fingerprint(folder)
        return same_place if known is None else fingerprint(here) == known
    if name == START and known is not None and not same_place and saved_steps.has_checkpoint(here):
        return tree_hash(checkpoint.load_best(here)[0]) == known
    return same_place


def _describe(name: str, fields: dict, recorded: dict) -> str:
    """A field's value as JSON; a model's has its fingerprint too, because the paths may be equal."""
    if name not in fields:  # one of our fields, if the package is installed without configs/base.py
        return "absent"
    value = json.dumps(fields[name])
    if name not in MODELS:
        return value
    known = recorded.get(name, {}).get("fingerprint") or (fingerprint(fields[name]) if _is_folder(fields[name]) else "")
    return f"{value} (content {known})" if known else value


def _resolved_fields(config, name: str, *values) -> tuple:
    """What values of a field mean to the kind of prefix; the models' settings are read only if the values differ."""
    if all(value == values[0] for value in values):
        return values
    kind = kind_of(config)
    paths = kind.backbone(config), config.llm.path
    models = [from_hf_config(local_folder(path)) if path else None for path in paths]
    return tuple(kind.resolved(name, value, *models) for value in values)


def _is_folder(path: str) -> bool:
    return Path(path).expanduser().exists()


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute().resolve()) if path else ""


@functools.cache
def defaults() -> dict:
    """What a field means for a run older than the field: its value in BEFORE, else in configs/base.py, which may be missing."""
    base = base_config()
    return ({} if base is None else dotted_fields(json.loads(base.to_json()))) | BEFORE
