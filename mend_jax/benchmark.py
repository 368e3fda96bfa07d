"""Measure: the train step against PyTorch, MEND against Vanilla ICL, scoring against PyTorch, int8 weights against float32,
objectives against the forward KL, a server's requests with packs against those with demonstrations.

    python -m mend_jax.benchmark step --llm=gpt2 --out=step.json
    python -m mend_jax.benchmark step --llm=opt-6.7b --dtype=bfloat16 --weights=int8 --no_pytorch  # a GPU
    python -m mend_jax.benchmark step --llm=gpt2-xl --dtype=bfloat16 --batch_size=8 --up_to=64
    python -m mend_jax.benchmark inference --llm=gpt2-large --demos=469,652
    python -m mend_jax.benchmark scoring --llm=SmolLM2-135M --items=40
    python -m mend_jax.benchmark objectives --batch_size=8
    python -m mend_jax.benchmark quantization --llm=gpt2,opt-125m,SmolLM2-135M,t5-small-lm-adapt --demos=96
    python -m mend_jax.benchmark serving --distiller=runs/quickstart/mend/finetune

Weights are random and sizes are known (model_sizes.py), so nothing is downloaded; `serving` alone has a real LLM and distiller,
and `scoring` and `quantization` have a folder's weights where one is named. Each side runs in its own process, so that its peak
memory is measured alone; the sides take turns, so that a busy moment of the machine affects both. Figures are medians. Use a
quiet machine.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from mend_jax.cli import command_line as cli
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.data.templates import TEMPLATES
from mend_jax.measure import quantization as weights_of
from mend_jax.measure.inference import measure_inference
from mend_jax.measure.jax_side import CHUNK, Settings
from mend_jax.measure.model_sizes import known_or_folder, smallest_of
from mend_jax.measure.objectives import measure_objectives
from mend_jax.measure.scoring import measure_scoring
from mend_jax.measure.serving import measure_serving
from mend_jax.measure.step import measure_largest, measure_step
from mend_jax.models.families import Config, DecoderConfig
from mend_jax.prefixes.start import first_layers
from mend_jax.run.files import write_report

Dtype = Literal[*CHOICES["llm.dtype"]]
Weights = Literal[*CHOICES["llm.weights"]]
Attention = Literal["auto", *CHOICES["llm.attention"]]


def step(
    llm="gpt2",
    distiller="",
    layers=0,
    dtype: Dtype = "float32",
    attention: Attention = "auto",
    remat=False,
    weights: Weights = "full",
    demos=900,
    queries=1,
    query=124,
    target=4,
    vectors=100,
    batch_size=1,
    up_to=0,
    repeats=5,
    no_pytorch=False,
    query_head=False,
    out="",
) -> int:
    """Seconds, memory and FLOPs of MEND's train step, against the same step in PyTorch; losses and gradient norms are compared.

    Args:
        llm, distiller: the name of a published model (gpt2, opt-6.7b, t5-large-lm-adapt, SmolLM2-1.7B, ...), or a folder with a
            config.json. Empty distiller: the smallest model of the LLM's family.
        layers: of the distiller, its first so many alone, as prefix.layers; 0: all.
        dtype: of the LLM and of the distiller's arithmetic.
        attention: "auto" is cudnn in bfloat16 on a GPU, xla elsewhere.
        remat: recompute activations in the backward pass.
        weights: the LLM's; "full" means in `dtype`.
        demos: tokens of the demonstrations.
        queries: that share a context, as data.queries; the figures of PyTorch then are with a cache of the context.
        query: tokens of the query.
        target: tokens of y, the query's end.
        vectors: number of vectors that the distiller makes.
        batch_size: sequences of a step.
        up_to: measure our side alone, from --batch_size on with twice as many sequences each time, up to this number, until
            memory is full or tokens/s grow by less than 5%; the figures are those of the fastest. 0: --batch_size alone.
        repeats: timed runs of each side.
        no_pytorch: measure our side alone.
        query_head: PyTorch also applies the head only at the query, which the release does not.
        out: a JSON file for the figures.
    """
    asked = SimpleNamespace(**locals())
    _check(asked, "batch_size", "demos", "queries", "query", "target", "vectors", "repeats")
    _check_target(asked)
    if up_to and up_to < batch_size:
        raise UserError(f"--up_to={up_to} is less than --batch_size={batch_size}: give at least as many.")
    asked.no_pytorch = no_pytorch or bool(up_to)
    settings = _settings(asked, demos, remat=remat, queries=queries)
    return _finished(*(measure_largest if up_to else measure_step)(asked, settings), out)


def inference(
    llm="gpt2",
    distiller="",
    layers=0,
    dtype: Dtype = "float32",
    attention: Attention = "auto",
    weights: Weights = "full",
    demos="900",
    query=56,
    target=3,
    options=3,
    vectors=100,
    items=16,
    batch_size=1,
    repeats=5,
    out="",
) -> int:
    """Seconds, memory and FLOPs of a task's items after vectors (MEND) and after demonstrations (Vanilla ICL), each with the prefix
    read anew and with its keys and values kept; the scores of both are compared.

    Args:
        llm: a published model or a folder, as in `step`; a decoder-only one.
        distiller, layers, dtype, attention, weights: as in `step`.
        demos: tokens of the demonstrations; several numbers separated by commas.
        query: tokens of an item's input x.
        target: tokens of each option.
        options: answers of each item.
        vectors: number of vectors that the distiller makes.
        items: test items of the task.
        batch_size: items in one pass.
        repeats: timed runs.
        out: a JSON file for the figures.
    """
    asked = SimpleNamespace(**locals())
    asked.lengths = _numbers(demos, "demos", "tokens")
    _check(asked, "batch_size", "query", "target", "options", "vectors", "items", "repeats")
    _check_decoder_only("inference", llm)
    return _finished(*measure_inference(asked, _settings(asked, asked.lengths[0])), out)


def scoring(
    llm="gpt2",
    dtype: Dtype = "float32",
    attention: Attention = "auto",
    demos=900,
    query=0,
    target=3,
    options=3,
    tasks="",
    names="",
    seed=13,
    template: Literal[*TEMPLATES] = "newline",
    items=16,
    batch_size=32,
    repeats=5,
    query_head=False,
    out="",
) -> int:
    """Milliseconds per item of scoring after a kept prefix of demonstrations, against a plain PyTorch loop; scores are compared.

    The items are random ones of the lengths of --demos, --query, --options and --target if --query is given, else those of
    --tasks, else random ones with the lengths of four MetaICL tasks.

    Args:
        llm: a published model or a folder, as in `step`; a decoder-only one. A folder that has weights is measured with them.
        dtype, attention: as in `step`.
        demos: tokens of the demonstrations.
        query: tokens of an item's input x; 0: see above.
        target: tokens of each option.
        options: answers of each item.
        tasks: a folder of MetaICL's files.
        names: task names, separated by commas; empty: emo, ethos-religion, wiki_qa and yelp_polarity.
        seed: the seed of the tasks' 16 demonstrations.
        template: the texts around the tasks' inputs and outputs, as data.template.
        items: test items of a task.
        batch_size: rows in one pass of our side, as evaluate.batch_size.
        repeats: timed runs of each side.
        query_head: PyTorch also applies the head only at the options, which the release does not.
        out: a JSON file for the figures.
    """
    asked = SimpleNamespace(**locals())
    _check(asked, "demos", "target", "options", "items", "batch_size", "repeats")
    if query < 0:
        raise UserError(f"--query={query} is no length: give 1 or more, or 0 for those of the tasks.")
    return _finished(*measure_scoring(asked, _check_decoder_only("scoring", llm)), out)


def objectives(llm="gpt2", query=256, batch_size=1, repeats=5, out="") -> int:
    """Seconds and memory of value and gradient of each of L_distill's objectives beside the forward KL.

    Args:
        llm: a published model or a folder, as in `step`, whose width and vocabulary count.
        query: tokens of the query.
        batch_size: sequences of a step.
        repeats: timed runs of each objective.
        out: a JSON file for the figures.
    """
    config = known_or_folder(llm)
    _check(SimpleNamespace(**locals()), "query", "batch_size", "repeats")
    return _finished(*measure_objectives(batch_size, query, config.width, config.vocab_size, CHUNK, repeats), True, out)


def quantization(llm="gpt2", demos=900, query=32, target=16, vectors=100, batch_size=1, out="") -> int:
    """What weights in bfloat16 and in 8 bits save in bytes and change in logits and gradients, against float32.

    Args:
        llm: published models or folders, as in `step`, separated by commas. A folder that has weights is measured with them.
        demos: tokens of the demonstrations.
        query: tokens of the query.
        target: tokens of y, the query's end.
        vectors: number of vectors.
        batch_size: sequences of a step.
        out: a JSON file for the figures.
    """
    asked = SimpleNamespace(**locals())
    _check(asked, "batch_size", "demos", "query", "target", "vectors")
    _check_target(asked)
    report = weights_of.measure_models(llm, weights_of.Sizes(batch_size, demos, query, target, vectors))
    return _finished(report, weights_of.text(report), True, out)


def serving(
    distiller: str,
    llm="",
    dtype: Dtype = "float32",
    weights: Weights = "full",
    clients="1,8,32",
    packs=4,
    batch_size=32,
    repeats=5,
    seconds=2.0,
    out="",
) -> int:
    """Requests per second of a server that answers with packs, beside the same questions with their demonstrations.

    Args:
        distiller: the folder of a training or of an export, or the name of a packaged distiller.
        llm, dtype, weights: as in `python -m mend_jax.serve`.
        clients: numbers of clients, separated by commas.
        packs: different sets of demonstrations that are asked for in turn.
        batch_size: the server's.
        repeats: measurements of each.
        seconds: of each measurement.
        out: a JSON file for the figures.
    """
    asked = SimpleNamespace(**locals())
    asked.clients = _numbers(clients, "clients", "clients")
    _check(asked, "packs", "batch_size", "repeats")
    if not seconds > 0:
        raise UserError(f"--seconds={seconds} is too short: give more than 0.")
    return _finished(*measure_serving(asked), out)


def _settings(asked, demos: int, **more) -> Settings:
    """The workload of an LLM and a distiller that the command line asks for."""
    llm = known_or_folder(asked.llm)
    asked.distiller = asked.distiller or smallest_of(llm.family)
    distiller = known_or_folder(asked.distiller).headless
    if not 0 <= asked.layers <= distiller.layers:
        raise UserError(
            f"--layers={asked.layers}: the distiller {asked.distiller} has {distiller.layers}; 0 is all of them."
        )
    sizes = {"rows": asked.batch_size, "demos": demos} | {n: getattr(asked, n) for n in ("query", "target", "vectors")}
    how = {"attention": asked.attention, "weights": asked.weights} | more
    return Settings(llm, first_layers(distiller, asked.layers), asked.dtype, **sizes, **how)


def _finished(report: dict, text: str, same: bool, out: str) -> int:
    """Prints a report and writes it; returns the exit code: 1 if two computations that must agree do not, else 0."""
    print(text)
    if out:
        write_report(out, report)
    return 0 if same else 1


def _check(asked, *positive: str) -> None:
    """Raises UserError for a size below 1, or a report that could not be written."""
    for name in positive:
        if getattr(asked, name) < 1:
            raise UserError(f"--{name}={getattr(asked, name)} is too small: give 1 or more.")
    if asked.out and not Path(asked.out).expanduser().absolute().parent.is_dir():
        raise UserError(f"The folder of --out={asked.out} does not exist: create it, or name another file.")


def _check_target(asked) -> None:
    if asked.target >= asked.query:
        raise UserError(
            f"--target={asked.target} is the end of the query: give fewer tokens than --query={asked.query}."
        )


def _check_decoder_only(command: str, llm: str) -> Config:
    config = known_or_folder(llm)
    if not isinstance(config, DecoderConfig):
        raise UserError(f"{command} measures decoder-only LLMs, {llm} is {config.family}: name another.")
    return config


def _numbers(text: str, flag: str, what: str) -> list[int]:
    """The numbers of a flag, ascending."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--{flag}={text} is not a number of {what}, or several separated by commas: give 1 or more.")
    return sorted({int(word) for word in words})


COMMANDS = step, inference, scoring, objectives, quantization, serving

if __name__ == "__main__":
    cli.run(COMMANDS)
