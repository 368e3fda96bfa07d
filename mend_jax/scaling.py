"""What the real-size train step needs on a mesh: bytes per device, and what crosses between devices. Nothing is run.

    python -m mend_jax.scaling opt-6.7b --fsdp=8
    python -m mend_jax.scaling gpt2-large --data=8 --out=gpt2-large.json
    python -m mend_jax.scaling all                 # by formula alone: every model on 1, 8, 64 and 512 devices

The step of finetuning, one sequence for each device that splits the batch, is compiled for simulated devices from the
shapes of its arguments: no weight is ever made. Bytes per device are the compiler's; what crosses is counted in the
compiled program, each loop as often as it runs; beside both stand the formulas (mend_jax/costs.py and below) that
docs/scaling.md goes on with to other numbers of devices.
"""

import functools
import math
import os
import re
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax import cli, costs, measure, parallel, sharding
from mend_jax.benchmark import table, write_json
from mend_jax.benchmark_jax import CHUNK, Settings, step_config
from mend_jax.data.batches import Batch
from mend_jax.llm import LLM
from mend_jax.llm_encoder_decoder import EncoderDecoderLLM
from mend_jax.models import int8
from mend_jax.models.families import Config, DecoderConfig, EncoderDecoderConfig, from_hf_config
from mend_jax.models.folders import init_params
from mend_jax.prefix import Distiller, resolve_projection
from mend_jax.query import Query
from mend_jax.step import init_state, make_loss_fn, make_optimizer, make_train_step


def _gpt2(width, layers, heads):
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads}
    return {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, **sizes}


def _opt(width, layers, heads):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "ffn_dim": 4 * width}
    return {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, **sizes}


def _t5(width, layers, heads, mlp_width):
    sizes = {"d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": 64, "d_ff": mlp_width}
    fixed = {"model_type": "t5", "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return fixed | sizes


def _llama(width, layers, heads, kv_heads, mlp_width):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    fixed = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}
    return fixed | sizes | {"num_key_value_heads": kv_heads, "intermediate_size": mlp_width}


# LLM -> (its config.json as far as sizes go, that of its distiller's backbone): the paper's, and a 7B Llama-like one.
MODELS = {
    "gpt2-large": (_gpt2(1280, 36, 20), _gpt2(768, 12, 12)),
    "gpt2-xl": (_gpt2(1600, 48, 25), _gpt2(768, 12, 12)),
    "opt-6.7b": (_opt(4096, 32, 32), _opt(768, 12, 12)),
    "t5-large-lm-adapt": (_t5(1024, 24, 16, 2816), _t5(512, 8, 6, 1024)),
    "flan-t5-xl": (_t5(2048, 24, 32, 5120), _t5(768, 12, 12, 2048)),
    "llama-2-7b": (_llama(4096, 32, 32, 32, 11008), _llama(2048, 22, 32, 4, 5632)),  # TinyLlama
}


def scaling(
    llm: Literal["all", *MODELS],
    /,
    data=1,
    fsdp=1,
    tensor=1,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    weights: Literal["full", "int8"] = "full",
    remat=False,
    batch_size=0,
    demos=900,
    vectors=100,
    query=124,
    target=4,
    out="",
) -> int:
    """Prints what one train step needs on each device of a mesh.

    Args:
        llm: the LLM, with its distiller; "all": the table by formula.
        data, fsdp, tensor: devices along each axis of the mesh.
        dtype: of the LLM and of all arithmetic.
        weights: "int8" holds the LLM in 8 bits.
        remat: both models recompute their layers.
        batch_size: sequences; 0 is one for each device that splits the batch.
        demos, vectors, query, target: tokens of a sequence: context, vectors, query, and of it y.
        out: a JSON file for the figures.
    """
    sizes = {sharding.DATA: data, sharding.FSDP: fsdp, sharding.TENSOR: tensor}
    rows = batch_size or data * fsdp

    def settings_of(name, rows):
        models = (
            from_hf_config(source).headless if i else from_hf_config(source) for i, source in enumerate(MODELS[name])
        )
        return Settings(*models, dtype, rows, demos, query, target, vectors, "xla", remat)

    if llm == "all":
        print(formula_table(settings_of, weights))
        return 0
    _simulate(math.prod(sizes.values()))
    settings = settings_of(llm, rows)
    report = {"llm": llm, "mesh": sizes, "batch_size": rows, "dtype": dtype, "weights": weights, "remat": remat}
    report |= {
        "machine": measure.machine(),
        "formula": by_formula(settings, sizes, weights),
        "compiled": compiled(settings, sizes, weights),
    }
    print(as_text(report))
    if out:
        write_json(out, report)
    return 0


