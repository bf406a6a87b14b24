"""Sampling: which token follows, given the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sortal._engine.variable import describe
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
      key: a JAX random key; needed where ``temperature`` is given and not 0.
      temperature: divides the logits, finite and not negative; the most likely token is
        taken if it is 0 or absent.
      top_k: how many of the most likely tokens are considered; all if absent.
      top_p: in (0, 1]: the fewest most likely tokens that together have this
        probability are considered; all if absent.

    Returns:
      int32 (...); -1 for a row that holds NaN or infinity, or nothing but -infinity;
      and for all rows where a traced temperature or ``top_p`` is invalid.

    Raises:
      ArgumentError: an option is invalid, a temperature comes without a key, or the
        logits are not of this dtype and shape.

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
    temperature, top_k, top_p = checked_options(temperature, top_k, top_p)
    logits = jnp.asarray(logits)
    size = logits.shape[-1] if logits.ndim else 0
    if not size or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ArgumentError(
            "logits are floating-point numbers of shape (..., vocabulary); found "
            f"{describe(logits)}."
        )
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    bad = jnp.isnan(logits).any(axis=-1) | jnp.isinf(logits.max(axis=-1))
    if temperature is None:
        return jnp.where(bad, NO_TOKEN, likeliest)
    if key is None:
        raise ArgumentError(
            "sample(temperature=...) draws, and needs a key: sample(logits, "
            "jax.random.key(0), temperature=...)."
        )
    heat = jnp.asarray(temperature, jnp.float32)
    # Of a traced number only the program can say that it means nothing.
    if _is_traced_number(temperature):
        bad |= ~(jnp.isfinite(heat) & (heat >= 0))
    if _is_traced_number(top_p):
        bad |= ~((top_p > 0) & (top_p <= 1))
    # The greatest is subtracted first, so that no quotient is infinite.
    scaled = (logits - logits.max(axis=-1, keepdims=True)).astype(jnp.float32)
    limits = jnp.finfo(jnp.float32)
    scaled = scaled / jnp.clip(heat, limits.tiny, limits.max)
    kept = min(top_k or size, size)
    if kept < size or top_p is not None:
        # Sorted from the most likely down, so that both options keep the front.
        scaled, order = jax.lax.top_k(scaled, kept)
        if top_p is not None:
            before = jnp.cumsum(p := jax.nn.softmax(scaled), axis=-1) - p
            wanted = (before < top_p).at[..., 0].set(True)
            scaled = jnp.where(wanted, scaled, -jnp.inf)
        place = jax.random.categorical(key, scaled)
        chosen = jnp.take_along_axis(order, place[..., None], axis=-1)[..., 0]
    else:
        chosen = jax.random.categorical(key, scaled)
    chosen = jnp.where(heat > 0, chosen.astype(jnp.int32), likeliest)
    return jnp.where(bad, NO_TOKEN, chosen)


def checked_options(
    temperature: Any, top_k: Any, top_p: Any
) -> tuple[Any, int | None, Any]:
    """The options of sampling, as ``sample``, ``stream`` and ``generate`` take them.

    Args:
      temperature: as for ``sample``.
      top_k: as for ``sample``.
      top_p: as for ``sample``.

    Returns:
      The same; all None where the most likely token is taken, and ``top_p`` None where
      it leaves nothing out.

    Raises:
      ArgumentError: one of them is invalid. Of numbers of a trace only the shape is
        known.

    Example:
      >>> checked_options(0.0, 5, 0.9), checked_options(0.7, 5, 1.0)
      ((None, None, None), (0.7, 5, None))
    """
    if temperature is not None and not _is_traced_number(temperature):
        number = _number(temperature)
        if number is None or not 0 <= number < float("inf"):
            raise ArgumentError(
                f"temperature={_shown(temperature)}; it is a finite number, 0 or more. "
                "0 takes the most likely token."
            )
        temperature = None if number == 0 else temperature
    if top_p is not None and not _is_traced_number(top_p):
        number = _number(top_p)
        if number is None or not 0 < number <= 1:
            raise ArgumentError(
                f"top_p={_shown(top_p)}; it is above 0 and at most 1. None considers "
                "all tokens."
            )
        top_p = None if number == 1 else top_p
    if top_k is not None:
        top_k = whole_number("top_k", top_k, 1, " None considers all tokens.")
    return (None, None, None) if temperature is None else (temperature, top_k, top_p)


def whole_number(name: str, found: Any, least: int, more: str = "") -> int:
    """An option that is a whole number, as an ``int``.

    Args:
      name: the option.
      found: what was given for it.
      least: the least number that it may be.
      more: ends the message.

    Returns:
      The number.

    Raises:
      ArgumentError: it is no whole number, or too small.

    Example:
      >>> whole_number("top_k", np.int64(3), 1)
      3
    """
    whole = isinstance(found, (int, np.integer)) and not isinstance(found, bool)
    if not whole or found < least:
        raise ArgumentError(
            f"{name}={_shown(found)}; it is a whole number, {least} or more.{more}"
        )
    return int(found)


def _is_traced_number(x: Any) -> bool:
    return isinstance(x, Tracer) and not x.ndim


def _number(x: Any) -> float | None:
    """A concrete real number as a float; None where it is none."""
    if isinstance(x, (bool, str)) or np.ndim(x) or not hasattr(x, "__float__"):
        return None
    return float(x)


def _shown(x: Any) -> str:
    if isinstance(x, Tracer):
        return describe(x)
    return f"{x.item() if hasattr(x, 'item') and not np.ndim(x) else x!r:.60}"
