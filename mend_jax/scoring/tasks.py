"""A method's scores on a task: from a task's demonstrations to a prefix, and from its items to predictions and scores.

The same code scores the test set (evaluate.py) and the dev set that selects the best checkpoint in training (train.py).
"""

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.data.demonstrations import as_in_validation
from mend_jax.data.evaluation import EvalTask, load_tasks, read_twice
from mend_jax.data.sampling import fit_demos, join_demos, release_truncation, row_rng
from mend_jax.data.templates import chosen
from mend_jax.data.tokenize import other_tokenizer
from mend_jax.llm.decoder_only import LLM
from mend_jax.models.programs import program
from mend_jax.prefixes import Kind
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.scoring.each import cache_prefixes, pass_size, prefixes_at_once, score_each
from mend_jax.scoring.metrics import aggregate, task_scores
from mend_jax.scoring.options import cache_prefix, check_items, score_items

_events = collections.Counter()  # JAX's events in this process
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: _events.update([event]))
COMPILED = "/jax/core/compile/backend_compile_duration"  # a program was compiled, or read from the compile cache


MEAN = "mean"  # config.evaluate.option_score of every evaluation before the field was there


def programs_compiled() -> int:
    """How many programs this process has compiled, or read from the compile cache, so far."""
    return _events[COMPILED]


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A row of a results table: its name, its kind of prefix, and the path it was trained in."""

    name: str
    model: Kind
    path: str = ""


def prefix_maker(config, llm: LLM, method: Method, params=None) -> Callable[..., Prefix]:
    """prefix_of(task, orders=(None,)) -> Prefix: a method's prefix of an `EvalTask`'s demonstrations, a row for each order.

    Args:
        config: the config of a whole run.
        llm: the LLM that will read the prefix.
        method: the method that makes the prefix.
        params: params for the method's model; None means its own. (Training passes the current ones.)
    """

    def prefix_of(task: EvalTask, orders=(None,)) -> Prefix:
        model = method.model
        contexts = [make_context(config, llm, model, task, order) for order in orders]
        length = np.asarray([len(context) for context in contexts], np.int32)
        columns = model.columns(int(length.max()), config.data.demo_buckets) if model.reads_demos else 1
        tokens = np.zeros((len(contexts), columns), np.int32)
        for row, context in zip(tokens, contexts, strict=True):
            row[: len(context)] = context
        return _apply(model, model.params if params is None else params, tokens, length)

    return prefix_of


def make_context(config, llm: LLM, model: Kind, task: EvalTask, order=None) -> np.ndarray:
    """The context (N,) of a task's demonstrations, in the tokens of the model that reads it: in the file's order or, by their
    numbers, those of `order`; where each item has its own, None means the first item's. Empty for a kind that reads no
    demonstrations.

    Examples that do not fit beside the task's longest query are left out; with data.release_truncation the last one is cut, as
    in the release.
    """
    return make_contexts(config, llm, model, task, order)[0] if model.reads_demos else np.zeros(0, np.int32)


def make_contexts(
    config, llm: LLM, model: Kind, task: EvalTask, order=None, taught: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`make_context` of a kind that reads demonstrations, and the same demonstrations as the teacher reads them, in the LLM's
    tokens; with `taught` no more of them than the teacher's window holds beside the query."""
    room, (shown, own) = _room(llm, task), _readings(config, llm, model, task, order)
    if config.data.release_truncation:
        window = min(model.window, room, config.data.max_demo_tokens)  # as in training
        cut = release_truncation(join_demos(own), window, room)
        return cut[model.reader is None], cut[1]  # without a reader of its own the LLM reads them, as the teacher
    shown, own = _held(model, shown, own)
    count = _fitting(config, model, shown, own, room)
    if taught:
        count = min(count, fit_demos(_lengths(shown), room))
    if count == 0:
        raise UserError(
            f"No demonstration of {task.task}, seed {task.seed} fits into"
            f" {min(config.data.max_demo_tokens, room, model.window)} tokens{model.holds}: raise data.max_demo_tokens or lower"
            " data.max_input_tokens."
        )
    return model.lay_out(own[:count], room), join_demos(shown[:count])


def demos_read(config, llm: LLM, model: Kind, task: EvalTask) -> tuple[int, int]:
    """(how many of a task's demonstrations the kind's context holds whole, how many there are); those of the first item, where each
    has its own."""
    readings = _readings(config, llm, model, task, None)
    return _fitting(config, model, *_held(model, *readings), _room(llm, task)), len(readings[0])


def _room(llm: LLM, task: EvalTask) -> int:
    """The positions that the LLM has left beside a task's longest query."""
    return llm.window - task.longest_query


def _held(model: Kind, shown, own) -> tuple[list, list]:
    """The demonstrations that are no longer than what the kind reads of one, in both readings."""
    kept = [i for i, length in enumerate(_lengths(own)) if length <= model.longest_demo]
    return [shown[i] for i in kept], [own[i] for i in kept]


def _fitting(config, model: Kind, shown, own, room: int) -> int:
    return model.fit(_lengths(shown), _lengths(own), config.data.max_demo_tokens, room)


