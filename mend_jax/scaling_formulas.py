"""What a train step needs on a mesh, by arithmetic on the sizes of the models: FLOPs, bytes held, bytes sent.

Axes: N demonstration tokens, L vectors, Q query tokens, Y of them y.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mend_jax import costs, sharding
from mend_jax.benchmark_jax import CHUNK, Settings
from mend_jax.collectives import ring
from mend_jax.models.families import Config, DecoderConfig
from mend_jax.models.folders import init_params
from mend_jax.scaling_models import MODELS, workload


def by_formula(settings: Settings, sizes: dict[str, int]) -> dict:
    """FLOPs of the step, bytes per device and bytes that each device sends, as rings send them (collectives.py).

    `sizes` are those of the mesh. "working_bytes" are what is whole for a moment: the token table, a layer, three chunks
    of logits.
    """
    data, fsdp, tensor = (sizes[axis] for axis in sharding.AXES)
    llm, itemsize = settings.llm, jnp.dtype(settings.dtype).itemsize
    width, llm_width = settings.distiller.width, llm.width
    projection = 0 if width == llm_width else width * llm_width  # which tensor does not split
    held, rows, split = 1 if settings.weights == "int8" else itemsize, settings.rows / (data * fsdp), fsdp * tensor
    frozen, trained, table = count(llm), count(settings.distiller), llm.vocab_size * llm.width
    # The LLM's weights are gathered by teacher and student and on the way back; the distiller's twice.
    gathered = ring(fsdp) * (3 * frozen * held + 2 * trained * 4) / tensor + ring(tensor) * table * held
    reduced = ring(fsdp) * trained * 4 / tensor + 2 * ring(data) * trained * 4 / split
    tokens = min(CHUNK, rows * settings.query)
    working = 3 * tokens * llm.vocab_size * 4 + (table * held if split > 1 else 0)
    working += (frozen - table) / llm.layers * held / tensor if fsdp > 1 else 0
    bytes_ = {
        "llm_bytes": frozen * held / split,
        "state_bytes": 3 * 4 * (trained / split + projection / fsdp),
        "gradient_bytes": 4 * (trained / split + projection / fsdp),
        "activation_bytes": rows * _kept(settings) / tensor,
        "working_bytes": working,
    }
    moved = rows * itemsize * 2 * ring(tensor) * _activations(settings)
    return {
        "flops": flops(settings),
        **bytes_,
        "total_bytes": sum(bytes_.values()),
        "sent_bytes": {"weights": gathered, "gradients": reduced, "activations": moved},
    }


def formula_table(**fields) -> str:
    """Markdown: every model on 1, 8, 64 and 512 devices, one sequence for each that splits the batch.

    `fields` as those of `workload`.
    """
    lines = [
        "| LLM | devices | TFLOP a step | GB, data | GB, fsdp | GB, tensor | sent, data | sent, fsdp | sent, tensor |",
        "| --- " * 9 + "|",
    ]
    for name in MODELS:
        for devices in (1, 8, 64, 512):
            cells = []
            for sizes in meshes(devices):
                settings = workload(name, sizes[sharding.DATA] * sizes[sharding.FSDP], **fields)
                heads = settings.llm.heads, settings.distiller.heads
                fits = all(count % sizes[sharding.TENSOR] == 0 for count in heads)
                cells.append(by_formula(settings, sizes) if fits else None)
            held = [f"{cell['total_bytes'] / 1e9:.2f}" if cell else "–" for cell in cells]
            moved = [f"{sum(cell['sent_bytes'].values()) / 1e9:.2f}" if cell else "–" for cell in cells]
            total = flops(workload(name, devices, **fields)) / 1e12
            lines.append(f"| {name} | {devices} | {total:.3g} | {' | '.join(held + moved)} |")
    return "\n".join(lines)


def meshes(devices: int) -> list[dict[str, int]]:
    """Data alone; fsdp over up to 64 devices, which divide every model here; tensor over 4, fsdp over up to 16."""
    fsdp, tensor = min(devices, 64), min(devices, 4)
    rest = min(devices // tensor, 16)
    sizes = [(devices, 1, 1), (devices // fsdp, fsdp, 1), (devices // tensor // rest, rest, tensor)]
    return [dict(zip(sharding.AXES, size, strict=True)) for size in sizes]


def flops(settings: Settings) -> int:
    """FLOPs of a step over all devices."""
    shapes = (settings.rows, settings.demos, settings.query, settings.vectors, settings.target)
    return costs.step(settings.llm, settings.distiller, *shapes)["total"]


@functools.cache
def count(config: Config) -> int:
    """Parameters of a model."""
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _activations(settings: Settings) -> int:
    """Numbers that tensor parallelism reduces for one sequence: two of a layer's width per token and reading."""
    N, L, Q, Y = settings.demos, settings.vectors, settings.query, settings.target
    backbone, llm = settings.distiller, settings.llm
    own = 2 * 2 * (N + L) * backbone.layers * getattr(backbone, "hidden_width", backbone.width)  # forward and back
    if isinstance(llm, DecoderConfig):
        return own + 2 * llm.layers * llm.hidden_width * ((N + Q) + 2 * (L + Q))
    said = 3 * llm.decoder_layers * Y * 3  # three products are summed in a decoder's layer
    return own + llm.width * (2 * llm.layers * ((N + Q - Y) + 2 * (L + Q - Y)) + said)


def _kept(settings: Settings) -> int:
    """Bytes of one sequence that wait for the backward pass: what the layers keep (`KEPT` in models/), or only their inputs."""
    itemsize, N, L, Q, Y = (
        jnp.dtype(settings.dtype).itemsize,
        *(getattr(settings, name) for name in ("demos", "vectors", "query", "target")),
    )
    parts = [(settings.distiller, settings.distiller.layers, N + L, 1)]
    if isinstance(settings.llm, DecoderConfig):
        parts.append((settings.llm, settings.llm.layers, L + Q, 1))
    else:
        parts += [(settings.llm, settings.llm.layers, L + Q - Y, 1), (settings.llm, settings.llm.decoder_layers, Y, 2)]
    total = 0
    for config, layers, tokens, attentions in parts:
        width = getattr(config, "hidden_width", config.width)
        heads = config.heads * config.head_width
        numbers = width  # the layer's input
        if not settings.remat:
            kv = getattr(config, "kv_heads", config.heads) * config.head_width
            numbers += attentions * (2 * heads + 2 * kv + width) + (2 if config.gated else 1) * config.mlp_width
        total += layers * tokens * numbers * itemsize
    return total
