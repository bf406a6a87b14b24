"""Embed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import ArgumentError


def test_an_index_picks_its_row_and_none_beyond_the_table_exists() -> None:
    layer = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
    y = layer(jnp.array([0, -1, 4]))
    table = layer.embedding[...]
    np.testing.assert_array_equal(y[:2], table[jnp.array([0, 3])])
    assert jnp.all(jnp.isnan(y[2]))


def test_a_table_of_one_vector_gives_it_for_every_index() -> None:
    layer = nnx.Embed(1, 3, rngs=nnx.Rngs(0))
    y = layer(jnp.array([[0, 7]]))
    np.testing.assert_array_equal(y, jnp.stack([layer.embedding[...][0]] * 2)[None])


def test_indices_may_be_plain_numbers() -> None:
    layer = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer([2, 1]), layer(np.array([2, 1])))


def test_attending_is_a_product_with_the_table() -> None:
    layer = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
    x = jnp.eye(3)
    np.testing.assert_allclose(layer.attend(x), layer.embedding[...].T, rtol=1e-6)


def test_rows_that_were_not_looked_up_have_no_gradient() -> None:
    layer = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda m: m(jnp.array([1, 1])).sum())(layer)
    assert grads["embedding"][...][:, 0].tolist() == [0.0, 2.0, 0.0, 0.0]


def test_looking_up_by_other_than_integers_is_refused() -> None:
    layer = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"by integers; found float32\[2\]"):
        layer(jnp.ones(2))
    with pytest.raises(ArgumentError, match=r"found bool\[2\]"):
        layer(jnp.ones(2, bool))


def test_attending_with_another_number_of_features_is_refused() -> None:
    layer = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"Embed has parameters for 3 features"):
        layer.attend(jnp.ones((2, 4)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32"])
def test_indices_of_any_integer_dtype_give_the_same_vectors(dtype) -> None:
    table = nnx.Embed(300, 2, rngs=nnx.Rngs(0))
    indices = np.array([0, 100, 127])
    if not dtype.startswith("u"):
        indices = np.array([0, 100, 127, -1, -128])
    expected = np.asarray(table.embedding.value)[indices]
    np.testing.assert_array_equal(table(indices.astype(dtype)), expected)
    small = nnx.Embed(100, 2, rngs=nnx.Rngs(0))
    assert bool(jnp.isnan(small(np.array([100, 127], dtype))).all())


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_an_index_beyond_32_bits_is_nan_too(dtype: str) -> None:
    """JAX takes its last 32 bits, which may be those of a vector that is there."""
    layer = nnx.Embed(5, 3, rngs=nnx.Rngs(0))
    indices = np.array([2**40 + 1, 1], dtype)
    for wide in (True, False):
        with jax.enable_x64(wide):
            y = layer(jnp.asarray(indices) if wide else indices)
        assert jnp.isnan(y[0]).all()
        assert (y[1] == layer.embedding[1]).all()
