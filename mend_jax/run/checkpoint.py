"""Save and restore a run: `<workdir>/checkpoints/<step>/{params,opt_state,meta}` and `<step>/checksums.json`.

Orbax writes a step in the background; when it has finished, the SHA-256 of every file of the step is written beside the files.
A step without checksums was interrupted, and a step that does not match them is damaged: neither is ever used. A step that is
no longer kept loses its checksums first, so that one whose deletion was interrupted is not taken for damaged.
Only trainable params, their optimizer state and a few numbers are saved; the frozen LLM is always loaded from its source.
"""

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as managers

from mend_jax.cli.errors import UserError
from mend_jax.run.distributed import wait_for_all
from mend_jax.run.files import is_disk_full, sync_file, write_json
from mend_jax.run.reading import Unreadable, parse_json, read_json, read_text
from mend_jax.run.sealed import read_sealed, write_sealed
from mend_jax.run.sharding import places

FOLDER = "checkpoints"
CHECKSUMS = "checksums.json"
CONFIG = "config.json"
META = "meta/metadata"  # of a step
STEP = re.compile("0|[1-9][0-9]{0,17}")  # the name of its folder


class Checkpoints:
    """The checkpoints of one run in training: keeps the newest two and the best.

    `maximize`: whether a higher score is better. Opening removes the remains of an interrupted save and moves checkpoints
    that have been damaged aside.
    """

    def __init__(self, workdir, maximize):
        self.folder = Path(workdir).absolute() / FOLDER
        self.maximize = maximize
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_unusable(self.folder)
        wait_for_all("checkpoints opened")
        logging.getLogger("absl").addFilter(_without_orbax_traces)
        if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
            sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)
        self.scores = {step: read_meta(self.folder / str(step)).get("score") for step in _steps(self.folder)}
        options = managers.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(self), enable_async_checkpointing=True, **_waiting_beside_the_step()
        )
        self.manager = _Manager(self.folder, options=options)
        self.background = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="seal")
        self.unfinished = None

    @property
    def steps(self):
        """The steps of the complete checkpoints, oldest first."""
        return sorted(self.scores)

    @property
    def best_step(self):
        """The step with the best score so far, or None before the first evaluation."""
        return _best(self.scores, self.maximize)

    def save(self, step, params, opt_state, meta, score=None):
        """Starts to save the trees, of which every process writes a part; returns before they are on disk.

        The trees are numpy arrays, the same on all processes, or arrays sharded over all devices that no one will modify.
        `meta` is JSON; `score` is that of the evaluation at this step.
        """
        self.wait()
        if not self.folder.is_dir():
            raise UserError(
                f"{self.folder} is gone, so checkpoint {step} cannot be written: someone removed the workdir while the run"
                " went on; begin it again."
            )
        meta = dict(meta, step=step, score=score, maximize=self.maximize, shapes=shapes_of(params))
        self.scores[step] = score
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(_spread(params)),
            opt_state=ocp.args.PyTreeSave(_spread(opt_state)),
            meta=ocp.args.JsonSave(meta),
        )
        with self._clear_disk_errors(step):
            self.manager.save(step, args=items, force=True)
        self.unfinished = step, self.background.submit(self._seal, step)

    def wait(self):
        """Blocks until the last save is complete on disk, or raises the reason why it is not."""
        if self.unfinished is None:
            return
        (step, future), self.unfinished = self.unfinished, None
        with self._clear_disk_errors(step):
            future.result()

    def restore(self, params, opt_state):
        """(step, params, opt_state, meta) of the newest complete checkpoint, or None.

        The arguments give the shapes. If these have a sharding, each process reads only its parts, else everything as numpy.
        """
        if not self.steps:
            return None
        folder = self.folder / str(self.steps[-1])
        meta = read_meta(folder)
        check_shapes(meta["shapes"], shapes_of(params), folder)
        return meta["step"], _read_tree(folder / "params", params), _read_tree(folder / "opt_state", opt_state), meta

    def close(self):
        """Waits for the last save and ends the background threads; an error is raised once, here or earlier."""
        try:
            self.wait()
        finally:
            self.background.shutdown()
            with contextlib.suppress(Exception):  # orbax raises a failed save a second time
                self.manager.close()

    @contextlib.contextmanager
    def _clear_disk_errors(self, step):
        """Turns a full disk, or a workdir that was removed, however orbax reports it, into a UserError of one sentence."""
        try:
            yield
        except Exception as error:
            if not self.folder.is_dir():
                raise UserError(
                    f"{self.folder} is gone, so checkpoint {step} could not be written: someone removed the workdir while the"
                    " run went on; begin it again."
                ) from error
            if not is_disk_full(error):
                raise
            earlier = "earlier checkpoints are intact" if len(self.steps) > 1 else "it would have been the first"
            raise UserError(
                f"The disk is full: checkpoint {step} could not be written to {self.folder}; {earlier}. Free some space "
                "and run the same command again."
            ) from error

    def _seal(self, step):
        self.manager.wait_until_finished()
        if jax.process_index() == 0:
            folder = self.folder / str(step)
            write_json(folder / CHECKSUMS, _checksums(folder), sort_keys=True)
        kept = set(self.manager.all_steps())
        self.scores = {s: score for s, score in self.scores.items() if s in kept}


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own check for a stop: processes agree on that by counting how often each has checked."""

    def reached_preemption(self, step):
        return False


class _NewestAndBest:
    """Orbax's preservation policy: the newest two, and the best by the scores in our own meta files.

    Those that are not kept lose their checksums here: orbax deletes them next, file by file.
    """

    def __init__(self, checkpoints):
        self.checkpoints = checkpoints

    def should_preserve(self, checkpoints, *, context):
        known = set(self.checkpoints.scores)  # orbax takes more names of folders for steps than ours
        kept = {*sorted(known)[-2:], self.checkpoints.best_step, *({info.step for info in checkpoints} - known)}
        if jax.process_index() == 0:
            for info in checkpoints:
                if info.step not in kept:
                    (self.checkpoints.folder / str(info.step) / CHECKSUMS).unlink(missing_ok=True)
        return [info.step in kept for info in checkpoints]


def load_best(workdir, place=None):
    """(params, meta) of the best complete checkpoint of a training workdir, or of the newest if none was evaluated.

    params: nested dict of numpy arrays or, with `place`, of arrays placed by it (sharding.py). If a checkpoint is damaged, a
    warning names it and the next best is used; if a training that goes on removes it meanwhile, what is best by then. Raises
    UserError if the workdir holds no complete checkpoint.
    """
    while True:
        step, meta = _best_of(workdir)
        try:
            params = read_step(workdir, step, place)
        except Exception:  # orbax raises many kinds
            if _is_sealed(workdir, step):
                raise
            continue
        if _is_sealed(workdir, step):  # else some of its files may have been gone already
            return params, meta


def _is_sealed(workdir, step):
    return (step_folder(workdir, step) / CHECKSUMS).exists()


def _best_of(workdir):
    """(step, meta) of the checkpoint that `load_best` reads."""
    folder = Path(workdir).absolute() / FOLDER
    candidates = {}
    for step, damage in _damages(folder).items():
        if damage:
            logging.warning(damage)
        else:
            with contextlib.suppress(FileNotFoundError):  # removed since
                candidates[step] = read_meta(folder / str(step))
    if not candidates:
        raise UserError(f"{workdir} holds no complete checkpoint: train there first, or name another workdir.")
    maximize = candidates[max(candidates)]["maximize"]
    best = _best({step: meta["score"] for step, meta in candidates.items()}, maximize)
    step = max(candidates) if best is None else best
    return step, candidates[step]


def has_checkpoint(workdir):
    """Whether a training workdir holds a complete checkpoint."""
    folder = Path(workdir).expanduser().absolute() / FOLDER
    return any(find_damage(folder / str(step)) is None for step in reversed(_steps(folder)))


def whole_steps(workdir):
    """The steps of the complete checkpoints, oldest first."""
    folder = Path(workdir).absolute() / FOLDER
    return [step for step in _steps(folder) if find_damage(folder / str(step)) is None]


def step_folder(workdir, step):
    """The folder of a step's checkpoint."""
    return Path(workdir).absolute() / FOLDER / str(step)


