"""Cells of recurrent networks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import ArgumentError
from sortal.nn.recurrent import modified_orthogonal

CELLS = ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"]


def cell(name: str, **options: Any) -> Any:
    return getattr(nnx, name)(3, 4, **options, rngs=nnx.Rngs(0))


def test_both_cells_of_long_memory_are_one_function_of_their_kernels() -> None:
    slow, fast = cell("LSTMCell"), cell("OptimizedLSTMCell")
    inputs = [slow.ii, slow.if_, slow.ig, slow.io]
    carries = [slow.hi, slow.hf, slow.hg, slow.ho]
    for dense, parts in ((fast.dense_i, inputs), (fast.dense_h, carries)):
        dense.kernel[...] = jnp.concatenate([p.kernel[...] for p in parts], axis=1)
    x = jnp.ones((2, 3))
    carry = slow.initialize_carry(x.shape, nnx.Rngs(0), nnx.initializers.ones)
    for ours, theirs in zip(
        jax.tree.leaves(slow(carry, x)), jax.tree.leaves(fast(carry, x)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", CELLS)
def test_parameters_may_be_in_half_precision(name: str, dtype: Any) -> None:
    made = cell(name, param_dtype=dtype)
    dtypes = {leaf.dtype for _, leaf in nnx.state(made, nnx.Param).flat_state()}
    assert dtypes == {jnp.dtype(dtype)}


def test_recurrent_kernels_are_orthogonal() -> None:
    kernel = modified_orthogonal(jax.random.key(0), (4, 4))
    np.testing.assert_allclose(kernel @ kernel.T, jnp.eye(4), atol=1e-5)
    half = cell("SimpleCell", param_dtype=jnp.bfloat16).dense_h.kernel[...]
    np.testing.assert_allclose(half @ half.T, jnp.eye(4), atol=0.05)


@pytest.mark.parametrize("name", CELLS)
def test_a_new_carry_has_the_batch_of_the_input(name: str) -> None:
    made = cell(name)
    carry = made.initialize_carry((5, 2, 3), nnx.Rngs(0))
    parts = carry if isinstance(carry, tuple) else (carry,)
    assert len(parts) == (2 if "LSTM" in name else 1)
    assert all(part.shape == (5, 2, 4) and not part.any() for part in parts)
    assert made.num_feature_axes == 1


def test_carries_are_made_by_the_call_the_cell_or_zeros_in_this_order() -> None:
    ones, normal = nnx.initializers.ones, nnx.initializers.normal()
    own = cell("GRUCell", carry_init=ones)
    assert own.initialize_carry((3,), nnx.Rngs(0)).tolist() == [1.0] * 4
    drawn = own.initialize_carry((3,), nnx.Rngs(carry=1), normal)
    assert len(set(drawn.tolist())) == 4


def test_a_cell_may_keep_a_stream_for_its_carries() -> None:
    keeping = cell("SimpleCell", keep_rngs=True)
    assert keeping.initialize_carry((2, 3)).shape == (2, 4)
    assert int(keeping.rngs.count[...]) == 1


@pytest.mark.parametrize("rngs", [None, 3])
def test_a_carry_needs_something_to_draw_from(rngs: Any) -> None:
    message = (
        rf"SimpleCell\.initialize_carry needs an Rngs or a stream; found rngs={rngs}"
    )
    with pytest.raises(ArgumentError, match=message):
        cell("SimpleCell").initialize_carry((3,), rngs)


def test_sizes_and_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"GRUCell: hidden_features must be made"):
        nnx.GRUCell(3, -4, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"parameters for 3 features"):
        cell("GRUCell")(jnp.zeros(4), jnp.ones(5))


@pytest.mark.parametrize("name", CELLS)
def test_a_carry_of_another_batch_is_refused(name: str) -> None:
    layer = cell(name)
    carry = layer.initialize_carry((3, 3), nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"carry .*float32\[3,4\].* batch of") as e:
        layer(carry, jnp.ones((2, 3)))
    assert f"{name}: " in str(e.value)
    assert "float32[2,3]. Write initialize_carry(inputs.shape, rngs)" in str(e.value)
    one = layer.initialize_carry((1, 3), nnx.Rngs(0))
    assert layer(one, jnp.ones((2, 3)))[1].shape == (2, 4)


@pytest.mark.parametrize("name", ["LSTMCell", "OptimizedLSTMCell"])
def test_rows_of_one_array_are_no_carry_of_two(name: str) -> None:
    """An input in the place of the carry has as many rows as its batch."""
    layer = getattr(nnx, name)(4, 4, rngs=nnx.Rngs(0))
    carry, x = (jnp.zeros((2, 4)), jnp.ones((2, 4))), jnp.ones((2, 4))
    for wrong in (x, (*carry, x)):
        with pytest.raises(ArgumentError, match=r"carry, given first, is a pair"):
            layer(wrong, x)
    np.testing.assert_array_equal(layer(list(carry), x)[1], layer(carry, x)[1])


def test_a_cell_of_ones_own_is_told_what_it_lacks() -> None:
    class Empty(nnx.RNNCellBase):
        pass

    for use, message in (
        (lambda c: c.initialize_carry((3,)), r"Empty does not define initialize_carry"),
        (lambda c: c(0, 0), r"Empty does not define __call__\(carry, inputs\)"),
        (lambda c: c.num_feature_axes, r"Empty does not define num_feature_axes"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            use(Empty())