def _simulate(devices: int) -> None:
    """Simulated devices, unless the environment says how many there are."""
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def abstract_step(settings: Settings, layout: parallel.Layout, weights: str = "full"):
    """(train step, state, LLM params, batch): the last three as `jax.ShapeDtypeStruct`s that lie as `layout` says."""
    llm_params = _shapes(settings.llm, settings.dtype)
    llm_params = _in_8_bits(llm_params) if weights == "int8" else llm_params
    kind = EncoderDecoderLLM if isinstance(settings.llm, EncoderDecoderConfig) else LLM
    llm = kind(settings.llm, llm_params, None, "shapes alone", settings.dtype, "xla", settings.remat)
    backbone = settings.distiller
    projection = resolve_projection("auto", backbone.width, settings.llm.width)
    params = {"backbone": _shapes(backbone, "float32"), "placeholders": _shape(settings.vectors, backbone.width)}
    if projection != "identity":
        params["projection"] = {"kernel": _shape(backbone.width, llm.config.width), "bias": _shape(llm.config.width)}
    distiller = Distiller(backbone, params, projection, llm.config.width, None, settings.dtype, "xla", settings.remat)
    config = step_config()
    optimizer = make_optimizer(config)
    step = make_train_step(config, make_loss_fn(config, llm, distiller, layout.mesh), optimizer, layout.axis)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    rows = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec(sharding.ROWS))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), _batch(settings))
    return step, layout.shaped(state), layout.shaped(llm_params), batch


def compiled(settings: Settings, sizes: dict[str, int], weights: str = "full") -> dict:
    """The compiler's figures of the step on a mesh: bytes per device, and bytes that each device sends, by operation."""
    for what, config in (("the LLM", settings.llm), ("the distiller's backbone", settings.distiller)):
        sharding.check_heads(config, sizes[sharding.TENSOR], what)
    layout = parallel.make_layout("mesh", sizes)
    step, state, llm_params, batch = abstract_step(settings, layout, weights)
    began = time.monotonic()
    program = layout.compile_step(step, state).lower(state, llm_params, batch).compile()
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "llm_bytes": _local_bytes(llm_params),
        "state_bytes": _local_bytes(state),
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": kept + memory.temp_size_in_bytes,
        "sent_bytes": sent(program.as_text()),
        "compile_seconds": time.monotonic() - began,
    }


def by_formula(settings: Settings, sizes: dict[str, int], weights: str = "full") -> dict:
    """FLOPs, bytes per device and bytes that each device sends, from the sizes alone; sent as rings send (`sent`).

    "working_bytes" are what is whole for a moment: the token table, a layer, three chunks of logits.
    """
    data, fsdp, tensor = (sizes[axis] for axis in sharding.AXES)
    llm, itemsize = settings.llm, jnp.dtype(settings.dtype).itemsize
    width, llm_width = settings.distiller.width, llm.width
    projection = 0 if width == llm_width else width * llm_width  # which tensor does not split
    held, rows, split = 1 if weights == "int8" else itemsize, settings.rows / (data * fsdp), fsdp * tensor
    frozen, trained, table = count(llm), count(settings.distiller), llm.vocab_size * llm.width
    # The LLM's weights are gathered by teacher and student and on the way back; the distiller's twice.
    gathered = _ring(fsdp) * (3 * frozen * held + 2 * trained * 4) / tensor + _ring(tensor) * table * held
    reduced = _ring(fsdp) * trained * 4 / tensor + 2 * _ring(data) * trained * 4 / split
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
    moved = rows * itemsize * 2 * _ring(tensor) * _activations(settings)
    return {
        "flops": costs_of(settings),
        **bytes_,
        "total_bytes": sum(bytes_.values()),
        "sent_bytes": {"weights": gathered, "gradients": reduced, "activations": moved},
    }


def formula_table(settings_of, weights: str) -> str:
    """Markdown: every model on 1, 8, 64 and 512 devices, one sequence for each that splits the batch.

    `settings_of(name, rows)` gives a model's `Settings`.
    """
    lines = [
        "| LLM | devices | TFLOP a step | GB, data | GB, fsdp | GB, tensor | sent, data | sent, fsdp | sent, tensor |",
        "| --- " * 9 + "|",
    ]
    for name in MODELS:
        for devices in (1, 8, 64, 512):
            cells, flops = [], costs_of(settings_of(name, devices))
            for sizes in meshes(devices):
                settings = settings_of(name, sizes[sharding.DATA] * sizes[sharding.FSDP])
                heads = settings.llm.heads, settings.distiller.heads
                fits = all(count % sizes[sharding.TENSOR] == 0 for count in heads)
                cells.append(by_formula(settings, sizes, weights) if fits else None)
            held = [f"{cell['total_bytes'] / 1e9:.2f}" if cell else "–" for cell in cells]
            moved = [f"{sum(cell['sent_bytes'].values()) / 1e9:.2f}" if cell else "–" for cell in cells]
            lines.append(f"| {name} | {devices} | {flops / 1e12:.3g} | {' | '.join(held + moved)} |")
    return "\n".join(lines)


def costs_of(settings: Settings) -> int:
    """FLOPs of a step."""
    shapes = (settings.rows, settings.demos, settings.query, settings.vectors, settings.target)
    return costs.step(settings.llm, settings.distiller, *shapes)["total"]


