"""cached_partial and jit_partial; against Flax in test_nnx_names."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from sortal import nnx


def add(v: Any, x: Any) -> Any:
    v[...] += x
    return v


def test_what_the_function_changes_is_changed_in_what_was_given_beforehand() -> None:
    v = nnx.Variable(jnp.array(0))
    for once in (nnx.cached_partial(nnx.jit(add), v), nnx.jit_partial(add, v)):
        assert once(1) is v
    assert int(v.value) == 2


def test_options_of_jit_are_handed_on() -> None:
    v = nnx.Variable(jnp.array(0))
    kinds = []
    nnx.jit_partial(lambda v, x: kinds.append(type(x)), v, static_argnums=1)(3)
    assert kinds == [int]
