"""Text to token ids on disk, one shard at a time; `prepare` runs this in its own process or in worker processes.

A shard is an array_record file that appears under its name only when it is complete. Text: one record per document, then one
record with every document's length. Tasks: one record per 1,024 examples, then one record with two counts. If the
distiller has another tokenizer than the LLM, a record holds both readings and the marks of alignment.py.
`python -m mend_jax.data.tokenize` is the worker: it reads JSON lines (tokenizers, jobs) and writes JSON lines (progress, results).
"""

import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tokenizers import Tokenizer

from mend_jax.cli.errors import UserError
from mend_jax.data import c4, metaicl
from mend_jax.data.alignment import common_ends
from mend_jax.run.files import whole_file

BLOCK = 1024  # examples in one record of a task's shard
BATCH = 256  # documents tokenised together


def tokenizer_text(tokenizer) -> str:
    """A Hugging Face tokenizer as JSON text, without truncation and padding. Raises UserError if it has no fast version."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"The tokenizer {getattr(tokenizer, 'name_or_path', tokenizer)!r} has no fast version, which prepare needs."
        )
    plain = Tokenizer.from_str(backend.to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain.to_str()


def fingerprint(*parts) -> str:
    """16 hexadecimal digits that change when any part changes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def check_tokenizer(tokenizer, vocab_size: int, path, reader: str = "LLM") -> None:
    """Raises UserError if `path`, the folder of the LLM or of the backbone (`reader`), has no tokenizer, or if the tokenizer
    has an id without an embedding in the model."""
    if tokenizer is None:
        raise UserError(f"{path} holds no tokenizer: put the {reader}'s tokenizer files there.")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise UserError(f"The tokenizer {tokenizer.name_or_path!r} is empty: its folder needs the vocabulary files.")
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} gives ids up to {largest}, but the {reader} knows {vocab_size} "
            f"tokens: use the tokenizer that belongs to the {reader}."
        )


def check_backbone(tokenizer, own, vocab_size: int, path) -> None:
    """Raises UserError if a distiller has no embedding for some token ids that it will read.

    Args:
        tokenizer: the LLM's; the distiller reads its ids if the backbone's `own` is None or gives the same ids.
        own: the backbone's tokenizer, or None if its folder `path` has none.
        vocab_size: the number of ids that the backbone has embeddings for.
    """
    if other_tokenizer(tokenizer, own) is not None:
        check_tokenizer(own, vocab_size, path, "backbone")
        return
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise UserError(
            f"The LLM's tokenizer {tokenizer.name_or_path!r} gives ids up to {largest}, but the backbone {path} knows "
            f"{vocab_size} tokens: put the backbone's own tokenizer there, or set prefix.backbone to a model with the LLM's vocabulary."
        )


@functools.lru_cache(maxsize=16)
def other_tokenizer(tokenizer, own):
    """The distiller's `own` tokenizer if it gives texts other ids than the LLM's; None if one serves both."""
    if tokenizer is None or own is None or own is tokenizer:
        return None
    return None if _what_makes_ids(tokenizer) == _what_makes_ids(own) else own


def _what_makes_ids(tokenizer) -> list:
    """The parts of a tokenizer that decide its ids, without those that only affect offsets and decoding."""
    parts = json.loads(tokenizer_text(tokenizer), object_hook=_without_offsets)
    added = {token["content"]: token | {"special": None} for token in parts["added_tokens"]}
    return [parts["normalizer"], parts["pre_tokenizer"], parts["model"], added]


def _without_offsets(part: dict) -> dict:
    return {name: None if value == "" else value for name, value in part.items() if name != "trim_offsets"}


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def readings(tokenizers: Sequence[Tokenizer], texts: Sequence[str]) -> Iterator[tuple[list, list]]:
    """(ids per tokenizer, marks per tokenizer) of each text; two tokenizers get the marks of common_ends, one gets none."""
    if len(tokenizers) == 1:
        yield from (([ids], []) for ids in encode(tokenizers[0], texts))
        return
    both = [tokenizer.encode_batch(texts, add_special_tokens=False) for tokenizer in tokenizers]
    for pair in zip(*both, strict=True):
        yield [one.ids for one in pair], list(common_ends(*(one.offsets for one in pair)))


def run_job(tokenizers: Sequence[Tokenizer], job: dict, report=lambda done: None) -> dict:
    """Writes one shard and returns {"items", "tokens"}. Calls `report(bytes of the source)` from time to time.

    tokenizers: the LLM's and, if it differs, the distiller's.
    job: {"kind": "text" | "tfds" | "task", "source", "out", "dtype", "stamps": of `stamps_of`, ...}. Raises UserError: bad input, a
        source that changes meanwhile, a full disk.
    """
    out = Path(job["out"])
    records = {"text": text_records, "tfds": text_records, "task": task_records}[job["kind"]]
    try:
        with whole_file(out) as temporary:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            try:
                for record in _read(records(tokenizers, job, report), job["source"]):
                    writer.write(record)
            finally:
                writer.close()
            _require_unchanged(job)
            result = shard_counts(temporary, job["kind"], len(tokenizers))
        return result
    except (OSError, RuntimeError) as error:  # the writer reports every error as RuntimeError
        reason = str(error).split(";")[0]
        if any(words in reason for words in ("No space left", "quota", "too large")):
            raise UserError(
                f"The disk of {out.parent} is full: free some space or set config.data.cache to another disk."
            ) from error
        raise UserError(f"{out} cannot be written ({reason}): check config.data.cache.") from error


