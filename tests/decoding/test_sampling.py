"""Tokens are chosen with the probabilities of the definitions."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from sortal import decoding
from sortal.errors import ArgumentError


def shares(logits, draws=3000, **options):
    keys = jax.random.split(jax.random.key(0), draws)
    drawn = jax.vmap(lambda k: decoding.sample(logits, k, **options))(keys)
    return np.bincount(np.asarray(drawn), minlength=len(logits)) / draws


def expected(logits, temperature, top_k=None, top_p=None):
    """The definition: drop tokens one by one from the unlikely end."""
    p = np.exp(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-p)
    kept = order[:top_k]
    weights = p[kept] / p[kept].sum()
    if top_p is not None:
        enough = int(np.argmax(np.cumsum(weights) >= top_p - 1e-9)) + 1
        kept, weights = kept[:enough], weights[:enough]
    out = np.zeros(len(p))
    out[kept] = weights / weights.sum()
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.0, "top_k": 2},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 2.0, "top_k": 4, "top_p": 0.75},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": 99, "top_p": 1.0},
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_the_definition(options) -> None:
    logits = np.array([0.3, 2.0, -1.0, 1.5, 0.0], np.float32)
    wanted = expected(logits, **options)
    found = shares(jnp.asarray(logits), **options)
    assert ((found > 0) <= (wanted > 0)).all(), "no token that was cut"
    np.testing.assert_allclose(found, wanted, atol=0.03)


def test_rows_are_chosen_for_alone_and_nan_is_no_token() -> None:
    logits = jnp.array([[[0.0, 1.0]], [[1.0, 0.0]], [[jnp.nan, 9.0]]])
    assert decoding.sample(logits).tolist() == [[1], [0], [-1]]
    with jax.numpy_rank_promotion("raise"):  # as strict users of JAX have it
        cold = decoding.sample(logits, jax.random.key(1), temperature=1e-3, top_p=0.5)
    assert cold.tolist() == [[1], [0], [-1]]


def test_a_temperature_without_a_key_is_refused() -> None:
    with pytest.raises(ArgumentError, match="needs a key"):
        decoding.sample(jnp.zeros(3), temperature=1.0)


def exact(logits, temperature, top_k, top_p):
    """The definition in float64; the tokens of a cut's boundary may be either way."""
    x = np.asarray(logits, np.float64)
    p = np.exp((x - x.max()) / temperature)
    order = np.argsort(-x, kind="stable")  # of p, all are 1 at a high temperature
    kept = order[:top_k]
    weights = p[kept] / p[kept].sum()
    if top_p is not None:
        before = np.cumsum(weights) - weights
        kept = kept[(before < top_p) | (np.arange(len(kept)) == 0)]
    out = np.zeros(len(p))
    out[kept] = p[kept] / p[kept].sum()
    return out


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.example([0.5], 1.0, None, 0.93, jnp.float32)
@hypothesis.given(
    logits=st.lists(
        st.sampled_from([-np.inf, -3.0, -1.0, -0.25, 0.0, 0.5, 1.0, 2.0, 40.0]),
        min_size=6,  # each size is compiled anew
        max_size=6,
        unique=True,
    ),
    temperature=st.sampled_from([0, 0.0, 1e-45, 1e-3, 0.5, 1, 2.0, 1e30]),
    top_k=st.sampled_from([None, 1, 3, 8]),
    # No sum of the weights above comes near to these.
    top_p=st.none() | st.sampled_from([1e-6, 0.3141, 0.7713, 0.93, 1.0]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_any_options_draw_with_exact_probabilities(
    logits, temperature, top_k, top_p, dtype
) -> None:
    logits = jnp.asarray(logits, dtype)
    wanted = exact(logits, temperature or 1e-300, top_k, top_p)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = jax.vmap(lambda k: decoding.sample(logits, k, **options))(keys)
    found = np.bincount(np.asarray(drawn), minlength=len(logits)) / 2000
    assert ((found > 0) <= (wanted > 0)).all(), "no token that was cut"
    np.testing.assert_allclose(found, wanted, atol=0.05)


def test_a_temperature_of_0_takes_the_most_likely_token_and_needs_no_key() -> None:
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    for zero in (0, 0.0, np.float32(0), jnp.array(0.0), jnp.array(0)):
        assert decoding.sample(logits, temperature=zero).tolist() == [1, 0]
        key = jax.random.key(0)
        assert decoding.sample(logits, key, temperature=zero).tolist() == [1, 0]


def test_a_temperature_known_only_in_a_trace_means_the_same() -> None:
    logits = jnp.array([0.0, 3.0, 1.0])
    drawn = jax.jit(
        lambda t, p: decoding.sample(
            logits, jax.random.key(0), temperature=t, top_k=2, top_p=p
        )
    )
    assert int(drawn(0.0, 0.9)) == 1
    assert int(drawn(1e-40, 0.9)) == 1
    for t, p in [(-1.0, 0.9), (jnp.nan, 0.9), (jnp.inf, 0.9), (1.0, 0.0), (1.0, 1.5)]:
        assert int(drawn(t, p)) == -1, "no token, where no error can be raised"


@pytest.mark.parametrize(
    "row", [[jnp.nan, 0.0], [-jnp.inf, -jnp.inf], [jnp.inf, 0.0], [jnp.nan, jnp.inf]]
)
def test_a_row_that_is_no_distribution_gives_no_token(row) -> None:
    logits = jnp.array([row, [0.0, 9.0]])
    for options in ({}, {"temperature": 0.1}, {"temperature": 0.1, "top_p": 0.5}):
        key = jax.random.key(0)
        assert decoding.sample(logits, key, **options).tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1.0; it is a finite number, 0 or more"),
        ({"temperature": jnp.array(-1.0)}, "temperature=-1.0; it is"),
        ({"temperature": float("nan")}, "temperature=nan; it is"),
        ({"temperature": float("inf")}, "temperature=inf; it is"),
        ({"temperature": "hot"}, "temperature='hot'; it is"),
        ({"temperature": True}, "temperature=True; it is"),
        ({"temperature": [1.0, 2.0]}, "temperature="),
        ({"top_p": 0}, "top_p=0; it is above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5; it is"),
        ({"top_p": float("nan")}, "top_p=nan; it is"),
        ({"top_p": "most"}, "top_p='most'; it is"),
        ({"top_k": 0}, "top_k=0; it is a whole number, 1 or more"),
        ({"top_k": 2.5}, "top_k=2.5; it is a whole number, 1 or more"),
        ({"top_k": True}, "top_k=True; it is a whole number"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        decoding.sample(jnp.zeros(3), jax.random.key(0), **options)


@pytest.mark.parametrize(
    "logits", [jnp.zeros((2, 0)), jnp.array(1.0), jnp.array([1, 2])]
)
def test_what_is_no_row_of_logits_is_refused(logits) -> None:
    with pytest.raises(ArgumentError, match=r"logits are floating-point numbers"):
        decoding.sample(logits)


@pytest.mark.parametrize("option", ["temperature", "top_p"])
def test_an_option_for_each_row_is_refused_inside_a_trace_too(option) -> None:
    @jax.jit
    def draw(x):
        options = {"temperature": 1.0, option: x}
        return decoding.sample(jnp.zeros((4, 4)), jax.random.key(0), **options)

    with pytest.raises(ArgumentError, match=rf"{option}=.*float32\[4\]"):
        draw(jnp.full(4, 0.5))