def _lengths(pairs) -> list[int]:
    return [len(x) + len(y) for x, y in pairs]


def _readings(config, llm: LLM, model: Kind, task: EvalTask, order) -> tuple[list, list]:
    """The demonstrations (x, y) in the LLM's tokens and in those of the kind's own tokenizer, usually the LLM's."""
    tokenizer = other_tokenizer(llm.tokenizer, model.tokenizer)
    both = task.demos, task.demos
    order = task.items[0].shown if order is None else order
    if tokenizer is not None:  # each x is cut where it is the same text to both, as in training
        check_truncation(config)
        between = chosen(config.data.template).between
        both = read_twice(task.texts, (llm.tokenizer, tokenizer), config.data.max_input_tokens, between)
    return both if order is None else tuple([pairs[i] for i in order] for pairs in both)


def check_truncation(config) -> None:
    """Raises UserError if the release's truncation is combined with a distiller that has its own tokenizer."""
    if config.data.release_truncation:
        raise UserError(
            "data.release_truncation cuts contexts after a number of tokens, which is another text for a distiller whose "
            "tokenizer is not the LLM's: set it to false."
        )


@dataclasses.dataclass
class TaskResult:
    """One task and seed: the lines of its prediction file and what they cost."""

    lines: list[dict]
    cost: dict


def evaluate_task(
    llm: LLM,
    prefix_of: Callable[..., Prefix],
    task: EvalTask,
    batch_size: int,
    shuffle_demos: bool = False,
    reads_demos: bool = True,
    params=None,
    chunk: int = 512,
    option_score: str = MEAN,
    progress: Callable[[int], None] | None = None,
) -> TaskResult:
    """Scores all options of all items of one task and seed.

    Args:
        llm: the LLM.
        prefix_of: from `prefix_maker`.
        task: the demonstrations and the items.
        batch_size: rows in one pass of the LLM, see `score_items`.
        shuffle_demos: whether every item gets its own order of its demonstrations, and so its own prefix.
        reads_demos: whether the prefix depends on the demonstrations; else all items share it.
        params: the LLM's; None means `llm.params`.
        chunk: see `score_items`.
        option_score: config.evaluate.option_score: "mean", per token, or "sum".
        progress: called with the number of items finished since the last call.
    Raises:
        UserError: demonstrations or an item that do not fit, or scores that are not finite.
    """
    where, orders = f"{task.task}, seed {task.seed}", _orders(task, shuffle_demos) if reads_demos else None
    before, parts = programs_compiled(), _parts(llm, task, orders, batch_size, params)
    size = None if orders is None else pass_size(llm, task.items)
    scores, prefix_seconds, seconds, positions = [], 0.0, 0.0, 0
    for shown, items in parts:
        began = time.perf_counter()
        prefix = prefix_of(task) if orders is None else prefix_of(task, shown)
        keep = cache_prefix if orders is None else cache_prefixes
        cache = jax.block_until_ready(keep(llm, prefix, params))
        made = time.perf_counter()
        try:
            if orders is None:
                scores += score_items(llm, cache, items, batch_size, params, chunk, progress)
            else:
                scores += score_each(llm, cache, items, size, params, chunk, progress)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        prefix_seconds += made - began
        seconds += time.perf_counter() - made
        positions += int(to_host(cache.length).ravel()[: 1 if orders is None else len(items)].sum())
    if option_score != MEAN:
        lengths = ([len(option) for option in item.options_tokens] for item in task.items)
        scores = [values * count for values, count in zip(scores, map(np.asarray, lengths), strict=True)]
    lines = [_line(i, item, values, where) for i, (item, values) in enumerate(zip(task.items, scores, strict=True))]
    prefixes = 1 if orders is None else len(orders)
    cost = {
        "prefix_length": positions / prefixes,
        "prefix_seconds": prefix_seconds / prefixes,
        "item_seconds": seconds / len(task.items),
        "compiled": programs_compiled() > before,  # then the seconds include compilation
    }
    return TaskResult(lines, cost)


def _orders(task: EvalTask, shuffle_demos: bool) -> list | None:
    """The numbers of each item's demonstrations, in order; None where all items share theirs, and so the prefix."""
    if task.shares_demos and not shuffle_demos:
        return None
    shown = [range(len(task.demos)) if item.shown is None else item.shown for item in task.items]
    if not shuffle_demos:
        return shown
    return [np.asarray(one)[row_rng(task.seed, i).permutation(len(one))].tolist() for i, one in enumerate(shown)]


def _parts(llm: LLM, task: EvalTask, orders, batch_size: int, params) -> Iterator[tuple[list, list]]:
    """(orders, items) of the prefixes that are made together; the last orders are repeated, so that all parts have one shape."""
    if orders is None:
        yield [None], task.items
        return
    together = prefixes_at_once(llm, batch_size, len(orders), llm.params if params is None else params)
    for start in range(0, len(orders), together):
        part = orders[start : start + together]
        yield part + [part[-1]] * (together - len(part)), task.items[start : start + together]


