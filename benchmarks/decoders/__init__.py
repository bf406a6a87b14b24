"""One decoder written three times: in Sortal, in Flax NNX, and by hand in JAX.

Each file has ``prepare(config, params, batch, length)``, which returns a Contender. All
get the same parameters, keep keys and values in the same order, and take the likeliest
token, so that they must give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

NAMES = ("sortal", "flax", "raw")
Params = dict[tuple[Any, ...], np.ndarray]


class Contender(NamedTuple):
    """What a decoder offers to be measured by."""

    reset: Callable[[], None]
    """Empties the caches."""
    step: Callable[[Any], jax.Array]
    """Takes a token for each sequence, (batch,), and returns the next ones."""
    loop: Callable[[Any, int], jax.Array] | None
    """The same for several steps, as one compiled program; the last token."""
    analysis: Callable[[Any], Any]
    """XLA's memory analysis of a step."""
