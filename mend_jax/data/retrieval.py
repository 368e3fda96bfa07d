"""Demonstrations from a task's training pool (config.evaluate.demos) instead of the seed's own file.

| name | the K demonstrations |
| --- | --- |
| file | those of the file of K and the seed (MetaICL's protocol) |
| pool | those of the seed's largest file, then ones drawn from the pool with the seed; the same for all test items, those of a smaller K first |
| random | drawn from the pool with the seed, for each test item |
| bm25 | those whose inputs share the rarest words with the test item's, nearest first |
| dense | those whose inputs have the nearest embeddings, by the cosine after the pool's mean is taken off, nearest first |

The pool is the task's meta-training file (`16384_100_train`) or, without one, the demonstrations of all seeds' files together. A
test item is never its own demonstration: an example of the pool whose input is that of the item, spaces and capitals aside, is left out.
"""

import logging
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.data import metaicl
from mend_jax.data.metaicl import Example
from mend_jax.data.tokenize import fingerprint
from mend_jax.run.sealed import read_sealed, write_sealed

PER_ITEM = ("random", "bm25", "dense")  # those of CHOICES["evaluate.demos"] that each item has its own of
Encode = Callable[[Sequence[str]], np.ndarray]  # texts -> (count, width) float32


def read_pool(folder, task: str) -> list[Example]:
    """The training pool of a test task: its file as it is, where one example may stand several times (the small world's has 1,024
    of fewer than 300 different ones, and K = 1,024 wants them all), or each example of the seeds' files, which overlap, once.

    Raises UserError for bad files, or if the task has none.
    """
    path = metaicl.meta_train_file(folder, task)
    files = [path] if path.is_file() else sorted(path.parent.glob("*_train.jsonl"))
    if not files:
        raise UserError(
            f"Task {task!r} has no training examples in {path.parent}: add {path.name}, or leave the task out."
        )
    examples = [example for file in files for example in metaicl.read_file(file)]
    return examples if path.is_file() else list(dict.fromkeys(examples))


def require_pools(folder, tasks: Sequence[str], k: int) -> None:
    """Raises UserError, which names all of them, if pools have fewer than k examples."""
    sizes = {task: len(read_pool(folder, task)) for task in tasks}
    small = [f"{task!r} ({size})" for task, size in sizes.items() if size < k]
    enough = [task for task, size in sizes.items() if size >= k]
    if small:
        rest = f", or leave them out: --config.evaluate.tasks={','.join(enough)}" if enough else ""
        raise UserError(
            f"Fewer training examples than config.data.k = {k} have {', '.join(small)}: lower k, add examples to their"
            f" 16384_100_train files{rest}."
        )


def same_text(text: str) -> str:
    """A key that is equal for texts that differ in spaces and capitals alone."""
    return " ".join(text.split()).casefold()


def drawn(
    pool: Sequence[Example], items: Sequence[Example], k: int, seed: int, first: Sequence[Example] = ()
) -> list[Example]:
    """K examples, the same for all items: those of `first`, then others drawn from what the pool holds besides; no input is an item's.

    Raises UserError if there are fewer.
    """
    asked, task = {same_text(item.input) for item in items}, items[0].task
    begin = [example for example in first if same_text(example.input) not in asked]
    rest = [example for example in pool if same_text(example.input) not in asked]
    for example in begin:
        if example in rest:
            rest.remove(example)
    _check_size(len(begin) + len(rest), k, task)
    return (begin + random.Random(f"{seed} {task} pool").sample(rest, len(rest)))[:k]


def neighbours(
    pool: Sequence[Example], items: Sequence[Example], k: int, how: str, seed: int, encode: Encode | None = None
) -> np.ndarray:
    """The numbers in the pool of each item's demonstrations: (items, k) int32, distinct in a row.

    Args:
        pool: from `read_pool`.
        items: the test items.
        k: demonstrations of an item.
        how: one of PER_ITEM.
        seed: of "random"; the others do not depend on it.
        encode: of "dense".
    Raises:
        UserError: fewer than k examples beside an item's own text.
    """
    keys = np.asarray([same_text(example.input) for example in pool], object)
    scores = _scores(pool, items, how, encode)
    found = np.zeros((len(items), k), np.int32)
    for i, item in enumerate(items):
        rest = np.flatnonzero(keys != same_text(item.input))
        _check_size(len(rest), k, item.task)
        if scores is None:
            found[i] = random.Random(f"{seed} {item.task} {item.input}").sample(rest.tolist(), k)
        else:
            found[i] = rest[np.argsort(-scores[i, rest], kind="stable")[:k]]  # of equals the pool's first
    return found


def cached_neighbours(
    cache, encoder: str, pool, items, k: int, how: str, seed: int, encode: Encode | None
) -> np.ndarray:
    """`neighbours`, kept below the folder `cache` by the content of all that decides them; `encoder` names what `encode` is."""
    texts = [example.input for example in (*pool, *items)]
    parts = (how, k, len(items), encoder if how == "dense" else "", seed if how == "random" else "", *texts)
    path = Path(cache).expanduser() / "neighbours" / f"{fingerprint(*parts)}.json"
    if (kept := _kept(path, len(items), k, len(pool))) is not None:
        return kept
    found = neighbours(pool, items, k, how, seed, encode)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed(path, {"numbers": found.tolist()}, indent=None)
    return found


def _kept(path: Path, items: int, k: int, pool: int) -> np.ndarray | None:
    """What a file of `cached_neighbours` holds, numbers of examples of a pool of so many; None if there is none or, which is said, one that has changed."""
    try:
        rows = read_sealed(path, "it is made again").get("numbers")
    except FileNotFoundError:
        return None
    except UserError as error:
        logging.warning("%s", error)
        return None
    fits = isinstance(rows, list) and all(isinstance(row, list) and len(row) == k for row in rows)
    if not fits or len(rows) != items or not all(type(n) is int and 0 <= n < pool for row in rows for n in row):
        logging.warning(
            "%s does not name %d of %d examples for each of %d items: it is made again.", path, k, pool, items
        )
        return None
    return np.asarray(rows, np.int32)


def _check_size(there: int, k: int, task: str) -> None:
    if there < k:
        raise UserError(
            f"The training pool of task {task!r} has {there} examples beside a test item's own text, fewer than config.data.k"
            f" = {k}: lower k, add examples to its 16384_100_train file, or leave the task out."
        )


def _scores(pool, items, how: str, encode: Encode | None) -> np.ndarray | None:
    """How near each example of the pool is to each item, (items, pool); None where it is drawn."""
    if how == "random":
        return None
    texts = [[example.input for example in part] for part in (pool, items)]
    if how == "bm25":
        return _bm25(*texts)
    vectors = [np.asarray(encode(part), np.float64) for part in texts]
    centre = vectors[0].mean(0)  # the states of a language model have a large part in common, which says nothing
    here, asked = (
        (part - centre) / np.maximum(np.linalg.norm(part - centre, axis=1, keepdims=True), 1e-9) for part in vectors
    )
    return asked @ here.T


def _bm25(pool: list[str], items: list[str]) -> np.ndarray:
    from bm25s import BM25  # compiles a program of JAX when it is imported

    index = BM25()
    index.index([_words(text) or [""] for text in pool], show_progress=False)
    return np.stack([index.get_scores(_words(text) or [""]) for text in items])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
