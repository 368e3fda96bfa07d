"""A frozen LLM of ours as a model of lm-evaluation-harness, with its few-shot examples as vectors or as a plain prompt.

The harness writes the few-shot examples and the question into one text. To have the examples themselves, each task's
`fewshot_context` is replaced by one that draws them with the task's own sampler and then asks the harness for the text without
any (`read_examples`): no text is taken apart. An answer is then scored after the vectors of its examples, with the distiller's
template around the question. Without a distiller the examples stay in the prompt, and tokens, truncation and scores are those of
the harness's `--model hf`.

Axes: R rows (a context and an answer each), T their tokens.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from mend_jax.cli.errors import UserError
from mend_jax.data.batches import pad
from mend_jax.data.query import Query, query_tokens
from mend_jax.data.templates import Template
from mend_jax.generation.generate import generate_text
from mend_jax.prefixes.context import bucket, pair_tokens
from mend_jax.prefixes.kind import Kind
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.scoring.options import require_batch_size

Example = tuple[str, str]
PLAIN = Template("", "", "")  # of the plain prompt, which the harness writes whole
ANSWER_TOKENS = 256  # of a generated answer, where a task does not say


class HarnessLM(TemplateLM):
    """The LLM for `lm_eval.simple_evaluate(HarnessLM(llm, distiller), ...)`; `evaluate_harness` does all of it."""

    def __init__(self, llm, distiller: Kind | None = None, batch_size: int = 8):
        """`llm` and `distiller` are from `load_llm` and `load_distiller`. Raises UserError for an encoder–decoder, an LLM without a
        tokenizer, or a `distiller` that reads no demonstrations."""
        super().__init__()
        require_batch_size(batch_size)
        if llm.start_token is not None:
            raise UserError(f"{llm.path} is an encoder–decoder: the harness is given decoder-only LLMs.")
        if llm.tokenizer is None:
            raise UserError(f"{llm.path} holds no tokenizer, which the harness's texts need: put its files there.")
        if distiller is not None and not distiller.reads_demos:
            raise UserError(f"{distiller.title} reads no few-shot examples: give a distiller.")
        self.llm, self.distiller, self.batch_size = llm, distiller, batch_size
        self.tokenizer = llm.tokenizer
        self.examples: dict[int, tuple[dict, list[Example]]] = {}  # by the id of a document, which is kept with them
        self.distilled: dict[tuple[Example, ...], Prefix] = {}

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.llm.path.replace("/", "__")

    @property
    def max_length(self) -> int:
        return self.llm.window

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            given = {"add_special_tokens": False}
        return self.tokenizer.encode(string, **given)

    # What the harness asks

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether it is the likeliest answer) of each request's continuation."""
        if self.distiller is None:
            return super().loglikelihood(requests, disable_tqdm)
        rows = [self._pair(*request.args) for request in requests]
        return self._scores([self._prefix(request.doc) for request in requests], rows)

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        window, rows = self.max_length, []
        for _, context, answer in requests:  # too long: cut from the left, as the harness does
            whole = [*context, *answer][-(window + 1) :]
            rows.append((whole[: len(whole) - len(answer)], answer))
        return self._scores([self._nothing] * len(rows), rows)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, window by window; no examples belong to it."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            rows = [utils.make_disjoint_window(window) for window in windows]
            found.append(sum(score for score, _ in self._scores([self._nothing] * len(rows), rows)))
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, before the first of its stop strings."""
        found: list[str] = [""] * len(requests)
        for group in _groups(requests, lambda request: (repr(request.args[1]), id(self._prefix_of(request)))):
            first = requests[group[0]]
            options = normalize_gen_kwargs(first.args[1], ANSWER_TOKENS)
            room, prefix = options["max_gen_toks"], self._prefix_of(first)
            most = self.max_length - room - int(to_host(prefix.length)[0])
            texts = [requests[i].args[0] for i in group]
            rows = [(self._question(text) if self.distiller else self.tok_encode(text))[-most:] for text in texts]
            answers = generate_text(
                self.llm, prefix, rows, room,
                temperature=options.get("temperature") or 0.0, top_p=options.get("top_p", 1.0), stop=tuple(_stops(options)),
                template=PLAIN if self.distiller is None else self.distiller.template, batch_size=self.batch_size,
            )  # fmt: skip
            for i, answer in zip(group, answers, strict=True):
                found[i] = answer.text
        return found

    # The examples

    def read_examples(self, task) -> None:
        """Makes a task of the harness give its few-shot examples to this model, in the place of writing them into the prompt."""
        write = task.fewshot_context

        def fewshot_context(doc, num_fewshot, **more):
            if not num_fewshot:
                return write(doc, num_fewshot=0, **more)
            shared = task.fewshot_cfg.split == task.config.test_split
            drawn = task.sampler.sample(n=num_fewshot, eval_doc=doc if shared else None)
            self.examples[id(doc)] = doc, [_texts(task, example) for example in drawn]
            return write(doc, num_fewshot=0, **more)

        task.fewshot_context = fewshot_context

    def _prefix_of(self, request) -> Prefix:
        return self._nothing if self.distiller is None else self._prefix(request.doc)

    def _prefix(self, doc) -> Prefix:
        """The vectors of a document's examples; nothing, where it has none."""
        examples = tuple(self.examples.get(id(doc), (doc, []))[1])
        if not examples:
            return self._nothing
        if examples not in self.distilled:
            self.distilled[examples] = self.distiller.distill(self._fitting(examples))
        return self.distilled[examples]

    def _fitting(self, examples: Sequence[Example]) -> list[Example]:
        """The first of the examples that the distiller reads at once; a warning says that there are more."""
        read = self.distiller
        count = read.fitting([len(pair_tokens([pair], read.tokenizer, read.template)) for pair in examples], self.llm)
        if not count:
            raise UserError(
                f"A few-shot example ({examples[0][0][:40]!r} ...) is longer than the distiller reads: take another task."
            )
        if count < len(examples):
            logging.warning(
                "Not all few-shot examples fit the distiller's window of %d tokens: of a question's examples the first that fit are read.",
                read.window,
            )
        return list(examples[:count])

    @property
    def _nothing(self) -> Prefix:
        if () not in self.distilled:
            self.distilled[()] = no_prefix(1, self.llm.config.width)
        return self.distilled[()]

    def _question(self, context: str) -> list[int]:
        return query_tokens(self.llm, context, "question", self.distiller.template.query)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a question and an answer in the distiller's template, which has its own space between them."""
        answer = query_tokens(self.llm, continuation.strip(), "answer", self.distiller.template.output)
        return self._question(context.rstrip()), answer

    # The scores

    def _scores(self, prefixes: Sequence[Prefix], rows) -> list[tuple[float, bool]]:
        """Of each (context, answer) in tokens, after its prefix."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for group in _groups(range(len(rows)), lambda i: id(prefixes[i])):
            group.sort(key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                scored = self._batch(prefixes[batch[0]], [rows[i] for i in batch])
                for i, (score, likeliest) in zip(batch, scored, strict=True):
                    found[i] = float(score), bool(likeliest)
        return found

    def _batch(self, prefix: Prefix, rows):
        whole = [[*context, *answer] for context, answer in rows]
        room = self.max_length - int(to_host(prefix.length)[0])
        if max(map(len, whole)) > room + 1:
            raise UserError(
                f"A question with its answer has {max(map(len, whole))} tokens; behind its prefix the LLM reads {room}: take shorter ones."
            )
        columns = min(bucket(max(map(len, whole))), room + 1)
        tokens, length = pad([*whole, *[[0, 0]] * (self.batch_size - len(whole))], columns)
        start = np.asarray([len(context) for context, _ in rows] + [1] * (self.batch_size - len(rows)), np.int32)
        sums, likeliest = _answers(self.llm, self.llm.params, prefix, tokens, length, start)
        return list(zip(to_host(sums), to_host(likeliest), strict=True))[: len(rows)]


def evaluate_harness(
    llm,
    tasks: Sequence[str],
    distiller: Kind | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
    **options,
) -> dict:
    """The harness's results of tasks; `options` are those of `lm_eval.simple_evaluate`, such as num_fewshot and limit.

    Raises UserError for tasks that the harness does not know.
    """
    model = HarnessLM(llm, distiller, batch_size)
    manager = _Manager(model, include_path=include_path)
    missing = [name for name in tasks if name not in manager.all_tasks]
    if missing:
        raise UserError(
            f"lm-evaluation-harness has no task {missing[0]!r}: `lm-eval ls tasks` lists them; yours are in --include_path."
        )
    return evaluator.simple_evaluate(model, tasks=list(tasks), task_manager=manager, batch_size=batch_size, **options)


class _Manager(TaskManager):
    """The harness's tasks, whose examples the model reads where it has a distiller."""

    def __init__(self, model: HarnessLM, **given):
        super().__init__(**given)
        self.model = model

    def load(self, tasks):
        loaded = super().load(tasks)
        if self.model.distiller is not None:
            for task in loaded["tasks"].values():
                self.model.read_examples(task)
        return loaded


