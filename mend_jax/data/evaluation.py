"""The data of an evaluation: for each task and seed the demonstrations and the test items, as token ids (as in MetaICL).

The pieces that the template makes of an x, a y or an option are tokenised alone, so that a context is a plain concatenation.
"""

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import nearest
from mend_jax.data import alignment, metaicl, sampling
from mend_jax.data.demonstrations import demonstrations, files_for
from mend_jax.data.perturbations import NOT_SHOWN
from mend_jax.data.retrieval import PER_ITEM, require_pools
from mend_jax.data.templates import Template, chosen
from mend_jax.data.tokenize import check_tokenizer, encode, readings, tokenizer_text


@dataclass(frozen=True, eq=False)
class Item:
    """One test item."""

    x_tokens: np.ndarray  # (X,) int32, x cut at config.data.max_input_tokens, then the template's text between x and y
    options_tokens: list[np.ndarray]  # int32, never cut
    options: tuple[str, ...]
    label: int  # index of the correct option
    shown: tuple[int, ...] | None = (
        None  # the numbers of its demonstrations among the task's, in order; None: all of them
    )


@dataclass(frozen=True, eq=False)
class EvalTask:
    """One task and seed."""

    task: str
    seed: int
    demos: list[tuple[np.ndarray, np.ndarray]]  # (x, y) token ids, int32, in the file's order
    items: list[Item]
    classification: bool  # scored by Macro-F1, else by accuracy
    texts: tuple[
        tuple[str, str], ...
    ] = ()  # the demonstrations' (x, y), each with the template's text in front: for another tokenizer; "" is not shown

    @functools.cached_property
    def longest_query(self) -> int:
        """Tokens of the longest input with an option."""
        return max(len(item.x_tokens) + max(map(len, item.options_tokens)) for item in self.items)

    @property
    def shares_demos(self) -> bool:
        """Whether all items have the same demonstrations, and so the same prefix."""
        return self.items[0].shown is None


def load_tasks(config, llm, split: str, encoder=None) -> tuple[list[EvalTask], list[str]]:
    """The meta-test tasks of config.data.partition, one `EvalTask` per task and seed, and the names of missing tasks.

    Args:
        config: the config of a whole run.
        llm: the LLM, whose `.tokenizer` is used.
        split: "test", or "dev" for the validation examples.
        encoder: of config.evaluate.demos "dense", see `demonstrations`.
    Raises:
        UserError: bad files, a tokenizer that does not fit the LLM, free-form items, an unknown name
            in config.evaluate.tasks, or no task with files.
    """
    data, seeds = config.data, tuple(config.evaluate.seeds)
    check_tokenizer(llm.tokenizer, llm.config.vocab_size, llm.path)
    names = metaicl.load_partition(data.tasks, data.partition)["test"]
    for name in config.evaluate.tasks:
        if name not in names:
            hint = (
                f': did you mean {nearest(name, names)!r}? (For all of them: "--config.evaluate.tasks=()".)'
                if names
                else ", which has none."
            )
            raise UserError(
                f"config.evaluate.tasks names {name!r}, which is not a meta-test task of {data.partition!r}{hint}"
            )
    names = [name for name in names if name in config.evaluate.tasks or not config.evaluate.tasks]
    present, missing = metaicl.present_tasks(data.tasks, names, split, files_for(config), seeds)
    if not present:
        raise metaicl.none_present(config, names, split, files_for(config), seeds)
    if missing:
        logging.warning(
            "%d of %d meta-test tasks are missing in %s: %s", len(missing), len(names), data.tasks, ", ".join(missing)
        )
    if config.evaluate.demos in PER_ITEM:
        require_pools(data.tasks, present, data.k)
    tokenizer = Tokenizer.from_str(tokenizer_text(llm.tokenizer))
    return [task for name in present for task in read_task(config, tokenizer, name, split, present, encoder)], missing


def read_task(config, tokenizer: Tokenizer, name: str, split: str, tasks=(), encoder=None) -> list[EvalTask]:
    """One of the `tasks`, for every seed of config.evaluate.seeds. Raises UserError for bad files."""
    data, limit, template = config.data, config.evaluate.limit, chosen(config.data.template)
    others, files, every = [other for other in tasks if other != name], {}, []
    for seed in config.evaluate.seeds:
        path = metaicl.example_file(data.tasks, name, files_for(config), seed, split)
        items = metaicl.read_file(path)
        check_options(items, path)
        every += items
        demos = demonstrations(config, name, seed, items, others, encoder)
        items = items[:limit] if limit else items
        files[seed] = demos[: len(items)], items
    examples = [e for demos, items in files.values() for part in (*demos, items) for e in part]
    inputs = _read_inputs(tokenizer, [e.input for e in examples], template, data.max_input_tokens)
    outputs = encode_texts(tokenizer, (text for e in examples for text in (e.output, *e.options)), template.answer)
    _warn_of_repeated_options(name, [item for _, items in files.values() for item in items])
    _warn_of_equal_options(name, [item for _, items in files.values() for item in items], outputs)
    made, kind = [], metaicl.is_classification(data.tasks, name, every)  # of all seeds, whatever the limit
    for seed, (demos, items) in files.items():
        numbers = {example: i for i, example in enumerate(dict.fromkeys(e for part in demos for e in part))}
        demos_of = [None] * len(items)
        if config.evaluate.demos in PER_ITEM:
            demos_of = [tuple(numbers[example] for example in part) for part in demos]
        shown = list(numbers) if demos_of[0] is not None else demos[0]
        pairs = [(inputs[e.input], outputs[e.output]) for e in shown]
        texts = tuple((_before(template.before, e.input), _before(template.answer, e.output)) for e in shown)
        answered = [
            Item(inputs[e.input], [outputs[o] for o in e.options], e.options, e.options.index(e.output), of_item)
            for e, of_item in zip(items, demos_of, strict=True)
        ]
        made.append(EvalTask(name, int(seed), pairs, answered, kind, texts))
    return made


