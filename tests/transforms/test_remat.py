"""remat: numbers of plain JAX, what is recomputed, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal
from models import Linear, Net
from sortal import Param
from sortal.errors import ArgumentError


def test_remat_has_the_numbers_of_plain_jax_and_writes_back() -> None:
    net, x = Net(), jnp.arange(6.0).reshape(2, 3)
    twin = Net()
    loss = lambda m, x: (sortal.remat(Net.__call__)(m, x) ** 2).sum()  # noqa: E731
    plain = lambda m, x: (m(x) ** 2).sum()  # noqa: E731
    value, grads = sortal.value_and_grad(loss)(net, x)
    graphdef, params, rest = sortal.split(twin, Param, ...)
    expected, by_jax = jax.value_and_grad(
        lambda p: plain(sortal.merge(graphdef, p, rest), x)
    )(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(by_jax), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    twin(x)
    np.testing.assert_allclose(net.norm.mean.value, twin.norm.mean.value, rtol=1e-6)
    assert int(net.calls.value) == 1


def test_remat_recomputes_where_the_policy_says_so() -> None:
    net, x = Linear(3, 3), jnp.ones((1, 3))

    def sines(policy: Any) -> int:
        f = sortal.remat(lambda m, x: jnp.sin(jnp.sin(m(x))), policy=policy)
        grad = sortal.jit(sortal.grad(lambda m: f(m, x).sum()))
        return str(grad.trace(net).jaxpr).count("sin ")

    nothing, everything = jax.checkpoint_policies.nothing_saveable, None
    saved = sines(jax.checkpoint_policies.everything_saveable)
    assert sines(nothing) > saved
    assert sines(everything) > saved


def test_remat_static_arguments_and_decorator_forms() -> None:
    @sortal.remat(static_argnums=2)
    def f(m: Any, x: Any, n: int) -> Any:
        assert isinstance(n, int)
        return m(x) * n

    net, x = Linear(2, 2), jnp.ones((1, 2))
    np.testing.assert_allclose(f(net, x, 3), 3 * net(x), rtol=1e-6)
    assert f.__name__ == "f"
    bound = sortal.remat(net.__call__)
    np.testing.assert_allclose(bound(x), net(x), rtol=1e-6)


def test_remat_refuses_options_that_it_does_not_have() -> None:
    with pytest.raises(ArgumentError, match="remat has no option concrete, prevnt_cse"):
        sortal.remat(lambda m: m, prevnt_cse=True, concrete=False)
