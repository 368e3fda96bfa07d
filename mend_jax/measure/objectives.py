"""The cost of each objective of L_distill relative to the forward KL: seconds and peak memory of value and gradient.

Axes: B batch, Q query tokens, D width, V vocabulary.
"""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from mend_jax.cli.progress import Progress
from mend_jax.cli.text import columns
from mend_jax.data.query import Query
from mend_jax.losses import Weights
from mend_jax.measure import machine as measure
from mend_jax.objectives import OBJECTIVES, STATE_OBJECTIVES, Objective
from mend_jax.step import query_losses

BY_JAX = "forward_kl, by JAX"  # the same values, without the hand-written gradient


class ObjectiveSide:
    """One objective on random states, in its own process."""

    def __init__(self, name: str, rows: int, query: int, width: int, words: int, chunk: int):
        random = np.random.default_rng(0)
        states, teacher = (jnp.asarray(random.standard_normal((rows, query, width), np.float32)) for _ in range(2))
        head = jnp.asarray(random.standard_normal((words, width), np.float32) * np.float32(0.05))
        tokens = jnp.asarray(random.integers(0, words, (rows, query), np.int32))
        targets = Query(tokens, jnp.full(rows, query), jnp.zeros(rows, jnp.int32))
        objective = Objective("forward_kl", by_jax=True) if name == BY_JAX else Objective(name)
        weights = Weights(1.0, 0.0, 0.0)

        def loss(states):
            return query_losses(states, teacher, head, targets, weights, chunk, objective=objective)[0]

        self.states, self.step = states, jax.jit(jax.value_and_grad(loss)).lower(states).compile()

    def run(self) -> float:
        """Seconds of computing the value and the gradient of the states."""
        start = time.perf_counter()
        jax.block_until_ready(self.step(self.states))
        return time.perf_counter() - start

    def peak(self) -> int:
        """Peak bytes of the compiled program's temporary arrays, without its arguments and results."""
        return self.step.memory_analysis().temp_size_in_bytes


def measure_objectives(rows: int, query: int, width: int, words: int, chunk: int, repeats: int) -> tuple[dict, str]:
    """(report, its text): each objective in its own process, taking turns, `repeats` times."""
    names = ["forward_kl", BY_JAX, *(n for n in (*OBJECTIVES, *STATE_OBJECTIVES) if n != "forward_kl")]
    sizes = rows, query, width, words, chunk
    report = {
        "machine": measure.machine(),
        "sizes": dict(zip(("rows", "query", "width", "words", "chunk"), sizes, strict=True)),
    }
    seconds, peaks = {name: [] for name in names}, {}
    with contextlib.ExitStack() as stack, Progress(len(names) * (1 + repeats), "run") as bar:
        sides = {name: stack.enter_context(measure.Worker(ObjectiveSide, name, *sizes)) for name in names}
        for name, side in sides.items():
            side.call("run")
            peaks[name] = side.call("peak")
            bar.update()
        for _ in range(repeats):
            for name, side in sides.items():
                seconds[name].append(side.call("run"))
                bar.update()
    report["objectives"] = {
        name: {"seconds": measure.median(seconds[name]), "peak_bytes": peaks[name]} for name in names
    }
    return report, _text(report)


def _text(report: dict) -> str:
    base = report["objectives"]["forward_kl"]
    rows = [["objective", "s", "of forward_kl", "peak MB", "of forward_kl"]]
    for name, of in report["objectives"].items():
        seconds, peak = of["seconds"], of["peak_bytes"]
        cells = [
            f"{seconds:.3f}",
            f"{seconds / base['seconds']:.2f}",
            f"{peak / 1e6:.0f}",
            f"{peak / base['peak_bytes']:.2f}",
        ]
        rows.append([name, *cells])
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, jax {machine['versions']['jax']}, {machine['date']}"
    shape = "B={rows}, Q={query}, D={width}, V={words}, chunks of {chunk} tokens; value and gradient".format(
        **report["sizes"]
    )
    return "\n".join([shape, where, "", columns(rows)])