def _before(before: str, text: str | None) -> str:
    return "" if text is NOT_SHOWN else before + text


@functools.lru_cache(maxsize=256)
def read_twice(texts: tuple, tokenizers: tuple, max_input_tokens: int, between: str = "") -> tuple[list, list]:
    """Text demonstrations (x, y) as token ids of two Hugging Face tokenizers: ([(x, y), ...], [(x, y), ...]), int32.

    Each x is cut where both tokenizers end a token, at no more than `max_input_tokens` of either (as in the training data); the
    tokens of `between` are put behind it. An x or y that is "" is not shown.
    """
    plain = [_plain(tokenizer) for tokenizer in tokenizers]
    inputs, outputs = (list(readings(plain, part)) for part in zip(*texts, strict=True))
    behind = [encode(tokenizer, [between] if between else []) for tokenizer in plain]
    both = [], []
    for (text, _), (x, marks), (y, _) in zip(texts, inputs, outputs, strict=True):
        kept = alignment.cut(marks, (max_input_tokens, max_input_tokens)) if text else (0, 0)
        for pairs, x_ids, y_ids, count, ids in zip(both, x, y, kept, behind, strict=True):
            x_ids = sum(ids, x_ids[:count]) if text else []
            pairs.append((np.asarray(x_ids, np.int32), np.asarray(y_ids, np.int32)))
    return both


@functools.lru_cache(maxsize=8)
def _plain(tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_text(tokenizer))


def check_options(items: list[metaicl.Example], path) -> None:
    """Raises UserError for a free-form item, which has no options to choose from."""
    for number, item in enumerate(items, 1):
        if len(item.options) < 2:
            raise UserError(
                f"{path}, example {number} has {len(item.options)} different options: evaluation chooses among at least two, so "
                f"leave free-form tasks like {item.task!r} out of the meta-test tasks."
            )


def _warn_of_repeated_options(name: str, items: list[metaicl.Example]) -> None:
    """Warns if lines list an option more than once: chance is another than such a line seems to say."""
    found = {item for item in items if item.repeated}  # seeds often share their test items
    if found:
        logging.warning(
            "%s: %d item%s an option more than once, such as %r: it counts once, where it stands first",
            name,
            len(found),
            " lists" if len(found) == 1 else "s list",
            min(found, key=lambda item: item.repeated).repeated[0],
        )


def _warn_of_equal_options(name: str, items: list[metaicl.Example], ids: dict[str, np.ndarray]) -> None:
    """Warns if options have the same tokens though they differ as texts: unknown words, spaces."""
    found = set()  # seeds often share their test items
    for item in items:
        first = {}
        for option in item.options:
            other = first.setdefault(ids[option].tobytes(), option)
            if other is not option:
                found.add((item, other, option))
    if found:
        count, (_, *pair) = len({item for item, *_ in found}), min(found, key=lambda entry: entry[1:])
        logging.warning(
            "%s: the LLM's tokenizer gives different options of %d item%s the same tokens, such as %r and %r: their scores "
            "are equal, and the first option is chosen", name, count, "s" * (count > 1), *pair
        )  # fmt: skip


def _read_inputs(tokenizer: Tokenizer, texts: Iterable[str], template: Template, limit: int) -> dict[str, np.ndarray]:
    """{text: int32 ids} of inputs, each cut to `limit` tokens, then the template's text between x and y."""
    between = encode_texts(tokenizer, [template.between] if template.between else [], "").values()
    ids = encode_texts(tokenizer, texts, template.before)
    nothing = {NOT_SHOWN: ids.pop(NOT_SHOWN)} if NOT_SHOWN in ids else {}
    return {text: np.concatenate([sampling.cut_input(row, limit), *between]) for text, row in ids.items()} | nothing


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str | None], before: str) -> dict[str | None, np.ndarray]:
    """{text: int32 ids, with `before` in front} of texts, each tokenised once: seeds often share their test items. A text that is
    NOT_SHOWN has none."""
    texts = list(dict.fromkeys(texts))  # keeps the order, unlike a set
    ids = encode(tokenizer, [_before(before, text) for text in texts])
    return {text: np.asarray(row, np.int32) for text, row in zip(texts, ids, strict=True)}
