"""The decoder of ``sortal generate``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import sortal
from benchmarks.decoders import Contender, Params
from sortal.demo.llama import Config
from sortal.demo.smollm2 import build


def prepare(config: Config, params: Params, batch: int, length: int) -> Contender:
    """The decoder with these parameters and a cache of this length."""
    model = build(config, params.items())
    sortal.init_cache(model, batch, length)
    going = jnp.zeros((batch,), bool)
    choice = sortal.decoding.Choice()

    def step(token: Any) -> jax.Array:
        return sortal.decoding.decode(model, None, token, going, choice, top_k=None)[0]

    def loop(token: Any, steps: int) -> jax.Array:
        tokens, _ = sortal.decoding.decode_all(
            model, None, token, going, going, choice, steps=steps + 1, top_k=None
        )
        return tokens[:, -1]

    def analysis(token: Any) -> Any:
        lowered = sortal.decoding.decode.lower(
            model, None, token, going, choice, top_k=None
        )
        return lowered.compile().memory_analysis()

    return Contender(lambda: sortal.reset_cache(model), step, loop, analysis)
