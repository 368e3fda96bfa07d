"""Text to token ids on disk, one shard at a time: what `prepare` runs, in this process or in worker processes.

A shard is an array_record file that appears under its name only when it is whole. Text: one record a document, then one
record with every document's length. Tasks: one record per 1,024 examples, then one record with two counts.
`python -m mend_jax.data.tokenize` is the worker: JSON lines in (tokenizer, jobs) and out (progress, results).
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tokenizers import Tokenizer

from mend_jax.data import c4, metaicl
from mend_jax.errors import UserError
from mend_jax.files import temporary_for

SEPARATORS = {"space": " ", "newline": "\n"}  # config.data.template: stands before every input and every output
BLOCK = 1024  # examples in one record of a task's shard
BATCH = 256  # documents tokenised together


def separator(template: str) -> str:
    """The text before every x and y. Raises UserError for an unknown template."""
    if template not in SEPARATORS:
        raise UserError(f"config.data.template is {template!r}: choose one of {', '.join(SEPARATORS)}.")
    return SEPARATORS[template]


def tokenizer_text(tokenizer) -> str:
    """A Hugging Face tokenizer as one JSON text, without truncation and padding. Raises UserError for a slow one."""
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
    """16 hexadecimal digits that change when any part does."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def check_tokenizer(tokenizer, vocab_size: int, path) -> None:
    """Raises UserError where the LLM's folder `path` has no tokenizer, or one with an id that the LLM has no embedding for."""
    if tokenizer is None:
        raise UserError(f"{path} holds no tokenizer: put the LLM's tokenizer files there.")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise UserError(f"The tokenizer {tokenizer.name_or_path!r} is empty: its folder needs the vocabulary files.")
    if largest >= vocab_size:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} gives ids up to {largest}, but the LLM knows {vocab_size} "
            "tokens: use the tokenizer that belongs to the LLM."
        )