def stamps_of(files: Sequence[Path]) -> list[list]:
    """[path, size, time of change] of files, taken before a shard is named by what they hold."""
    stats = [file.stat() for file in files]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]


def _require_unchanged(job: dict) -> None:
    """Raises UserError if a source was written to since its job was made: the shard would have the name of other data."""
    with readable(job["source"]):
        now = stamps_of([Path(name) for name, *_ in job["stamps"]])
    for (name, *before), (_, *after) in zip(job["stamps"], now, strict=True):
        if before != after:
            raise UserError(
                f"{name} has changed while it was tokenised: run the same command again when nothing writes it."
            )


def _read(records: Iterator[bytes], source: str) -> Iterator[bytes]:
    with readable(source):
        yield from records


@contextlib.contextmanager
def readable(source) -> Iterator[None]:
    """Turns a read error into a UserError that names the source, or the file in it, that cannot be read."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # tfds' reader reports every error as RuntimeError
        path, reason = getattr(error, "filename", None) or source, getattr(error, "strerror", None) or error
        raise UserError(
            f"{path} cannot be read ({reason}): check that the file is complete and that you may read it."
        ) from error


def text_records(tokenizers: Sequence[Tokenizer], job: dict, report) -> Iterator[bytes]:
    """Records of the documents' ids (two tokenizers': one after the other, then their marks), then of all lengths (uint32)."""
    lengths = []
    if job["kind"] == "text":
        texts = (row["text"] for row in c4.read_documents(job["source"], report))
    else:
        texts = c4.tfds_texts(job["source"], job["split"], job["start"], job["stop"])
    while batch := list(islice(texts, BATCH)):
        for ids, marks in readings(tokenizers, batch):
            lengths += map(len, ids)
            yield _packed(ids, marks, job["dtype"])
    yield np.asarray(lengths, np.uint32).tobytes()


def task_records(tokenizers: Sequence[Tokenizer], job: dict, report) -> Iterator[bytes]:
    """Blocks of [count, x lengths, y lengths] (uint32) and ids x1 y1 x2 y2 ...; then [examples, tokens] (uint64).

    What a template puts between x and y is the same in every example: it is not in a block, `TaskStore` puts it there.
    With two tokenizers a block has both sets of lengths, then both sets of ids, then both sets of marks.
    """
    del report  # task files are small
    examples = [example for file in job["files"] for example in metaicl.read_file(file)]
    tokens = 0
    for start in range(0, len(examples), BLOCK):
        block = examples[start : start + BLOCK]
        pairs = [text for e in block for text in (job["before"] + e.input, job["answer"] + e.output)]
        ids, marks = (list(zip(*parts, strict=True)) for parts in zip(*readings(tokenizers, pairs), strict=True))
        lengths = [np.asarray([len(i) for i in own], np.uint32).reshape(-1, 2) for own in ids]
        tokens += int(lengths[0].sum())
        header = np.concatenate([np.asarray([len(block)], np.uint32), *(own.T.reshape(-1) for own in lengths)])
        flat = [np.concatenate([np.asarray(i, job["dtype"]) for i in own]) for own in ids]
        yield header.tobytes() + _packed(flat, [np.concatenate(own) for own in marks], job["dtype"])
    yield np.asarray([len(examples), tokens], np.uint64).tobytes()


def _packed(ids: list, marks: list, dtype: str) -> bytes:
    """Rows of ids, then rows of marks as bits; stores.py unpacks them."""
    return b"".join([np.asarray(i, dtype).tobytes() for i in ids] + [np.packbits(m).tobytes() for m in marks])


def shard_counts(path, kind: str, tokenizers: int = 1) -> dict:
    """{"items", "tokens" (the LLM's)} of a complete shard. Raises UserError if the file is damaged."""
    [last] = read_shard(path, last=True)
    if kind == "task":
        items, tokens = np.frombuffer(last, np.uint64)
        return {"items": int(items), "tokens": int(tokens)}
    lengths = np.frombuffer(last, np.uint32)[::tokenizers]
    return {"items": len(lengths), "tokens": int(lengths.sum(dtype=np.int64))}


def read_shard(path, last: bool = False) -> list[bytes]:
    """All records of a shard, or only the last. Raises UserError if the file is missing or damaged."""
    try:
        reader = ArrayRecordReader(str(path))
        records = reader.read([reader.num_records() - 1]) if last else reader.read_all()
        reader.close()
    except Exception as error:  # the reader raises plain RuntimeError and ValueError
        raise damaged(path, error) from error
    return records


def damaged(path, error) -> UserError:
    """The error for a shard that cannot be read."""
    reason = " ".join(str(error).split())[:80] or type(error).__name__
    return UserError(f"{path} is damaged or missing ({reason}): delete it, and the same command makes it again.")


def worker() -> None:
    """Runs the jobs that arrive on standard input, until it closes."""
    send = lambda **message: print(json.dumps(message), flush=True)  # noqa: E731
    tokenizers = [Tokenizer.from_str(text) for text in json.loads(sys.stdin.readline())]
    for line in sys.stdin:
        try:
            send(result=run_job(tokenizers, json.loads(line), lambda done: send(progress=done)))
        except UserError as error:
            send(error=str(error))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):  # the command that started this worker has ended
        worker()
