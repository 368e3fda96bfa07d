"""The steps of a run on disk: which of them are complete, and what is done with the others.

`<workdir>/checkpoints/<step>/{params,opt_state,meta}` is written by orbax (checkpoint.py). When that has finished, the SHA-256 of
every file of the step is written beside the files, to `<step>/checksums.json`: the step is sealed. A step without checksums was
interrupted, and a step that does not match them is damaged: neither is ever used. A step that is no longer kept loses its
checksums first, so that one whose deletion was interrupted is not taken for damaged.
"""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path

from mend_jax.cli.errors import UserError
from mend_jax.run.files import sha256_of, sync_file, write_json
from mend_jax.run.reading import Unreadable, parse_json, read_json, read_text
from mend_jax.run.sealed import read_sealed, write_sealed

FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
META = "meta/metadata"  # of a step
SCORE = "score.json"  # of a step that was saved before it was evaluated: it is added later, with a checksum of its own
REMEDY = "restore it, or remove this checkpoint"
STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of its folder


def step_folder(workdir, step):
    """The folder of a step's checkpoint."""
    return Path(workdir).absolute() / FOLDER / str(step)


def steps_in(folder):
    """The steps that have a folder in a run's folder of checkpoints, complete or not, the earliest first."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if STEP.fullmatch(p.name) and p.is_dir())


def whole_steps(workdir):
    """The steps of the complete checkpoints, oldest first."""
    folder = Path(workdir).absolute() / FOLDER
    return [step for step in steps_in(folder) if find_damage(folder / str(step)) is None]


def has_checkpoint(workdir):
    """Whether a training workdir holds a complete checkpoint."""
    folder = Path(workdir).expanduser().absolute() / FOLDER
    return any(find_damage(folder / str(step)) is None for step in reversed(steps_in(folder)))


def read_meta(folder):
    """The metadata saved with a checkpoint: step, score, maximize, shapes and whatever train.py adds.

    `due` says whether the step is still to be evaluated; if it was evaluated after it was saved, `values` are what was found.
    """
    meta = read_json(folder / META, REMEDY)
    with contextlib.suppress(FileNotFoundError):
        meta |= read_sealed(folder / SCORE, REMEDY) | {"due": False}
    return meta


def add_score(folder, score, values):
    """Adds the score, and all {name: value} of its evaluation, to a step that was saved before."""
    write_sealed(folder / SCORE, {"score": score, "values": values})


def find_damage(folder):
    """A sentence that names a checkpoint's folder and what is wrong with it; None if it is complete."""
    try:
        expected = parse_json(read_text(folder / CHECKSUMS, ""), dict)
    except FileNotFoundError:
        return f"The checkpoint {folder} was not finished (it has no {CHECKSUMS}) and is not used."
    except (Unreadable, UserError):
        return f"The checkpoint {folder} is damaged: {CHECKSUMS} is not readable; it is not used."
    if META not in expected or not all(_is_entry(entry) for entry in expected.values()):
        return f"The checkpoint {folder} is damaged: {CHECKSUMS} does not list its files; it is not used."
    for name, (size, digest) in expected.items():
        try:
            found = (folder / name).stat().st_size
            changed = found == size and sha256_of(folder / name) != digest
        except OSError:
            return f"The checkpoint {folder} is damaged: {name} is missing; it is not used."
        if found != size:
            return f"The checkpoint {folder} is damaged: {name} has {found} bytes instead of {size}; it is not used."
        if changed:
            return f"The checkpoint {folder} is damaged: the content of {name} has changed since it was written; it is not used."
    return None


def damages(folder):
    """{step: what `find_damage` says}, without those whose deletion was interrupted: older than a complete one, not sealed."""
    found = {step: find_damage(folder / str(step)) for step in steps_in(folder)}
    newest = max((step for step, damage in found.items() if damage is None), default=-1)
    return {step: damage for step, damage in found.items() if step > newest or is_sealed(folder / str(step))}


def remove_unusable(folder):
    """Removes the remains of interrupted saves and deletions; moves damaged steps aside, and says so."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not STEP.fullmatch(path.name) and "tmp" in path.name:
            shutil.rmtree(path)
    found = damages(folder)
    for step in steps_in(folder):
        if step not in found:  # the rest of a deletion
            shutil.rmtree(folder / str(step))
        elif found[step]:
            _set_aside(folder, step, found[step])


def seal(folder):
    """Writes the checksums of a step's files, which have all been written: from now on it is complete."""
    write_json(folder / CHECKSUMS, _checksums(folder), sort_keys=True)


def unseal(folder):
    """Takes a step's checksums away, before its files are deleted."""
    (folder / CHECKSUMS).unlink(missing_ok=True)


def is_sealed(folder):
    """Whether a step was completely written and is not being deleted; its files are not looked at."""
    return (folder / CHECKSUMS).exists()


def _set_aside(folder, step, damage):
    """Removes an interrupted save; renames a damaged checkpoint, which stays beside the others."""
    if not is_sealed(folder / str(step)):
        logging.warning(damage)
        shutil.rmtree(folder / str(step))
        return
    aside = folder / f"{step}.damaged"
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder / str(step), aside)
    logging.warning("%s Its files are in %s now.", damage, aside)


def _is_entry(entry):
    """Whether it is what CHECKSUMS says of a file: its size and its digest."""
    return isinstance(entry, list) and [type(part) for part in entry] == [int, str]


def _checksums(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    for file in files:  # before what says that they are whole: after a power cut too
        sync_file(file)
    return {str(p.relative_to(folder)): [p.stat().st_size, sha256_of(p)] for p in files}
