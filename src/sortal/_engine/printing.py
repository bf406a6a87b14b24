"""What ``print`` shows of values: numbers of small ones, statistics on request."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

_SMALL = 64
"""How many numbers are shown at most."""
STATISTICS = "stats"


def _readable(x: Any) -> bool:
    """Whether the numbers of a value can be read here and now."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray):
        return False
    plain = jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
    if isinstance(x, np.ndarray) or not plain:
        return plain
    return x.is_fully_addressable and not x.is_deleted()


def text(value: Any, described: str, before: str, spec: str) -> str:
    """A value after some text, with which it is aligned.

    Args:
      value: the value.
      described: its dtype and shape.
      before: the text.
      spec: ``stats`` for mean and extremes.

    Returns:
      The text of the value.
    """
    if spec == STATISTICS and _readable(value) and value.size > 1:
        x = np.asarray(value).astype(np.float64)
        return f"{described}, mean {x.mean():.4g}, {x.min():.4g} to {x.max():.4g}"
    if not _readable(value) or value.size > _SMALL:
        return described
    head = f"{described}: "
    return head + np.array2string(np.asarray(value), prefix=before + head)
