"""What 8-bit weights save and change: bytes, logits, and the direction of L_distill's gradient, against float32.

Each model is held in three ways (float32, bfloat16, int8) and computes in float32, so that only the weights differ.
Teacher and student are held the same way, as in training. A folder with weights is measured with them, any other model
with random ones.

Axes: B batch, N demonstration tokens, L vectors, D width.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.text import markdown
from mend_jax.data.batches import Batch
from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import LLM
from mend_jax.llm.encoder_decoder import EncoderDecoderLLM
from mend_jax.measure import machine as measure
from mend_jax.measure.jax_side import BATCH_SEED, CHUNK, LLM_SEED, PAPERS_OBJECTIVE, random_params
from mend_jax.measure.model_sizes import known_or_folder
from mend_jax.models import int8
from mend_jax.models.families import Config, EncoderDecoderConfig
from mend_jax.models.folders import has_weights
from mend_jax.models.weights import as_read, read_params
from mend_jax.prefixes.prefix import Prefix
from mend_jax.prefixes.soft_prompt import SoftPrompt
from mend_jax.scoring import costs
from mend_jax.step import make_loss_fn

FORMATS = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The batch of one measurement, in rows and tokens; `target` are the tokens of y, the end of the query."""

    rows: int
    demos: int
    query: int
    target: int
    vectors: int


def measure_models(names: str, sizes: Sizes) -> dict:
    """The report on models, whose names (see `known_or_folder`) are separated by commas."""
    report: dict[str, Any] = {"machine": measure.machine(), "sizes": dataclasses.asdict(sizes), "models": {}}
    names = names.split(",")
    with Progress(len(names) * len(FORMATS), "format") as bar:
        for name in names:
            bar.at(name)
            report["models"][name] = measure_model(name, sizes, bar.update)
    return report


def measure_model(name: str, sizes: Sizes, progress: Callable[[], None] = lambda: None) -> dict:
    """{"weights", "parameters", "formats": {format: figures}} of one model; `progress` is called after each format."""
    config, params, weights = _model(name)
    needed = max(sizes.demos, sizes.vectors) + sizes.query
    if needed > config.window:
        raise UserError(f"{name} would read {needed} tokens, but its window is {config.window}: choose smaller sizes.")
    batch = _batch(config, sizes)
    rows = np.random.default_rng(BATCH_SEED + 1).integers(0, config.vocab_size, sizes.vectors)
    # A distiller's start: embeddings of the vocabulary.
    vectors = int8.rows(jnp.asarray(params["embed"]["tokens"]), rows, "float32", config.embed_scale)
    outputs, figures, wanted = _outputs(config, name, vectors, batch), {}, None
    for kind in FORMATS:
        logits, gradient = outputs(_held(params, kind))
        wanted = wanted or (logits, gradient)
        figures[kind] = {
            "bytes": costs.weight_bytes(config, {"bfloat16": 2}.get(kind, 4), kind == "int8"),
            "logit_error": float(np.linalg.norm(logits - wanted[0]) / np.linalg.norm(wanted[0])),
            "gradient_error": float(np.linalg.norm(gradient - wanted[1]) / np.linalg.norm(wanted[1])),
            "gradient_cosine": _cosine(gradient, wanted[1]),
        }
        progress()
    return {"weights": weights, "parameters": costs.weight_bytes(config, 1), "formats": figures}


def text(report: dict) -> str:
    """The report for a terminal, with a Markdown table."""
    sizes, machine = report["sizes"], report["machine"]
    lines = [
        "{rows} x ({demos} + {query}) tokens, {vectors} vectors; errors are relative norms, all against float32".format(
            **sizes
        ),
        f"{machine['cpu']}, {machine['cores']} cores, jax {machine['versions']['jax']}, {machine['date']}",
        "",
    ]
    header = ["model", "weights", "parameters", "held as", "MB", "logits, error", "gradient of L_distill, error"]
    rows = []
    for name, model in report["models"].items():
        for kind, of in model["formats"].items():
            cells = [name, model["weights"], f"{model['parameters'] / 1e6:.1f} M", kind, f"{of['bytes'] / 1e6:.1f}"]
            cells += [f"{of['logit_error']:.2%}", f"{of['gradient_error']:.2%}", f"{of['gradient_cosine']:.6f}"]
            rows.append(cells)
    return "\n".join([*lines, markdown([*header, "its cosine"], rows)])


def _model(name: str) -> tuple[Config, dict, str]:
    """(its config, float32 params (NumPy), "its own" or "random")."""
    config = known_or_folder(name)
    if Path(name).exists() and has_weights(name):
        params = read_params(name, config)
        return as_read(config, params), params, "its own"
    return config, random_params(config, LLM_SEED), "random"


def _held(params: dict, kind: str) -> dict:
    """The params in the format `kind`, ready for arithmetic in float32."""
    if kind == "int8":
        return int8.quantize_params(params)
    return jax.tree.map(lambda a: jnp.asarray(a.astype(kind), jnp.float32), params)


def _batch(config: Config, sizes: Sizes) -> Batch:
    random, full = np.random.default_rng(BATCH_SEED), np.ones(sizes.rows, np.int32)
    demos, query = (
        random.integers(0, config.vocab_size, (sizes.rows, n), np.int32) for n in (sizes.demos, sizes.query)
    )
    parts = (full * sizes.query, full * (sizes.query - sizes.target), sizes.query - sizes.target, sizes.target)
    return Batch(demos, full * sizes.demos, Query(query, *parts), None)


def _outputs(config: Config, name: str, vectors, batch: Batch) -> Callable[[dict], tuple[np.ndarray, np.ndarray]]:
    """f(params) -> (logits of the first row's query after its demonstrations, gradient of L_distill for the vectors (L,D))."""
    kind = EncoderDecoderLLM if isinstance(config, EncoderDecoderConfig) else LLM
    llm = kind(config, None, None, name, "float32")
    settings = ConfigDict(
        {"stage": "pretrain", "loss": {"kd": 1.0, "pred": 0.0, "clm": 0.0, "chunk": CHUNK, **PAPERS_OBJECTIVE}}
    )
    loss_fn = make_loss_fn(settings, llm, SoftPrompt({"vectors": vectors}))

    @jax.jit
    def compiled(vectors, params, batch):
        gradient, _ = jax.grad(loss_fn, has_aux=True)({"vectors": vectors}, params, batch)
        one = jax.tree.map(lambda a: a[:1], batch)
        prefix = Prefix(llm.embed(params, one.demos), one.demos_length)
        return llm.logits(params, llm.states(params, prefix, one.query)), gradient["vectors"]

    return lambda params: tuple(np.asarray(array, np.float64) for array in compiled(vectors, params, batch))


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
