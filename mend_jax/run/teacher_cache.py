"""The teacher's predictions on disk: a rerun of the same draws with another loss, rate or distiller computes no teacher pass.

A batch's file is named by what the teacher reads (its tokens, the LLM, the number k of words that are kept), so nothing
else of a config matters, and several runs share a folder. Each holds, for every query token, the k likeliest words with
their log-probabilities (float16), and the mass of all others (`losses.TopK`). Runs that compute the predictions and runs
that read them see the same numbers.

Axes: B batch, R queries of a row, Q query tokens, D width.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from mend_jax.data.batches import Batch
from mend_jax.data.tokenize import fingerprint
from mend_jax.losses import TopK
from mend_jax.models import folders
from mend_jax.run.files import whole_file
from mend_jax.run.layout import Layout
from mend_jax.step import teacher_states


def is_used(config) -> bool:
    """Whether a run reads or writes the folder loss.teacher_cache: its loss has L_distill."""
    return bool(config.loss.teacher_cache and config.loss.kd and config.stage != "lm")


class TeacherCache:
    """The predictions of the batches of a run."""

    def __init__(self, config, llm, layout: Layout):
        """`config` is a whole run's, with loss.teacher_cache; `llm` its LLM."""
        loss = config.loss
        self.folder = Path(loss.teacher_cache).expanduser()
        self.key = [folders.fingerprint(config.llm.path), llm.bos, llm.dtype, config.llm.weights, loss.teacher_top_k]
        self.compiled = layout.compile_rows(_of_batch(llm, loss.teacher_top_k, loss.chunk))

    def add(self, batch: Batch, sent: Batch, frozen, split: Callable) -> tuple[Batch, float]:
        """The batch on the devices with its teacher's predictions, and the mean mass of the words that they leave out.

        Args:
            batch: on the host.
            sent: the same on the devices.
            frozen: the LLM's parameters on the devices.
            split: `Layout.split`.
        """
        path = self._path(batch)
        found = _read(path)
        if found is None:
            found = TopK(*self.compiled(frozen, sent))
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary, open(temporary, "wb") as file:
                np.savez(file, **found._asdict())
        return sent.replace(teacher=split(found)), _mean_lost(found, batch)

    def _path(self, batch: Batch) -> Path:
        demos, length = batch.demos, batch.demos_length
        if batch.teacher_demos is not None:
            demos, length = batch.teacher_demos, batch.teacher_demos_length
        arrays, structure = jax.tree.flatten((demos, length, batch.query))
        name = fingerprint(*self.key, structure, *(part for a in arrays for part in (a.shape, a.tobytes())))
        return self.folder / name[:2] / f"{name}.npz"


def _of_batch(llm, k: int, chunk: int) -> Callable:
    def predictions(frozen, batch):
        states = teacher_states(llm, frozen, batch)
        found = TopK.of(states.reshape(-1, states.shape[-1]), llm.head(frozen), k, chunk)
        shape = (*batch.query.tokens.shape[:-1], states.shape[1])  # (B,Q) or (B,R,Q)
        return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), found)

    return predictions


def _read(path: Path) -> TopK | None:
    """The content of a file; None if there is none, or one that is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return TopK(*(file[name] for name in TopK._fields))
    except FileNotFoundError:
        return None
    except Exception as error:  # of many kinds: a file can be damaged in its arrays, their headers, its list of them
        logging.warning("%s is damaged (%s): its predictions are computed again.", path, error)
        return None


def _mean_lost(found: TopK, batch: Batch) -> float:
    """The mean of `lost` over the predicted query tokens, without padding; an encoder–decoder predicts those of y alone."""
    query = batch.query
    lost = found.lost.reshape(-1, found.lost.shape[-1]).astype(np.float64)
    length = query.length.reshape(-1, 1)
    if lost.shape[-1] != query.tokens.shape[-1]:
        length = length - query.target_start.reshape(-1, 1)
    read = np.arange(lost.shape[-1]) < length
    return float((lost * read).sum() / max(1, read.sum()))
