"""MEND in JAX: a distiller turns demonstrations into a few vectors that a frozen LLM reads in their place.

    import mend_jax

    llm = mend_jax.load_llm("gpt2-large", dtype="bfloat16")
    distiller = mend_jax.load_distiller("runs/mend", llm)        # a training workdir, or an exported folder
    vectors = distiller.distill([("a great film", "positive"), ("dull", "negative")])   # Prefix((1,L,D), (1,))
    mend_jax.score_options(llm, vectors, "I loved it", ["positive", "negative"])         # [-0.3, -1.9]

A method is a `Prefix`: `no_prefix` is zero-shot, `demonstrations_prefix` in-context learning, `distiller.distill` MEND.
A mistake by the caller raises `UserError` with one sentence. Names are imported on first use.
"""

import importlib
import importlib.util
import os
import signal
import sys

if sys.argv[:1] == ["-m"]:  # one of our commands
    # XLA reads this when it loads. What it logs as errors (2) are alarms for its developers, such as "Very slow compile? If you
    # want to file a bug ..."; what fails it raises as well.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

    def _stopped(*_):
        os.write(2, b"\nStopped before it began.\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until the command itself takes over (cli.run)
        signal.signal(signal.SIGINT, _stopped)

if importlib.util.find_spec("torch") is None:
    # transformers would warn that it can load no models, which we load ourselves.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_HOMES = {
    "LLM": "mend_jax.llm.decoder_only",
    "load_llm": "mend_jax.llm.decoder_only",
    "Prefix": "mend_jax.prefixes.prefix",
    "Query": "mend_jax.data.query",
    "Distiller": "mend_jax.prefixes.distiller",
    "SoftPrompt": "mend_jax.prefixes.soft_prompt",
    "Chunked": "mend_jax.prefixes.chunked",
    "load_distiller": "mend_jax.interchange.trained",
    "load_prefix": "mend_jax.interchange.trained",
    "demonstrations_prefix": "mend_jax.prefixes.demonstrations",
    "no_prefix": "mend_jax.prefixes.nothing",
    "score_options": "mend_jax.scoring.options",
    "generate_text": "mend_jax.generation.generate",
    "Pack": "mend_jax.packs.pack",
    "load_pack": "mend_jax.packs.pack",
    "make_packs": "mend_jax.packs.make",
    "training_losses": "mend_jax.step",
    "UserError": "mend_jax.cli.errors",
}

__all__ = list(_HOMES)  # noqa: PLE0605


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'mend_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
