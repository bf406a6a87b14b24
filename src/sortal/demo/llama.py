"""A decoder of the Llama architecture in Sortal modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import sortal as nnx


@dataclass(frozen=True)
class Config:
    """The sizes of a model; the defaults are those of SmolLM2-135M."""

    vocabulary: int = 49_152
    features: int = 576
    hidden: int = 1536
    layers: int = 30
    heads: int = 9
    key_value_heads: int = 3
    rotary_base: float = 100_000.0
    epsilon: float = 1e-5
    context: int = 8192
    """The length of the sequences in training."""
    tied: bool = True
    """Whether logits are inner products with the embedding itself."""


class SwiGLU(nnx.Module):
    """The gated feed-forward network: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, **options: Any):
        inner, outer = config.hidden, config.features
        options = {"use_bias": False, "rngs": rngs, **options}
        self.gate = nnx.Linear(outer, inner, **options)
        self.up = nnx.Linear(outer, inner, **options)
        self.down = nnx.Linear(inner, outer, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and feed-forward network, each with a norm and a residual."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs, **options: Any):
        options = {"rngs": rngs, **options}
        norm = {"epsilon": config.epsilon, **options}
        self.attention_norm = nnx.RMSNorm(config.features, **norm)
        self.attention = nnx.DecoderAttention(
            config.features,
            config.heads,
            num_key_value_heads=config.key_value_heads,
            rotary_base=config.rotary_base,
            **options,
        )
        self.feed_norm = nnx.RMSNorm(config.features, **norm)
        self.feed = SwiGLU(config, **options)

    def __call__(self, x: jax.Array, lengths: Any = None) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), lengths)
        return x + self.feed(self.feed_norm(x))


class Head(nnx.Module):
    """Logits: inner products with a table (vocabulary, features).

    If the table is also the embedding, the model has one Variable at two paths.
    """

    def __init__(self, table: nnx.Param):
        self.table = table

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.dot(x, self.table[...].T)


class Llama(nnx.Module):
    """Blocks between an embedding and a Head."""

    def __init__(
        self, config: Config, *, rngs: nnx.Rngs, param_dtype: DTypeLike = jnp.float32
    ):
        options: Any = {"param_dtype": param_dtype, "rngs": rngs}
        sizes = config.vocabulary, config.features
        self.embed = nnx.Embed(*sizes, **options)
        self.blocks = [Block(config, **options) for _ in range(config.layers)]
        self.norm = nnx.RMSNorm(config.features, epsilon=config.epsilon, **options)
        table = self.embed if config.tied else nnx.Embed(*sizes, **options)
        self.head = Head(table.embedding)
        self.config = config

    def hidden(self, tokens: Any, lengths: Any = None) -> jax.Array:
        """The input of the head, (batch, length, features).

        Tokens (batch, length) follow those in the caches; ``lengths`` (batch,) are
        without padding.
        """
        # All caches are checked before any is written.
        nnx.check_room(self, tokens.shape[1] if lengths is None else lengths)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, lengths)
        return self.norm(x)

    def __call__(self, tokens: Any, lengths: Any = None) -> jax.Array:
        """Logits after each token: (batch, length, vocabulary); see ``hidden``."""
        return self.head(self.hidden(tokens, lengths))

    def next_logits(self, tokens: Any, lengths: Any) -> jax.Array:
        """Logits after the last token of each sequence: (batch, vocabulary)."""
        x = self.hidden(tokens, lengths)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return self.head(jnp.take_along_axis(x, last, axis=1)[:, 0])
