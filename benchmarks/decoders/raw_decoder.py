"""The decoder as functions of dicts of arrays, under ``jax.jit``.

All sequences are at one position, a scalar, and nothing guards the end of the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.decoders import Contender, Params
from sortal.demo.llama import Config


def prepare(config: Config, params: Params, batch: int, length: int) -> Contender:
    """The decoder with these parameters and a cache of this length."""
    weights = _nested(config, params)
    shape = (batch, config.key_value_heads, length, config.features // config.heads)

    def empty() -> Any:
        one = lambda: (jnp.zeros(shape), jnp.zeros(shape))  # noqa: E731
        return [one() for _ in range(config.layers)], jnp.int32(0)

    live = [empty()]
    advance = functools.partial(_advance, config)
    jitted = jax.jit(advance, donate_argnums=1)
    looped = jax.jit(
        functools.partial(_loop, config), donate_argnums=1, static_argnums=3
    )

    def reset() -> None:
        live[0] = empty()

    def step(token: Any) -> jax.Array:
        live[0], token = jitted(weights, live[0], token)
        return token

    def loop(token: Any, steps: int) -> jax.Array:
        live[0], token = looped(weights, live[0], token, steps)
        return token

    def analysis(token: Any) -> Any:
        return jitted.lower(weights, live[0], token).compile().memory_analysis()

    return Contender(reset, step, loop, analysis)


def _nested(config: Config, params: Params) -> dict[str, Any]:
    arrays = {path: jnp.asarray(x) for path, x in params.items()}
    return {
        "embed": arrays["embed", "embedding"],
        "norm": arrays["norm", "scale"],
        "blocks": [
            {path[2:]: x for path, x in arrays.items() if path[:2] == ("blocks", i)}
            for i in range(config.layers)
        ],
    }


def _loop(config: Config, weights: Any, cache: Any, token: Any, steps: int) -> Any:
    def goes_on(state: Any) -> Any:
        return state[2] < steps

    def body(state: Any) -> Any:
        return (*_advance(config, weights, state[0], state[1]), state[2] + 1)

    return jax.lax.while_loop(goes_on, body, (cache, token, 0))[:2]


def _advance(config: Config, weights: Any, cache: Any, token: Any) -> Any:
    held, position = cache
    x = weights["embed"][token]
    turn = _rotation(config, position)
    new = []
    for block, pair in zip(weights["blocks"], held, strict=True):
        h = _norm(x, block["attention_norm", "scale"], config.epsilon)
        mixed, *pair_after = _attention(config, block, h, turn, *pair, position)
        new.append(tuple(pair_after))
        x = x + mixed
        h = _norm(x, block["feed_norm", "scale"], config.epsilon)
        gate, up, down = (block["feed", n, "kernel"] for n in ("gate", "up", "down"))
        x = x + (jax.nn.silu(h @ gate) * (h @ up)) @ down
    logits = _norm(x, weights["norm"], config.epsilon) @ weights["embed"].T
    return (new, position + 1), jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _norm(x: Any, scale: Any, epsilon: float) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon) * scale


def _rotation(config: Config, position: Any) -> Any:
    half = config.features // config.heads // 2
    angles = position * config.rotary_base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def turn(x: Any) -> Any:
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    return turn


def _attention(
    config: Config, block: Any, h: Any, turn: Any, keys: Any, values: Any, position: Any
) -> Any:
    batch, heads = h.shape[0], config.key_value_heads
    width = config.features // config.heads

    def project(name: str, *shape: int) -> Any:
        return (h @ block["attention", name, "kernel"]).reshape(batch, *shape, width)

    query = turn(project("query", 1, config.heads))
    key, value = turn(project("key", heads, 1)), project("value", heads, 1)
    at = (0, 0, position, 0)
    keys = jax.lax.dynamic_update_slice(keys, key, at)
    values = jax.lax.dynamic_update_slice(values, value, at)
    seen = (jnp.arange(keys.shape[2]) <= position)[None, None, None]
    mixed = jax.nn.dot_product_attention(
        query, keys.swapaxes(1, 2), values.swapaxes(1, 2), mask=seen
    )
    return mixed.reshape(batch, -1) @ block["attention", "out", "kernel"], keys, values
