"""The decoder in Flax NNX: its own layers, ``nnx.Cache`` and ``nnx.jit``.

The arithmetic is that of the other two; all sequences are at one position.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.decoders import Contender, Params
from sortal.demo.llama import Config
from sortal.nn.rope import rotary


class Attention(nnx.Module):
    """Grouped-query attention with its keys and values in ``nnx.Cache``."""

    def __init__(self, config: Config, batch: int, length: int, rngs: nnx.Rngs):
        self.heads, self.kv_heads = config.heads, config.key_value_heads
        self.base, self.width = config.rotary_base, config.features // config.heads
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        narrow = self.kv_heads * self.width
        self.query = linear(config.features, config.features)
        self.key = linear(config.features, narrow)
        self.value = linear(config.features, narrow)
        self.out = linear(config.features, config.features)
        shape = (batch, self.kv_heads, length, self.width)
        self.keys = nnx.Cache(jnp.zeros(shape))
        self.values = nnx.Cache(jnp.zeros(shape))
        self.position = nnx.Cache(jnp.int32(0))

    def __call__(self, x: Any) -> Any:
        batch, position = x.shape[0], self.position[...]
        q = self.query(x).reshape(batch, 1, self.heads, self.width)
        k = self.key(x).reshape(batch, 1, self.kv_heads, self.width)
        v = self.value(x).reshape(batch, 1, self.kv_heads, self.width)
        q = rotary(q, position[None], base=self.base)
        k = rotary(k, position[None], base=self.base)
        at = (0, 0, position, 0)
        update = jax.lax.dynamic_update_slice
        self.keys[...] = keys = update(self.keys[...], k.swapaxes(1, 2), at)
        self.values[...] = values = update(self.values[...], v.swapaxes(1, 2), at)
        self.position[...] = position + 1
        seen = (jnp.arange(keys.shape[2]) <= position)[None, None, None]
        mixed = jax.nn.dot_product_attention(
            q, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask=seen
        )
        return self.out(mixed.reshape(batch, -1))


class Feed(nnx.Module):
    """The gated feed-forward network."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate = linear(config.features, config.hidden)
        self.up = linear(config.features, config.hidden)
        self.down = linear(config.hidden, config.features)

    def __call__(self, x: Any) -> Any:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: Config, batch: int, length: int, rngs: nnx.Rngs):
        norm = functools.partial(nnx.RMSNorm, epsilon=config.epsilon, rngs=rngs)
        self.attention_norm = norm(config.features)
        self.attention = Attention(config, batch, length, rngs)
        self.feed_norm = norm(config.features)
        self.feed = Feed(config, rngs)

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed(self.feed_norm(x))


class Model(nnx.Module):
    """The whole; logits are inner products with the embedding."""

    def __init__(self, config: Config, batch: int, length: int, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocabulary, config.features, rngs=rngs)
        blocks = [Block(config, batch, length, rngs) for _ in range(config.layers)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.RMSNorm(config.features, epsilon=config.epsilon, rngs=rngs)

    def __call__(self, token: Any) -> Any:
        x = self.embed(token)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def _step(model: Model, token: Any) -> Any:
    return jnp.argmax(model(token), axis=-1).astype(jnp.int32)


def prepare(config: Config, params: Params, batch: int, length: int) -> Contender:
    """The decoder with these parameters and a cache of this length."""
    model = Model(config, batch, length, nnx.Rngs(0))
    for path, array in params.items():
        functools.reduce(_item, path, model)[...] = jnp.asarray(array)
    step = nnx.jit(_step, donate_argnums=0)

    def reset() -> None:
        for _, cache in nnx.to_flat_state(nnx.state(model, nnx.Cache)):
            cache[...] = jnp.zeros_like(cache[...])

    def analysis(token: Any) -> Any:
        return step.lower(model, token).compile().memory_analysis()

    return Contender(reset, functools.partial(step, model), None, analysis)


def _item(node: Any, key: Any) -> Any:
    return node[key] if isinstance(key, int) else getattr(node, key)
