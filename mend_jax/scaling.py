"""What the real-size train step needs on a mesh: bytes per device, and what crosses between devices. Nothing is run.

    python -m mend_jax.scaling opt-6.7b --fsdp=8
    python -m mend_jax.scaling gpt2-large --data=8 --out=gpt2-large.json
    python -m mend_jax.scaling opt-6.7b --fsdp=8 --topology=v5e:2x4       # by the TPU's compiler: pip install libtpu
    python -m mend_jax.scaling all                 # by formula alone: every model on 1, 8, 64 and 512 devices

The step of finetuning, one sequence for each device that splits the batch, is compiled from the shapes of its arguments:
no weight is ever made. It is compiled for simulated CPU devices, or with `--topology` for a TPU slice, which need not be
there either. Bytes per device are the compiler's; what crosses is counted in the program for the CPUs, each loop as often as it
runs; beside both stand the formulas (scaling_formulas.py) that docs/scaling.md goes on with to other numbers of devices.
"""

import math
import os
import time
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from mend_jax import cli, measure, parallel, sharding
from mend_jax.benchmark_jax import Settings, check_window, step_config
from mend_jax.collectives import sent
from mend_jax.data.batches import Batch
from mend_jax.errors import UserError
from mend_jax.files import write_report
from mend_jax.llm import LLM
from mend_jax.llm_encoder_decoder import EncoderDecoderLLM
from mend_jax.models import int8
from mend_jax.models.families import Config, DecoderConfig, EncoderDecoderConfig
from mend_jax.models.folders import init_params
from mend_jax.prefix import Distiller, resolve_projection
from mend_jax.query import Query
from mend_jax.scaling_formulas import by_formula, formula_table
from mend_jax.scaling_models import MODELS, workload
from mend_jax.step import init_state, make_loss_fn, make_optimizer, make_train_step


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
    topology="",
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
        topology: a TPU slice as libtpu names it, such as "v5e:2x4"; empty: simulated CPU devices.
        out: a JSON file for the figures.
    """
    fields = {"dtype": dtype, "weights": weights, "remat": remat}
    fields |= {"demos": demos, "vectors": vectors, "query": query, "target": target}
    if llm == "all":
        print(formula_table(**fields))
        return 0
    sizes = {sharding.DATA: data, sharding.FSDP: fsdp, sharding.TENSOR: tensor}
    _check(llm, sizes, batch_size, fields)
    devices = _devices(topology, math.prod(sizes.values()))
    settings = workload(llm, batch_size or data * fsdp, **fields)
    report = {"llm": llm, "mesh": sizes, "batch_size": settings.rows, "topology": topology} | fields
    report |= {
        "machine": measure.machine(),
        "formula": by_formula(settings, sizes),
        "compiled": compiled(settings, sizes, devices),
    }
    print(as_text(report))
    if out:
        write_report(out, report)
    return 0


def _check(llm: str, sizes: dict[str, int], rows: int, fields: dict) -> None:
    """Raises UserError where the mesh or the batch cannot be, or a sequence is longer than a model's window."""
    given = {**sizes, **{name: fields[name] for name in ("demos", "vectors", "query", "target")}}
    for name, value in given.items():
        if value < 1:
            raise UserError(f"--{name}={value} is too small: give 1 or more.")
    over = sizes[sharding.DATA] * sizes[sharding.FSDP]
    if rows < 0 or rows % over:
        raise UserError(f"--batch_size={rows} does not divide over data x fsdp = {over} devices: use a multiple of {over}.")
    if fields["target"] >= fields["query"]:
        raise UserError(f"--target={fields['target']} is the end of the query: give fewer tokens than --query={fields['query']}.")
    settings = workload(llm, rows or over, **fields)
    longest = max(settings.demos, settings.vectors) + settings.query
    check_window("LLM", longest, settings.llm)
    check_window("distiller", settings.demos + settings.vectors, settings.distiller)


def _devices(topology: str, count: int) -> Sequence | None:
    """The devices of a TPU slice; None: simulated ones, as many, unless the environment says how many there are."""
    jax.config.update("jax_platforms", "cpu")
    if not topology:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)
        return None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU whose surroundings could be asked,
    jax.config.update("jax_enable_compilation_cache", False)  # and none to read a kept program for
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology={topology} has no compiler here ({str(error).splitlines()[0]}): pip install libtpu, and name a TPU"
            " slice such as v5e:2x4."
        ) from None
    if len(devices) != count:
        raise UserError(
            f"--topology={topology} has {len(devices)} devices, the mesh {count}: give as many to its axes."
        )
    return devices


def compiled(settings: Settings, sizes: dict[str, int], devices: Sequence | None = None) -> dict:
    """The compiler's figures of the step on a mesh: bytes per device, and bytes that each device sends, by operation.

    `devices` are those to compile for; None: all that JAX has. What is sent is read of CPUs' programs alone.
    """
    for what, config in (("the LLM", settings.llm), ("the distiller's backbone", settings.distiller)):
        sharding.check_heads(config, sizes[sharding.TENSOR], what)
    layout = parallel.make_layout("mesh", sizes, devices)
    step, state, llm_params, batch = abstract_step(settings, layout)
    began = time.monotonic()
    lowered = layout.compile_step(step, state).lower(state, llm_params, batch)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"The step does not fit such a device: {str(error).splitlines()[0]}") from None
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "llm_bytes": _local_bytes(llm_params),
        "state_bytes": _local_bytes(state),
        "temporary_bytes": memory.temp_size_in_bytes,
        "total_bytes": kept + memory.temp_size_in_bytes,
        "sent_bytes": sent(program.as_text()) if devices is None else None,
        "compile_seconds": time.monotonic() - began,
    }


def abstract_step(settings: Settings, layout: parallel.Layout):
    """(train step, state, LLM params, batch): the last three as `jax.ShapeDtypeStruct`s that lie as `layout` says."""
    llm_params = _shapes(settings.llm, settings.dtype)
    llm_params = _in_8_bits(llm_params) if settings.weights == "int8" else llm_params
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
    moved = [side["sent_bytes"] for side in (made, formula)]
    rows.append(["sent in a step", *("" if of is None else f"{sum(of.values()) / 1e9:.2f}" for of in moved)])
    by_kind = ", ".join(f"{kind} {size / 1e9:.3f}" for kind, size in sorted((moved[0] or {}).items()))
    return "\n".join(
        [
            f"{report['llm']}, mesh {mesh}, batch {report['batch_size']}, {report['dtype']},"
            f" LLM {'in 8 bits' if report['weights'] == 'int8' else 'in full'}"
            f"{', remat' if report['remat'] else ''}, for {report['topology'] or 'CPUs'}: {formula['flops'] / 1e12:.3g} TFLOP a step",
            "",
            measure.table(rows),
            "",
            *([f"sent, GB, by the compiled program: {by_kind or 'nothing'}"] if moved[0] is not None else []),
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
