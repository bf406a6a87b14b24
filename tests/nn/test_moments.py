"""What all norms share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx

X = np.random.default_rng(0).normal(3, 2, size=(4, 5, 6)).astype(np.float32)
NORMS = ["BatchNorm", "LayerNorm", "RMSNorm", "InstanceNorm", "GroupNorm"]


def norm(name: str, **options: Any) -> Any:
    args = (6, 3) if name == "GroupNorm" else (6,)
    return getattr(nnx, name)(*args, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_moments_are_those_of_numpy(fast: bool, masked: bool) -> None:
    mask = np.arange(5)[:, None] < (3 if masked else 5)
    layer = norm("LayerNorm", use_fast_variance=fast)
    mean, variance = layer._statistics(jnp.asarray(X), (0, 1), mask)
    taken = X[:, :3] if masked else X
    expected = taken.mean((0, 1), keepdims=True), taken.var((0, 1), keepdims=True)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-5)
    np.testing.assert_allclose(variance, expected[1], rtol=1e-4)


@pytest.mark.parametrize("name", NORMS)
def test_a_constructor_keeps_its_settings_and_nothing_else(name: str) -> None:
    """Arguments become attributes; initialisers, metadata and rngs do not."""
    layer = norm(name, epsilon=0.5, scale_metadata={"of": "scale"})
    assert layer.epsilon == 0.5
    assert layer.scale.get_metadata() == {"of": "scale"}
    kept = vars(layer) if hasattr(layer, "__dict__") else {}
    assert not [n for n in kept if n.endswith(("_init", "_metadata"))]
    assert not hasattr(layer, "rngs")
    assert not hasattr(layer, "arguments")


@pytest.mark.parametrize("name", NORMS)
def test_scale_and_bias_can_be_left_out(name: str) -> None:
    bare = {"use_scale": False} | ({} if name == "RMSNorm" else {"use_bias": False})
    layer = norm(name, **bare)
    assert layer.scale is None
    assert layer.bias is None
    assert nnx.state(layer, nnx.Param).paths() == ()


def test_epsilon_keeps_a_constant_finite() -> None:
    assert jnp.all(norm("LayerNorm")(jnp.ones((2, 6))) == 0)
