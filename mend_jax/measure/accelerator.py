"""What can only be measured on an accelerator, in minutes: one JSON file and a page of tables.

    python -m mend_jax.measure.accelerator                  # on a machine with an H100 or H200
    python -m mend_jax.measure.accelerator --dry_run        # every part at a tiny size, on a CPU

`launch/accelerator.sh` prepares the machine and calls it; docs/benchmarks.md says what must travel there. The parts run in the
order of their value, each in processes of its own (parts.py). One that fails, or takes too long, is reported; one that does not
fit the minutes is left out. The same command again runs only what has not been done, and adds to the same files.
"""

import datetime
import importlib.util
import os
import sys
import time
from pathlib import Path

from mend_jax.cli import command_line as cli
from mend_jax.cli.errors import UserError
from mend_jax.cli.settings import nearest
from mend_jax.cli.text import minutes as in_words
from mend_jax.data.small_world import write_small_world
from mend_jax.data.small_world_language import World
from mend_jax.measure.accelerator_page import page
from mend_jax.measure.machine import machine
from mend_jax.measure.parts import DONE, GRACE, SKIPPED, Part, last_line, read_json, read_junit, run_part, skipped
from mend_jax.run.files import write_json, write_text

RESULTS, PAGE = "results.json", "results.md"
DEVICES = "devices"  # the part that says what the others are measured on
CONFIG = "configs/smollm2_135m.py:tokens"
MODEL, DATA = "model.gguf", "data"  # in the workdir: what MEND is trained on
LENGTHS = "469,652,639,848,818"  # demonstration tokens of the paper's Class, HR→LR, QA, non-NLI→NLI and non-Para→Para
# Train steps in the order of their value: (name, LLM, its weights, sequences to begin with, attention, seconds).
# "auto" is cuDNN's, except for T5, whose attention scores have a bias.
STEPS = (
    ("gpt2_large", "gpt2-large", "full", 16, "auto", 100),
    ("opt_6_7b", "opt-6.7b", "full", 8, "auto", 150),
    ("opt_6_7b_int8", "opt-6.7b", "int8", 8, "auto", 150),
    ("gpt2_xl", "gpt2-xl", "full", 8, "auto", 120),
    ("t5_large", "t5-large-lm-adapt", "full", 16, "auto", 100),
    ("gpt2_large_xla", "gpt2-large", "full", 16, "xla", 100),
    ("gpt2_xl_xla", "gpt2-xl", "full", 8, "xla", 120),
    ("opt_6_7b_xla", "opt-6.7b", "full", 8, "xla", 150),
    ("opt_6_7b_int8_xla", "opt-6.7b", "int8", 8, "xla", 150),
)
TINY_STEPS = ("gpt2_large", "opt_6_7b_int8", "t5_large")  # of a dry run, where the others would compute much the same
TINY = {
    "gpt2": {"model_type": "gpt2", "vocab_size": 96, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "opt": {"model_type": "opt", "vocab_size": 96, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"ffn_dim": 32, "max_position_embeddings": 64},
    "t5": {"model_type": "t5", "vocab_size": 96, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32},
}
TINY_SIZES = ("--demos=24", "--query=8", "--target=2", "--vectors=4", "--repeats=2")
TINY_WORLD = World(
    train_tasks=12, first_tasks=6, test_tasks=2, four_tasks=1, train_documents=200, validation_documents=16
)


def accelerator(out: str = "", workdir: str = "runs/accelerator", minutes=9.0, only: str = "", dry_run=False) -> int:
    """Runs the parts; returns the exit code: 1 if one failed or took too long, else 0.

    Args:
        out: the folder of results.json, results.md and the trained distiller; empty: <workdir>/results.
        workdir: a folder for all else; MEND is trained on its model.gguf and data/.
        minutes: the time of all parts together.
        only: names of parts, separated by commas; empty: all.
        dry_run: every part at a tiny size, on a CPU.
    """
    until = time.monotonic() + 60 * minutes
    folder = Path(workdir).expanduser().absolute()
    home = Path(out).expanduser().absolute() if out else folder / "results"
    parts = chosen(make_parts(folder, home, dry_run), only)
    try:
        for path in (folder, home):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be created ({error.strerror}): name another folder.") from error
    if dry_run:
        write_tiny(folder / "tiny")
    before = read_json(home / RESULTS) or {}
    kept = before.get("parts", {}) if before.get("dry_run") == dry_run else {}  # no tiny figures beside real ones
    results = {"dry_run": dry_run, "minutes": minutes, "machine": machine(), "parts": kept}
    run_parts(parts, folder, home, results, until)
    print((home / PAGE).read_text())
    states = {results["parts"][part.name]["state"] for part in parts}
    return 0 if states <= {DONE, SKIPPED} else 1


def run_parts(parts: list[Part], folder: Path, home: Path, results: dict, until: float) -> None:
    """Runs parts until the time `until` (of `time.monotonic`) and writes `results` and its page to `home` after each; `folder` is
    for their own files. A part that was done before, by the same command, is not run again."""
    for part in parts:
        before, left = results["parts"].get(part.name), until - time.monotonic() - GRACE
        obstacle = part.obstacle(left)
        if before and before["state"] == DONE and before["command"] == list(part.command):
            found, done = before, "done before"
        elif obstacle and before and before["result"]:  # figures of an earlier call that did not come to its end
            found, done = before, f"{SKIPPED}: {obstacle}"
        elif obstacle:
            found, done = skipped(part, obstacle), f"{SKIPPED}: {obstacle}"
        else:
            limit = min(part.seconds, left)
            _say(f"{part.name}: {part.what}, {in_words(limit)} at most")
            found = run_part(part, folder, limit)
            done = f"{found['state']} after {found['seconds']} s: {last_line(found)}"
        _say(f"{part.name}: {done}")
        results["parts"][part.name] = found
        results["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        write_json(home / RESULTS, results)
        write_text(home / PAGE, page(results))
        if part.name == DEVICES and not results["dry_run"] and (found["result"] or {}).get("platform") == "cpu":
            raise UserError("JAX finds no accelerator here: install JAX for it, or give --dry_run.")


def chosen(parts: list[Part], only: str) -> list[Part]:
    """The parts that --only names, in their own order; all if it is empty. Raises UserError for an unknown name."""
    names, known = [word.strip() for word in only.split(",") if word.strip()], [part.name for part in parts]
    for name in names:
        if name not in known:
            raise UserError(
                f"--only={only}: there is no part {name}, did you mean {nearest(name, known)}? (There are {', '.join(known)}.)"
            )
    return [part for part in parts if part.name in names or not names]


def make_parts(folder: Path, home: Path, tiny: bool) -> list[Part]:
    """All parts, in the order of their value."""
    first, *others = (_step(folder, tiny, *one) for one in STEPS if not tiny or one[0] in TINY_STEPS)
    values, half = "the public release's values, in float32", "both stages in bfloat16 against float32"
    command = ("-m", "mend_jax.measure.devices", "--out={out}")
    return [
        Part(DEVICES, "what JAX finds", command, 60, 5, environment=_environment(tiny)),
        _tests(tiny, "golden", values, ("-k", "test_losses and gpt2-0")),
        _tests(tiny, "bfloat16", half, ("-k", "near_those_of_float32")),
        _pytorch(folder, tiny),
        _mend(folder, home, tiny),
        first,
        _inference(folder, tiny),
        *others,
    ]


def _environment(tiny: bool, **settings: str) -> dict[str, str]:
    one = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"  # a flag again: the last counts
    return settings | ({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": one} if tiny else {})


def _step(folder, tiny: bool, name: str, llm: str, weights: str, rows: int, attention: str, seconds: int) -> Part:
    words = (f"--weights={weights}", f"--attention={attention}", *_models(folder, tiny, llm))
    words += ("--batch_size=1", "--up_to=1") if tiny else (f"--batch_size={rows}", "--up_to=256")
    what = f"the train step of {llm}, {weights} weights, {attention} attention, with as many sequences as pay"
    command = ("-m", "mend_jax.benchmark", "step", "--dtype=bfloat16", *words, "--out={out}")
    memory = _environment(tiny, XLA_PYTHON_CLIENT_MEM_FRACTION="0.95")
    return Part(f"step_{name}", what, command, seconds, 45, environment=memory)


def _pytorch(folder, tiny: bool) -> Part:
    """At the paper's 8 sequences; the two sides share the device's memory."""
    words = (*_models(folder, tiny, "gpt2-large"), "--batch_size=2" if tiny else "--batch_size=8")
    command = ("-m", "mend_jax.benchmark", "step", "--dtype=bfloat16", *words, "--out={out}")
    half = _environment(tiny, XLA_PYTHON_CLIENT_MEM_FRACTION="0.45")
    return Part("step_pytorch", "the train step of gpt2-large beside PyTorch's", command, 120, 45, environment=half)


def _inference(folder, tiny: bool) -> Part:
    words = (
        *_models(folder, tiny, "gpt2-large"),
        "--demos=24" if tiny else f"--demos={LENGTHS}",
        "--items=4" if tiny else "--items=16",
    )
    command = ("-m", "mend_jax.benchmark", "inference", "--dtype=bfloat16", *words, "--out={out}")
    what = "gpt2-large after demonstrations and after vectors, at the paper's lengths"
    return Part("inference", what, command, 240, 60, environment=_environment(tiny))


def _models(folder: Path, tiny: bool, llm: str) -> tuple[str, ...]:
    """Flags of `benchmark` for an LLM with its family's smallest model as the distiller, or for a tiny one of its family."""
    if not tiny:
        return (f"--llm={llm}",)
    path = folder / "tiny" / next(family for family in TINY if llm.startswith(family))
    return (f"--llm={path}", f"--distiller={path}", *TINY_SIZES)


def _tests(tiny: bool, name: str, what: str, few: tuple[str, ...]) -> Part:
    """A file of the project's tests on this device. `few`: pytest's flags in a dry run."""
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py", "--junitxml={out}")
    if tiny:
        words += few
    elif name == "golden" and importlib.util.find_spec("xdist"):
        words += ("-n", "8")  # most of the time is the compiler's
    settings = {"JAX_DEFAULT_MATMUL_PRECISION": "float32", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if not tiny:  # the tests alone would take a CPU, and XLA without its optimisations
        settings |= {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    settings = _environment(tiny, **settings)
    return Part(name, what, words, 120, 30, environment=settings, read=read_junit)


def _mend(folder: Path, home: Path, tiny: bool) -> Part:
    data, llm = folder / DATA, folder / MODEL
    fields = {"data.text": data / "c4", "data.tasks": data / "metaicl", "data.cache": data / "tokens"}
    config, needs = CONFIG, (llm, data)
    if tiny:
        world, config, needs = folder / "tiny" / "world", "configs/small_world.py:quick", ()
        fields = {"data.text": world / "c4", "data.tasks": world / "metaicl", "data.cache": folder / "tiny" / "tokens"}
        fields |= {"train.batch_size": 4, "train.log_every": 2, "data.queries": 1, "data.validation_items": 8}
        fields |= {"evaluate.limit": 10, "evaluate.seeds": "13,"}
    else:
        fields |= {"llm.path": llm, "prefix.backbone": llm}
    words = [f"--config={config}", *(f"--config.{name}={value}" for name, value in fields.items())]
    words += [f"--workdir={folder / 'training'}", f"--home={home}", "--out={out}"]
    words += ["--seconds=25" if tiny else "--seconds={seconds}"]
    what = "MEND, both stages with as many steps as its time allows"
    command = ("-m", "mend_jax.measure.timed_training", *words)
    return Part("mend", what, command, 240, 150, needs, _environment(tiny))


def write_tiny(folder: Path) -> None:
    """What a dry run measures: a config.json of each family, and a small world of a few tasks."""
    for family, fields in TINY.items():
        (folder / family).mkdir(parents=True, exist_ok=True)
        write_json(folder / family / "config.json", fields)
    write_small_world(folder / "world", TINY_WORLD)


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(accelerator, keeps=True)
