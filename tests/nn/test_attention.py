"""Attention as functions, masks and rotary positions."""

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
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


Q, K, V = normal(2, 3, 4, 6), normal(2, 5, 2, 6), normal(2, 5, 2, 6)


def by_hand(query: Any, key: Any, value: Any, allowed: Any = True) -> np.ndarray:
    """The formula, in double precision, head by head."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[-2] // key.shape[-2]
    key, value = (np.repeat(x, group, axis=-2) for x in (key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    logits = np.where(allowed, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", weights, value)


@pytest.mark.parametrize("way", ["fused", "in two steps"])
def test_attention_is_the_formula(way: str) -> None:
    mask = np.arange(5) < np.array([3, 5])[:, None]
    mask = mask[:, None, None]
    options = {} if way == "fused" else {"dropout_rate": 0.5, "deterministic": True}
    y = nnx.dot_product_attention(Q, K, V, mask=mask, **options)
    np.testing.assert_allclose(y, by_hand(Q, K, V, mask), atol=1e-6)


def test_a_causal_call_is_one_with_a_causal_mask() -> None:
    x = Q[:, :, :2]
    mask = nnx.make_causal_mask(jnp.zeros((2, 3)))
    first = nnx.dot_product_attention(x, x, x, is_causal=True)
    np.testing.assert_allclose(first, by_hand(x, x, x, mask), atol=1e-6)
    shared = nnx.dot_product_attention_weights(
        x, x, mask=mask[:1, :, :1], is_causal=True
    )
    assert jnp.all(shared[..., 1:] == 0)


def test_masks_and_biases_broadcast_over_any_batch() -> None:
    """Also where leading axes are missing, or of size 1 among several."""
    q, k, v = (jnp.stack([x, -x]) for x in (Q, K, V))
    mask = jnp.arange(5) < 3
    wide = nnx.dot_product_attention(q, k, v, mask=mask[None, None, None, None])
    thin = nnx.dot_product_attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(wide, thin)
    np.testing.assert_allclose(thin[1], by_hand(q[1], k[1], v[1], mask), atol=1e-6)


def test_dropped_weights_are_shared_by_batch_and_heads_if_asked_for() -> None:
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}
    shared = nnx.dot_product_attention_weights(Q, K, **options) == 0
    assert jnp.all(shared == shared[:1, :1])
    own = nnx.dot_product_attention_weights(Q, K, broadcast_dropout=False, **options)
    assert not jnp.all((own == 0) == (own[:1, :1] == 0))


@pytest.mark.parametrize("precision", [None, "highest", jax.lax.Precision.HIGH])
def test_a_precision_reaches_both_products(precision: Any) -> None:
    def attend(x: Any) -> Any:
        return nnx.dot_product_attention(x, x, x, precision=precision)

    text = str(jax.make_jaxpr(attend)(Q))
    assert text.count("dot_general[") == 2
    name = None if precision is None else jax.lax.Precision(precision).name
    assert text.count(f"precision=(Precision.{name}") == (0 if name is None else 2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 4), (3, 4), (3, 4)), r"arrays \(\*batch, length, heads, depth\)"),
        (((2, 3, 4, 6), (5, 4, 6), (5, 4, 6)), r"of one batch shape; found query=fl"),
        (((2, 3, 4, 6), (3, 5, 4, 6), (3, 5, 4, 6)), r"of one batch shape"),
        (((3, 4, 6), (5, 4, 7), (5, 4, 6)), r"one depth, the last axis"),
        (((3, 4, 6), (5, 4, 6), (4, 4, 6)), r"as many values as keys"),
        (((3, 4, 6), (5, 3, 6), (5, 3, 6)), r"on axis -2, must divide"),
        (((3, 4, 6), (5, 0, 6), (5, 0, 6)), r"on axis -2, must divide"),
    ],
)
def test_operands_that_do_not_fit_are_refused(shapes: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        nnx.dot_product_attention(*(jnp.ones(shape) for shape in shapes))


@pytest.mark.parametrize("name", ["mask", "bias"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_mask_that_does_not_broadcast_is_refused(
    name: str, deterministic: bool
) -> None:
    message = r"here \(2, 4, 3, 5\); found float32\[3,4\]"
    options = {name: jnp.ones((3, 4)), "deterministic": True}
    with pytest.raises(ArgumentError, match=message):
        nnx.dot_product_attention(Q, K, V, dropout_rate=0.1 * deterministic, **options)


@pytest.mark.parametrize("rate", [1.5, -0.5, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(ArgumentError, match=r"dropout_rate is the probability"):
        nnx.dot_product_attention(Q, K, V, dropout_rate=rate)


def test_dropping_without_a_key_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"nothing to draw from: dropout_rate=0\.5"):
        nnx.dot_product_attention(Q, K, V, dropout_rate=0.5)


def test_one_mask_combines_to_booleans_as_several_do() -> None:
    mask = jnp.array([2.0, 0.0, 0.5])
    assert nnx.combine_masks(mask, dtype=jnp.int32).tolist() == [1, 0, 1]
    assert nnx.combine_masks(mask, mask, dtype=jnp.int32).tolist() == [1, 0, 1]
    assert nnx.combine_masks([2.0, 0.0], [1, 1], dtype=jnp.int32).tolist() == [1, 0]


def test_masks_of_different_ranks_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"one rank.*float32\[3\], float32\[1,3\]"):
        nnx.combine_masks(jnp.ones(3), None, jnp.ones((1, 3)))
    with pytest.raises(ArgumentError, match=r"broadcast, .*t32\[3\], float32\[2\]"):
        nnx.combine_masks(jnp.ones(3), jnp.ones(2))
    assert nnx.combine_masks(None) is None


def test_rotary_positions_keep_lengths_and_tell_distances_alone() -> None:
    rope, x = nnx.RoPE(), Q[:, :, 0]
    np.testing.assert_allclose(
        jnp.linalg.norm(rope(x), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
    )
    places = jnp.arange(3.0)
    near = rope(x, places) @ rope(x, places).mT
    far = rope(x, places + 40) @ rope(x, places + 40).mT
    np.testing.assert_allclose(near, far, atol=1e-4)


def test_tables_of_angles_are_those_that_would_be_computed() -> None:
    rope = nnx.RoPE(100.0, embedding_size=6, max_seq_len=8)
    np.testing.assert_array_equal(rope(Q[:, :, 0]), nnx.RoPE(100.0)(Q[:, :, 0]))
    assert nnx.state(rope).paths() == (("cached_cos",), ("cached_sin",))


def test_each_sequence_may_have_its_own_positions() -> None:
    rope, places = nnx.RoPE(), jnp.array([[0, 1, 2], [5, 6, 7]])
    whole = nnx.dot_product_attention_with_rope(
        Q, Q, Q, rope=rope, input_positions=places
    )
    for i in range(2):
        part = nnx.dot_product_attention_with_rope(
            Q[i], Q[i], Q[i], rope=rope, input_positions=places[i]
        )
        np.testing.assert_allclose(whole[i], part, atol=1e-5)
    # Distances are the same, so the numbers are.
    plain = nnx.dot_product_attention_with_rope(Q, Q, Q, rope=rope)
    np.testing.assert_allclose(whole, plain, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nnx.RoPE(embedding_size=4), r"both given; found embedding_size=4"),
        (lambda: nnx.RoPE(embedding_size=5, max_seq_len=2), r"must be even; found 5"),
        (lambda: nnx.RoPE()(jnp.ones((2, 3))), r"must be even; found 3"),
        (
            lambda: nnx.RoPE()(jnp.ones((2, 4)), jnp.arange(3)),
            r"one position for each of 2 places; found input_positions int32\[3\]",
        ),
        (
            lambda: nnx.RoPE()(jnp.ones((2, 3, 4)), jnp.zeros((5, 3))),
            r"input_positions float32\[5,3\] for an input float32\[2,3,4\]",
        ),
        (
            # They would make five sequences of one.
            lambda: nnx.RoPE()(jnp.ones((1, 3, 4)), jnp.zeros((5, 3))),
            r"input_positions float32\[5,3\] for an input float32\[1,3,4\]",
        ),
        (
            lambda: nnx.RoPE(embedding_size=4, max_seq_len=2)(
                jnp.ones((2, 6)), jnp.arange(2)
            ),
            r"tables for 2 places of 4 features",
        ),
        (
            lambda: nnx.RoPE(embedding_size=4, max_seq_len=2)(jnp.ones((3, 4))),
            r"tables for 2 places of 4 features; found an input float32\[3,4\]",
        ),
        (
            lambda: nnx.RoPE(embedding_size=4, max_seq_len=2)(jnp.ones((2, 6))),
            r"tables for 2 places of 4 features; found an input float32\[2,6\]",
        ),
    ],
)
def test_positions_that_do_not_fit_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_dropping_all_weights_gives_zeros_as_dropout_does() -> None:
    options = {"dropout_rng": jax.random.key(0), "deterministic": False}
    out = nnx.dot_product_attention(Q, K, V, dropout_rate=1.0, **options)
    assert not out.any()
    grads = jax.grad(
        lambda q: nnx.dot_product_attention(q, K, V, dropout_rate=1.0, **options).sum()
    )(Q)
    assert not grads.any()
    assert not nnx.Dropout(1.0, rngs=nnx.Rngs(0))(Q).any()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("heads", "depth"), [(4, 3), (1, 6)])
def test_values_may_have_a_depth_and_heads_of_their_own(dropout, heads, depth) -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 5, 4, 6)), rng.normal(size=(2, 7, 2, 6))
    v = rng.normal(size=(2, 7, heads, depth))
    weights = np.einsum("bqhd,bkhd->bhqk", q, np.repeat(k, 2, axis=2)) / np.sqrt(6)
    weights = np.exp(weights) / np.exp(weights).sum(axis=-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, np.repeat(v, 4 // heads, axis=2))
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    options = {"dropout_rate": dropout, "deterministic": True}
    found = nnx.dot_product_attention(q, k, v, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [(), (4, 8)])
def test_rotation_of_an_array_without_places_is_refused(sizes) -> None:
    rope = nnx.RoPE(1e4, *sizes)
    with pytest.raises(ArgumentError, match=r"\(\.\.\., length, depth\).*float32\[4\]"):
        rope(jnp.ones(4))
