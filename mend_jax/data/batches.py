"""Batches of fixed shapes for the train step, as a function of (seed, step).

Axes: B rows of this process, N demonstration tokens, R queries of a row (data.queries), Q query tokens.
The rows of `bucket_window` batches are drawn together and sorted by length, so that batches need little padding.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from flax import struct

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES, check_choice
from mend_jax.data import metaicl, prepared, sampling
from mend_jax.data.query import Query
from mend_jax.data.readers import Readers
from mend_jax.data.rows.finetune import TaskRows
from mend_jax.data.rows.lm import SequenceRows
from mend_jax.data.rows.pretrain import TextRows
from mend_jax.data.stores import TaskStore, text_splits

LAST_STEP = 2**40


@struct.dataclass
class Batch:
    """The rows of one step, right-padded with 0; numpy arrays on the host. In stage "lm" demos has no columns.

    If a row has several queries (R > 1), the arrays of `query` are (B,R,Q) and (B,R).
    """

    demos: np.ndarray  # (B,N) int32
    demos_length: np.ndarray  # (B,) int32
    query: Query  # tokens (B,Q), length (B,), target_start (B,), int32
    ids: np.ndarray  # (B,) int64, row numbers, for `Batches.describe`
    vectors: np.ndarray | None = None  # (B,) int32, how many vectors of each row the LLM reads, with prefix.nested
    # The teacher's context: the same text in the LLM's own tokens or, with release_truncation, a longer text.
    teacher_demos: np.ndarray | None = None
    teacher_demos_length: np.ndarray | None = None
    teacher: Any = None  # its predictions at the queries (losses.TopK), with loss.teacher_cache


class Batches:
    """`batches[step]` is this process's part of the global batch of a step; it depends on nothing but the step.

    `steps` is the number of batches of a validation split; None for training, which has no end.
    `lengths` are the numbers of vectors that are trained, if there are several: each row draws one.
    `contents` identifies the files of these batches and of their validation: {"data.text" or "data.tasks": a hash}.
    """

    def __init__(
        self, rows, config, steps, sort: bool, share=(0, 1), separate_targets=False, contents=None, lengths=()
    ):
        self.rows, self.steps, self.contents, self.lengths = rows, steps, contents or {}, lengths
        process_index, process_count = share
        self.batch_size, self.window = config.train.batch_size, config.data.bucket_window if sort else 1
        self.seed, self.prefetch = config.seed, config.data.prefetch
        if self.batch_size % process_count:
            raise UserError(
                f"config.train.batch_size = {self.batch_size} cannot be divided among {process_count} processes: "
                "choose a multiple."
            )
        part = self.batch_size // process_count
        self.separate_targets = separate_targets
        self.mine = slice(process_index * part, (process_index + 1) * part)
        self.plans, self.lock = {}, threading.Lock()

    def __getitem__(self, step: int) -> Batch:
        rows, demos_length, query_length = self.plan(step)
        demo_size = self._demo_size(rows, demos_length)
        query_size = sampling.bucket(int(query_length.max()), self.rows.query_buckets)
        mine = rows[self.mine]
        demos, queries, teachers = zip(*(self.rows.tokens(int(row)) for row in mine), strict=True)
        demos, demos_length = pad(demos, demo_size)
        query = Query(*pad_queries(queries, query_size), *self._columns(rows))
        if self.rows.counts_outputs:
            query = query.replace(counted=pad([self.rows.counted(int(row)) for row in mine], query_size)[0] > 0)
        batch = Batch(demos, demos_length, query, mine)
        if teachers[0] is not None:  # one size for the global batch: every process needs the same shape
            teacher, teacher_length = pad(teachers, self._teacher_size(rows, demo_size))
            batch = batch.replace(teacher_demos=teacher, teacher_demos_length=teacher_length)
        if self.lengths:
            drawn = [sampling.row_rng(self.seed, 7, int(row)).choice(self.lengths) for row in mine]
            batch = batch.replace(vectors=np.asarray(drawn, np.int32))
        return batch

    def _demo_size(self, rows, demos_length) -> int:
        """Columns of the contexts; two readings share one size, so that fewer shapes are compiled."""
        longest = int(demos_length.max())
        if self.rows.separate_teacher and self.rows.packing is None:
            longest = max(longest, self._teacher_length(rows))
        return sampling.bucket(longest, self.rows.demo_buckets)

    def _teacher_size(self, rows, demo_size: int) -> int:
        """Columns of the teacher's contexts; they have their own size if the distiller reads in chunks."""
        if not self.rows.separate_teacher:
            return self.rows.teacher_size  # the release's
        return (
            demo_size
            if self.rows.packing is None
            else sampling.bucket(self._teacher_length(rows), self.rows.teacher_buckets)
        )

    def _teacher_length(self, rows) -> int:
        return max(self.rows.teacher_length(int(row)) for row in rows)

    def _columns(self, rows) -> tuple[int | None, int | None]:
        """Separate sizes for x and y over the global batch, or None unless the LLM needs them: each size is compiled."""
        if not self.separate_targets:
            return None, None
        longest = max(self.rows.target_length(int(row)) for row in rows)
        return self.rows.input_columns, sampling.bucket(longest, self.rows.query_buckets)

    def plan(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A step's global batch: row numbers and context lengths, each (batch_size,), and query lengths (batch_size, R)."""
        window, place = divmod(int(step), self.window)
        with self.lock:  # several threads ask for the same window at once
            if window not in self.plans:
                if len(self.plans) > 3 + self.prefetch:  # the main thread asks for prefetched steps once more
                    self.plans.pop(min(self.plans))
                self.plans[window] = self._plan_window(window)
            return tuple(array[place] for array in self.plans[window])

    def _plan_window(self, window: int):
        count = self.window * self.batch_size
        first = window * count
        lengths = np.asarray([self.rows.lengths(row) for row in range(first, first + count)], np.int64)
        shape = (self.window, self.batch_size)
        order = np.arange(count).reshape(shape)
        if self.window > 1:
            rng = sampling.row_rng(self.seed, 5, window)
            sizes = self.rows.demo_buckets, self.rows.query_buckets
            order = sampling.window_plan(lengths[:, 0], lengths[:, 1:].max(1), *sizes, self.window, rng)
        return first + order, lengths[order, 0], lengths[order, 1:]

    def iterator(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, prefetched by threads; the time that `next` takes is the time spent waiting for data."""
        stop = LAST_STEP if self.steps is None else self.steps
        options = grain.ReadOptions(
            num_threads=max(1, min(8, self.prefetch)), prefetch_buffer_size=max(1, self.prefetch)
        )
        return iter(grain.MapDataset.range(start_step, stop).map(self.__getitem__).to_iter_dataset(options))

    def tokens(self, step: int) -> int:
        """The tokens of a step's global batch, without padding: those of contexts and queries."""
        rows, demos_length, query_length = self.plan(step)
        chunked = self.rows.packing is not None  # then a context's length is that of its chunks, which are not full
        contexts = sum(self.rows.context_tokens(int(row)) for row in rows) if chunked else int(demos_length.sum())
        return contexts + int(query_length.sum())

    def padding(self, step: int) -> float:
        """The share of padding among the tokens of a step's global batch, 0 to 1."""
        rows, demos_length, query_length = self.plan(step)
        sizes = self._demo_size(rows, demos_length)
        sizes += sampling.bucket(int(query_length.max()), self.rows.query_buckets) * query_length.shape[1]
        return 1.0 - self.tokens(step) / (sizes * len(query_length))

    def describe(self, row: int) -> str:
        """Where a row of `Batch.ids` came from, for messages to the user."""
        return self.rows.describe(int(row))


def pad(rows, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids, right-padded with 0 to (B, size) int32, and their lengths (B,) int32."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    out = np.zeros((len(rows), size), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, lengths


def pad_queries(rows, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows' queries, each (tokens, target_start), as tokens, lengths and starts: (B,Q) and (B,), or (B,R,Q) and (B,R)."""
    tokens, length = pad([query for row in rows for query, _ in row], size)
    arrays = tokens, length, np.asarray([start for row in rows for _, start in row], np.int32)
    if len(rows[0]) == 1:
        return arrays
    return tuple(array.reshape(len(rows), len(rows[0]), *array.shape[1:]) for array in arrays)


def make_batches(config, readers: Readers, split: str = "train", share: tuple[int, int] = (0, 1)) -> Batches:
    """The batches of config.stage; data that is not tokenised yet is tokenised first (`mend_jax.prepare`).

    Args:
        readers: what the data must know about the models.
        split: "train", or "validation": held-out text, and the dev examples of the partition's meta-test tasks.
        share: (i, n): this process's part of every batch is part i of n.
    Raises:
        UserError: bad input (see `metaicl`, `c4` and `rows`).
    """
    tokenizer, distiller_tokenizer = readers.tokenizer, readers.distiller_tokenizer
    train, stage = split == "train", config.stage
    check_choice("stage", stage, CHOICES["stage"])
    if split not in ("train", "validation"):
        raise ValueError(f"split {split!r}")
    store, documents, tasks, contents = None, range(0), [], {}
    if stage == "pretrain" or (stage == "lm" and config.data.text_share > 0):
        manifest = prepared.prepare_text(config, tokenizer, distiller_tokenizer)
        store, documents = text_splits(manifest, config.data.validation_items)[split]
        contents["data.text"] = prepared.contents(manifest)
    if stage == "finetune" or (stage == "lm" and config.data.text_share < 1):
        manifest = prepare_tasks(config, tokenizer, split, distiller_tokenizer)
        tasks = [TaskStore(shard, manifest["dtype"], manifest["between"]) for shard in manifest["shards"]]
        contents["data.tasks"] = prepared.contents(manifest, *metaicl.held_out_files(config))
    if stage == "pretrain":
        rows = TextRows(config, store, documents, train, readers)
    elif stage == "finetune":
        rows = TaskRows(config, tasks, train, readers)
    else:
        rows = SequenceRows(config, store, documents, tasks, train, readers)
    steps = None if train else max(1, config.data.validation_items // config.train.batch_size)
    lengths = (*config.prefix.nested, config.prefix.length) if train and stage != "lm" and config.prefix.nested else ()
    # Stage "lm": the place of a text in its batch is a function of the row (SequenceRows.text_number).
    sort = train and (stage != "lm" or store is None)
    return Batches(rows, config, steps, sort, share, readers.separate_targets, contents, lengths)


def prepare_tasks(config, tokenizer, split: str, distiller_tokenizer=None) -> dict:
    """The manifest of the tasks of `find_tasks`, which are tokenised first if they are not yet."""
    files = "train" if split == "train" else "dev"
    return prepared.prepare_tasks(config, tokenizer, find_tasks(config, split), files, distiller_tokenizer)


def find_tasks(config, split: str) -> list[str]:
    """The partition's tasks that have files: meta-training ("train"), or meta-test with dev files ("validation").

    One warning names the tasks without files. Raises UserError if no task has files.
    """
    data, side, files = config.data, *(("train", "train") if split == "train" else ("test", "dev"))
    names = metaicl.load_partition(data.tasks, data.partition)[side]
    seeds = metaicl.validation_seeds(config)
    present, missing = metaicl.present_tasks(data.tasks, names, files, data.k, seeds)
    if not present:
        raise metaicl.none_present(config, names, files, data.k, seeds)
    if missing:
        logging.warning(
            "%d of %d meta-%s tasks are missing in %s: %s",
            len(missing),
            len(names),
            side,
            data.tasks,
            ", ".join(missing),
        )
    return present
