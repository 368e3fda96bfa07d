"""Prepared tokens, read back: documents by number from disk, the examples of tasks from memory."""

import threading

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from mend_jax.data.tokenize import damaged, read_shard
from mend_jax.errors import UserError


class TextStore:
    """The documents of some shards, by number. Safe to use from several threads."""

    def __init__(self, manifest: dict, shards: list[dict]):
        self.dtype = manifest["dtype"]
        self.paths = [shard["path"] for shard in shards]
        self.lengths = np.concatenate([np.frombuffer(read_shard(path, last=True)[0], np.uint32) for path in self.paths])
        self.ends = np.cumsum([shard["items"] for shard in shards])
        self.readers, self.lock = {}, threading.Lock()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, document: int) -> np.ndarray:
        """Token ids of a document, (T,) int32."""
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
        return np.frombuffer(record, self.dtype).astype(np.int32)


class TaskStore:
    """All examples of one task, in memory: ids of x1 y1 x2 y2 ... one after another."""

    def __init__(self, shard: dict, dtype: str):
        self.task = shard["task"]
        blocks = read_shard(shard["path"])[:-1]
        lengths, ids = zip(*(_block(block, dtype) for block in blocks), strict=True)
        self.ids = np.concatenate(ids)
        self.lengths = np.concatenate(lengths)  # (examples, 2): tokens of x and y
        ends = np.cumsum(self.lengths.reshape(-1))
        self.starts = np.concatenate([[0], ends[:-1]]).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def example(self, i: int, max_input_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) of example i, x cut."""
        (x, y), (x_length, y_length) = self.starts[i], self.lengths[i]
        return self.ids[x : x + min(x_length, max_input_tokens)], self.ids[y : y + y_length]

    def cut_lengths(self, max_input_tokens: int) -> np.ndarray:
        """Tokens of each example with its x cut: (examples,) int64."""
        return np.minimum(self.lengths[:, 0], max_input_tokens) + self.lengths[:, 1]


def _block(record: bytes, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    count = int(np.frombuffer(record, np.uint32, 1)[0])
    lengths = np.frombuffer(record, np.uint32, 2 * count, offset=4).reshape(2, count).T.astype(np.int64)
    return lengths, np.frombuffer(record, dtype, offset=4 * (1 + 2 * count))


def text_splits(manifest: dict, validation_items: int) -> dict[str, tuple[TextStore, range]]:
    """{"train", "validation"}: a store and the numbers of its documents that belong there.

    Held out are the files named so; where there are none, the last `validation_items` training texts.
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
            f"{validation_items}: give more text or lower it."
        )
    return {"train": (train, range(cut)), "validation": (train, range(cut, len(train)))}