def _texts(task, doc) -> Example:
    """A few-shot example as the task writes it: its question and its answer."""
    config = task.fewshot_cfg
    question, answer = task.doc_to_text(doc, config.doc_to_text), task.doc_to_target(doc, config.doc_to_target)
    choices = task.doc_to_choice(doc, config.doc_to_choice) if config.doc_to_choice else None
    if task.multiple_input:
        question = choices[question]
    elif isinstance(answer, int) and choices:
        answer = choices[answer]
    answer = answer[0] if isinstance(answer, list) else str(answer)
    before = task.resolve_field(doc, config.gen_prefix)
    return question, f"{before} {answer}" if before else answer


def _groups(items, key: Callable) -> list[list[int]]:
    """The places of items with the same key together."""
    found: dict = {}
    for place, item in enumerate(items):
        found.setdefault(key(item), []).append(place)
    return list(found.values())


def _stops(options: dict) -> list[str]:
    until = options.get("until") or []
    return [until] if isinstance(until, str) else list(until)


# The LLM (hashed by identity) is static: each shape compiles once.
@partial(jax.jit, static_argnums=0)
def _answers(llm, params, prefix, tokens, length, start):
    """(sum of log-probabilities, whether each token is the likeliest) (R,) of tokens[start:length] of each row (R,T)."""

    def one(row):
        tokens, length, start = (a[None] for a in row)
        query = Query(tokens[:, :-1], length - 1, start)  # the last token is predicted and not read
        logits = llm.logits(params, llm.states(params, prefix, query))[0].astype(jnp.float32)
        words, at = tokens[0, 1:], jnp.arange(1, tokens.shape[1])
        counted = (at >= start) & (at < length)
        told = jnp.take_along_axis(logits, words[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
        return jnp.where(counted, told, 0).sum(), jnp.all((logits.argmax(1) == words) | ~counted)

    return jax.lax.map(one, (tokens, length, start))
