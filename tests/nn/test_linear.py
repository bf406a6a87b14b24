"""Linear, LinearGeneral and Einsum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import ArgumentError

ONES = nnx.initializers.ones


def arange(*shape: int) -> jax.Array:
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


def test_linear_is_a_product_and_a_sum() -> None:
    layer = nnx.Linear(3, 2, bias_init=ONES, rngs=nnx.Rngs(0))
    x = arange(4, 3)
    np.testing.assert_allclose(layer(x), x @ layer.kernel + 1, rtol=1e-6)


def test_linear_without_bias_has_none() -> None:
    layer = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    assert layer.bias is None
    assert list(nnx.state(layer).paths()) == [("kernel",)]


def test_a_replaced_dot_general_is_passed_only_what_was_asked_for() -> None:
    """One that does not know ``out_sharding`` works, as long as nobody asks for it."""
    seen = []

    def dot_general(x: Any, w: Any, dims: Any, precision: Any = None) -> Any:
        seen.append((dims, precision))
        return jax.lax.dot_general(x, w, dims, precision=precision)

    layer = nnx.Linear(
        3, 2, dot_general=dot_general, precision="highest", rngs=nnx.Rngs(0)
    )
    layer(jnp.ones((4, 3)))
    assert seen == [((((1,), (0,)), ((), ())), "highest")]


def test_the_kernel_may_be_exchanged_for_one_of_another_size() -> None:
    """What counts at a call is the kernel, so that shards and surgery work."""
    layer = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.ones((5, 2)))
    assert layer(jnp.ones(5)).tolist() == [5.0, 5.0]


def test_linear_works_under_jit_and_grad() -> None:
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(layer: Any, x: Any) -> Any:
        return nnx.grad(lambda m: m(x).sum())(layer)

    grads = step(layer, jnp.ones((4, 3)))
    assert grads["bias"][...].tolist() == [4.0, 4.0]


def test_a_general_map_over_all_axes_is_a_tensor_product() -> None:
    layer = nnx.LinearGeneral(
        (2, 3), (4, 5), axis=(0, 1), use_bias=False, rngs=nnx.Rngs(0)
    )
    x = arange(2, 3)
    expected = jnp.tensordot(x, layer.kernel[...], 2)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)


def test_each_index_of_a_batch_axis_has_a_map_of_its_own() -> None:
    layer = nnx.LinearGeneral(3, 2, batch_axis={0: 4}, rngs=nnx.Rngs(0))
    x = arange(4, 5, 3)
    alone = [x[i] @ layer.kernel[...][i] for i in range(4)]
    np.testing.assert_allclose(layer(x), jnp.stack(alone), rtol=1e-5)


def test_a_general_initialiser_sees_features_as_two_axes() -> None:
    """Fan-in and fan-out are those of the whole map."""
    seen = []

    def init(key: Any, shape: Any, dtype: Any) -> Any:
        seen.append(shape)
        return jnp.zeros(shape, dtype)

    nnx.LinearGeneral(
        (2, 3),
        (4, 5),
        axis=(-2, -1),
        batch_axis={0: 6},
        kernel_init=init,
        bias_init=init,
        rngs=nnx.Rngs(0),
    )
    assert seen == [(36, 20), (120,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": (2, 3)}, r"in_features=\(2, 3\) and axis=\(-1,\) must have"),
        ({"batch_axis": {1: 2}}, r"leading axes 0, 1, \.\.\. .* found \[1\]"),
        ({"out_features": (4, -1)}, r"out_features must be made of whole numbers"),
    ],
)
def test_general_sizes_that_do_not_fit_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    options = {"in_features": 2, "out_features": 3, **arguments}
    with pytest.raises(ArgumentError, match=message):
        nnx.LinearGeneral(**options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(2, 4), (3,), (4, 2, 4), (3, 2, 4)])
def test_a_general_input_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    layer = nnx.LinearGeneral((2, 3), 4, axis=(1, 2), rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"LinearGeneral has parameters for"):
        layer(jnp.ones(shape))


def test_an_equation_of_the_call_replaces_that_of_the_layer() -> None:
    layer = nnx.Einsum("ab,bc->ac", (3, 4), (4,), bias_init=ONES, rngs=nnx.Rngs(0))
    x = arange(2, 3)
    np.testing.assert_array_equal(layer(x, "ab, bc -> ca"), layer(x).T)


def test_an_ellipsis_of_the_kernel_is_matched_from_its_end() -> None:
    layer = nnx.Einsum(
        "...a,...ab->...b", (5, 2, 3), (5, 3), bias_init=ONES, rngs=nnx.Rngs(0)
    )
    x = arange(4, 5, 2)
    expected = jnp.einsum("nka,kab->nkb", x, layer.kernel[...]) + 1
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5)


@pytest.mark.parametrize("equation", ["ab,bc", "ab->ac", "a,b,c->a", "", None])
def test_an_equation_without_two_operands_and_a_result_is_refused(
    equation: Any,
) -> None:
    with pytest.raises(ArgumentError, match=r"equation of two operands"):
        nnx.Einsum(equation, (3, 4), rngs=nnx.Rngs(0))
    layer = nnx.Einsum("ab,bc->ac", (3, 4), rngs=nnx.Rngs(0))
    if equation is not None:
        with pytest.raises(ArgumentError, match=r"such as 'nta,ab->ntb'"):
            layer(jnp.ones((2, 3)), equation)


def test_a_bias_that_does_not_fit_the_equation_is_refused() -> None:
    layer = nnx.Einsum("ab,bc->ac", (3, 4), (3,), rngs=nnx.Rngs(0))
    message = r"keeps axes of sizes \(4,\); .* found float32\[3\]"
    with pytest.raises(ArgumentError, match=message):
        layer(jnp.ones((2, 3)))


def test_a_bias_of_the_kept_axes_in_another_order_is_refused() -> None:
    x, rngs = jnp.ones((2, 5, 2)), nnx.Rngs(0)
    layer = nnx.Einsum("nta,hab->ntbh", (8, 2, 4), (8, 4), rngs=rngs)
    with pytest.raises(ArgumentError, match=r"keeps axes of sizes \(4, 8\).*\[8,4\]"):
        layer(x)
    right = nnx.Einsum("nta,hab->ntbh", (8, 2, 4), (4, 8), rngs=rngs)
    assert right(x).shape == (2, 5, 4, 8)


@pytest.mark.parametrize(
    "options",
    [{"axis": (1, 1)}, {"axis": (1, -2)}, {"axis": (0, 1), "batch_axis": {0: 6}}],
)
def test_an_axis_that_is_contracted_twice_is_refused(options) -> None:
    layer = nnx.LinearGeneral((6, 6), 3, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="each axis once"):
        layer(jnp.ones((6, 6, 4)))
