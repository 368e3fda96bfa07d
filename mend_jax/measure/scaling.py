"""What the train step of a config needs on a mesh: bytes per device, and bytes sent between devices. Nothing is run.

    python -m mend_jax.scaling gpt2_large --data=8
    python -m mend_jax.scaling t5_large --stage=pretrain --data=8 --out=t5_large.json
    python -m mend_jax.scaling opt_6_7b --fsdp=8 --topology=v5p:2x2x2    # by the TPU's compiler: pip install libtpu
    python -m mend_jax.scaling all              # by formula alone: the table's configs on 1, 8, 64 and 512 devices

The step of MEND's pretraining or finetuning with configs/NAME.py, on the largest batch that it can get (workloads.py), is
compiled from the shapes of its arguments: no weights are created. It is compiled for simulated CPU devices or, with
`--topology`, for a TPU slice, which need not exist either. Bytes per device are the compiler's; bytes sent are counted in
the CPU program, each loop as often as it runs. Beside both are the results of the formulas (formulas.py) that
docs/scaling.md uses for other numbers of devices.
"""

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from mend_jax.cli.errors import UserError
from mend_jax.cli.progress import Progress
from mend_jax.cli.settings import CHOICES
from mend_jax.cli.text import columns
from mend_jax.data.batches import Batch
from mend_jax.data.query import Query
from mend_jax.llm.decoder_only import LLM
from mend_jax.llm.encoder_decoder import EncoderDecoderLLM
from mend_jax.measure import machine as measure
from mend_jax.measure.collectives import sent
from mend_jax.measure.formulas import by_formula, formula_table, tera
from mend_jax.measure.workloads import NAMES, STAGES, Workload, load_workload
from mend_jax.models import int8
from mend_jax.models.families import Config
from mend_jax.models.folders import init_params
from mend_jax.prefixes.kind import FROZEN
from mend_jax.run import layout as parallel
from mend_jax.run import sharding
from mend_jax.run.files import write_report
from mend_jax.step import init_state, make_loss_fn, make_optimizer, make_train_step


def scaling(
    name: str,
    /,
    stage: Literal[*STAGES] = "finetune",
    data=1,
    fsdp=1,
    tensor=1,
    batch_size=0,
    dtype: Literal["", *CHOICES["llm.dtype"]] = "",
    weights: Literal["", *CHOICES["llm.weights"]] = "",
    remat=False,
    llm="",
    topology="",
    out="",
) -> int:
    """Prints what one train step of a config needs on each device of a mesh.

    Args:
        name: the config, configs/NAME.py, or NAME:VARIANT; "all": the table by formula, for both stages.
        stage: MEND's pretraining or finetuning.
        data, fsdp, tensor: devices along each axis of the mesh.
        batch_size: sequences per step; 0: each device that splits the batch gets an eighth of the config's batch.
        dtype: of both models' arithmetic; empty: the config's.
        weights: "int8" holds the LLM in 8 bits, "full" in its dtype; empty: as in the config.
        remat: both models recompute their layers, even if the config does not.
        llm: the LLM instead of the config's, and its distiller's backbone: a published name, or a folder; empty: the config's.
        topology: a TPU slice as libtpu names it, such as "v5p:2x2x2"; empty: simulated CPU devices.
        out: a JSON file for the figures.
    """
    fields = {"dtype": dtype, "weights": weights, "remat": remat, "llm": llm}
    if name == "all":
        print(formula_table(**fields))
        return 0
    if name.partition(":")[0] not in NAMES:
        raise UserError(
            f'"{name}" is not understood as the first word: give one of all, {", ".join(NAMES)}, or NAME:VARIANT.'
        )
    sizes = {sharding.DATA: data, sharding.FSDP: fsdp, sharding.TENSOR: tensor}
    for axis, size in sizes.items():
        if size < 1:
            raise UserError(f"--{axis}={size} is too small: give 1 or more.")
    work = load_workload(name, stage, data * fsdp, batch_size, **fields)
    devices = _devices(topology, math.prod(sizes.values()))
    report = {"config": name, "stage": stage, "mesh": sizes, "topology": topology} | described(work)
    with Progress(1, "step", what=f"compiling {name}, {stage}", leave=False):
        report |= {
            "machine": measure.machine(),
            "formula": by_formula(work, sizes),
            "compiled": compiled(work, sizes, devices),
        }
    print(as_text(report))
    if out:
        write_report(out, report)
    return 0


