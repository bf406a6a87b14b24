"""LoRA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sortal as nnx
from sortal.errors import ArgumentError

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def test_a_layer_begins_as_the_linear_that_it_extends() -> None:
    plain = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    layer = nnx.LoRALinear(3, 5, lora_rank=2, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(X), plain(X))
    base = nnx.state(layer, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)))
    assert base.paths() == nnx.state(plain).paths()
    assert nnx.LoRA(3, 2, 5, rngs=nnx.Rngs(0))(X).tolist() == [[0.0] * 5] * 4


def test_factors_can_be_merged_into_the_kernel() -> None:
    layer = nnx.LoRALinear(
        3, 5, lora_rank=2, b_initializer=nnx.initializers.normal(), rngs=nnx.Rngs(0)
    )
    merged = nnx.Linear(3, 5, rngs=nnx.Rngs(1))
    merged.kernel[...] = layer.kernel[...] + layer.lora.lora_a @ layer.lora.lora_b
    np.testing.assert_allclose(layer(X), merged(X), atol=1e-5)


def test_training_the_factors_leaves_the_rest_to_the_bit() -> None:
    layer = nnx.LoRALinear(3, 5, lora_rank=2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.sgd(0.1), wrt=nnx.LoRAParam)
    before = np.asarray(layer.kernel[...])
    grads = nnx.grad(lambda m: (m(X) ** 2).sum(), wrt=nnx.LoRAParam)(layer)
    optimizer.update(layer, grads)
    np.testing.assert_array_equal(layer.kernel[...], before)
    assert jnp.any(layer.lora.lora_b[...] != 0)


def test_a_base_module_is_added_with_its_own_arguments() -> None:
    class Base(nnx.Module):
        def __call__(self, x: Any, factor: float = 1.0) -> Any:
            return factor * x.sum(-1, keepdims=True)

    layer = nnx.LoRA(3, 2, 5, base_module=Base(), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(X, factor=2.0)[:, 0], 2 * X.sum(-1), rtol=1e-6)


def test_factors_have_the_kind_metadata_and_dtype_asked_for() -> None:
    class Adapter(nnx.Variable):
        pass

    layer = nnx.LoRALinear(
        3,
        5,
        lora_rank=2,
        lora_param_type=Adapter,
        lora_param_dtype=jnp.bfloat16,
        a_metadata={"of": "a"},
        use_bias=False,
        rngs=nnx.Rngs(0),
    )
    assert layer.bias is None
    assert len(nnx.state(layer, Adapter)) == 1
    assert type(layer.lora.lora_b) is Adapter
    assert layer.lora.lora_a.dtype == jnp.bfloat16
    assert layer.lora.lora_a.get_metadata() == {"of": "a"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": -1}, r"LoRA: lora_rank must be made of whole numbers"),
        ({"base_module": 3}, r"base_module=3, which cannot be called"),
        ({"a_initializer": 1.0}, r"LoRA: a_initializer must be a function"),
        ({"rngs": 0}, r"LoRA needs an Rngs to initialise its lora_a"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str
) -> None:
    given = {"in_features": 3, "lora_rank": 2, "out_features": 5, "rngs": nnx.Rngs(0)}
    with pytest.raises(ArgumentError, match=message):
        nnx.LoRA(**{**given, **options})


def test_an_input_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"LoRA has parameters for 3 features"):
        nnx.LoRA(3, 2, 5, rngs=nnx.Rngs(0))(jnp.ones((2, 4)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_merged_layer_is_a_linear_of_the_same_function(dtype, use_bias) -> None:
    layer = nnx.LoRALinear(
        3, 4, lora_rank=2, rngs=nnx.Rngs(0), param_dtype=dtype, use_bias=use_bias
    )
    layer.lora.lora_b[...] = jax.random.normal(jax.random.key(1), (2, 4))
    before = layer(jnp.ones((5, 3)))
    merged = layer.merge()
    assert type(merged) is nnx.Linear
    assert merged.kernel.value.dtype == dtype
    assert merged.kernel is not layer.kernel
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(merged(jnp.ones((5, 3))), before, atol=tolerance)
    assert (layer(jnp.ones((5, 3))) == before).all(), "left as it is"
    plain = nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=dtype, use_bias=use_bias)
    assert nnx.graphdef(merged) is nnx.graphdef(plain)
