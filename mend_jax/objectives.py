"""L_distill's objectives, which compare the student's predictions with the teacher's: each is one function and one dict entry.

`OBJECTIVES` work on logits: f(student (C,V), teacher (C,V), targets (C,), numbers) -> loss per token (C,). losses.py passes
them one chunk of tokens at a time and differentiates inside the chunk, so that no (B,Q,V) array exists for any of them.
`STATE_OBJECTIVES` work on the LLM's last hidden states at the query: f(student (B,Q,D), teacher (B,Q,D), counted (B,Q) bool,
numbers) -> loss per token (B,Q). The caller stops the teacher's gradient. All are float32, and in nats where they have a unit.

Axes: C tokens of a chunk, V vocabulary, B batch, Q query tokens, D width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Numbers(NamedTuple):
    """The numbers that objectives take from config.loss."""

    temperature: float = 1.0  # divides the logits; gradients are not multiplied by its square
    mix: float = 0.5  # share of the reverse KL, of the teacher in the mixture, ...: see each objective
    top_k: int = 64


class Objective(NamedTuple):
    """One entry of the dicts by name, with its numbers; hashable."""

    name: str = "forward_kl"
    numbers: Numbers = Numbers()
    by_jax: bool = False  # differentiated by JAX even where losses.py has its gradient by hand: for comparing the two

    @classmethod
    def of(cls, loss: Any) -> "Objective":
        """The objective of a config's section `loss`."""
        return cls(loss.objective, Numbers(loss.temperature, loss.mix, loss.top_k))

    @property
    def is_kl_of_teacher(self) -> bool:
        """Whether its value is KL(teacher || student) in nats, which `recovered` is made of."""
        return self.name == "forward_kl" and self.numbers.temperature == 1

    @property
    def on_states(self) -> bool:
        return self.name in STATE_OBJECTIVES


def forward_kl(student, teacher, targets, numbers: Numbers):
    """KL(teacher || student), the paper's objective (Eq. 2 and 3)."""
    p, q = _log_probs(student, teacher, numbers)
    return _kl(q, p)


def reverse_kl(student, teacher, targets, numbers: Numbers):
    """KL(student || teacher) (Gu et al., 2024, MiniLLM)."""
    p, q = _log_probs(student, teacher, numbers)
    return _kl(p, q)


def mixed_kl(student, teacher, targets, numbers: Numbers):
    """(1 - mix) KL(teacher || student) + mix KL(student || teacher)."""
    p, q = _log_probs(student, teacher, numbers)
    return (1 - numbers.mix) * _kl(q, p) + numbers.mix * _kl(p, q)


def jensen_shannon(student, teacher, targets, numbers: Numbers):
    """mix KL(teacher || m) + (1 - mix) KL(student || m), m = mix teacher + (1 - mix) student (Agarwal et al., 2024, GKD)."""
    p, q = _log_probs(student, teacher, numbers)
    m = _mixture(q, p, numbers.mix)
    return numbers.mix * _kl(q, m) + (1 - numbers.mix) * _kl(p, m)


def skewed_kl(student, teacher, targets, numbers: Numbers):
    """KL(teacher || mix teacher + (1 - mix) student) (Ko et al., 2024, DistiLLM)."""
    p, q = _log_probs(student, teacher, numbers)
    return _kl(q, _mixture(q, p, numbers.mix))


def top_k_kl(student, teacher, targets, numbers: Numbers):
    """KL(teacher || student) over the teacher's k most likely tokens, both distributions renormalised over them."""
    teacher, words = jax.lax.top_k(teacher, min(numbers.top_k, teacher.shape[-1]))
    return forward_kl(jnp.take_along_axis(student, words, -1), teacher, targets, numbers)


OBJECTIVES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "mixed_kl": mixed_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "top_k_kl": top_k_kl,
}


def hidden_mse(student, teacher, counted, numbers: Numbers):
    """The mean over D of the squared difference of the states."""
    return ((student - teacher) ** 2).mean(-1)


def hidden_cosine(student, teacher, counted, numbers: Numbers):
    """1 - the cosine of the states."""
    return 1 - (_unit(student) * _unit(teacher)).sum(-1)


def info_nce(student, teacher, counted, numbers: Numbers):
    """How well a query's state tells its own teacher from those of the batch's other queries (van den Oord et al., 2018).

    A query's state is the mean over its tokens; cosines are divided by the temperature. The contrast is within the rows that a
    device computes at one time: each device, and each accumulation step, contrasts only its own rows.
    """
    weights = counted.astype(student.dtype)[..., None]
    pooled = (_unit((states * weights).sum(1)) for states in (student, teacher))
    student, teacher = pooled
    scores = jax.nn.log_softmax(student @ teacher.T / numbers.temperature, axis=-1)
    return jnp.broadcast_to(-jnp.diagonal(scores)[:, None], counted.shape)


STATE_OBJECTIVES = {"hidden_mse": hidden_mse, "hidden_cosine": hidden_cosine, "info_nce": info_nce}


def _log_probs(student, teacher, numbers: Numbers):
    """Log-probabilities (C,V) of the student and of the teacher."""
    return tuple(jax.nn.log_softmax(logits / numbers.temperature, axis=-1) for logits in (student, teacher))


def _kl(p, q):
    """KL(p || q) of log-probabilities (C,V)."""
    return (jnp.exp(p) * (p - q)).sum(-1)


def _mixture(q, p, share: float):
    """The log of share * q + (1 - share) * p, from log-probabilities q and p."""
    return jnp.logaddexp(q + jnp.log(share), p + jnp.log1p(-share))


def _unit(states):
    """States (...,D) scaled to length 1; 0 stays 0, with a finite gradient."""
    square = (states**2).sum(-1, keepdims=True)
    return states * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
