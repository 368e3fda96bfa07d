"""What a train step needs on a mesh, computed from the models' sizes: FLOPs, bytes held, bytes sent.

Axes: N demonstration tokens, C parts of W tokens that the distiller reads alone, L vectors, R queries of Q tokens, X and Y tokens
of x and y, P prefix, T tokens that attend, S tokens attended to, V vocabulary.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mend_jax.cli.text import markdown
from mend_jax.measure.collectives import ring
from mend_jax.measure.workloads import STAGES, TABLE, Workload, load_workload
from mend_jax.models.attention import BLOCK
from mend_jax.models.families import Config, DecoderConfig
from mend_jax.models.folders import init_params
from mend_jax.run import sharding
from mend_jax.scoring import costs

LIVE = 3  # arrays of attention scores, weights or gradients that exist at one time; the same number for logits


class Stack(NamedTuple):
    """Layers that read one row: all of a decoder's, or those of one side of an encoder–decoder."""

    config: Config
    layers: int
    tokens: int  # T
    cross: int  # S, the encoder's states for cross-attention; 0: none
    itemsize: int
    remat: bool
    back: bool  # whether a gradient flows back through it
    count: int = 1  # such rows to a context
    before: int = 0  # P, whose keys and values are kept for a decoder's T tokens of several queries


