"""What a save promises of the disk: all is there before the step counts."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
import pytest

import sortal as nnx
from sortal.checkpoint import files
from sortal.errors import ArgumentError
from sortal.interop.files import exchange


def test_everything_is_on_disk_before_the_manifest_gets_its_name(tmp_path, monkeypatch):
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
    root = {
        "own": nnx.Param(jnp.ones((2100, 1000))),
        "packed": [nnx.Param(jnp.ones((700, 1000))) for _ in range(2)],
        "small": nnx.Cache(jnp.ones(2)),
    }
    path = nnx.save(tmp_path, root, step=0).path
    assert len(list(path.rglob("c.*"))) > 5
    due = {p.stat().st_ino for p in path.rglob("*")}
    due |= {path.stat().st_ino, tmp_path.stat().st_ino}
    assert due <= set(before_commit) | {path.stat().st_ino}
    # The name itself is made to survive by syncing its folder once more.
    assert synced[-1] != synced[0]
    assert path.stat().st_ino in synced[len(before_commit) :]


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


def test_syncs_reports_every_fault_and_syncs_the_rest(tmp_path, monkeypatch):
    seen = []

    def failing(path):
        seen.append(path.name)
        if path.name.startswith("bad"):
            raise OSError(5, f"no {path.name}")

    monkeypatch.setattr(files, "sync", failing)
    names = ["a", "bad1", "b", "bad2", *map(str, range(20))]
    syncs = files.Syncs()
    for name in names:
        syncs.add(tmp_path / name)
    assert sorted(str(e) for e in syncs.finish()) == [
        "[Errno 5] no bad1",
        "[Errno 5] no bad2",
    ]
    assert sorted(seen) == sorted(names)


def test_syncs_asks_the_system_about_the_files(tmp_path):
    (tmp_path / "there").write_bytes(b"x")
    syncs = files.Syncs()
    syncs.add(tmp_path / "there")
    syncs.add(tmp_path / "missing")
    (fault,) = syncs.finish()
    assert isinstance(fault, FileNotFoundError)


@pytest.mark.parametrize(
    "call",
    [
        lambda at: nnx.save(at, nnx.Rngs(0), step=0),
        lambda at: nnx.restore(at, nnx.Rngs(0)),
        lambda at: nnx.load_state(at),
        lambda at: nnx.Checkpoints(at),
        lambda at: exchange.open_arrays(at),
        lambda at: exchange.export(at, nnx.Rngs(0)),
    ],
)
def test_an_address_is_refused_rather_than_made_a_folder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for at in ("gs://bucket/run", "s3://bucket/run.npz", Path("gs://bucket/run")):
        with pytest.raises(ArgumentError, match=r"found the address .(gs|s3):/"):
            call(at)
    with pytest.raises(ArgumentError, match=r"found a Linear\. It comes first"):
        call(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    assert list(tmp_path.iterdir()) == []


def test_a_colon_in_a_name_is_no_address(tmp_path):
    assert files.local(tmp_path / "a:b" / "c").name == "c"
    assert files.local("2026-11-25T10:00:00/run").is_absolute()
