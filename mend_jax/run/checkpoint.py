"""Save and restore a run with orbax, which writes a step in the background: `<workdir>/checkpoints/<step>/...` (saved_steps.py).

Only trainable params, their optimizer state and a few numbers are saved; the frozen LLM is always loaded from its source.
"""

import concurrent.futures
import contextlib
import logging
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as managers

from mend_jax.cli.errors import UserError
from mend_jax.run.distributed import wait_for_all
from mend_jax.run.files import is_disk_full
from mend_jax.run.saved_steps import (
    FOLDER,
    add_score,
    damages,
    is_sealed,
    read_meta,
    remove_unusable,
    seal,
    step_folder,
    steps_in,
    unseal,
)
from mend_jax.run.sharding import places


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
            remove_unusable(self.folder)
        wait_for_all("checkpoints opened")
        logging.getLogger("absl").addFilter(_without_orbax_traces)
        if not isinstance(sys.unraisablehook, _WithoutClosedLoops):
            sys.unraisablehook = _WithoutClosedLoops(sys.unraisablehook)
        self.scores = {step: read_meta(self.folder / str(step)).get("score") for step in steps_in(self.folder)}
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

    @property
    def kept(self):
        """The steps that are kept: the newest two and the best."""
        return {*self.steps[-2:], self.best_step} - {None}

    def save(self, step, params, opt_state, meta, score=None):
        """Starts to save the trees, of which every process writes a part; returns before they are on disk.

        The trees are numpy arrays, the same on all processes, or arrays sharded over all devices that no one will modify.
        `meta` is JSON; `score` is that of the evaluation at this step, which `add_score` may add later.
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

    def add_score(self, step, score, values):
        """The score of a step that was saved without one, and all {name: value} of its evaluation."""
        self.wait()
        if jax.process_index() == 0:
            with self._clear_disk_errors(step):
                add_score(self.folder / str(step), score, values)
        self.scores[step] = score
        if jax.process_count() == 1:  # several leave it to the next save, which all of them begin together
            for old in self.scores.keys() - self.kept:
                unseal(self.folder / str(old))
                self.manager.delete(old)
                del self.scores[old]

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
            seal(self.folder / str(step))
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
        kept = self.checkpoints.kept | ({info.step for info in checkpoints} - known)
        if jax.process_index() == 0:
            for info in checkpoints:
                if info.step not in kept:
                    unseal(self.checkpoints.folder / str(info.step))
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
            if is_sealed(step_folder(workdir, step)):
                raise
            continue
        if is_sealed(step_folder(workdir, step)):  # else some of its files may have been gone already
            return params, meta


def _best_of(workdir):
    """(step, meta) of the checkpoint that `load_best` reads."""
    folder = Path(workdir).absolute() / FOLDER
    candidates = {}
    for step, damage in damages(folder).items():
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


def read_step(workdir, step, place=None):
    """The params of one step, as a nested dict of numpy arrays or, with `place`, as in `load_best`."""
    folder = step_folder(workdir, step)
    template = _template(read_meta(folder)["shapes"])
    if place is not None:
        template = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), template, places(template, place)
        )
    return _read_tree(folder / "params", template)


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
