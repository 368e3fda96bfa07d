"""The frozen encoder–decoder LLM (T5's family), with the interface of decoder_only.py.

The encoder reads the prefix and then x, the decoder y. The encoder's attention is bidirectional, so its states at a prefix
depend on x: only the prefix itself can be kept from one item to the next. Within an item, x is read once for all
answer options.

Axes: B batch, P prefix, Q query tokens, Y tokens of y, X tokens of x, T any sequence, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mend_jax.data.query import Query
from mend_jax.llm.frozen import FrozenLLM
from mend_jax.models.encoder_decoder import Decoding, begin_decoding, decode, decode_next, encode
from mend_jax.models.families import EncoderDecoderConfig
from mend_jax.prefixes.prefix import Prefix, join


class KeptPrefix(NamedTuple):
    """One prefix, shared by every row that follows it; or a prefix for each row."""

    embeds: jax.Array  # (P,D), or (B,P,D)
    length: jax.Array  # () or (B,) int32: later rows are padding

    @property
    def columns(self) -> int:
        return self.embeds.shape[-2]

    @classmethod
    def join(cls, caches: "Sequence[KeptPrefix]") -> "KeptPrefix":
        """Of single prefixes, of as many columns each, one of them all."""
        return cls(*(jnp.stack(parts) for parts in zip(*caches, strict=True)))

    def take(self, rows) -> "KeptPrefix":
        """Of several prefixes, for each of some rows (B,) int32 the one with this number."""
        return KeptPrefix(self.embeds[rows], self.length[rows])

    def of_rows(self, count: int) -> Prefix:
        """The prefix of each of `count` rows."""
        shape = (count, *self.embeds.shape[-2:])
        return Prefix(jnp.broadcast_to(self.embeds, shape), jnp.broadcast_to(self.length, (count,)))


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderDecoderLLM(FrozenLLM):
    """An encoder–decoder LLM; its `params` are {"embed", "encoder", "decoder"}."""

    config: EncoderDecoderConfig

    @property
    def start_token(self) -> int:
        """The token that the decoder reads first; its state there predicts the first token of y."""
        return self.config.start_token

    def targets(self, query: Query) -> Query:
        """The tokens that the decoder predicts: y alone, moved to the front, (B,Y)."""
        Q = query.tokens.shape[1]
        columns = query.target_start[:, None] + jnp.arange(query.target_columns or Q)[None]
        tokens = jnp.take_along_axis(query.tokens, jnp.minimum(columns, Q - 1), axis=1)
        return Query(tokens, query.length - query.target_start, jnp.zeros_like(query.target_start))

    def states(self, params, prefix: Prefix, query: Query):
        """The decoder's states (B*R,Y,D): state j *predicts* token j of `targets(query)`. Rows beyond a length are garbage.

        R consecutive rows of queries follow each of the B prefixes; the encoder reads the prefix again with every x.
        """
        queries = len(query.tokens) // len(prefix.length)
        prefix = jax.tree.map(lambda a: jnp.repeat(a, queries, 0), prefix)
        x = query.tokens[:, : query.input_columns]
        encoded, length = self._encode(params, prefix, x, query.target_start)
        targets = self.targets(query).tokens
        start = jnp.full((targets.shape[0], 1), self.start_token, targets.dtype)
        return self._decode(params, jnp.concatenate([start, targets[:, :-1]], 1), encoded, length)

    def text_states(self, params, tokens, length):
        """The encoder's states (B,T,D) of texts alone."""
        return encode(self.config, params, self.embed(params, tokens), length, jnp.dtype(self.dtype), self.remat)

    def prefix_cache(self, params, prefix: Prefix) -> KeptPrefix:
        """One prefix (B == 1; P may be 0), which every query after it shares; nothing can be computed from it without x."""
        del params
        return KeptPrefix(prefix.embeds[0], prefix.length[0])

    def prefix_caches(self, params, prefix: Prefix) -> KeptPrefix:
        """Those of each of B prefixes."""
        del params
        return KeptPrefix(prefix.embeds, prefix.length)

    def cached_states(self, params, cache: KeptPrefix, inputs, input_length, tokens, segments):
        """States (B,T,D) of answer options: the encoder reads the prefix and an item's x once for all of them.

        Args:
            inputs: (B,X) int32, x, with lengths (B,).
            tokens: (B,T) int32, the options one after another, each with the start token in front and without its last token.
            segments: (B,T) int32: a token sees only its own segment; each option is one.
        """
        encoded, length = self._encode(params, cache.of_rows(len(inputs)), inputs, input_length)
        return self._decode(params, tokens, encoded, length, segments)

    def prefill(self, params, cache: KeptPrefix, inputs, length, room: int):
        """Reads inputs (B,X) with lengths (B,) after the one prefix, or each after its own: (what `decode_next` needs for answers
        of at most `room` tokens, states (B,D) that predict the first)."""
        rows = len(inputs)
        encoded, length = self._encode(params, cache.of_rows(rows), inputs, length)
        kept = begin_decoding(self.config, params, encoded, length, room + 1, jnp.dtype(self.dtype))  # the start token
        return self.decode_next(params, kept, jnp.full(rows, self.start_token))

    def decode_next(self, params, kept: Decoding, tokens):
        """Reads the next token (B,) of each answer: (`kept` with it, states (B,D) that predict the one after)."""
        embeds = self.embed(params, tokens[:, None])
        states, kept = decode_next(self.config, params, embeds, kept, jnp.dtype(self.dtype))
        return kept, states[:, 0]

    def _encode(self, params, prefix, x, length):
        joined, length = join(prefix, self.embed(params, x), length)
        return encode(self.config, params, joined, length, jnp.dtype(self.dtype), self.remat), length

    def _decode(self, params, tokens, encoded, length, segments=None):
        embeds, dtype = self.embed(params, tokens), jnp.dtype(self.dtype)
        return decode(self.config, params, embeds, encoded, length, segments, dtype, self.remat)
