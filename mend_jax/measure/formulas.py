"""What a train step needs on a mesh, by arithmetic on the sizes of the models: FLOPs, bytes held, bytes sent.

Axes: N demonstration tokens, L vectors, Q query tokens, X and Y those of x and y, T tokens that read, S that are read,
V vocabulary.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mend_jax.measure.collectives import ring
from mend_jax.measure.workloads import STAGES, TABLE, Workload, load_workload
from mend_jax.models.attention import BLOCK
from mend_jax.models.families import Config, DecoderConfig
from mend_jax.models.folders import init_params
from mend_jax.prefixes.distiller import resolve_projection
from mend_jax.run import sharding
from mend_jax.scoring import costs

LIVE = 3  # arrays of scores, of their shares or their gradients, that exist at one time; of logits too


class Stack(NamedTuple):
    """Some layers that read one row: all of a decoder's, or those of one side of an encoder–decoder."""

    config: Config
    layers: int
    tokens: int  # T
    cross: int  # S of the encoder's states that are read too; 0: none
    itemsize: int
    remat: bool
    back: bool  # a gradient comes back through it


def by_formula(work: Workload, sizes: dict[str, int]) -> dict:
    """FLOPs of the step, bytes per device and bytes that each device sends, as rings send them (collectives.py).

    `sizes` are those of the mesh. "activation_bytes" wait for the backward pass; "working_bytes" are what the largest moment
    needs besides: a layer's weights and scores, or three chunks of logits.
    """
    data, fsdp, tensor = (sizes[axis] for axis in sharding.AXES)
    llm, backbone, c, parts = work.llm, work.backbone, work.config, work.config.train.accumulate
    itemsize = jnp.dtype(c.llm.dtype).itemsize
    held, split = 1 if c.llm.weights == "int8" else itemsize, fsdp * tensor
    rows = work.rows / (data * fsdp * parts)  # of a device, at one time
    frozen, trained, stacks = count(llm), count(backbone), [stack for part in _stacks(work).values() for stack in part]
    state = trained / split + _projection(work) / fsdp  # tensor does not split the projection
    # The LLM's weights are gathered by student and teacher and on the way back; the distiller's twice.
    gathered = ring(fsdp) * ((2 + bool(c.loss.kd)) * frozen * held + 2 * trained * 4) / tensor
    gathered += ring(tensor) * _table(llm) * held
    bytes_ = {
        "llm_bytes": frozen * held / split,
        "state_bytes": 3 * 4 * state,
        "gradient_bytes": 4 * state * min(parts, 2),
        "activation_bytes": sum(rows * _kept(stack) + _biases(stack) for stack in stacks if stack.back) / tensor,
        "working_bytes": _working(work, stacks, rows, held, fsdp, tensor),
    }
    return {
        "flops": flops(work),
        **bytes_,
        "total_bytes": sum(bytes_.values()),
        "sent_bytes": {
            "weights": parts * gathered,
            "gradients": ring(fsdp) * trained * 4 / tensor * parts + 2 * ring(data) * trained * 4 / split,
            "activations": parts * rows * 2 * ring(tensor) * sum(map(_reduced, stacks)),
        },
    }


def formula_table(**fields) -> str:
    """Markdown: the table's configs, both stages, on 1, 8, 64 and 512 devices; `fields` as those of `load_workload`."""
    lines = [
        "| config | stage | devices | sequences | TFLOP a step | GB, data | GB, fsdp | GB, tensor | sent, data | sent, fsdp | sent, tensor |",
        "| --- " * 11 + "|",
    ]
    for name in TABLE:
        for stage in STAGES:
            for devices in (1, 8, 64, 512):
                cells = [_cell(name, stage, sizes, fields) for sizes in meshes(devices)]
                held = [f"{cell['total_bytes'] / 1e9:.2f}" if cell else "–" for cell in cells]
                moved = [f"{sum(cell['sent_bytes'].values()) / 1e9:.2f}" if cell else "–" for cell in cells]
                work = load_workload(name, stage, devices, **fields)
                first = [name, stage, str(devices), str(work.rows), tera(flops(work))]
                lines.append(f"| {' | '.join(first + held + moved)} |")
    return "\n".join(lines)


def _cell(name: str, stage: str, sizes: dict[str, int], fields: dict) -> dict | None:
    """`by_formula`; None where the mesh does not divide the heads."""
    work = load_workload(name, stage, sizes[sharding.DATA] * sizes[sharding.FSDP], **fields)
    if any(config.heads % sizes[sharding.TENSOR] for config in (work.llm, work.backbone)):
        return None
    return by_formula(work, sizes)


