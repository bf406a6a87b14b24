"""print of Variables and States: small values, large ones by shape, statistics."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from sortal import nnx
from sortal.errors import ArgumentError


def numbers(text: str) -> list[float]:
    """The numbers between square brackets, without those of shapes."""
    values = re.sub(r"\w+\[[\d,]*\]", "", text)
    inside = re.findall(r"\[[^\w()]*?([-\d. e\n\],\[]+)\]", values)
    return [float(x) for part in inside for x in re.findall(r"-?\d+\.?\d*", part)]


@pytest.mark.parametrize("of", ["param", "state", "grads"])
def test_small_values_are_printed_as_by_flax(of: str) -> None:
    def program(lib: Any) -> str:
        param = lib.Param(jnp.arange(6.0).reshape(2, 3))
        layer = lib.Linear(2, 2, kernel_init=lib.initializers.ones, rngs=lib.Rngs(0))
        printed = {
            "param": lambda: param,
            "state": lambda: lib.state([param, lib.Param(jnp.array([7, 8]))]),
            "grads": lambda: lib.grad(lambda m: (m.kernel[...] ** 2).sum())(layer),
        }
        return str(printed[of]())

    assert numbers(program(nnx)) == numbers(program(flax_nnx)) != []


def test_what_is_printed() -> None:
    assert str(nnx.Param(jnp.arange(3.0))) == "Param(float32[3]: [0. 1. 2.])"
    assert str(nnx.Param(jnp.array(2))) == "Param(int32[]: 2)"
    assert str(nnx.Param(3, tag="a")) == "Param(3, tag='a')"
    model = {"a": nnx.Param(jnp.eye(2)), "b": jnp.ones(2), "c": nnx.Cache(0)}
    assert str(nnx.state(model)).splitlines() == [
        "State(",
        "  a: Param(float32[2,2]: [[1. 0.]",
        "                          [0. 1.]])",
        "  b: float32[2]: [1. 1.]",
        "  c: Cache(0)",
        ")",
    ]
    assert str(nnx.State({})) == "State()"
    assert repr(nnx.Param(jnp.arange(3.0))) == "Param(float32[3])"


def test_what_is_large_or_has_no_numbers_is_printed_by_shape() -> None:
    assert str(nnx.Param(jnp.zeros((30, 30)))) == "Param(float32[30,30])"
    assert str(nnx.eval_shape(lambda: nnx.Param(jnp.zeros(2)))).count("[") <= 1
    assert str(nnx.Param(jax.random.key(0))) == "Param(key<fry>[])"
    seen: list[str] = []
    nnx.jit(lambda v: seen.append(str(v)))(nnx.Param(jnp.ones(2)))
    assert seen == ["Param(float32[2])"]
    gone = jnp.ones(2)
    gone.delete()
    assert str(nnx.Param(gone)) == "Param(float32[2])"


def test_statistics_are_shown_on_request() -> None:
    x = np.linspace(-1, 3, 900, dtype=np.float32).reshape(30, 30)
    param = nnx.Param(jnp.asarray(x))
    assert f"{param:stats}" == "Param(float32[30,30], mean 1, -1 to 3)"
    shown = f"{nnx.state({'w': param}):stats}"
    assert shown == "State(\n  w: Param(float32[30,30], mean 1, -1 to 3)\n)"
    assert f"{nnx.Param(jnp.array(2.5)):.1f}" == "2.5"
    assert f"{param}" == str(param)
    with pytest.raises(ArgumentError, match=r"'' or 'stats'; found 'x'"):
        format(nnx.State({}), "x")
