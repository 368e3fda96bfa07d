"""Reads prepared tokens back: documents by number from disk, task examples from memory.

If the distiller has another tokenizer than the LLM, a store has both readings and marks where both can be cut (alignment.py).
"""

import threading
from collections.abc import Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mend_jax.cli.errors import UserError
from mend_jax.data import alignment
from mend_jax.data.tokenize import damaged, read_shard


class TextStore:
    """The documents of some shards, by number. Thread-safe."""

    def __init__(self, manifest: dict, shards: list[dict]):
        self.dtype = manifest["dtype"]
        self.paths = [shard["path"] for shard in shards]
        lengths = [np.frombuffer(read_shard(path, last=True)[0], np.uint32) for path in self.paths]
        for shard, own in zip(shards, lengths, strict=True):
            _require_items(shard, len(own) // manifest["tokenizers"])
        self.all_lengths = np.concatenate(lengths).reshape(-1, manifest["tokenizers"])
        self.lengths = self.all_lengths[:, 0]  # the LLM's
        self.ends = np.cumsum([shard["items"] for shard in shards])
        self.readers, self.lock = {}, threading.Lock()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        """The LLM's token ids of a document, (T,) int32."""
        return self.readings(document)[0][0]

    def readings(self, document: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """A document's token ids, (T,) int32 per tokenizer, and with two tokenizers the marks, (T,) bool each."""
        try:
            ids, marks = _unpacked(self._record(document), self.all_lengths[document], self.dtype)
        except ValueError as error:  # another file is there now than when the lengths were read
            raise damaged(self.paths[int(np.searchsorted(self.ends, document, side="right"))], error) from error
        return [row.astype(np.int32) for row in ids], marks

    def _record(self, document: int) -> bytes:
        shard = int(np.searchsorted(self.ends, document, side="right"))
        first = int(self.ends[shard - 1]) if shard else 0
        with self.lock:
            if shard not in self.readers:
                self.readers[shard] = ArrayRecordReader(self.paths[shard])
            reader = self.readers[shard]
        try:
            [record] = reader.read([int(document) - first])
        except Exception as error:  # the reader raises plain RuntimeError
            raise damaged(self.paths[shard], error) from error
        return record


class Reading:
    """A task's examples as one tokenizer reads them: the ids of x1 y1 x2 y2 ... concatenated, and those of the template's text
    between an x, cut or not, and its y."""

    def __init__(self, between: Sequence[int], lengths: np.ndarray, ids: np.ndarray, marks: np.ndarray | None = None):
        self.lengths, self.ids, self.marks = lengths, ids, marks  # (examples, 2): tokens of x and y
        self.between = np.asarray(between, ids.dtype)
        ends = np.cumsum(lengths.reshape(-1))
        self.starts = np.concatenate([[0], ends[:-1]]).reshape(-1, 2)

    def example(self, i: int, max_input_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) of example i, with x cut to `max_input_tokens` and the text between behind it."""
        start, length = self.starts[i, 0], self.lengths[i, 0]
        cut = self.ids[start : start + min(length, max_input_tokens)]
        return np.concatenate([cut, self.between]) if len(self.between) else cut, self.output(i)

    def output(self, i: int) -> np.ndarray:
        """y of example i."""
        start = self.starts[i, 1]
        return self.ids[start : start + self.lengths[i, 1]]

    def input_marks(self, i: int) -> np.ndarray:
        """Where x of example i can be cut for both models: (tokens of x,) bool."""
        return self.marks[self.starts[i, 0] :][: self.lengths[i, 0]]


class TaskStore:
    """All examples of one task, in memory: `readings` by the LLM's tokenizer and, if it differs, by the distiller's."""

    def __init__(self, shard: dict, dtype: str, between: Sequence[Sequence[int]] = ((),)):
        """`between`: for each tokenizer the ids between x and y; these three are of a manifest of `prepare_tasks`."""
        self.task = shard["task"]
        blocks = [_block(record, dtype, len(between)) for record in read_shard(shard["path"])[:-1]]
        self.readings = [
            Reading(ids, *map(np.concatenate, zip(*own, strict=True)))
            for ids, own in zip(between, zip(*blocks, strict=True), strict=True)
        ]
        self.lengths = self.readings[0].lengths
        _require_items(shard, len(self))

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, i: int, max_input_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) of example i in the LLM's tokens, with x cut."""
        return self.readings[0].example(i, max_input_tokens)

    def cut_lengths(self, max_input_tokens: int) -> np.ndarray:
        """The length of each example in the LLM's tokens, with its x cut: (examples,) int64."""
        kept = np.minimum(self.lengths[:, 0], max_input_tokens)
        return kept + len(self.readings[0].between) + self.lengths[:, 1]

    def input_columns(self, max_input_tokens: int) -> int:
        """The most tokens of the LLM's that a cut x has with the text behind it."""
        return max_input_tokens + len(self.readings[0].between)

    def shown_lengths(self, kept: np.ndarray) -> np.ndarray:
        """The length of each example as a demonstration of whose x `kept` (`shared_inputs`) tokens are left: (examples,
        tokenizers) int64."""
        return kept + np.stack([len(own.between) + own.lengths[:, 1] for own in self.readings], axis=1)

    def shared_inputs(self, max_input_tokens: int) -> np.ndarray:
        """Tokens kept of each x in a demonstration, without the text behind it: (examples, tokenizers) int64; all tokenizers
        keep the same text."""
        kept = np.stack([np.minimum(own.lengths[:, 0], max_input_tokens) for own in self.readings], axis=1)
        if len(self.readings) == 2:
            limits = max_input_tokens, max_input_tokens
            longer = [own.lengths[:, 0] > max_input_tokens for own in self.readings]
            for i in np.flatnonzero(longer[0] | longer[1]):
                kept[i] = alignment.cut([own.input_marks(i) for own in self.readings], limits)
        return kept


def _block(record: bytes, dtype: str, tokenizers: int) -> list[tuple[np.ndarray, ...]]:
    """(lengths (examples, 2), ids) for each tokenizer, and with two tokenizers the marks."""
    count = int(np.frombuffer(record, np.uint32, 1)[0])
    size = 2 * count * tokenizers
    lengths = np.frombuffer(record, np.uint32, size, offset=4).reshape(tokenizers, 2, count).astype(np.int64)
    ids, marks = _unpacked(record[4 * (1 + size) :], lengths.sum((1, 2)), dtype)
    return list(zip(lengths.swapaxes(1, 2), ids, *([marks] if marks else []), strict=True))


def _require_items(shard: dict, count: int) -> None:
    """Raises UserError if a shard holds another number of items than its manifest says: it is another file."""
    if count != shard["items"]:
        raise damaged(shard["path"], f"{count} items, not {shard['items']}")


def _unpacked(record: bytes, lengths: Sequence[int], dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Unpacks a record of tokenize.py: the ids of each tokenizer, then with two the marks as bits, each row in whole bytes.

    Raises ValueError for a record that is not of these lengths.
    """
    lengths = [int(length) for length in lengths]
    total = sum(lengths)
    size = total * np.dtype(dtype).itemsize + (sum(-(-n // 8) for n in lengths) if len(lengths) > 1 else 0)
    if len(record) != size:
        raise ValueError(f"a record of {len(record)} bytes, not {size}")
    ids = np.split(np.frombuffer(record, dtype, total), np.cumsum(lengths)[:-1])
    if len(lengths) == 1:
        return ids, []
    rest = np.frombuffer(record, np.uint8, offset=total * np.dtype(dtype).itemsize)
    rows = np.split(rest, [-(-lengths[0] // 8)])
    return ids, [np.unpackbits(row, count=n).astype(bool) for row, n in zip(rows, lengths, strict=True)]


def text_splits(manifest: dict, validation_items: int) -> dict[str, tuple[TextStore, range]]:
    """{"train", "validation"}: for each split a store and the numbers of its documents.

    Held out are the files with "validation" in their names or, if there are none, the last `validation_items` training texts.
    """
    shards = {s: [shard for shard in manifest["shards"] if shard["split"] == s] for s in ("train", "validation")}
    train = TextStore(manifest, shards["train"])
    if shards["validation"]:
        held_out = TextStore(manifest, shards["validation"])
        return {
            "train": (train, range(len(train))),
            "validation": (held_out, range(min(validation_items, len(held_out)))),
        }
    cut = len(train) - validation_items
    if cut <= 0:
        raise UserError(
            f"{manifest['source']} holds {len(train)} texts, no more than config.data.validation_items = "
            f"{validation_items}: give more text or lower that number."
        )
    return {"train": (train, range(cut)), "validation": (train, range(cut, len(train)))}
