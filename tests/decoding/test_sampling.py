"""Tokens are chosen with the probabilities of the definitions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    cold = decoding.sample(logits, jax.random.key(1), temperature=1e-3, top_p=0.5)
    assert cold.tolist() == [[1], [0], [-1]]


def test_a_temperature_without_a_key_is_refused() -> None:
    with pytest.raises(ArgumentError, match="needs a key"):
        decoding.sample(jnp.zeros(3), temperature=1.0)
