"""Measure: the train step against PyTorch, MEND against Vanilla ICL, int8 weights against float32, objectives against the forward
KL, a server's requests with packs against those with demonstrations.

    python -m mend_jax.benchmark step --llm=gpt2 --out=step.json
    python -m mend_jax.benchmark step --llm=opt-6.7b --dtype=bfloat16 --weights=int8 --no_pytorch  # a GPU
    python -m mend_jax.benchmark step --llm=gpt2-xl --dtype=bfloat16 --batch_size=8 --up_to=64
    python -m mend_jax.benchmark inference --llm=gpt2-large --demos=469,652
    python -m mend_jax.benchmark inference --against=pytorch --llm=SmolLM2-135M --items=40
    python -m mend_jax.benchmark objectives --batch_size=8
    python -m mend_jax.benchmark quantization --llm=gpt2,opt-125m,SmolLM2-135M,t5-small-lm-adapt --demos=96
    python -m mend_jax.benchmark serving --distiller=runs/quickstart/mend/finetune

Weights are random and sizes are known (model_sizes.py), so nothing is downloaded; `serving` alone has a real LLM and distiller. Each side runs in its own process, so that its
peak memory is measured alone; the sides take turns step by step, so that a busy moment of the machine affects both. Figures are
medians. Use a quiet machine.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from mend_jax.cli import command_line as cli
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import CHOICES
from mend_jax.data.templates import TEMPLATES
from mend_jax.measure import quantization as benchmark_quantization
from mend_jax.measure.inference import measure_inference
from mend_jax.measure.jax_side import CHUNK, Settings
from mend_jax.measure.model_sizes import known_or_folder, smallest_of
from mend_jax.measure.objectives import measure_objectives
from mend_jax.measure.scoring import measure_scoring
from mend_jax.measure.serving import measure_serving
from mend_jax.measure.step import measure_largest, measure_step
from mend_jax.models.families import DecoderConfig
from mend_jax.prefixes.start import first_layers
from mend_jax.run.files import write_report

DEFAULTS = {
    "step": {"query": 124, "target": 4},
    "inference": {"query": 56, "target": 3},
    "quantization": {"query": 32, "target": 16},
    "objectives": {"query": 256, "target": 1},
}


def benchmark(
    what: Literal["step", "inference", "quantization", "objectives", "serving"],
    /,
    llm="",
    distiller="",
    dtype: Literal[*CHOICES["llm.dtype"]] = "float32",
    attention: Literal["auto", *CHOICES["llm.attention"]] = "auto",
    remat=False,
    weights: Literal[*CHOICES["llm.weights"]] = "full",
    demos="900",
    layers=0,
    queries=1,
    vectors=100,
    query=0,
    target=0,
    batch_size=1,
    repeats=5,
    items=16,
    options=3,
    no_pytorch=False,
    up_to=0,
    query_head=False,
    against: Literal["icl", "pytorch"] = "icl",
    tasks="",
    names="",
    seed=13,
    rows=32,
    clients="1,8,32",
    packs=4,
    seconds=2.0,
    template: Literal[*TEMPLATES] = "newline",
    out="",
) -> int:
    """Prints a workload's figures; returns the exit code: 1 if two computations that must agree do not, else 0.

    Args:
        what: the workload.
        llm, distiller: the name of a published model (gpt2, opt-6.7b, t5-large-lm-adapt, SmolLM2-1.7B, ...), or a folder with a
            config.json. Empty llm: gpt2; empty distiller: the smallest model of the LLM's family. quantization: several LLMs
            separated by commas; a folder that has weights is measured with them. serving: as in `python -m mend_jax.serve`.
        dtype: of the LLM and of the distiller's arithmetic.
        attention: "auto" is cudnn in bfloat16 on a GPU, xla elsewhere.
        remat: recompute activations in the backward pass.
        weights: the LLM's; "full" means in `dtype`.
        demos: tokens of the demonstrations; inference: several numbers separated by commas.
        layers: of the distiller, its first so many alone, as prefix.layers; 0: all.
        queries: step: that share a context, as data.queries; the figures of PyTorch then are with a cache of the context.
        vectors: number of vectors that the distiller makes.
        query: tokens of the query (inference: of its input x); 0 means 124 (inference 56, quantization 32, objectives 256).
        target: step: tokens of y, the query's end; inference: tokens of each option; 0 means 4 (inference 3, quantization 16).
        batch_size: sequences of a step; inference: items in one pass.
        repeats: timed runs of each side.
        items: inference: test items of the task.
        options: inference: answers of each item.
        no_pytorch: step: measure our side alone.
        up_to: step: measure our side alone, from --batch_size on with twice as many sequences each time, up to this number, until
            memory is full or tokens/s grow by less than 5%; the figures are those of the fastest. 0: --batch_size alone.
        query_head: PyTorch also applies the head only at the query (inference: at the options), which the release does not.
        against: inference: "icl" compares MEND with Vanilla ICL; "pytorch" compares our scoring of items after a cached prefix
            of demonstrations with a plain PyTorch loop. The latter takes its lengths from --demos, --query, --options and
            --target if --query is given, else from --tasks, else from four MetaICL tasks.
        tasks: inference against pytorch: a folder of MetaICL's files; empty: random tokens.
        names: task names, separated by commas; empty: emo, ethos-religion, wiki_qa and yelp_polarity.
        seed: the seed of the tasks' 16 demonstrations.
        rows: inference against pytorch: rows in one pass of our side, as evaluate.batch_size; serving: --batch_size of the server.
        clients: serving: numbers of clients, separated by commas.
        packs: serving: different sets of demonstrations that are asked for in turn.
        seconds: serving: of each measurement.
        template: the texts around the tasks' inputs and outputs, as data.template.
        out: a JSON file for the figures.
    """
    arguments = SimpleNamespace(**locals(), lengths_given=bool(query))
    if out and not Path(out).expanduser().absolute().parent.is_dir():
        raise UserError(f"The folder of --out={out} does not exist: create it, or name another file.")
    if what == "serving":
        return _finished(*_serving(arguments), out)
    arguments.llm = llm or "gpt2"
    arguments.query = query or DEFAULTS[what]["query"]
    arguments.target = target or DEFAULTS[what]["target"]
    arguments.lengths = _lengths(demos)
    arguments.demos = arguments.lengths[0]
    arguments.no_pytorch = no_pytorch or bool(up_to)
    if len(arguments.lengths) > 1 and (what != "inference" or against == "pytorch"):
        raise UserError(f"--demos={demos}: only `inference` against in-context learning measures several lengths.")
    if up_to and what != "step":
        raise UserError(f"--up_to={up_to} is for `step` alone: {what} measures the --batch_size that it is given.")
    if up_to and up_to < batch_size:
        raise UserError(f"--up_to={up_to} is less than --batch_size={batch_size}: give at least as many.")
    if what == "quantization":
        report, text, same = measure_weights(arguments)
    elif what == "objectives":
        report, text, same = measure_losses(arguments)
    elif what == "inference" and against == "pytorch":
        report, text, same = measure_against_pytorch(arguments)
    else:
        measured = {"step": measure_largest if up_to else measure_step, "inference": measure_inference}[what]
        report, text, same = measured(arguments, settings_of(arguments))
    return _finished(report, text, same, out)


def _finished(report: dict, text: str, same: bool, out: str) -> int:
    """Prints a report and writes it; returns the exit code."""
    print(text)
    if out:
        write_report(out, report)
    return 0 if same else 1


def _serving(arguments) -> tuple[dict, str, bool]:
    """(report, its text, True) for a server under load."""
    if not arguments.distiller:
        raise UserError("serving compares vectors with demonstrations: name the distiller, --distiller=WORKDIR.")
    arguments.clients = _lengths(arguments.clients, "clients", "clients")
    if min(*arguments.clients, arguments.packs, arguments.repeats, arguments.rows) < 1 or not arguments.seconds > 0:
        raise UserError("--clients, --packs, --repeats, --rows and --seconds must be 1 or more.")
    return measure_serving(arguments)


def measure_weights(arguments) -> tuple[dict, str, bool]:
    """(report, its text, True) for models held in float32, bfloat16 and int8."""
    _check_sizes(arguments)
    names = ("batch_size", "demos", "query", "target", "vectors")
    sizes = benchmark_quantization.Sizes(*(getattr(arguments, name) for name in names))
    report = benchmark_quantization.measure_models(arguments.llm, sizes)
    return report, benchmark_quantization.text(report), True


def measure_losses(arguments) -> tuple[dict, str, bool]:
    """(report, its text, True) for L_distill's objectives with an LLM's head."""
    config = known_or_folder(arguments.llm)
    _check_sizes(arguments)
    sizes = arguments.batch_size, arguments.query, config.width, config.vocab_size
    return *measure_objectives(*sizes, CHUNK, arguments.repeats), True


def measure_against_pytorch(arguments) -> tuple[dict, str, bool]:
    """(report, its text, whether both sides agree) for scoring after a cached prefix."""
    config = known_or_folder(arguments.llm)
    _check_sizes(arguments)
    if not isinstance(config, DecoderConfig):
        raise UserError(f"inference measures decoder-only LLMs, {arguments.llm} is {config.family}: name another.")
    if arguments.weights != "full":
        raise UserError(f"PyTorch's side has no {arguments.weights} weights to compare with: leave --weights out.")
    return measure_scoring(arguments, config)


def settings_of(arguments) -> Settings:
    """The workload that the command line asks for."""
    llm = known_or_folder(arguments.llm)
    arguments.distiller = arguments.distiller or smallest_of(llm.family)
    distiller = known_or_folder(arguments.distiller).headless
    _check_sizes(arguments)
    if not 0 <= arguments.layers <= distiller.layers:
        raise UserError(
            f"--layers={arguments.layers}: the distiller {arguments.distiller} has {distiller.layers}; 0 is all of them."
        )
    distiller = first_layers(distiller, arguments.layers)
    if arguments.what != "step" and arguments.queries > 1:
        raise UserError(f"--queries={arguments.queries} is for `step` alone: `inference` has --items.")
    if arguments.what == "inference" and not isinstance(llm, DecoderConfig):
        raise UserError(f"inference measures decoder-only LLMs, {arguments.llm} is {llm.family}: name another.")
    shape = (arguments.batch_size, arguments.demos, arguments.query, arguments.target, arguments.vectors)
    how = arguments.attention, arguments.remat, arguments.weights, arguments.queries
    return Settings(llm, distiller, arguments.dtype, *shape, *how)


def _lengths(text: str, flag: str = "demos", what: str = "tokens") -> list[int]:
    """The numbers of a flag, ascending."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"--{flag}={text} is not a number of {what}, or several separated by commas: give some.")
    return sorted({int(word) for word in words})


def _check_sizes(arguments) -> None:
    for name in ("batch_size", "demos", "query", "queries", "vectors", "target", "repeats", "rows"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}={getattr(arguments, name)} is too small: give 1 or more.")
    if arguments.what != "inference" and arguments.target >= arguments.query:
        raise UserError(
            f"--target={arguments.target} is the end of the query: give fewer tokens than --query={arguments.query}."
        )
    if arguments.what == "inference" and min(arguments.items, arguments.options) < 1:
        raise UserError("--items and --options must be 1 or more.")


if __name__ == "__main__":
    cli.run(benchmark)
