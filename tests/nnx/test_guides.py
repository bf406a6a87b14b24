"""Counterparts of Flax's guides print the same under either library."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx as flax_nnx
from tests.nnx.guides import fundamentals, running, systems

from sortal import nnx

GUIDES = [
    fundamentals.basics,
    fundamentals.key_concepts,
    fundamentals.randomness,
    fundamentals.filters,
    fundamentals.surgery,
    running.transforms,
    running.performance,
    running.extracting_intermediates,
    running.optimization_cookbook,
    systems.checkpointing,
    systems.gspmd,
    systems.bridge,
]


def plain(x: Any) -> Any:
    """Output as numbers, texts and containers of them."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return [plain(v) for v in x]
    return np.asarray(x).tolist() if isinstance(x, jax.Array | np.ndarray) else x


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.__name__)
def test_a_guide_gives_the_output_that_it_gives_with_flax(guide: Any) -> None:
    found, expected = plain(guide(nnx)), plain(guide(flax_nnx))
    assert len(found) == len(expected)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        assert x == y, i
