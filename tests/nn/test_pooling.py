"""Pooling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import sortal as nnx
from sortal.errors import ArgumentError

X = jnp.arange(6.0).reshape(1, 6, 1)


def test_windows_are_as_far_apart_as_the_strides() -> None:
    assert nnx.max_pool(X, (2,)).ravel().tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert nnx.max_pool(X, (2,), (3,)).ravel().tolist() == [1.0, 4.0]
    assert nnx.min_pool(X, (2,), (3,)).ravel().tolist() == [0.0, 3.0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_initial_value_has_the_dtype_of_the_input(dtype: Any) -> None:
    with jax.enable_x64(True):
        found = nnx.pool(X.astype(dtype), 1.0, lax.mul, (2,), (2,), "VALID")
    assert found.dtype == dtype
    assert found.ravel().tolist() == [0.0, 6.0, 20.0]


def test_sizes_may_be_lists() -> None:
    assert nnx.avg_pool(X, [2], [2], [[0, 0]]).ravel().tolist() == [0.5, 2.5, 4.5]


def test_padding_counts_in_a_mean_unless_told_not_to() -> None:
    ones = jnp.ones((1, 3, 1))
    padded = nnx.avg_pool(ones, (2,), (2,), ((1, 0),))
    assert padded.ravel().tolist() == [0.5, 1.0]
    there = nnx.avg_pool(ones, (2,), (2,), ((1, 0),), count_include_pad=False)
    assert there.ravel().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "dtype", "mean"),
    [
        (1, "bfloat16", "bfloat16"),  # 256 + 1 is 256 in bfloat16
        (3000, "float16", "float16"),  # the sum is beyond float16
        (200, "uint8", "float32"),
        (True, "bool", "float32"),
    ],
)
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_a_mean_is_not_that_of_a_sum_that_its_dtype_cannot_hold(
    value: Any, dtype: str, mean: str, count_include_pad: bool
) -> None:
    x = jnp.full((1, 32, 32, 1), value, dtype)
    y = nnx.avg_pool(x, (32, 32), count_include_pad=count_include_pad)
    assert y.item() == value
    assert y.dtype == (mean if count_include_pad else "float32")


def test_padding_never_wins_a_maximum() -> None:
    assert nnx.max_pool(-X - 1, (3,), (6,), ((2, 0),)).ravel().tolist() == [-1.0]


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("padding", ["SAME", [(1, 1), (0, 0)]], ids=["name", "pairs"])
def test_any_number_of_batch_axes_is_kept(batch: tuple[int, ...], padding: Any) -> None:
    x = jnp.ones((*batch, 4, 3, 2))
    assert nnx.max_pool(x, (3, 1), None, padding).shape == (*batch, 4, 3, 2)
    mean = nnx.avg_pool(x, (3, 1), None, padding, count_include_pad=False)
    assert jnp.all(mean == 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_shape": 2}, r"window_shape has one entry .* found 2"),
        ({"window_shape": (2, 2, 2)}, r"needs an input of at least 4 axes"),
        ({"strides": 0}, r"strides has one entry for each spatial axis"),
        ({"strides": ()}, r"strides must have 1 entries"),
        ({"strides": 2}, r"strides has one entry for each spatial axis"),
        ({"strides": (1, 1)}, r"strides must have 1 entries"),
        ({"padding": 1}, r"padding must be 'SAME', 'VALID' or 1 pairs .* found 1"),
        ({"padding": (1,)}, r"padding must be"),
        ({"padding": ((0.5, 1),)}, r"padding must be"),
        ({"padding": ((1, 2, 3),)}, r"padding must be"),
        ({"padding": ((1, 1), (1, 1))}, r"padding must be"),
        ({"inputs": None}, r"pooling was called with None"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        nnx.max_pool(**{"inputs": X, "window_shape": (2,), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2,), (0,)), r"strides.*1 or more.*\(0,\)"),
        (((0,),), r"window_shape.*1 or more.*\(0,\)"),
        (((2,), None, "CIRCULAR"), r"padding must be 'SAME'.*'CIRCULAR'"),
    ],
)
def test_steps_of_zero_and_unknown_paddings_are_refused(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        nnx.avg_pool(jnp.ones((2, 6, 4)), *arguments)
