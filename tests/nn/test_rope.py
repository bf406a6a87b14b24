"""Rotary embeddings."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import ArgumentError


def test_a_pair_of_features_is_a_complex_number_turned_by_its_position() -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    pairs = x[..., :4] + 1j * x[..., 4:]
    speeds = 100.0 ** (-2 * np.arange(4) / 8)
    turned = pairs * np.exp(1j * positions[..., None, None] * speeds)
    found = nnx.rotary(jnp.asarray(x, jnp.float32), positions, base=100.0)
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_inner_products_depend_on_the_distance_only() -> None:
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def product(at, other):
        return float((nnx.rotary(q, [at]) * nnx.rotary(k, [other])).sum())

    assert product(3, 1) == pytest.approx(product(1002, 1000), rel=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), rel=1e-2)


def test_positions_for_all_sequences_and_for_each_mean_the_same() -> None:
    x = jnp.ones((2, 3, 1, 4), jnp.bfloat16)
    one, each = nnx.rotary(x, jnp.arange(3)), nnx.rotary(x, [[0, 1, 2]] * 2)
    np.testing.assert_array_equal(one, each)
    assert one.dtype == jnp.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"even number of features.*\[1,1,1,3\]"):
        nnx.rotary(jnp.ones((1, 1, 1, 3)), [0])
    with pytest.raises(ArgumentError, match=r"each of 3 tokens.*of 2 seq.*int32\[2\]"):
        nnx.rotary(jnp.ones((2, 3, 1, 4)), jnp.arange(2))
    with pytest.raises(ArgumentError, match=r"floating point.*found int32\[1,2,1,4\]"):
        nnx.rotary(jnp.ones((1, 2, 1, 4), int), [0, 1])