def meshes(devices: int) -> list[dict[str, int]]:
    """Data alone; fsdp over up to 64 devices, which divide every model here; tensor over 4, fsdp over up to 16."""
    fsdp, tensor = min(devices, 64), min(devices, 4)
    rest = min(devices // tensor, 16)
    sizes = [(devices, 1, 1), (devices // fsdp, fsdp, 1), (devices // tensor // rest, rest, tensor)]
    return [dict(zip(sharding.AXES, size, strict=True)) for size in sizes]


@functools.cache
def count(config: Config) -> int:
    """Parameters of a model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes(config, "float32")))


def sent(text: str) -> dict[str, float]:
    """{collective operation: bytes that one device sends} in the text of a compiled program, loops counted in full.

    As rings send them: of an all-gather of S bytes over n devices S (n-1)/n, of an all-reduce twice that.
    """
    bodies, entry, name = {}, "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header[2]
            entry, bodies[name] = (name if header[1] else entry), []
        elif name is not None:
            bodies[name].append(line)
    known: dict[str, dict] = {}

    def total(name: str) -> dict[str, float]:
        if name not in known:
            known[name] = {}
            for line in bodies[name]:
                _add(known[name], _own(line))
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                for called in re.findall(r"(?:body|calls|to_apply)=%?([\w.\-]+)", line):
                    _add(known[name], total(called), int(trips[1]) if trips else 1)
        return known[name]

    return total(entry)


def _own(line: str) -> dict[str, float]:
    found = re.search(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line
    )
    if not found:
        return {}
    size = sum(
        max(1, int(re.sub(r"\D", "", kind) or 8) // 8) * math.prod(int(n) for n in shape.split(",") if n)
        for kind, shape in re.findall(r"(pred|[a-z]+\d+)\[([\d,]*)\]", found[1])
    )
    n, kind = _group(line), found[2]
    share = {"all-reduce": 2 * _ring(n), "reduce-scatter": n - 1, "collective-permute": 1.0}.get(kind, _ring(n))
    return {kind: size * share}


def _group(line: str) -> int:
    """Devices that take part in one group of a collective operation."""
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    listed, counted = (
        re.search(pattern, line) for pattern in (r"replica_groups=\{\{([\d,]*)\}", r"replica_groups=\[\d+,(\d+)\]")
    )
    return int(counted[1]) if counted else len(listed[1].split(",")) if listed else 1


def _add(into: dict, other: dict, times: float = 1) -> None:
    for kind, size in other.items():
        into[kind] = into.get(kind, 0) + times * size


def _ring(n: int) -> float:
    return (n - 1) / n


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


def as_text(report: dict) -> str:
    """The report for a terminal."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    formula, made = report["formula"], report["compiled"]
    rows = [["GB per device", "compiler", "formula"]]
    names = {
        "llm_bytes": "LLM",
        "state_bytes": "train state",
        "temporary_bytes": "while it runs",
        "total_bytes": "in all",
    }
    formula = formula | {"temporary_bytes": formula["total_bytes"] - formula["llm_bytes"] - formula["state_bytes"]}
    rows += [[text, *(f"{side[name] / 1e9:.2f}" for side in (made, formula))] for name, text in names.items()]
    rows.append(["sent in a step", *(f"{sum(side['sent_bytes'].values()) / 1e9:.3f}" for side in (made, formula))])
    by_kind = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in sorted(made["sent_bytes"].items()))
    return "\n".join(
        [
            f"{report['llm']}, mesh {mesh}, batch {report['batch_size']}, {report['dtype']},"
            f" LLM {'in 8 bits' if report['weights'] == 'int8' else 'in full'}"
            f"{', remat' if report['remat'] else ''}: {formula['flops'] / 1e12:.3g} TFLOP a step",
            "",
            table(rows),
            "",
            f"sent, GB, by the compiled program: {by_kind or 'nothing'}",
        ]
    )


def _shapes(config: Config, dtype: str):
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)


def _in_8_bits(tree: dict) -> dict:
    """The shapes of `int8.quantize_params` of a tree of shapes."""
    held: dict = {}
    for name, leaf in tree.items():
        if isinstance(leaf, dict):
            held[name] = _in_8_bits(leaf)
        elif name in int8.SUMMED:
            scale = list(leaf.shape)
            del scale[int8.SUMMED[name]]
            held |= {name: jax.ShapeDtypeStruct(leaf.shape, jnp.int8), name + int8.SCALE: _shape(*scale)}
        else:
            held[name] = leaf
    return held


def _shape(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _batch(settings: Settings) -> Batch:
    """Numpy zeros of a step's shapes."""
    B, N, Q, Y = settings.rows, settings.demos, settings.query, settings.target
    apart = (None, None) if isinstance(settings.llm, DecoderConfig) else (Q - Y, Y)
    length = np.zeros(B, np.int32)
    return Batch(np.zeros((B, N), np.int32), length, Query(np.zeros((B, Q), np.int32), length, length, *apart), None)


def _local_bytes(tree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    cli.run(scaling)
