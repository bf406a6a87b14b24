"""Dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import ArgumentError

X = jnp.ones((4, 8))


def test_what_is_kept_is_scaled_to_keep_the_mean() -> None:
    y = nnx.Dropout(0.75, rngs=nnx.Rngs(0))(jnp.ones(1000))
    assert set(y.tolist()) == {0.0, 4.0}
    assert abs(float(y.mean()) - 1) < 0.2


def test_each_call_draws_anew_under_jit_too() -> None:
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda layer, x: layer(x))
    first, second = call(layer, X), call(layer, X)
    assert first.tolist() != second.tolist()
    again = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(again(X), first)


def test_a_layer_forks_its_stream_and_leaves_the_others_alone() -> None:
    rngs = nnx.Rngs(0, dropout=1)
    layers = [nnx.Dropout(0.5, rngs=rngs) for _ in range(2)]
    assert int(rngs.dropout.count[...]) == 2
    layers[0](X)
    assert int(rngs.dropout.count[...]) == 2
    assert [int(layer.rngs.count[...]) for layer in layers if layer.rngs] == [1, 0]


def test_an_inactive_dropout_returns_its_very_input() -> None:
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    layer.eval()
    assert layer(X) is X
    assert nnx.Dropout(0.0)(X) is X
    assert nnx.Dropout(0.5)(X, deterministic=True) is X


def test_train_and_eval_reach_nested_layers() -> None:
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    model.eval()
    assert model(X) is X
    model.train()
    assert model(X) is not X


def test_the_flag_of_a_call_wins_over_that_of_the_layer() -> None:
    layer = nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))
    assert (layer(X, deterministic=False) == 0).any()


def test_a_view_sets_whether_to_drop() -> None:
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    layer.set_view(deterministic=True)
    layer.set_view()
    assert layer(X) is X


def test_a_rate_of_one_drops_all_and_has_a_gradient_of_zero() -> None:
    layer = nnx.Dropout(1.0)
    y, dx = jax.value_and_grad(lambda x: layer(x).sum())(X)
    assert float(y) == 0
    assert not dx.any()


def test_elements_along_a_broadcast_axis_share_their_fate() -> None:
    y = nnx.Dropout(0.5, broadcast_dims=[-1], rngs=nnx.Rngs(0))(X)
    assert jnp.all(y == y[:, :1])
    assert len(set(y[:, 0].tolist())) == 2


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan"), "0.5", None, jnp.ones(1)])
def test_a_rate_that_is_no_probability_is_refused(rate: Any) -> None:
    with pytest.raises(ArgumentError, match=r"rate is the probability of zero"):
        nnx.Dropout(rate)


def test_rngs_of_another_type_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"rngs must be an Rngs, a stream or None"):
        nnx.Dropout(0.5, rngs=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("rngs", [None, 3])
def test_drawing_from_nothing_is_refused(rngs: Any) -> None:
    message = rf"nothing to draw from: found rngs={rngs}.*model\.eval\(\)"
    with pytest.raises(ArgumentError, match=message):
        nnx.Dropout(0.5)(X, rngs=rngs)


def test_a_flag_that_nobody_set_is_asked_for() -> None:
    layer = nnx.Dropout(0.5, deterministic=None, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"Dropout does not know its deterministic"):
        layer(X)


def test_integers_cannot_be_scaled() -> None:
    layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"must be floating-point; found int32\[4"):
        layer(X.astype(jnp.int32))


def test_a_broadcast_axis_that_is_not_there_is_refused() -> None:
    layer = nnx.Dropout(0.5, broadcast_dims=(2,), rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"broadcast_dims=\(2,\) names an axis"):
        layer(X)
