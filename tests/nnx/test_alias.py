"""`sys.modules["flax.nnx"]` may be `sortal.nnx`."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEFORE = """
import sys, sortal
from sortal import nnx
sys.modules["flax.nnx"] = nnx
"""
AFTER = """
import sys, flax.nnx
from sortal import nnx
flax_nnx, flax.nnx, sys.modules["flax.nnx"] = flax.nnx, nnx, nnx
"""
RUN = """
import jax.numpy as jnp
from flax import nnx
assert nnx.__name__ == "sortal.nnx"
model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
assert nnx.jit(lambda m, x: m(x))(model, jnp.ones((1, 2, 4))).shape == (1, 2, 4)
"""
BACK = """
flax.nnx = sys.modules["flax.nnx"] = flax_nnx
layer = flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0))
assert sortal_nnx.state(layer).paths() == (("bias",), ("kernel",))
"""


@pytest.mark.parametrize(
    "program",
    [
        BEFORE + "import flax; flax.nnx = nnx" + RUN,
        AFTER + RUN,
        AFTER + "sortal_nnx = nnx" + RUN + BACK,
    ],
    ids=["before", "after", "and-back"],
)
def test_sortal_stands_in_for_flax(program: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