def read_step(workdir, step, place=None):
    """The params of one step, as a nested dict of numpy arrays or, with `place`, as in `load_best`."""
    folder = step_folder(workdir, step)
    template = _template(read_meta(folder)["shapes"])
    if place is not None:
        template = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, places(template, place)
        )
    return _read_tree(folder / "params", template)


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
            changed = found == size and _sha256(folder / name) != digest
        except OSError:
            return f"The checkpoint {folder} is damaged: {name} is missing; it is not used."
        if found != size:
            return f"The checkpoint {folder} is damaged: {name} has {found} bytes instead of {size}; it is not used."
        if changed:
            return f"The checkpoint {folder} is damaged: the content of {name} has changed since it was written; it is not used."
    return None


def _is_entry(entry):
    """Whether it is what CHECKSUMS says of a file: its size and its digest."""
    return isinstance(entry, list) and [type(part) for part in entry] == [int, str]


def _damages(folder):
    """{step: what `find_damage` says}, without those whose deletion was interrupted: older than a complete one, not sealed."""
    found = {step: find_damage(folder / str(step)) for step in _steps(folder)}
    newest = max((step for step, damage in found.items() if damage is None), default=-1)
    return {
        step: damage for step, damage in found.items() if step > newest or (folder / str(step) / CHECKSUMS).exists()
    }


