"""MultiHeadAttention, and above all its cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import sortal as nnx
from sortal.errors import ArgumentError


def attention(**options: Any) -> nnx.MultiHeadAttention:
    given = {"num_heads": 2, "in_features": 4, "decode": False, **options}
    return nnx.MultiHeadAttention(**given, rngs=nnx.Rngs(0))


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)


def decoded(layer: Any, x: Any, **call: Any) -> jax.Array:
    layer.init_cache(x.shape)
    steps = range(x.shape[1])
    return jnp.concatenate(
        [layer(x[:, i : i + 1], decode=True, **call) for i in steps], axis=1
    )


def test_decoding_gives_what_a_causal_call_on_the_whole_gives() -> None:
    """Also with ``is_causal``, which must not hide the places before."""
    layer = attention()
    whole = layer(X, is_causal=True)
    np.testing.assert_allclose(decoded(layer, X), whole, atol=1e-6)
    np.testing.assert_allclose(decoded(layer, X, is_causal=True), whole, atol=1e-6)


def test_rotary_positions_decode_as_they_attend() -> None:
    """The query of a step is turned by its place in the cache, not by place 0."""
    function = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE())
    layer = attention(attention_fn=function)
    whole = layer(X, is_causal=True)
    np.testing.assert_allclose(decoded(layer, X), whole, atol=1e-5)
    given = [
        layer(X[:, i : i + 1], decode=True, input_positions=jnp.array([i]))
        for i in range(1)
        if layer.init_cache(X.shape) is None
    ]
    np.testing.assert_allclose(given[0], whole[:, :1], atol=1e-5)


def test_the_cache_is_of_its_kind_and_nothing_else_is() -> None:
    layer = attention(num_kv_heads=1)
    assert nnx.state(layer, nnx.Cache).paths() == ()
    layer.init_cache((2, 8, 4), jnp.bfloat16)
    cache = nnx.state(layer, nnx.Cache)
    assert {path[0]: (v.shape, str(v.dtype)) for path, v in cache.flat_state()} == {
        "cache_index": ((), "int32"),
        "cached_key": ((2, 8, 1, 2), "bfloat16"),
        "cached_value": ((2, 8, 1, 2), "bfloat16"),
    }


def test_a_full_cache_refuses_another_place_and_keeps_what_it_has() -> None:
    layer = attention()
    decoded(layer, X)
    before = layer.cached_key[...]
    message = r"cache is full: it has room for 3 places, and 3 are taken.*init_cache"
    with pytest.raises(ArgumentError, match=message):
        layer(X[:, :1], decode=True)
    assert layer.cached_key[...] is before
    assert int(layer.cache_index[...]) == 3


def test_a_place_too_many_inside_a_trace_is_nan_and_overwrites_nothing() -> None:
    layer = attention()
    decoded(layer, X)
    before = np.asarray(layer.cached_key[...])
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    assert jnp.isnan(step(layer, X[:, :1])).all()
    np.testing.assert_array_equal(layer.cached_key[...], before)
    with pytest.raises(ArgumentError, match=r"cache is full"):
        layer(X[:, :1], decode=True)
    layer.init_cache(X.shape)
    assert jnp.isfinite(step(layer, X[:, :1])).all()


def test_a_step_that_is_refused_leaves_the_cache() -> None:
    layer = attention(dropout_rate=0.5, keep_rngs=False)
    layer.init_cache(X.shape)
    one = X[:, :1]
    for inputs, options, message in (
        ((one,), {"mask": jnp.ones(3, bool)}, r"masks of one rank"),
        ((one,), {"mask": jnp.ones((2, 1, 1, 2), bool)}, r"masks .* that broadcast"),
        ((one[:1], one), {"deterministic": True}, r"of one batch shape"),
        ((one, one, X), {"deterministic": True}, r"and values float32\[2,3,2,2\]"),
        ((one,), {"deterministic": False}, r"nothing to draw from"),
    ):
        with pytest.raises(ArgumentError, match=message):
            layer(*inputs, decode=True, **options)
    assert int(layer.cache_index[...]) == 0
    assert not layer.cached_key[...].any()


def test_a_cache_that_does_not_fit_is_named() -> None:
    layer = attention()
    with pytest.raises(ArgumentError, match=r"has no cache to decode with. Call layer"):
        layer(X[:, :1], decode=True)
    layer.init_cache(X.shape)
    message = (
        r"one place at a call, with a cache float32\[2,3,2,2\].*float32\[2,3,2,2\]"
    )
    with pytest.raises(ArgumentError, match=message):
        layer(X, decode=True)
    layer.init_cache(X.shape, jnp.bfloat16)
    with pytest.raises(ArgumentError, match=r"found keys float32.*dtype=jnp\.float32"):
        layer(X[:, :1], decode=True)
    with pytest.raises(ArgumentError, match=r"needs a shape \(\*batch, length, feat"):
        layer.init_cache((4,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"num_heads=3 must divide qkv_features=4"),
        ({"num_kv_heads": 4}, r"num_kv_heads=4 must divide num_heads=2"),
        ({"num_heads": 0}, r"num_heads=0 must divide"),
        ({"out_features": 1.5}, r"MultiHeadAttention: out_features must be made of"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        attention(**options)


def test_flags_that_nobody_set_are_asked_for() -> None:
    with pytest.raises(ArgumentError, match=r"does not know its decode.*Pass decode="):
        attention(decode=None)(X)
    layer = attention(dropout_rate=0.5)
    with pytest.raises(ArgumentError, match=r"its deterministic.*Write model\.train"):
        layer(X)


def test_dropout_needs_something_to_draw_from() -> None:
    layer = nnx.MultiHeadAttention(
        2, 4, decode=False, dropout_rate=0.5, keep_rngs=False, rngs=nnx.Rngs(0)
    )
    layer.train()
    with pytest.raises(ArgumentError, match=r"nothing to draw from: found rngs=None"):
        layer(X)
    first, second = (layer(X, rngs=r) for r in (nnx.Rngs(1), nnx.Rngs(1).dropout))
    np.testing.assert_array_equal(first, second)


def test_values_without_keys_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"given inputs_v and no inputs_k"):
        attention()(X, inputs_v=X)


def test_a_view_sets_flags_and_makes_a_cache_where_there_is_none() -> None:
    layer = attention(dtype=jnp.bfloat16)
    layer.set_view(deterministic=True, decode=True)
    assert (layer.deterministic, layer.decode, layer.cached_key) == (True, True, None)
    layer.set_view(batch_size=2, max_length=5)
    assert layer.cached_key.shape == (2, 5, 2, 2)
    assert layer.cached_key.dtype == jnp.bfloat16
    layer.set_view(decode=False, batch_size=(3,), max_length=7)
    assert layer.cached_key.shape == (2, 5, 2, 2)
    assert layer.decode is False


def test_what_is_left_open_for_the_output_begins_as_the_rest_does() -> None:
    first, last = nnx.initializers.ones, nnx.initializers.zeros
    same = attention(kernel_init=first, kernel_metadata={"a": 1})
    assert float(same.out.kernel[...].min()) == 1
    assert same.out.kernel.get_metadata("a") == 1
    other = attention(
        kernel_init=first,
        out_kernel_init=last,
        kernel_metadata={"a": 1},
        out_kernel_metadata={"a": 2},
        bias_init=first,
    )
    assert float(other.out.kernel[...].max()) == 0
    assert other.out.kernel.get_metadata("a") == 2
    assert float(other.out.bias[...].min()) == 1


def test_norms_of_queries_and_keys_have_their_own_metadata() -> None:
    layer = attention(
        normalize_qk=True,
        query_ln_scale_metadata={"of": "q"},
        key_ln_scale_metadata={"of": "k"},
    )
    assert layer.query_ln.scale.get_metadata() == {"of": "q"}
    assert layer.key_ln.scale.get_metadata() == {"of": "k"}


def test_recorded_weights_sum_to_one() -> None:
    layer = attention()
    layer(X, sow_weights=True)
    (weights,) = nnx.pop(layer, nnx.Intermediate)["attention_weights"].value
    assert weights.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_a_cache_works_where_numbers_have_64_bits() -> None:
    def decoded(lib: Any) -> Any:
        layer = lib.MultiHeadAttention(2, 4, decode=True, rngs=lib.Rngs(0))
        layer.init_cache((1, 3, 4))
        step = lib.jit(lambda layer, x: layer(x))
        x = jnp.linspace(0, 1, 4, dtype=jnp.float32).reshape(1, 1, 4)
        return [np.asarray(f(layer, x)) for f in (step, step, lambda m, x: m(x))]

    with jax.enable_x64(True):
        found, expected = decoded(nnx), decoded(flax_nnx)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