def described(work: Workload) -> dict:
    """A description of a step, for a report."""
    c = work.config
    return {
        "llm": c.llm.path,
        "backbone": c.prefix.backbone,
        "dtype": c.llm.dtype,
        "weights": c.llm.weights,
        "remat": {"llm": c.llm.remat, "prefix": c.prefix.remat},
        "batch_size": work.rows,
        "demos": work.demos,
        "chunks": [work.parts, work.part],
        "vectors": work.vectors,
        "queries": work.queries,
        "query": work.query,
        "inputs": work.inputs,
    }


def _devices(topology: str, count: int) -> Sequence | None:
    """The devices of a TPU slice; None for `count` simulated CPU devices, unless the environment sets another number."""
    jax.config.update("jax_platforms", "cpu")
    if not topology:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)
        return None
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU whose metadata could be queried,
    jax.config.update("jax_enable_compilation_cache", False)  # and none to load a cached program on
    hosts = {"chips_per_host_bounds": [1, 1, 1]} if count == 1 else {}  # else a slice has whole machines
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **hosts).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology={topology} has no compiler here ({str(error).splitlines()[0]}): pip install libtpu, and name a TPU"
            " slice such as v5e:2x4."
        ) from None
    if len(devices) != count:
        raise UserError(
            f"--topology={topology} has {len(devices)} devices, but the mesh has {count}: give its axes as many."
        )
    return devices


def compiled(work: Workload, sizes: dict[str, int], devices: Sequence | None = None) -> dict:
    """The compiler's figures for the step on a mesh: bytes per device, and bytes that each device sends, by operation.

    `devices` are those to compile for; None: all that JAX has. Bytes sent are read from CPU programs only.
    """
    for what, config in (("the LLM", work.llm), ("the distiller's backbone", work.backbone)):
        sharding.check_heads(config, sizes[sharding.TENSOR], what)
    layout = parallel.make_layout("mesh", sizes, devices)
    step, state, llm_params, batch = abstract_step(work, layout)
    began = time.monotonic()
    lowered = layout.compile_step(step, state).lower(state, llm_params, batch)
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"The step does not fit on such a device: {str(error).splitlines()[0]}") from None
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


def abstract_step(work: Workload, layout: parallel.Layout):
    """(train step, state, LLM params, batch); the last three are `jax.ShapeDtypeStruct`s with the shardings of `layout`."""
    c = work.config
    llm_params = _shapes(work.llm, c.llm.dtype)
    llm_params = _in_8_bits(llm_params) if c.llm.weights == "int8" else llm_params
    kind = EncoderDecoderLLM if work.separate_targets else LLM
    llm = kind(work.llm, llm_params, None, c.llm.path, c.llm.dtype, "xla", c.llm.remat)
    optimizer = make_optimizer(c)
    step = make_train_step(c, make_loss_fn(c, llm, work.model, layout.mesh), optimizer, layout.average)
    trained, own = jax.eval_shape(lambda p: dataclasses.replace(work.model, params=p).split_params(), work.model.params)
    llm_params |= {FROZEN: own} if own else {}
    state = jax.eval_shape(lambda p: init_state(p, optimizer), trained)
    rows = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec(sharding.ROWS))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), _batch(work))
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
    remat = [model for model, on in report["remat"].items() if on]
    facts = [f"{report['config']}, {report['stage']}, mesh {mesh}, batch {report['batch_size']}", report["dtype"]]
    facts += ["LLM in 8 bits" if report["weights"] == "int8" else "LLM in full", *(f"{model}.remat" for model in remat)]
    facts += [f"for {report['topology'] or 'CPUs'}: {tera(formula['flops'])} TFLOP a step"]
    return "\n".join(
        [
            ", ".join(facts),
            "",
            columns(rows),
            "",
            *([f"sent, GB, by the compiled program: {by_kind or 'nothing'}"] if moved[0] is not None else []),
        ]
    )


def _shapes(config: Config, dtype: str):
    shapes = jax.eval_shape(lambda: init_params(config, 0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)


def _in_8_bits(tree: dict) -> dict:
    """The shapes that `int8.quantize_params` gives for a tree of shapes."""
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


def _batch(work: Workload) -> Batch:
    """A batch of NumPy zeros with a step's shapes."""
    B, length = work.rows, np.zeros(work.rows, np.int32)
    shape = (B,) if work.queries == 1 else (B, work.queries)
    of_query = np.zeros(shape, np.int32)
    query = Query(np.zeros((*shape, work.query), np.int32), of_query, of_query, work.inputs, work.targets)
    batch = Batch(np.zeros((B, work.parts * work.part), np.int32), length, query, None)
    if work.model.reads_chunks:  # the teacher reads the context whole
        return batch.replace(teacher_demos=np.zeros((B, work.demos), np.int32), teacher_demos_length=length)
    return batch


def _local_bytes(tree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