def read_meta(folder):
    """The metadata saved with a checkpoint: step, score, maximize, shapes and whatever train.py adds."""
    return read_json(folder / META, "restore it, or remove this checkpoint")


def shapes_of(params):
    """{"a/b": [shape, dtype]} of a tree of arrays, in the order of its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): [list(x.shape), str(x.dtype)] for p, x in leaves}


def check_shapes(saved, wanted, folder):
    """Raises UserError, which names the first parameter that differs, if a checkpoint belongs to another model."""
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            there, here = (_describe(s.get(name)) for s in (saved, wanted))
            raise UserError(
                f"The checkpoint {folder} belongs to another model: parameter {name} is {there} there but {here} in this "
                "configuration; use the configuration it was trained with, or another workdir."
            )


def write_config(workdir, config):
    """Writes the resolved configuration to <workdir>/config.json."""
    content = config.to_dict() if hasattr(config, "to_dict") else config
    write_sealed(Path(workdir) / CONFIG, content, sort_keys=True)


def read_config(workdir):
    """The resolved configuration (nested dict) of a training workdir. Raises UserError if there is none."""
    path = Path(workdir) / CONFIG
    try:
        config = read_sealed(path, "restore it, or use another workdir")
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a training workdir: it has no {CONFIG}.") from None
    sections = ("llm", "prefix", "loss", "data", "train")
    if not isinstance(config.get("stage"), str) or not all(isinstance(config.get(name), dict) for name in sections):
        raise UserError(f"{path} is not the config of a training: name the workdir of one.")
    return config


def _without_orbax_traces(record):
    """Drops the traces that orbax's threads print for a failed save: the error also reaches us and becomes one sentence."""
    return not (record.exc_info and "orbax" in record.pathname)


class _WithoutClosedLoops:
    """Ignores reports to orbax's closed event loop, which TensorStore's threads still send after a failed save."""

    def __init__(self, before):
        self.before = before

    def __call__(self, unraisable):
        if "Event loop is closed" not in str(unraisable.exc_value):
            self.before(unraisable)


def _remove_unusable(folder):
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not STEP.fullmatch(path.name) and "tmp" in path.name:
            shutil.rmtree(path)
    damages = _damages(folder)
    for step in _steps(folder):
        if step not in damages:  # the rest of a deletion
            shutil.rmtree(folder / str(step))
        elif damages[step]:
            _set_aside(folder, step, damages[step])


def _set_aside(folder, step, damage):
    """Removes an interrupted save; renames a damaged checkpoint, which stays beside the others."""
    if not (folder / str(step) / CHECKSUMS).exists():
        logging.warning(damage)
        shutil.rmtree(folder / str(step))
        return
    aside = folder / f"{step}.damaged"
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder / str(step), aside)
    logging.warning("%s Its files are in %s now.", damage, aside)


def _steps(folder):
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if STEP.fullmatch(p.name) and p.is_dir())


def _best(scores, maximize):
    known = {step: score for step, score in scores.items() if score is not None and score == score}
    if not known:
        return None
    # The earliest of equals, which was kept when the later one was saved.
    return min(known, key=lambda step: (-known[step] if maximize else known[step], step))


def _read_tree(folder, template):
    types = jax.tree.map(_restore_type, template)
    alone = ocp.options.MultiprocessingOptions(None, {jax.process_index()})  # each process reads on its own
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone) as reader:
        return reader.restore(folder, args=ocp.args.PyTreeRestore(item=template, restore_args=types))


def _restore_type(wanted):
    if getattr(wanted, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=wanted.dtype)
    return ocp.ArrayRestoreArgs(sharding=wanted.sharding, global_shape=wanted.shape, dtype=wanted.dtype)


def _template(shapes):
    tree = {}
    for name, (shape, dtype) in shapes.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
    return tree


def _checksums(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    for file in files:  # before what says that they are whole: after a power cut too
        sync_file(file)
    return {str(p.relative_to(folder)): [p.stat().st_size, _sha256(p)] for p in files}


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(shape_and_dtype):
    return "absent" if shape_and_dtype is None else f"{tuple(shape_and_dtype[0])} {shape_and_dtype[1]}"


def _waiting_beside_the_step():
    """Options of orbax's manager, whose threads then wait for other processes through JAX's coordinator, not on the devices.

    A wait on the devices would fall between train steps, and the order of programs must be the same on every process.
    """
    if jax.process_count() == 1:
        return {}
    everyone = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    return {"multiprocessing_options": everyone, "create": False}


def _spread(tree):
    """Numpy arrays as arrays sharded over the processes: orbax would let only process 0 write numpy arrays."""
    count = jax.process_count()
    if count == 1:
        return tree
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[i] for i in range(count)]), ("process",))

    def part(x):
        if isinstance(x, jax.Array):
            return x
        axis = next((i for i, size in enumerate(x.shape) if size % count == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "process")
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])

    return jax.tree.map(part, tree)
