"""Sampling: which token follows, given the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sortal.errors import ArgumentError

NO_TOKEN = -1
"""The token after the end of a sequence."""


class Choice(NamedTuple):
    """The options of sampling that may change without compilation.

    Attributes:
      temperature: as for ``sample``.
      top_p: as for ``sample``.
      stop: int32 (number,): tokens that end a sequence; or None.
    """

    temperature: Any = None
    top_p: Any = None
    stop: Any = None


def sample(
    logits: Any,
    key: Any = None,
    *,
    temperature: Any = None,
    top_k: int | None = None,
    top_p: Any = None,
) -> jax.Array:
    """Chooses a token for each row of logits.

    ``top_k`` is applied before ``top_p``, and both after the temperature.

    Args:
      logits: floating-point array (..., vocabulary).
      key: a JAX random key; needed where ``temperature`` is given.
      temperature: divides the logits, positive; the most likely token is taken if
        absent.
      top_k: how many of the most likely tokens are considered; all if absent.
      top_p: in (0, 1]: the fewest most likely tokens that together have this
        probability are considered; all if absent.

    Returns:
      int32 (...); -1 for a row that holds NaN.

    Raises:
      ArgumentError: a temperature without a key, or ``top_k`` is not positive.

    References:
      Holtzman et al., "The curious case of neural text degeneration",
      arXiv:1904.09751, section 3.1, for ``top_p``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> logits = jnp.array([[0.0, 3.0, 1.0], [jnp.nan, 0.0, 0.0]])
      >>> nnx.decoding.sample(logits)
      Array([ 1, -1], dtype=int32)
      >>> nnx.decoding.sample(logits, jax.random.key(0), temperature=2.0, top_k=1)
      Array([ 1, -1], dtype=int32)
    """
    if top_k is not None and top_k < 1:
        raise ArgumentError(f"top_k={top_k} leaves no token; it is 1 or more.")
    if temperature is None:
        chosen = jnp.argmax(logits, axis=-1)
    elif key is None:
        raise ArgumentError(
            "sample(temperature=...) draws, and needs a key: sample(logits, "
            "jax.random.key(0), temperature=...)."
        )
    else:
        scaled = logits.astype(jnp.float32) / temperature
        kept = min(top_k or scaled.shape[-1], scaled.shape[-1])
        if kept < scaled.shape[-1] or top_p is not None:
            # Sorted from the most likely down, so that both options keep the front.
            scaled, order = jax.lax.top_k(scaled, kept)
            if top_p is not None:
                before = jnp.cumsum(p := jax.nn.softmax(scaled), axis=-1) - p
                first = jnp.arange(kept) == 0
                scaled = jnp.where(first | (before < top_p), scaled, -jnp.inf)
            place = jax.random.categorical(key, scaled)
            chosen = jnp.take_along_axis(order, place[..., None], axis=-1)[..., 0]
        else:
            chosen = jax.random.categorical(key, scaled)
    bad = jnp.isnan(logits).any(axis=-1)
    return jnp.where(bad, NO_TOKEN, chosen).astype(jnp.int32)
