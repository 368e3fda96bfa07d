"""A frozen LLM of ours as a model of lm-evaluation-harness, with its few-shot examples as vectors or as a plain prompt.

The harness writes the few-shot examples and the question into one text. To have the examples themselves, each task's
`fewshot_context` is replaced by one that draws them with the task's own sampler and then asks the harness for the text without
any (`read_examples`): no text is taken apart. An answer is then scored after the vectors of its examples, with the distiller's
template around the question. Without a distiller the examples stay in the prompt, and tokens, truncation and scores are those of
the harness's `--model hf`.

Axes: R rows (a context and an answer each), T their tokens.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

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
from mend_jax.models.programs import program
from mend_jax.prefixes.context import bucket, bucket_rows
from mend_jax.prefixes.kind import Kind, Reading
from mend_jax.prefixes.nothing import no_prefix
from mend_jax.prefixes.prefix import Prefix
from mend_jax.run.distributed import to_host
from mend_jax.scoring.options import require_batch_size

Example = tuple[str, str]
PLAIN = Template("", "", "")  # of the plain prompt, which the harness writes whole
ANSWER_TOKENS = 256  # of a generated answer, where a task does not say
TOGETHER = 8  # sets of examples that are distilled at a time, whose vectors are dropped with the next


@dataclasses.dataclass
class LeftOut:
    """Few-shot examples that a distiller does not read, counted over the questions of a run."""

    questions: int = 0
    examples: int = 0
    why: str = ""  # the first question's that has none left


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
        self._nothing = no_prefix(1, llm.config.width)

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
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for group, prefix in self._after_examples(requests):
            scored = self._scores(prefix, [self._pair(*requests[i].args) for i in group])
            for i, one in zip(group, scored, strict=True):
                found[i] = one
        return found

    def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
        window, rows = self.max_length, []
        for _, context, answer in requests:  # too long: cut from the left, as the harness does
            whole = [*context, *answer][-(window + 1) :]
            rows.append((whole[: len(whole) - len(answer)], answer))
        return self._scores(self._nothing, rows)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, window by window; no examples belong to it."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            rows = [utils.make_disjoint_window(window) for window in windows]
            found.append(sum(score for score, _ in self._scores(self._nothing, rows)))
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The answer to each request, before the first of its stop strings."""
        found: list[str] = [""] * len(requests)
        for alike in _groups(requests, lambda request: repr(request.args[1])):
            options = normalize_gen_kwargs(requests[alike[0]].args[1], ANSWER_TOKENS)
            for group, prefix in self._after_examples([requests[i] for i in alike]):
                texts = [requests[alike[i]].args[0] for i in group]
                for i, text in zip(group, self._generate(prefix, texts, options), strict=True):
                    found[alike[i]] = text
        return found

    def _generate(self, prefix: Prefix, texts: Sequence[str], options: dict) -> list[str]:
        room = options["max_gen_toks"]
        most = self.max_length - room - int(to_host(prefix.length)[0])
        rows = [(self._question(text) if self.distiller else self.tok_encode(text))[-most:] for text in texts]
        answers = generate_text(
            self.llm, prefix, rows, room,
            temperature=options.get("temperature") or 0.0, top_p=options.get("top_p", 1.0), stop=tuple(_stops(options)),
            template=PLAIN if self.distiller is None else self.distiller.template, batch_size=self.batch_size,
        )  # fmt: skip
        return [answer.text for answer in answers]

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

    def _after_examples(self, requests) -> Iterator[tuple[list[int], Prefix]]:
        """The places of requests with the same examples, and the prefix of these; few prefixes are there at a time."""
        groups, told = _groups(requests, self._examples_of), LeftOut()
        for start in range(0, len(groups), TOGETHER):
            part = groups[start : start + TOGETHER]
            readings = [self._reading(self._examples_of(requests[group[0]]), told) for group in part]
            yield from zip(part, self._prefixes(readings), strict=True)
        if told.questions:
            logging.warning(
                "Of %d of %d questions few-shot examples were left out, %d in all, because they do not fit the distiller.%s",
                told.questions, len(groups), told.examples, told.why and f" Where none is read: {told.why}",
            )  # fmt: skip

    def _examples_of(self, request) -> tuple[Example, ...]:
        """The examples that a request's document has for a distiller."""
        return () if self.distiller is None else tuple(self.examples.get(id(request.doc), (None, []))[1])

    def _reading(self, examples: Sequence[Example], told: LeftOut) -> Reading | None:
        """The examples as the distiller reads them; None: there are none, or none can be read. Those that are left out are counted in
        `told`."""
        if not examples:
            return None
        try:
            reading = self.distiller.read_pairs(examples, self.llm)
        except UserError as error:  # one question is no reason to end a run of hours
            reading = None
            told.why = told.why or str(error)
        dropped = len(examples) if reading is None else len(reading.dropped)
        told.questions += dropped > 0
        told.examples += dropped
        return reading

    def _prefixes(self, readings: Sequence[Reading | None]) -> list[Prefix]:
        """The vectors of each reading, in few padded lengths, because each is compiled; nothing for None."""
        contexts = [reading.context for reading in readings if reading is not None]
        vectors = iter(self.distiller.vectors_of(contexts) if contexts else [])
        return [self._nothing if reading is None else self._padded(next(vectors)) for reading in readings]

    def _padded(self, vectors: np.ndarray) -> Prefix:
        columns = min(self.max_length, bucket(len(vectors)))
        padded = np.pad(vectors, ((0, columns - len(vectors)), (0, 0)))
        return Prefix(jnp.asarray(padded)[None], jnp.asarray([len(vectors)], jnp.int32))

    def _question(self, context: str) -> list[int]:
        return query_tokens(self.llm, context, "question", self.distiller.template.query)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a question and an answer in the distiller's template, which has its own space between them."""
        answer = query_tokens(self.llm, continuation.strip(), "answer", self.distiller.template.output)
        return self._question(context.rstrip()), answer

    # The scores

    def _scores(self, prefix: Prefix, rows) -> list[tuple[float, bool]]:
        """Of each (context, answer) in tokens, after the prefix."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for i, (score, likeliest) in zip(batch, self._batch(prefix, [rows[i] for i in batch]), strict=True):
                found[i] = float(score), bool(likeliest)
        return found

    def _batch(self, prefix: Prefix, rows):
        whole = [[*context, *answer] for context, answer in rows]
        room = self.max_length - int(to_host(prefix.length)[0])
        if max(map(len, whole)) > room + 1:
            raise UserError(
                f"A question with its answer has {max(map(len, whole))} tokens; behind its prefix the LLM reads {room}: take shorter ones."
            )
        count = min(self.batch_size, bucket_rows(len(rows)))  # few numbers of rows, because each is compiled
        empty = count - len(rows)
        columns = min(bucket(max(map(len, whole))), room + 1)
        tokens, length = pad([*whole, *[[0, 0]] * empty], columns)
        start = np.asarray([len(context) for context, _ in rows] + [1] * empty, np.int32)
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


@program
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