def meshes(devices: int) -> list[dict[str, int]]:
    """Data alone; fsdp over up to 64 devices, which divide every model here; tensor over 4, fsdp over up to 16."""
    fsdp, tensor = min(devices, 64), min(devices, 4)
    rest = min(devices // tensor, 16)
    sizes = [(devices, 1, 1), (devices // fsdp, fsdp, 1), (devices // tensor // rest, rest, tensor)]
    return [dict(zip(sharding.AXES, size, strict=True)) for size in sizes]


def flops(work: Workload) -> int:
    """FLOPs of a step over all devices: those of costs.py, and what the backward pass computes again."""
    own, student, teacher = _products(work)
    kd = bool(work.config.loss.kd)
    total = own.forward + own.gradient + 6 * work.vectors * _projection(work)
    total += (
        student.forward + student.input_gradient + kd * teacher.forward + (2 + kd) * costs.head(work.llm, work.query)
    )
    return work.rows * total + recomputed(work)


def tera(number: float) -> str:
    """12345e12 as "12,345", less than a thousand with three digits."""
    return f"{number / 1e12:,.0f}" if number >= 1e15 else f"{number / 1e12:.3g}"


def recomputed(work: Workload) -> int:
    """FLOPs of a step that the backward pass computes again: the scores, which no layer keeps; of rematerialised layers all
    but the last product."""
    total, (own, student, _), stacks = 0, _products(work), _stacks(work)
    for who, products in (("distiller", own), ("student", student)):
        config, scores = stacks[who][0].config, products.attention // 2
        if stacks[who][0].remat:
            last = sum(stack.layers * 2 * stack.tokens * config.mlp_width * _width(config) for stack in stacks[who])
            # The blocks of a decoder's attention keep nothing of the second pass for the gradient either.
            total += products.forward - last + scores * isinstance(config, DecoderConfig)
        else:
            total += scores
    return work.rows * total


@functools.cache
def count(config: Config) -> int:
    """Parameters of a model."""
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _products(work: Workload) -> tuple[costs.Products, costs.Products, costs.Products]:
    """Of one row: the distiller's reading, the student's and the teacher's, cut to the LLM's window as the program cuts them."""
    targets = work.targets or 0
    query = work.read + targets
    room = work.llm.window - query
    student, teacher = (
        costs.query_reading(work.llm, min(before, room), query, targets) for before in (work.vectors, work.demos)
    )
    return costs.reading(work.backbone, work.demos + work.vectors), student, teacher


def _stacks(work: Workload) -> dict[str, list[Stack]]:
    """All that reads one row, by who reads it: the distiller, the student, and where there is L_distill the teacher."""
    own = work.config.prefix, work.backbone, work.demos + work.vectors, 0, True
    student = work.config.llm, work.llm, work.vectors + work.read, work.targets, True
    teacher = work.config.llm, work.llm, work.demos + work.read, work.targets, False
    readers, found = {"distiller": own, "student": student}, {}
    for who, (section, config, tokens, targets, back) in (
        readers | ({"teacher": teacher} if work.config.loss.kd else {})
    ).items():
        rest = jnp.dtype(section.dtype).itemsize, bool(section.remat), back
        tokens = min(tokens, config.window)
        found[who] = [Stack(config, config.layers, tokens, 0, *rest)]
        if targets:
            found[who].append(Stack(config, config.decoder_layers, targets, tokens, *rest))
    return found


def _kept(stack: Stack) -> int:
    """Bytes of one row that wait for the backward pass: what the layers keep (`KEPT` in models/), or only their inputs."""
    layer = stack.tokens * _width(stack.config) * stack.itemsize if stack.remat else _layer(stack)
    return stack.layers * layer


def _layer(stack: Stack) -> int:
    """Bytes of one layer's input and of all that it keeps of a row."""
    config = stack.config
    width, heads = _width(config), config.heads * config.head_width
    kv = getattr(config, "kv_heads", config.heads) * config.head_width
    numbers = 2 * width + 2 * heads + 2 * kv + (2 if config.gated else 1) * config.mlp_width
    numbers *= stack.tokens
    if stack.cross:
        numbers += stack.tokens * (2 * heads + width) + stack.cross * 2 * kv
    normaliser = 4 * stack.tokens * config.heads if isinstance(config, DecoderConfig) else 0
    return numbers * stack.itemsize + normaliser


def _scores(stack: Stack) -> int:
    """Bytes of one row's scores that exist at one time: a decoder's of one block of tokens, T5's of all."""
    read, columns = stack.tokens, max(stack.tokens, stack.cross)
    return 4 * stack.config.heads * (min(read, BLOCK) if isinstance(stack.config, DecoderConfig) else read) * columns


def _biases(stack: Stack) -> int:
    """Bytes of T5's bias of every pair of tokens, the same for all rows of a device, and of its gradient where it is trained."""
    if isinstance(stack.config, DecoderConfig):
        return 0
    return 4 * stack.config.heads * stack.tokens**2 * (1 if stack.config.decoder_layers else 2)


def _working(work: Workload, stacks: list[Stack], rows: float, held: int, fsdp: int, tensor: int) -> float:
    """Bytes of the largest moment, besides what waits."""
    llm, needed = work.llm, []
    tables = _table(llm) * (1 if llm.tied_head else 2) * held if fsdp * tensor > 1 else 0
    layers = llm.layers + getattr(llm, "decoder_layers", 0)
    weights = (count(llm) - _table(llm) * (1 if llm.tied_head else 2)) / layers * held / tensor if fsdp > 1 else 0
    for stack in stacks:
        states = _layer(stack) * (2 if stack.back and stack.remat else 1)
        bias = 0 if stack.back else _biases(stack)  # of the others it waits
        needed.append((rows * (LIVE * _scores(stack) + states) + bias) / tensor + weights * (stack.config is llm))
    needed.append(LIVE * min(work.config.loss.chunk, rows * work.query) * llm.vocab_size * 4)
    return max(needed) + tables


def _reduced(stack: Stack) -> int:
    """Bytes of one row that tensor parallelism sums: a state behind each product that it splits, there and back."""
    sums = 3 if stack.cross else 2
    turns = sums * (2 if stack.back else 1) + (sums - 1) * (stack.back and stack.remat)
    return stack.layers * stack.tokens * turns * _width(stack.config) * stack.itemsize


def _projection(work: Workload) -> int:
    """Weights of the distiller's projection."""
    width, llm_width = work.backbone.width, work.llm.width
    kind = resolve_projection(work.config.prefix.projection, width, llm_width)
    return 0 if kind == "identity" else width * llm_width


def _table(config: Config) -> int:
    return config.vocab_size * config.width


def _width(config: Config) -> int:
    """Of the states between the layers."""
    return getattr(config, "hidden_width", config.width)
