"""What a save promises of the disk: all is there before the step counts."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
import pytest

import sortal as nnx
from sortal.checkpoint import files


def test_everything_is_on_disk_before_the_manifest_gets_its_name(tmp_path, monkeypatch):
    """Chunks are synced by TensorStore, which is asked to; the rest is seen here."""
    synced: list[int] = []
    before_commit: list[int] = []
    fsync, replace = os.fsync, Path.replace

    def note(at):
        fsync(at)
        synced.append(os.fstat(at).st_ino)

    def rename(self, target):
        before_commit[:] = synced
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", rename)
    big = nnx.Param(jnp.ones((1100, 1000)))
    path = nnx.save(tmp_path, {"a": big, "b": nnx.Cache(jnp.ones(2))}, step=0).path
    chunks = set(path.rglob("c.*"))
    due = {p.stat().st_ino for p in path.rglob("*") if p not in chunks}
    due |= {path.stat().st_ino, tmp_path.stat().st_ino}
    assert due <= set(before_commit) | {path.stat().st_ino}
    # The name itself is made to survive by syncing its folder once more.
    assert synced[-1] != synced[0]
    assert path.stat().st_ino in synced[len(before_commit) :]


def test_tensorstore_is_asked_to_sync_each_chunk(tmp_path, monkeypatch):
    from sortal.checkpoint import store

    asked = []
    context = store._context
    monkeypatch.setattr(
        store, "_context", lambda **more: asked.append(more) or context(**more)
    )
    nnx.save(tmp_path, nnx.Rngs(0), step=0)
    assert {"file_io_sync": True, "file_io_locking": {"mode": "none"}} in asked


def test_a_deletion_first_makes_the_step_not_count(tmp_path, monkeypatch):
    nnx.save(tmp_path, nnx.Rngs(0), step=0)
    monkeypatch.setattr(files, "clean_step", lambda folder, keep: None)
    files.forget(tmp_path, 0)
    assert files.steps(tmp_path) == []
    assert (tmp_path / "0").exists()


def test_a_step_whose_manifest_is_damaged_is_never_cleaned(tmp_path):
    path = nnx.save(tmp_path, nnx.Rngs(0), step=0).path
    (path / "arrays-0123456789abcdef").mkdir()
    (path / "manifest.json").write_bytes(b"damaged")
    there = set(path.iterdir())
    nnx.save(tmp_path, nnx.Rngs(0), step=1)
    assert set(path.iterdir()) == there


def test_a_failed_replacement_of_a_damaged_step_leaves_its_files(tmp_path):
    from benchmarks import faults

    path = nnx.save(tmp_path, nnx.Rngs(0), step=0).path
    (path / "manifest.json").write_bytes(b"damaged")
    there = set(path.rglob("*"))
    with faults.small_files(10), pytest.raises(nnx.errors.SaveError):
        nnx.save(tmp_path, faults.model(0, 1.0), step=0)
    assert set(path.rglob("*")) == there
