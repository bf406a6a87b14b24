"""Copies of steps: nothing of an interrupted one stays."""

from __future__ import annotations

import jax.numpy as jnp

import sortal as nnx
from sortal.checkpoint.copying import copy_step
from sortal.checkpoint.verifying import verify


def test_what_a_killed_copy_left_is_removed_by_the_next(tmp_path):
    path = nnx.save(tmp_path / "a", {"w": nnx.Param(jnp.ones(3))}, step=1).path
    left = tmp_path / "b" / "1" / "arrays-000000000000-00000000"
    left.mkdir(parents=True)
    (left / "zarr.json").write_text("half")
    copied = copy_step(path, tmp_path / "b")
    assert not left.exists()
    assert verify(copied).faults == ()