def evaluate_prefix(
    llm: LLM,
    prefix_of: Callable[..., Prefix],
    tasks: Iterable[EvalTask],
    batch_size: int,
    model: Kind | None = None,
    bar: Progress | None = None,
    **options,
) -> dict:
    """`metrics.aggregate` of one method's scores over tasks and seeds; writes nothing.

    Args:
        llm: the LLM.
        prefix_of: from `prefix_maker`.
        tasks: one for each task and seed.
        batch_size: as in `evaluate_task`; so are `options`.
        model: the kind that makes the prefixes; if it reads no demonstrations, seeds with the same items are scored once.
        bar: counts the items.
    """
    scores: dict[str, dict[int, dict]] = {}
    known: dict[str, list[dict]] = {}
    for task in tasks:
        same = json.dumps(content_of(task)) if model is not None and not model.reads_demos else None
        lines = known.get(same) if same else None
        if lines is None:
            count = None if bar is None else bar.update
            lines = evaluate_task(llm, prefix_of, task, batch_size, progress=count, **options).lines
            if same:
                known[same] = lines
        elif bar is not None:
            bar.skip(len(task.items))
        scores.setdefault(task.task, {})[task.seed] = scores_of(task, lines)
    return aggregate(scores)


def content_of(task: EvalTask, demos: bool = False, context: Iterable[int] = ()) -> list:
    """What decides a task's predictions, JSON-like: the tokens read (with `demos` also the demonstrations and the `context`
    made of them) and the correct options."""
    shown = [[_ints(x), _ints(y)] for x, y in task.demos] if demos else []
    items = [[_ints(i.x_tokens), [_ints(o) for o in i.options_tokens], i.label, list(i.options)] for i in task.items]
    each = [] if task.shares_demos or not demos else [[_ints(item.shown) for item in task.items]]
    return [shown, _ints(context), items, task.classification, *each]


def _ints(ids) -> list[int]:
    return [int(token) for token in ids]


def dev_tasks(config, llm: LLM, model: Kind) -> list[EvalTask]:
    """The meta-test *validation* examples for `dev_score`, with every check that scoring them would make.

    Raises:
        UserError: missing or bad files, demonstrations or an item that do not fit beside the model's vectors.
    """
    tasks, _ = load_tasks(as_in_validation(config), llm, "dev")
    for task in tasks:
        _check_task(llm, model.num_vectors, task, task.items, "dev")
        make_context(config, llm, model, task)
    return tasks


def check_longest(llm: LLM, prefix_length: int, tasks: list[EvalTask], split: str) -> None:
    """Raises UserError for the first task whose longest item does not fit the LLM's window after a prefix; cheap."""
    for task in tasks:
        longest = max(task.items, key=lambda item: len(item.x_tokens) + max(map(len, item.options_tokens)))
        _check_task(llm, prefix_length, task, [longest], split)


def _check_task(llm, prefix_length, task, items, split) -> None:
    try:
        check_items(llm, prefix_length, items)
    except UserError as error:
        raise UserError(f"{task.task}, seed {task.seed}, {split}: {error}") from error


def dev_score(config, llm: LLM, model: Kind, params, tasks: list[EvalTask]) -> float:
    """The score (0 to 1) of a model in training.

    Args:
        config: the config of a whole run, with resolved paths.
        llm: the run's LLM.
        model: a kind of prefix; always the same object, so that nothing is compiled again.
        params: its current params.
        tasks: from `dev_tasks`.
    """
    method = Method("model in training", model)
    params = jax.tree.map(jnp.asarray, params)  # arrays on devices, of several processes too, stay where they are
    prefix_of, options = prefix_maker(config, llm, method, params), scoring_options(config, method)
    with Progress(sum(len(task.items) for task in tasks), "item", what="dev_score", leave=False) as bar:
        return evaluate_prefix(llm, prefix_of, tasks, model=model, bar=bar, **options)["score"]["mean"]


def scoring_options(config, method: Method) -> dict:
    """The options of `evaluate_task` that a config sets, for validation and test alike."""
    return {
        "batch_size": config.evaluate.batch_size,
        "shuffle_demos": config.evaluate.shuffle_demos and method.model.reads_demos,
        "reads_demos": method.model.reads_demos,
        "chunk": config.loss.chunk,
        "option_score": config.evaluate.option_score,
    }


def scores_of(task: EvalTask, lines: list[dict]) -> dict:
    golds = [item.options[item.label] for item in task.items]
    return task_scores([line["prediction"] for line in lines], golds, task.classification)


def _line(index: int, item: Any, scores: np.ndarray, where: str) -> dict:
    if not np.all(np.isfinite(scores)):
        raise UserError(
            f"The scores of item {index} of {where} are not finite: the model diverged or its weights are damaged."
        )
    return {
        "item": index,
        "scores": [round(float(score), 6) for score in scores],
        "options": list(item.options),
        "prediction": item.options[int(np.argmax(scores))],
        "gold": item.options[item.label],
    }


@program
def _apply(model, params, tokens, length):
    return model.apply(params, tokens, length)