def check_backbone(tokenizer, own, vocab_size: int, path) -> None:
    """Raises UserError where a distiller cannot read the LLM's token ids, or reads other words in them.

    Args:
        tokenizer: the LLM's, which makes the ids that the distiller reads in training.
        own: of the backbone, which reads texts later, or None where its folder `path` has none.
        vocab_size: ids that the backbone has an embedding for.
    """
    words = tokenizer.get_vocab()
    if max(words.values()) >= vocab_size:
        raise UserError(
            f"The LLM's tokenizer {tokenizer.name_or_path!r} gives ids up to {max(words.values())}, but the backbone {path} "
            f"knows {vocab_size} tokens: set prefix.backbone to a model with the LLM's vocabulary."
        )
    theirs = own.get_vocab() if own is not None else {}
    for word, number in sorted(words.items(), key=lambda item: item[1]):
        if theirs.get(word, number) != number:
            raise UserError(
                f"The tokenizers of the LLM ({tokenizer.name_or_path}) and of the backbone ({path}) differ: {word!r} is "
                f"{number} in one and {theirs[word]} in the other; set prefix.backbone to a model with the LLM's vocabulary."
            )


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def run_job(tokenizer: Tokenizer, job: dict, report=lambda done: None) -> dict:
    """Writes one shard and returns {"items", "tokens"}. `report(bytes of the source)` is called now and then.

    job: {"kind": "text" | "tfds" | "task", "source", "out", "dtype", ...}. Raises UserError: bad input, a full disk.
    """
    out = Path(job["out"])
    temporary = temporary_for(out)
    records = {"text": text_records, "tfds": text_records, "task": task_records}[job["kind"]]
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            for record in _read(records(tokenizer, job, report), job["source"]):
                writer.write(record)
        finally:
            writer.close()
        result = shard_counts(temporary, job["kind"])
        os.replace(temporary, out)
        return result
    except (OSError, RuntimeError) as error:  # the writer says everything with RuntimeError
        reason = str(error).split(";")[0]
        if any(words in reason for words in ("No space left", "quota", "too large")):
            raise UserError(
                f"The disk of {out.parent} is full: make room or set config.data.cache to another disk."
            ) from error
        raise UserError(f"{out} cannot be written ({reason}): check config.data.cache.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(records: Iterator[bytes], source: str) -> Iterator[bytes]:
    with readable(source):
        yield from records


@contextlib.contextmanager
def readable(source) -> Iterator[None]:
    """Names the source, or the file of it, that the system does not let us read."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # tfds' reader says everything with RuntimeError
        path, reason = getattr(error, "filename", None) or source, getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): check that it is a whole file that you may read.") from error


def text_records(tokenizer: Tokenizer, job: dict, report) -> Iterator[bytes]:
    """The documents' ids, then their lengths (uint32)."""
    lengths = []
    if job["kind"] == "text":
        texts = (row["text"] for row in c4.read_documents(job["source"], report))
    else:
        texts = c4.tfds_texts(job["source"], job["split"], job["start"], job["stop"])
    while batch := list(islice(texts, BATCH)):
        for ids in encode(tokenizer, batch):
            lengths.append(len(ids))
            yield np.asarray(ids, job["dtype"]).tobytes()
    yield np.asarray(lengths, np.uint32).tobytes()


def task_records(tokenizer: Tokenizer, job: dict, report) -> Iterator[bytes]:
    """Blocks of [count, x lengths, y lengths] (uint32) and ids x1 y1 x2 y2 ...; then [examples, tokens] (uint64)."""
    del report  # task files are small
    examples = [example for file in job["files"] for example in metaicl.read_file(file)]
    tokens = 0
    for start in range(0, len(examples), BLOCK):
        block = examples[start : start + BLOCK]
        pairs = [job["separator"] + text for example in block for text in (example.input, example.output)]
        ids = encode(tokenizer, pairs)
        lengths = np.asarray([len(i) for i in ids], np.uint32).reshape(-1, 2)
        tokens += int(lengths.sum())
        header = np.concatenate([np.asarray([len(block)], np.uint32), lengths[:, 0], lengths[:, 1]])
        yield header.tobytes() + np.concatenate([np.asarray(i, job["dtype"]) for i in ids]).tobytes()
    yield np.asarray([len(examples), tokens], np.uint64).tobytes()


def shard_counts(path, kind: str) -> dict:
    """{"items", "tokens"} of a whole shard. Raises UserError where the file is damaged."""
    [last] = read_shard(path, last=True)
    if kind == "task":
        items, tokens = np.frombuffer(last, np.uint64)
        return {"items": int(items), "tokens": int(tokens)}
    lengths = np.frombuffer(last, np.uint32)
    return {"items": len(lengths), "tokens": int(lengths.sum(dtype=np.int64))}


def read_shard(path, last: bool = False) -> list[bytes]:
    """All records of a shard, or its last one. Raises UserError where the file is missing or damaged."""
    try:
        reader = ArrayRecordReader(str(path))
        records = reader.read([reader.num_records() - 1]) if last else reader.read_all()
        reader.close()
    except Exception as error:  # the reader raises plain RuntimeError and ValueError
        raise damaged(path, error) from error
    return records


def damaged(path, error) -> UserError:
    """What to say of a shard that cannot be read."""
    reason = " ".join(str(error).split())[:80] or type(error).__name__
    return UserError(f"{path} is damaged or missing ({reason}): delete it, then the same command makes it again.")


def worker() -> None:
    """Runs the jobs that come in on standard input until it closes."""
    send = lambda **message: print(json.dumps(message), flush=True)  # noqa: E731
    tokenizer = Tokenizer.from_str(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        try:
            send(result=run_job(tokenizer, json.loads(line), lambda done: send(progress=done)))
        except UserError as error:
            send(error=str(error))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):  # the command that started this one is gone
        worker()
