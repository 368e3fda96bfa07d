"""The distiller's network (paper, section 3.1).

A decoder, or the encoder of an encoder–decoder, reads the demonstrations and then L placeholder embeddings; its states
there, projected to the LLM's width, are the vectors; with `residual` they are added to embeddings of demonstration tokens.

Axes: B batch, N demonstration tokens, L vectors, D width of the backbone.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from mend_jax.models.decoder import Decoder
from mend_jax.models.encoder_decoder import encode
from mend_jax.models.families import Config, EncoderDecoderConfig
from mend_jax.models.folders import init_params
from mend_jax.models.int8 import rows
from mend_jax.prefixes.prefix import Prefix, join, last_embeds, take_rows, vectors_after
from mend_jax.prefixes.start import PROJECTION_START


class DistillerModule(nn.Module):
    """The distiller as a function of its parameters: {"backbone": a model's tree without a head, "placeholders": (L,D)} and,
    if there is a projection, {"projection": {"kernel": (D,llm_width), "bias": (llm_width,)}}."""

    config: Config  # the backbone's
    length: int  # L
    llm_width: int
    projection: str  # "tanh", "linear" or "identity"
    dtype: str = "float32"  # of the arithmetic
    attention: str = "xla"
    remat: bool = False
    residual: bool = False  # the states are added to the embeddings of the last L demonstration tokens

    @nn.compact
    def __call__(self, demos, length, vectors=None):
        """(B,N) int32 tokens with lengths (B,) int32 -> vectors (B,L,llm_width) in `dtype`.

        `vectors` (B,) int32: how many of a row are to be read; the first so many are what a network of that length makes.
        """
        # The backbone's tree is one param, in the form that models/ reads; only `init` makes a random one.
        given = self.has_variable("params", "backbone")
        backbone = self.get_variable("params", "backbone") if given else self.param("backbone", self._random_backbone)
        own = self.param("placeholders", nn.initializers.normal(0.02), (self.length, self.config.width))
        context = Prefix(rows(backbone["embed"]["tokens"], demos, self.dtype, self.config.embed_scale), length)
        placeholders = jnp.broadcast_to(own, (demos.shape[0], *own.shape))
        states = self._states_at(placeholders, backbone, context, vectors)
        if self.projection != "identity":
            states = _Projection(self.llm_width, self.dtype, name="projection")(states)
        if self.residual:
            return states + last_embeds(context, self.length, vectors)
        return jnp.tanh(states) if self.projection == "tanh" else states

    def _random_backbone(self, key):
        return init_params(self.config, key)

    def _states_at(self, placeholders, backbone, context: Prefix, vectors):
        """The backbone's states at the placeholders (B,L,D), which it reads after the context."""
        dtype = jnp.dtype(self.dtype)
        if isinstance(self.config, EncoderDecoderConfig):
            L = placeholders.shape[1]
            seen = (
                jnp.full_like(context.length, L) if vectors is None else vectors
            )  # an encoder would see later ones too
            joined, length = join(context, placeholders, seen)
            return take_rows(encode(self.config, backbone, joined, length, dtype, self.remat), context.length, L)
        model = Decoder(self.config, dtype, self.attention, self.remat)
        return vectors_after(model, backbone, context, placeholders)

    def shapes(self):
        """The parameter tree as `jax.ShapeDtypeStruct`s, without allocating anything."""
        return jax.tree.map(lambda leaf: leaf, _shapes(self))


@functools.lru_cache(maxsize=64)  # tables of costs ask for few networks, but often
def _shapes(module: DistillerModule):
    tokens, length = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), tokens, length)["params"]


class _Projection(nn.Module):
    """Projects states to the LLM's width."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", PROJECTION_START["kernel"], (x.shape[-1], self.width))
        bias = self.param("bias", PROJECTION_START["bias"], (self.width,))
        return x @ kernel.astype(self.dtype) + bias.astype(self.dtype)


def make_vectors(module: DistillerModule, params, demos, length, vectors=None) -> Prefix:
    """`Distiller.apply` as a function of its module."""
    made = module.apply({"params": params}, demos, length, vectors)
    return Prefix(made, jnp.full((demos.shape[0],), made.shape[1], jnp.int32) if vectors is None else vectors)
