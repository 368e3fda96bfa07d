"""Both stages in bfloat16: what is computed in it, what stays float32, and that the losses are those of float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_files import make_world, tiny_config

from mend_jax import train
from mend_jax.models import stacks
from mend_jax.models.int8 import times
from mend_jax.run import build, checkpoint, reporting
from mend_jax.run.loop import Loop
from mend_jax.step import make_loss_fn

pytestmark = pytest.mark.slow

STAGES = ("pretrain", "finetune")
DTYPES = ("bfloat16", "float32")
STEPS = 3


@pytest.fixture(scope="module")
def trained(tiny_llm, tiny_backbone, tmp_path_factory):
    """{stage: the run after its end}, in bfloat16; finetuning starts from pretraining."""
    folder, runs, run = tmp_path_factory.mktemp("bfloat16"), {}, Loop.run
    make_world(folder / "world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "run", lambda loop: (runs.update({loop.config.stage: loop}), run(loop))[1])
        for stage in STAGES:
            c = tiny_config(folder / "world", stage, demo_buckets=(60,), query_buckets=(16,))
            c.llm.path, c.prefix.backbone = str(tiny_llm), str(tiny_backbone)
            c.llm.dtype = c.prefix.dtype = "bfloat16"
            c.prefix.start_from = str(folder / "pretrain") if stage == "finetune" else ""
            c.optimizer.learning_rate, c.train.batch_size = 1e-3, jax.device_count()
            c.train.steps = c.train.eval_every = STEPS
            c.train.log_every = 1
            assert train.train(c, folder / stage) == 0
    return runs


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


def equations(jaxpr):
    """All equations, those of loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def read_by(primitive, jaxpr):
    """The dtypes that all uses of a primitive read."""
    return {str(v.aval.dtype) for e in equations(jaxpr) if e.primitive.name == primitive for v in e.invars}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_trained_and_kept_is_float32(stage, trained):
    run = trained[stage]
    assert dtypes(run.frozen) == {"bfloat16"}
    assert dtypes(run.state.params) == dtypes(run.state.opt_state) == {"float32"}
    assert dtypes(checkpoint.read_step(run.workdir, STEPS)) == {"float32"}


def loss_of(run, dtype):
    """(the loss function, its arguments) of a run as if its config had asked for `dtype`; the params it trained, its first batch."""
    c = run.config.copy_and_resolve_references().unlock()
    c.llm.dtype = c.prefix.dtype = dtype
    llm = build.load(c)
    model = dataclasses.replace(build.build(c, llm, begins=False), params=run.layout.fetch(run.state.params))
    return make_loss_fn(c, llm, model), (model.params, llm.params, run.batches[0].replace(ids=None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_computed_in_bfloat16(stage, dtype, trained):
    loss, args = loss_of(trained[stage], dtype)
    found = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), *args)
    assert dtypes(found) == {"float32"}
    forward = jax.make_jaxpr(loss)(*args).jaxpr
    assert read_by("dot_general", forward) == {dtype}
    for name in ("exp", "log", "rsqrt"):  # softmax, losses, norms
        assert read_by(name, forward) <= {"float32"}


@pytest.mark.parametrize("stage", STAGES)
def test_the_losses_are_near_those_of_float32(stage, trained):
    rounded, exact = ((jax.jit(loss)(*args)[1]) for loss, args in (loss_of(trained[stage], d) for d in DTYPES))
    for name in {"pretrain": ("kd",), "finetune": ("kd", "pred")}[stage]:
        assert float(rounded[name]) == pytest.approx(float(exact[name]), rel=0.01)
        assert float(rounded[name]) != float(exact[name])
    lines = [line for line in reporting.read_lines(trained[stage].workdir / "metrics.jsonl") if "loss" in line]
    assert len(lines) == STEPS and all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("stage", STAGES)
def test_stacks_over_the_layers_are_no_bfloat16_on_a_cpu(stage, trained, monkeypatch):
    """XLA would convert a whole stack for each layer that is read or written (models/stacks.py); the numbers are the same."""
    loss, args = loss_of(trained[stage], "bfloat16")

    def stacked(jaxpr):
        scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
        written = [v for e in scans for v in e.outvars[e.params["num_carry"] :]]
        read = [v for e in scans for v in e.invars[e.params["num_consts"] + e.params["num_carry"] :]]
        return {str(v.aval.dtype) for v in written}, {str(v.aval.dtype) for v in read if v.aval.ndim > 2}

    gradient = jax.value_and_grad(loss, has_aux=True)
    written, read = stacked(jax.make_jaxpr(gradient)(*args).jaxpr)
    assert "bfloat16" not in written | read and "uint16" in read
    (value, _), found = jax.jit(gradient)(*args)
    monkeypatch.setattr(stacks, "_converts", lambda dtype: False)
    loss, args = loss_of(trained[stage], "bfloat16")
    written, read = stacked(jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(*args).jaxpr)
    assert "bfloat16" in written & read
    (wanted, _), plain = jax.jit(jax.value_and_grad(loss, has_aux=True))(*args)
    assert float(value) == pytest.approx(float(wanted), rel=1e-4)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    "shape", [(3, 5, 6, 4), (3, 5, 4, 6), (2, 70, 64, 96), (1, 1, 8, 8), (0, 5, 6, 4), (2, 0, 4, 6)]
)
def test_a_kernels_gradient_is_the_sum_over_all_rows(shape):
    """Of bfloat16's numbers, rounded once: whichever of the two is turned, and for no rows at all."""
    (B, T, m, n), keys = shape, jax.random.split(jax.random.key(0), 3)
    x, g = (
        jax.random.normal(key, (B, T, width)).astype(jnp.bfloat16) for key, width in zip(keys, (m, n), strict=False)
    )
    kernel = jax.random.normal(keys[2], (m, n)).astype(jnp.bfloat16)

    @jax.jit
    def gradients(x, kernel, g):
        return jax.vjp(times, x, kernel)[1](g)

    x_grad, kernel_grad = gradients(x, kernel, g)
    wide = [a.astype(jnp.float32) for a in (x, kernel, g)]
    assert x_grad.dtype == kernel_grad.dtype == jnp.bfloat16 and kernel_grad.shape == (m, n)
    np.testing.assert_allclose(kernel_grad, jnp.einsum("btm,btn->mn", wide[0], wide[2]), rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(x_grad, wide[2] @ wide[1].T, rtol=2**-8, atol=1e-5)
