"""BatchNorm, LayerNorm, RMSNorm, InstanceNorm and GroupNorm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import ArgumentError


def normal(*shape: int) -> jax.Array:
    rng = np.random.default_rng(shape)
    return jnp.asarray(3 + 2 * rng.normal(size=shape), jnp.float32)


def close(x: Any, y: Any) -> None:
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def batch_norm(**options: Any) -> nnx.BatchNorm:
    return nnx.BatchNorm(3, **options, rngs=nnx.Rngs(0))


def test_batch_norm_gives_each_feature_mean_zero_and_variance_one() -> None:
    y = batch_norm()(normal(8, 5, 3))
    close(y.mean((0, 1)), jnp.zeros(3))
    close(y.var((0, 1)), jnp.ones(3))


def test_running_statistics_are_a_moving_mean_of_those_of_the_batches() -> None:
    layer, x = batch_norm(momentum=0.75), normal(8, 3)
    layer(x)
    close(layer.mean[...], 0.25 * x.mean(0))
    close(layer.var[...], 0.75 + 0.25 * x.var(0))


def test_evaluation_uses_the_running_statistics_and_leaves_them() -> None:
    layer, x = batch_norm(), normal(8, 3)
    layer.eval()
    close(layer(x), x)
    assert layer.mean[...].tolist() == [0.0, 0.0, 0.0]
    layer.train()
    layer(x)
    assert layer.mean[...].tolist() != [0.0, 0.0, 0.0]


def test_the_flag_of_a_call_wins_over_that_of_the_layer() -> None:
    layer, x = batch_norm(use_running_average=True), normal(8, 3)
    close(layer(x, use_running_average=False).mean(0), jnp.zeros(3))


def test_running_statistics_are_kept_out_of_the_gradient_and_carried_out_of_jit() -> (
    None
):
    """One step under jit and grad leaves what the same step leaves without them."""
    x = normal(8, 3)

    def loss(model: Any) -> Any:
        return (model(x) ** 3).sum()

    plain, compiled = batch_norm(), batch_norm()
    loss(plain)
    grads = nnx.jit(nnx.grad(loss))(compiled)
    assert sorted(grads.paths()) == [("bias",), ("scale",)]
    close(compiled.mean[...], plain.mean[...])
    close(compiled.var[...], plain.var[...])


def test_masked_elements_have_no_part_in_the_statistics() -> None:
    x = normal(8, 3)
    mask = jnp.arange(8)[:, None] < 5
    masked, alone = batch_norm(), batch_norm()
    y = masked(x, mask=mask)
    close(y[:5], alone(x[:5]))
    close(masked.mean[...], alone.mean[...])


def test_statistics_are_at_least_float32() -> None:
    """In bfloat16, the mean of 300 and 302 would be 300 or 304."""
    layer = batch_norm(dtype=jnp.bfloat16, momentum=0.0)
    y = layer(jnp.array([[300.0], [302.0]]) * jnp.ones(3))
    assert y.dtype == jnp.bfloat16
    assert layer.mean[...].tolist() == [301.0, 301.0, 301.0]


def test_the_variance_of_a_constant_is_not_negative() -> None:
    layer = batch_norm(momentum=0.0)
    y = layer(jnp.full((7, 3), 1e4 + 0.1))
    assert jnp.all(layer.var[...] >= 0)
    assert jnp.all(jnp.isfinite(y))


def test_layer_norm_gives_each_example_mean_zero_and_variance_one() -> None:
    y = nnx.LayerNorm(6, rngs=nnx.Rngs(0))(normal(4, 6))
    close(y.mean(-1), jnp.zeros(4))
    close(y.var(-1), jnp.ones(4))


def test_rms_norm_gives_each_example_mean_square_one() -> None:
    x = normal(4, 6)
    y = nnx.RMSNorm(6, rngs=nnx.Rngs(0))(x)
    close((y**2).mean(-1), jnp.ones(4))
    close(y / x, (y / x)[:, :1] * jnp.ones(6))


def test_one_group_of_all_features_is_a_layer_norm_over_the_example() -> None:
    x = normal(4, 3, 6)
    group = nnx.GroupNorm(6, 1, rngs=nnx.Rngs(0))
    layer = nnx.LayerNorm(6, reduction_axes=(1, 2), rngs=nnx.Rngs(0))
    close(group(x), layer(x))


def test_groups_are_normalised_alone() -> None:
    x = normal(4, 3, 6)
    whole = nnx.GroupNorm(6, 3, rngs=nnx.Rngs(0))(x)
    part = nnx.GroupNorm(2, 1, rngs=nnx.Rngs(0))
    for i in range(3):
        close(whole[..., 2 * i : 2 * i + 2], part(x[..., 2 * i : 2 * i + 2]))


def test_leading_axes_left_out_of_the_reduction_are_batch_axes() -> None:
    """Each example gets its own statistics, group by group, however many such axes."""
    x = normal(2, 4, 3, 6)
    layer = nnx.GroupNorm(6, 2, reduction_axes=(2, -1), rngs=nnx.Rngs(0))
    flat = nnx.GroupNorm(6, 2, rngs=nnx.Rngs(0))
    close(layer(x), flat(x.reshape(8, 3, 6)).reshape(x.shape))


def test_an_example_without_a_batch_axis_can_be_group_normalised() -> None:
    x = normal(4, 6)
    layer = nnx.GroupNorm(6, 2, rngs=nnx.Rngs(0))
    close(layer(x[0]), layer(x)[0])


def test_a_group_mask_need_not_name_every_feature() -> None:
    x = normal(4, 5, 6)
    mask = jnp.arange(5)[:, None] < 3
    layer = nnx.GroupNorm(6, 2, rngs=nnx.Rngs(0))
    close(layer(x, mask=mask)[:, :3], layer(x[:, :3]))


def test_the_slow_variance_survives_a_large_mean() -> None:
    x = 1e4 + jnp.linspace(-1, 1, 6)[None]
    slow = nnx.LayerNorm(6, use_fast_variance=False, rngs=nnx.Rngs(0))(x)
    close(slow.var(), 1.0)


def test_complex_inputs_are_scaled_by_their_modulus() -> None:
    x = jnp.array([[1 + 1j, 1 - 1j, -1 + 1j, -1 - 1j]])
    y = nnx.LayerNorm(4, rngs=nnx.Rngs(0))(x)
    close(jnp.abs(y), jnp.ones((1, 4)))


def test_a_real_running_mean_takes_no_complex_batch() -> None:
    x = jnp.array([[1 + 2j], [3 + 2j]])
    layer = nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"real part alone. Write layer.mean.value"):
        layer(x)
    close(layer.mean.value, 0.0)
    layer.mean.value = layer.mean.value.astype(jnp.complex64)
    close(layer(x).mean(), 0.0)
    close(layer.mean.value, x.mean(0) / 2)
    close(layer.var.value, 0.5 + jnp.var(x, 0) / 2)


@pytest.mark.parametrize(
    "layer",
    [
        nnx.BatchNorm(3, use_bias=False, use_scale=False, rngs=nnx.Rngs(0)),
        nnx.LayerNorm(3, use_bias=False, rngs=nnx.Rngs(0)),
        nnx.RMSNorm(3, rngs=nnx.Rngs(0)),
        nnx.InstanceNorm(3, rngs=nnx.Rngs(0)),
        nnx.GroupNorm(3, 3, rngs=nnx.Rngs(0)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_wrong_number_of_features_is_refused(layer: Any) -> None:
    message = rf"{type(layer).__name__} has parameters for 3 features .*float32\[2,4\]"
    with pytest.raises(ArgumentError, match=message):
        layer(jnp.ones((2, 4)))


def test_a_group_norm_without_parameters_knows_its_features() -> None:
    layer = nnx.GroupNorm(4, 2, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"for 4 features on axis -1"):
        layer(jnp.ones((2, 6)))


def test_instance_norm_normalises_each_feature_of_each_example() -> None:
    x = normal(4, 5, 3)
    y = nnx.InstanceNorm(3, rngs=nnx.Rngs(0))(x)
    close(y.mean(1), jnp.zeros((4, 3)))
    close(y.var(1), jnp.ones((4, 3)))
    close(y, nnx.GroupNorm(3, 3, rngs=nnx.Rngs(0))(x))


def test_an_instance_norm_keeps_the_first_axis_for_the_batch() -> None:
    layer = nnx.InstanceNorm(4, feature_axes=0, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"first axis is that of the batch.*axes=0"):
        layer(jnp.ones((4, 3)))


def test_a_view_sets_which_statistics_are_used() -> None:
    layer = batch_norm()
    layer.set_view(use_running_average=True)
    assert layer.use_running_average is True
    layer.set_view()
    assert layer.use_running_average is True


def test_an_axis_that_is_not_there_is_refused() -> None:
    layer = nnx.LayerNorm(3, reduction_axes=(-3, -1), rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"works on axes \(-3, -1\), which its"):
        layer(jnp.ones((2, 3)))


def test_a_mask_that_does_not_broadcast_is_refused() -> None:
    layer = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"mask must broadcast .* found bool\[4\]"):
        layer(jnp.ones((2, 3)), mask=jnp.ones(4, bool))


def test_a_flag_that_nobody_set_is_asked_for() -> None:
    layer = batch_norm(use_running_average=None)
    message = r"BatchNorm does not know its use_running_average: .*model\.eval\(\)"
    with pytest.raises(ArgumentError, match=message):
        layer(jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 2}, r"num_groups or group_size, not both; .*num_groups=32"),
        ({"num_groups": None}, r"found num_groups=None and group_size=None"),
        ({}, r"num_groups=32 does not divide num_features=6"),
        ({"num_groups": 0}, r"num_groups=0 does not divide"),
        ({"num_groups": 2.0}, r"num_groups must be made of whole numbers"),
        ({"num_groups": None, "group_size": 4}, r"group_size=4 does not divide"),
    ],
)
def test_groups_that_do_not_divide_the_features_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        nnx.GroupNorm(6, **arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("axes", [(1,), ()])
def test_a_group_reduction_without_the_features_is_refused(axes: Any) -> None:
    layer = nnx.GroupNorm(6, 2, reduction_axes=axes, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"reduction_axes must contain the last"):
        layer(jnp.ones((2, 3, 6)))


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm"])
@pytest.mark.parametrize("dtype", [int, float])
def test_a_mask_of_weights_is_refused(name, dtype) -> None:
    layer = getattr(nnx, name)(3, rngs=nnx.Rngs(0))
    mask = jnp.ones((4, 2, 3), dtype)
    with pytest.raises(ArgumentError, match=rf"{name}: the mask .* booleans; found"):
        layer(jnp.ones((4, 2, 3)), mask=mask)


@pytest.mark.parametrize("options", [{}, {"use_fast_variance": False}])
@pytest.mark.parametrize(
    ("x", "mask"),
    [(normal(4, 3), jnp.zeros((4, 3), bool)), (jnp.zeros((0, 3)), None)],
    ids=["hidden", "empty"],
)
def test_a_batch_that_shows_nothing_leaves_the_running_statistics(
    x: Any, mask: Any, options: dict[str, Any]
) -> None:
    """It is normalised by them, as in evaluation, and no gradient is NaN."""
    layer = batch_norm(**options, dtype=jnp.bfloat16)
    layer(normal(8, 3))
    mean, var = layer.mean[...], layer.var[...]
    expected = layer(x, use_running_average=True)
    loss = nnx.value_and_grad(lambda m, x: (m(x, mask=mask) ** 2).sum(), argnums=1)
    y, grad = loss(layer, x)
    close(layer.mean[...], mean)
    close(layer.var[...], var)
    close(y, (expected**2).sum())
    assert jnp.isfinite(grad).all()


def test_of_several_features_only_those_in_sight_are_learned() -> None:
    layer, x = batch_norm(momentum=0.5), normal(8, 3)
    layer(x, mask=jnp.array([True, False, True]))
    close(layer.mean[...], 0.5 * x.mean(0) * jnp.array([1, 0, 1]))


@pytest.mark.parametrize(
    "layer",
    [
        nnx.LayerNorm(6, rngs=nnx.Rngs(0)),
        nnx.RMSNorm(6, rngs=nnx.Rngs(0)),
        nnx.GroupNorm(6, 2, reduction_axes=-1, rngs=nnx.Rngs(0)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_hidden_as_a_whole_stays_as_it_is(layer: Any) -> None:
    x = normal(4, 6)
    mask = jnp.arange(4)[:, None] < 3
    y = layer(x, mask=mask)
    close(y[:3], layer(x[:3]))
    close(y[3], x[3])


@pytest.mark.parametrize("options", [{}, {"use_fast_variance": False}])
def test_members_of_an_axis_count_by_how_much_of_them_is_in_sight(
    options: dict[str, Any],
) -> None:
    """Of four members, one shows half of its rows and one shows nothing."""
    x = normal(8, 3)
    mask = jnp.array([1, 1, 1, 0, 1, 1, 0, 0], bool)[:, None]
    whole, parts = batch_norm(**options), batch_norm(**options, axis_name="i")
    y = nnx.vmap(
        lambda layer, x, mask: layer(x, mask=mask),
        in_axes=(nnx.StateAxes({...: None}), 0, 0),
        axis_name="i",
    )(parts, x.reshape(4, 2, 3), mask.reshape(4, 2, 1))
    close(y.reshape(8, 3), whole(x, mask=mask))
    close(parts.mean[...], whole.mean[...])
    close(parts.var[...], whole.var[...])


def test_a_complex_mean_over_a_mapped_axis_leaves_the_variance_real() -> None:
    parts = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
    x = parts[0] + 1j * parts[1]
    layer = nnx.BatchNorm(2, axis_name="batch", rngs=nnx.Rngs(0))
    layer.mean.value = layer.mean.value.astype(jnp.complex64)
    found = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="batch")(layer, x)
    centred = x - x.mean((0, 1))
    expected = centred / np.sqrt((abs(centred) ** 2).mean((0, 1)) + 1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert layer.var.dtype == np.float32
