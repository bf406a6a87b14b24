"""Activation functions."""

from __future__ import annotations

import pytest
from flax import nnx as flax_nnx
from flax.nnx.nn import activations as flax_activations

import sortal as nnx


@pytest.mark.parametrize("name", sorted({*flax_activations.__all__} - {"PReLU"}))
def test_every_activation_is_the_one_that_flax_exports(name: str) -> None:
    assert getattr(nnx, name) is getattr(flax_nnx, name)
    assert getattr(nnx.nn.activations, name) is getattr(flax_nnx, name)
