"""Layers are tested by what they compute, not by how fast."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    """Spends no time on fast code: what is tested is which operations are done."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
