"""Conv and ConvTranspose."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import ArgumentError
from sortal.nn.conv import canonicalize_padding


def conv(*args: Any, **kwargs: Any) -> nnx.Conv:
    return nnx.Conv(*args, **{"rngs": nnx.Rngs(0), **kwargs})


def normal(*shape: int) -> jax.Array:
    rng = np.random.default_rng(shape)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_circular_convolution_commutes_with_rolling() -> None:
    layer = conv(3, 4, 3, padding="CIRCULAR")
    x = normal(2, 7, 3)
    rolled = layer(jnp.roll(x, 2, axis=1))
    np.testing.assert_allclose(rolled, jnp.roll(layer(x), 2, axis=1), rtol=1e-5)


def test_causal_convolution_does_not_look_ahead() -> None:
    layer = conv(3, 4, 3, padding="CAUSAL", kernel_dilation=2)
    x = normal(2, 7, 3)
    y = layer(x.at[:, 4:].set(0))
    assert y.shape == (2, 7, 4)
    np.testing.assert_array_equal(y[:, :4], layer(x)[:, :4])


def test_reflected_padding_mirrors_the_input() -> None:
    layer = conv(1, 1, 3, padding="REFLECT", kernel_init=nnx.initializers.ones)
    assert layer(jnp.arange(4.0)[:, None])[:, 0].tolist() == [2.0, 3.0, 6.0, 7.0]


def test_masked_weights_neither_act_nor_learn() -> None:
    mask = np.zeros((3, 3, 4), bool)
    mask[0] = True
    layer = conv(3, 4, 3, mask=mask)
    grads = nnx.grad(lambda m: m(normal(2, 7, 3)).sum())(layer)
    gradient = grads["kernel"][...]
    assert jnp.all(gradient[1:] == 0)
    assert jnp.any(gradient[0] != 0)


def test_groups_of_features_do_not_mix() -> None:
    layer = conv(4, 6, 3, feature_group_count=2)
    x = normal(2, 7, 4)
    y = layer(x.at[..., 2:].set(0))
    np.testing.assert_array_equal(y[..., :3], layer(x)[..., :3])


@pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,), (2, 0)])
def test_any_number_of_batch_axes_is_kept(batch: tuple[int, ...]) -> None:
    layer = conv(3, 4, 3)
    transposed = nnx.ConvTranspose(3, 4, 3, rngs=nnx.Rngs(0))
    x = jnp.ones((*batch, 7, 3))
    assert layer(x).shape == (*batch, 7, 4)
    assert transposed(x).shape == (*batch, 7, 4)


def test_a_transposed_kernel_gives_the_transpose_of_the_convolution() -> None:
    """``<conv(x), y> == <x, transposed(y)>`` where they share a kernel."""
    forward = conv(3, 4, 3, 2, padding="VALID", use_bias=False)
    back = nnx.ConvTranspose(
        4,
        3,
        3,
        2,
        padding="VALID",
        use_bias=False,
        transpose_kernel=True,
        rngs=nnx.Rngs(1),
    )
    back.kernel = forward.kernel
    x, y = normal(2, 7, 3), normal(2, 3, 4)
    np.testing.assert_allclose(jnp.vdot(forward(x), y), jnp.vdot(x, back(y)), rtol=1e-5)


def test_a_replaced_convolution_is_passed_only_what_was_asked_for() -> None:
    def convolve(*args: Any, **kwargs: Any) -> Any:
        assert not {"out_sharding", "preferred_element_type"} & set(kwargs)
        return jax.lax.conv_general_dilated(*args, **kwargs)

    layer = conv(3, 4, 3, conv_general_dilated=convolve)
    assert layer(jnp.ones((2, 7, 3))).shape == (2, 7, 4)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        ("SAME", "SAME"),
        (2, [(2, 2), (2, 2)]),
        ([1, (0, 3)], [(1, 1), (0, 3)]),
        (((1, 2), (3, 4)), [(1, 2), (3, 4)]),
        (np.int64(2), [(2, 2), (2, 2)]),
        ((np.int64(1), (np.int32(0), 3)), [(1, 1), (0, 3)]),
    ],
)
def test_padding_is_written_in_many_ways(padding: Any, expected: Any) -> None:
    assert canonicalize_padding(padding, 2) == expected


@pytest.mark.parametrize(
    "padding", [(1,), (1, (2, 3, 4)), 1.0, None, (1, "SAME"), (1, (0.5, 1)), ("1", 2)]
)
def test_malformed_padding_is_refused(padding: Any) -> None:
    message = r"padding must be a name, a number, or a sequence of 2 numbers or pairs"
    with pytest.raises(ArgumentError, match=message):
        conv(3, 4, (3, 3), padding=padding)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": (3, -1)}, r"kernel_size must be made of whole numbers"),
        ({"kernel_size": (3, 0)}, r"kernel_size=\(3, 0\) must be 1 or more"),
        ({"in_features": 2.5}, r"in_features must be made of whole numbers"),
        ({"strides": (1, 1)}, r"strides must be one number or one for each of 1"),
        ({"strides": "2"}, r"strides must be made of whole numbers"),
        ({"kernel_dilation": (0.5,)}, r"kernel_dilation must be made of whole"),
        ({"feature_group_count": 2}, r"feature_group_count=2 must divide in_feat"),
        ({"feature_group_count": 0}, r"feature_group_count=0 must divide in_feat"),
        ({"padding": "same"}, r"'same' is unknown; the names are SAME, SAME_LOWER"),
        ({"padding": "SAME", "input_dilation": 2}, r"not defined for a dilated inp"),
        ({"padding": "CAUSAL", "kernel_size": (3, 3)}, r"'CAUSAL' is for one spat"),
        ({"mask": np.ones((3, 3, 5))}, r"kernel's shape \(3, 3, 4\); found float64"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    options = {"in_features": 3, "out_features": 4, "kernel_size": 3, **arguments}
    with pytest.raises(ArgumentError, match=message):
        conv(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding": "REFLECT"}, r"ConvTranspose: padding 'REFLECT' is unknown"),
        ({"strides": (1, 1)}, r"ConvTranspose: strides must be one number"),
        ({"out_features": None}, r"ConvTranspose: out_features must be made of"),
        ({"mask": np.ones(3)}, r"ConvTranspose: the mask must have the kernel's"),
    ],
)
def test_arguments_that_do_not_fit_a_transposed_convolution_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    options = {"in_features": 3, "out_features": 4, "kernel_size": 3, **arguments}
    with pytest.raises(ArgumentError, match=message):
        nnx.ConvTranspose(**options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose"])
def test_an_input_that_does_not_fit_is_refused(name: str) -> None:
    layer = getattr(nnx, name)(3, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=rf"{name} with kernel_size=\(3, 3\) needs"):
        layer(jnp.ones((7, 3)))
    with pytest.raises(ArgumentError, match=rf"{name} has parameters for 3 features"):
        layer(jnp.ones((2, 7, 7, 4)))


@pytest.mark.parametrize("strides", [1, 2])
def test_an_empty_batch_goes_through_a_circular_transpose(strides) -> None:
    layer = nnx.ConvTranspose(
        3, 4, (3,), strides=strides, padding="CIRCULAR", rngs=nnx.Rngs(0)
    )
    assert layer(jnp.zeros((0, 5, 3))).shape == (0, 5 * strides, 4)


@pytest.mark.parametrize("name", ["strides", "kernel_dilation"])
@pytest.mark.parametrize("layer", [nnx.Conv, nnx.ConvTranspose])
def test_steps_of_zero_are_refused(layer, name) -> None:
    with pytest.raises(ArgumentError, match=rf"{name}=0 .*1 or more"):
        layer(4, 3, 3, **{name: 0}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("padding", ["CIRCULAR", "REFLECT"])
def test_an_empty_axis_has_nothing_to_wrap(padding: str) -> None:
    layer = nnx.Conv(3, 4, 3, padding=padding, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=rf"'{padding}' .* float32\[2,0,3\]"):
        layer(jnp.ones((2, 0, 3)))