def by_formula(work: Workload, sizes: dict[str, int]) -> dict:
    """FLOPs of the step, bytes per device and bytes that each device sends in rings (collectives.py).

    `sizes` are those of the mesh. "activation_bytes" are kept for the backward pass; "working_bytes" are what the peak needs in
    addition: a layer's weights and scores, or three chunks of logits.
    """
    data, fsdp, tensor = (sizes[axis] for axis in sharding.AXES)
    llm, backbone, c, parts = work.llm, work.backbone, work.config, work.config.train.accumulate
    itemsize = jnp.dtype(c.llm.dtype).itemsize
    held, split = 1 if c.llm.weights == "int8" else itemsize, fsdp * tensor
    rows = work.rows / (data * fsdp * parts)  # per device, at one time
    frozen, trained, stacks = count(llm), count(backbone), [stack for part in _stacks(work).values() for stack in part]
    own = 0 if work.config.prefix.train_embeddings else _table(backbone)  # the distiller's, frozen beside the LLM's
    trained, own_bytes = trained - own, own * jnp.dtype(c.prefix.dtype).itemsize
    state = trained / split + work.model.vector_weights / fsdp  # tensor does not split the projection
    # The student, the teacher and the backward pass gather the LLM's weights; the distiller's are gathered twice.
    gathered = ring(fsdp) * ((2 + bool(c.loss.kd)) * frozen * held + 2 * trained * 4) / tensor
    gathered += ring(tensor) * _table(llm) * held + ring(fsdp) * own_bytes / tensor
    bytes_ = {
        "llm_bytes": (frozen * held + own_bytes) / split,
        "state_bytes": 3 * 4 * state,
        "gradient_bytes": 4 * state * min(parts, 2),
        "activation_bytes": sum(rows * stack.count * _kept(stack) + _biases(stack) for stack in stacks if stack.back)
        / tensor,
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
    """A Markdown table of the configs, both stages, on 1, 8, 64 and 512 devices; `fields` are as in `load_workload`."""
    header, rows = ["config", "stage", "devices", "sequences", "TFLOP a step"], []
    header += [f"{what}, {axis}" for what in ("GB", "sent") for axis in sharding.AXES]
    for name in TABLE:
        for stage in STAGES:
            for devices in (1, 8, 64, 512):
                cells = [_cell(name, stage, sizes, fields) for sizes in meshes(devices)]
                held = [f"{cell['total_bytes'] / 1e9:.2f}" if cell else "–" for cell in cells]
                moved = [f"{sum(cell['sent_bytes'].values()) / 1e9:.2f}" if cell else "–" for cell in cells]
                work = load_workload(name, stage, devices, **fields)
                first = [name, stage, str(devices), str(work.rows), tera(flops(work))]
                rows.append(first + held + moved)
    return markdown(header, rows)


def _cell(name: str, stage: str, sizes: dict[str, int], fields: dict) -> dict | None:
    """The result of `by_formula`; None if the mesh does not divide the heads."""
    work = load_workload(name, stage, sizes[sharding.DATA] * sizes[sharding.FSDP], **fields)
    if any(config.heads % sizes[sharding.TENSOR] for config in (work.llm, work.backbone)):
        return None
    return by_formula(work, sizes)


def meshes(devices: int) -> list[dict[str, int]]:
    """Three meshes: data alone; fsdp up to 64, which divides every model here; tensor up to 4 with fsdp up to 16."""
    fsdp, tensor = min(devices, 64), min(devices, 4)
    rest = min(devices // tensor, 16)
    sizes = [(devices, 1, 1), (devices // fsdp, fsdp, 1), (devices // tensor // rest, rest, tensor)]
    return [dict(zip(sharding.AXES, size, strict=True)) for size in sizes]


def flops(work: Workload) -> int:
    """FLOPs of a step over all devices: those of costs.py plus what the backward pass recomputes."""
    own, student, teacher = _products(work)
    kd = bool(work.config.loss.kd)
    total = own.forward + own.gradient + 6 * work.made * work.model.vector_weights
    total += student.forward + student.input_gradient + kd * teacher.forward
    total += (2 + kd) * costs.head(work.llm, work.queries * work.query)
    return work.rows * total + recomputed(work)


def tera(number: float) -> str:
    """A number in units of 1e12: 12345e12 as "12,345"; below a thousand with three digits."""
    return f"{number / 1e12:,.0f}" if number >= 1e15 else f"{number / 1e12:.3g}"


def recomputed(work: Workload) -> int:
    """FLOPs that a step's backward pass recomputes: the scores, which no layer keeps, and in rematerialised layers all but the
    last product."""
    total, (own, student, _), stacks = 0, _products(work), _stacks(work)
    for who, products in (("distiller", own), ("student", student)):
        config, scores = stacks[who][0].config, products.attention // 2
        joined = stacks[who][-1]
        if joined.before:  # attention to cached keys is recomputed whole, by itself or with its layer
            attended = costs.reading(config, joined.tokens, joined.before + joined.tokens).attention // 2
            scores += -attended if joined.remat else attended
        if stacks[who][0].remat:
            tokens = sum(stack.count * stack.layers * stack.tokens for stack in stacks[who])
            last = 2 * tokens * config.mlp_width * _width(config)
            # The blocks of a decoder's attention do not keep the recomputed scores for the gradient either.
            total += products.forward - last + scores * isinstance(config, DecoderConfig)
        else:
            total += scores
    return work.rows * total


@functools.cache
def count(config: Config) -> int:
    """The number of parameters of a model."""
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _products(work: Workload) -> tuple[costs.Products, costs.Products, costs.Products]:
    """The distiller's, the student's and the teacher's products for one row, cut to the LLM's window as in the program."""
    targets, befores = work.targets or 0, (work.vectors, work.demos)
    query = work.read + targets
    room = work.llm.window - query
    if work.queries > 1:
        student, teacher = (_joined(work.llm, before, work.queries * query) for before in befores)
    else:
        student, teacher = (costs.query_reading(work.llm, min(before, room), query, targets) for before in befores)
    own = costs.reading(work.backbone, work.part + work.config.prefix.length)
    return costs.Products(*(work.parts * products for products in own)), student, teacher


def _joined(llm: Config, before: int, tokens: int) -> costs.Products:
    """A prefix read once, and T tokens of all queries after it in one row: more pairs of tokens than are seen."""
    parts = costs.reading(llm, before), costs.reading(llm, tokens, before + tokens)
    return costs.Products(*map(sum, zip(*parts, strict=True)))


def _stacks(work: Workload) -> dict[str, list[Stack]]:
    """The stacks that read one row, by reader: the distiller, the student and, if there is L_distill, the teacher."""
    own = work.config.prefix, work.backbone, work.part + work.config.prefix.length, 0, True
    student = work.config.llm, work.llm, work.vectors + work.read, work.targets, True
    teacher = work.config.llm, work.llm, work.demos + work.read, work.targets, False
    readers, found = {"distiller": own, "student": student}, {}
    for who, (section, config, tokens, targets, back) in (
        readers | ({"teacher": teacher} if work.config.loss.kd else {})
    ).items():
        rest = jnp.dtype(section.dtype).itemsize, bool(section.remat), back
        if who == "distiller":
            rest += (work.parts,)
        elif work.queries > 1:
            before, joined = tokens - work.read, work.queries * work.read
            found[who] = [Stack(config, config.layers, before, 0, *rest)]
            found[who].append(Stack(config, config.layers, joined, 0, *rest, before=before))
            continue
        tokens = min(tokens, config.window)
        found[who] = [Stack(config, config.layers, tokens, 0, *rest)]
        if targets:
            found[who].append(Stack(config, config.decoder_layers, targets, tokens, *rest))
    return found


def _kept(stack: Stack) -> int:
    """Bytes of one row kept for the backward pass: what the layers keep (`KEPT` in models/), or with remat only their inputs."""
    layer = stack.tokens * _width(stack.config) * stack.itemsize if stack.remat else _layer(stack)
    return stack.layers * layer


def _layer(stack: Stack) -> int:
    """Bytes of one layer's input and of all that the layer keeps of a row."""
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
    """Bytes of one row's scores that exist at one time: one block of tokens in a decoder, all tokens in T5, and of all blocks
    where a gradient flows back through attention to cached keys."""
    if stack.before:
        T = stack.tokens
        pairs = T * (stack.before + (T + BLOCK) // 2) if stack.back else BLOCK * max(T, stack.before)
        return 4 * stack.config.heads * pairs
    read, columns = stack.tokens, max(stack.tokens, stack.cross)
    return 4 * stack.config.heads * (min(read, BLOCK) if isinstance(stack.config, DecoderConfig) else read) * columns


def _biases(stack: Stack) -> int:
    """Bytes of T5's bias for every pair of tokens, shared by all rows of a device, and of its gradient if it is trained."""
    if isinstance(stack.config, DecoderConfig):
        return 0
    return 4 * stack.config.heads * stack.tokens**2 * (1 if stack.config.decoder_layers else 2)


def _working(work: Workload, stacks: list[Stack], rows: float, held: int, fsdp: int, tensor: int) -> float:
    """Bytes that the peak needs beyond the activations kept."""
    llm, needed = work.llm, []
    tables = _table(llm) * (1 if llm.tied_head else 2) * held if fsdp * tensor > 1 else 0
    layers = llm.layers + getattr(llm, "decoder_layers", 0)
    weights = (count(llm) - _table(llm) * (1 if llm.tied_head else 2)) / layers * held / tensor if fsdp > 1 else 0
    for stack in stacks:
        states = _layer(stack) * (2 if stack.back and stack.remat else 1) + _cached(stack)
        bias = 0 if stack.back else _biases(stack)  # with a gradient it is among the activations kept
        needed.append(
            (rows * stack.count * (LIVE * _scores(stack) + states) + bias) / tensor + weights * (stack.config is llm)
        )
    needed.append(LIVE * min(work.config.loss.chunk, rows * work.queries * work.query) * llm.vocab_size * 4)
    return max(needed) + tables


def _cached(stack: Stack) -> int:
    """Bytes of the keys and values of one prefix in all layers, and of their gradients."""
    kept = costs.cache_bytes(stack.config, stack.before, stack.itemsize) if stack.before else 0
    return kept * (2 if stack.back else 1)


def _reduced(stack: Stack) -> int:
    """Bytes of one row that tensor parallelism sums: a state after each product that it splits, forward and backward."""
    sums = 3 if stack.cross else 2
    turns = sums * (2 if stack.back else 1) + (sums - 1) * (stack.back and stack.remat)
    return stack.count * stack.layers * stack.tokens * turns * _width(stack.config) * stack.itemsize


def _table(config: Config) -> int:
    return config.vocab_size * config.width


def _width(config: Config) -> int:
    """The width of the states between the layers."""
    return getattr(config, "hidden_width", config.width)
