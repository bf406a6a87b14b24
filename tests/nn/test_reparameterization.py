"""WeightNorm and SpectralNorm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from sortal import nnx
from sortal.errors import ArgumentError, FilterError

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def linear(features: int = 5) -> nnx.Linear:
    return nnx.Linear(3, features, rngs=nnx.Rngs(0))


def weight_norm(layer: Any = None, **options: Any) -> nnx.WeightNorm:
    return nnx.WeightNorm(layer or linear(), **options, rngs=nnx.Rngs(1))


def spectral_norm(layer: Any = None, **options: Any) -> nnx.SpectralNorm:
    return nnx.SpectralNorm(layer or linear(), **options, rngs=nnx.Rngs(1))


def test_each_column_has_the_length_that_its_scale_says() -> None:
    layer = weight_norm()
    layer.scales["kernel",][...] = jnp.arange(1.0, 6.0)
    layer(X)
    lengths = jnp.linalg.norm(layer.layer_instance.kernel[...], axis=0)
    np.testing.assert_allclose(lengths, jnp.arange(1.0, 6.0), rtol=1e-5)
    assert float(layer.layer_instance.bias[...].max()) == 0


@pytest.mark.parametrize(("axes", "over"), [(None, (0, 1)), (0, 1), ((-2,), 1)])
def test_which_axes_keep_lengths_of_their_own_is_a_choice(axes: Any, over: Any) -> None:
    layer = weight_norm(feature_axes=axes, use_scale=False)
    layer(X)
    squares = (layer.layer_instance.kernel[...] ** 2).sum(over)
    np.testing.assert_allclose(squares, jnp.ones_like(squares), rtol=1e-5)
    assert layer.scales is None


def test_a_gradient_along_a_weight_is_zero_and_scales_learn() -> None:
    layer = weight_norm()
    kernel = layer.layer_instance.kernel[...]
    grads = nnx.grad(lambda m: (m(X) ** 2).sum())(layer)
    along = (grads["layer_instance"]["kernel"][...] * kernel).sum(0)
    np.testing.assert_allclose(along, jnp.zeros(5), atol=1e-4)
    assert jnp.all(grads["scales"]["kernel",][...] != 0)


def test_scales_are_drawn_without_moving_the_stream() -> None:
    """So that layers made afterwards begin as they would without them."""
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(2, 3, rngs=rngs)])
    count = int(rngs.default.count[...])
    normal = nnx.initializers.normal()
    layer = nnx.WeightNorm(model[0], scale_init=normal, rngs=rngs)
    other = nnx.WeightNorm(model[1], scale_init=normal, rngs=nnx.Rngs(1))
    assert int(rngs.default.count[...]) == count
    scales = [x.scales["kernel",][...].tolist() for x in (layer, other)]
    assert scales[0] != scales[1]
    assert len(set(scales[0])) == 3


def test_the_greatest_singular_value_becomes_one() -> None:
    layer = spectral_norm(n_steps=60)
    layer(X)
    kernel = layer.layer_instance.kernel[...]
    np.testing.assert_allclose(np.linalg.norm(kernel, ord=2), 1.0, rtol=1e-4)
    sigma = np.linalg.norm(linear().kernel[...], ord=2)
    np.testing.assert_allclose(
        layer.batch_stats["kernel", "sigma"][...], sigma, rtol=1e-4
    )


def test_statistics_are_kept_in_training_only() -> None:
    layer = spectral_norm()
    before = layer.batch_stats["kernel", "u"][...]
    layer.eval()
    layer(X)
    assert layer.batch_stats["kernel", "u"][...] is before
    layer(X, update_stats=True)
    assert jnp.any(layer.batch_stats["kernel", "u"][...] != before)
    layer.train()
    assert layer.use_running_average is False


def test_no_steps_leave_the_weights_alone() -> None:
    layer = spectral_norm(n_steps=0)
    np.testing.assert_array_equal(layer(X), linear()(X))
    assert layer.batch_stats == {}


def test_what_is_no_matrix_is_refused_where_asked_for() -> None:
    conv = nnx.Conv(3, 4, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"not matrices: kernel: float32\[3,3,4\]"):
        spectral_norm(conv, error_on_non_matrix=True)
    assert spectral_norm(conv).batch_stats["kernel", "u"].shape == (1, 4)


@pytest.mark.parametrize("make", [weight_norm, spectral_norm])
def test_a_weight_that_came_later_is_named(make: Any) -> None:
    layer = make(nnx.Sequential(linear()))
    layer.layer_instance.kernel_too = nnx.Param(jnp.ones((2, 2)))
    layer.layer_instance.layers.append(nnx.Linear(5, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ArgumentError, match=r"its layer now has (kernel_too|layers\.1)"
    ):
        layer(X)


def test_an_axis_that_a_weight_does_not_have_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"feature_axes=2 names an axis that the w"):
        weight_norm(feature_axes=2)


@pytest.mark.parametrize("name", ["WeightNorm", "SpectralNorm"])
def test_rngs_of_another_type_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"{name} needs an Rngs to initialise"):
        getattr(nnx, name)(linear(), rngs=None)


def test_a_flag_that_nobody_set_is_asked_for() -> None:
    layer = spectral_norm()
    layer.use_running_average = None
    with pytest.raises(ArgumentError, match=r"does not know its use_running_average"):
        layer(X)


@pytest.mark.parametrize("make", [weight_norm, spectral_norm])
def test_the_weights_of_a_layer_of_flax_are_normalised_likewise(make: Any) -> None:
    theirs, ours = make(flax_nnx.Linear(3, 5, rngs=flax_nnx.Rngs(0))), make()
    for _ in range(2):
        np.testing.assert_array_equal(theirs(X), ours(X))
    found = theirs.layer_instance.kernel[...]
    np.testing.assert_array_equal(found, ours.layer_instance.kernel[...])
    assert (found != linear().kernel[...]).any()


def test_a_layer_of_which_no_weight_is_taken_is_refused() -> None:
    with pytest.raises(FilterError, match=r"PathContains\('kernel'\) takes no weight"):
        weight_norm(nnx.Embed(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(FilterError, match="Linear: a filter takes leaves"):
        weight_norm(variable_filter=nnx.Linear)


def test_weights_in_half_precision_keep_it_without_a_warning() -> None:
    layer = nnx.Linear(3, 5, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    normed = spectral_norm(layer, n_steps=20)
    normed(X)
    assert layer.kernel.dtype == jnp.bfloat16
    kernel = np.asarray(layer.kernel.value, np.float32)
    np.testing.assert_allclose(np.linalg.norm(kernel, ord=2), 1, atol=0.02)


def test_scales_are_as_wide_as_the_weights_whatever_numbers_are_by_default() -> None:
    with jax.enable_x64(True):
        layer = linear()
        assert weight_norm(layer)(X).dtype == jnp.float32
        assert layer.kernel.dtype == jnp.float32
        wide = nnx.Linear(3, 5, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        [scale] = weight_norm(wide).scales.values()
        assert scale.dtype == jnp.float64
