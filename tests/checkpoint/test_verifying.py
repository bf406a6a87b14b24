"""verify: every byte of a step is read, and every sort of damage has its own line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from benchmarks import faults
from sortal.checkpoint import files, verifying
from sortal.checkpoint.verifying import open_step, read_step, verify
from sortal.errors import CheckpointError, DamagedError, NoCheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A step with packs of odd dtypes, and an array of several chunks."""
    root = {
        "big": nnx.Param(np.arange(2_200_000, dtype=np.float32).reshape(2200, 1000)),
        "small": nnx.Param(jnp.arange(5, dtype=jnp.bfloat16)),
        "int4": nnx.Cache(jnp.arange(5, dtype=jnp.int4)),
        "empty": nnx.Cache(jnp.zeros((0, 3))),
        "flags": nnx.BatchStat(np.ones((8, 600_000, 2), bool)),
    }
    return nnx.save(tmp_path_factory.mktemp("v"), root, step=4).path


@pytest.fixture
def step(saved, tmp_path) -> Path:
    """A copy to damage."""
    for file in filter(Path.is_file, saved.rglob("*")):
        copied = tmp_path / saved.name / str(file.relative_to(saved))
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
    return tmp_path / saved.name


def test_an_intact_step_has_no_faults_and_its_files_are_counted(step):
    told = []
    found = verify(step, progress=lambda done, total: told.append((done, total)))
    (folder,) = step.glob("arrays-*")
    there = [p for p in step.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in there if p.parent != step)
    assert (found.path, found.faults, found.extra) == (step, (), ())
    assert found.files == len(there)
    assert found.bytes == size
    done = [d for d, _ in told]
    assert done == sorted(done)
    assert done[-1] == size
    assert {total for _, total in told} == {size}
    # Once for each chunk, and at the end.
    assert len(told) == len(list(folder.rglob("c.*"))) + 1


def test_a_step_is_found_by_its_folder_or_by_its_number(step):
    above = step.parent
    assert verify(above).path == verify(above, 4).path == verify(str(step)).path == step
    assert open_step(step, 9) == step
    assert read_step(step).step == 4
    with pytest.raises(NoCheckpointError, match=r"no step 3 in .*: 4"):
        verify(above, 3)
    with pytest.raises(NoCheckpointError, match="no checkpoint in"):
        verify(step / "no")


DAMAGE: dict[str, tuple[Callable[[Path, bytes], object], str]] = {
    "a flipped bit": (
        lambda f, d: f.write_bytes(d[:1] + bytes([d[1] ^ 4]) + d[2:]),
        "",
    ),
    "a flipped last bit": (
        lambda f, d: f.write_bytes(d[:-1] + bytes([d[-1] ^ 1])),
        "not what was written: another checksum",
    ),
    "a byte too few": (lambda f, d: f.write_bytes(d[:-1]), " bytes, not "),
    "nothing left": (lambda f, d: f.write_bytes(b""), "0 bytes, not "),
    "a byte too many": (lambda f, d: f.write_bytes(d + b"\0"), " bytes, not "),
    "not there": (lambda f, d: f.unlink(), "missing"),
    "a folder instead": (lambda f, d: (f.unlink(), f.mkdir()), ""),
}
WHERE = (
    "zarr.json",
    "Param/zarr.json",
    "Param/big/zarr.json",
    "Param/big/c.1.0",
    "Param/packed/c.0",
    "Cache/packed/zarr.json",
    "BatchStat/flags/c.1.0.0",
)


@pytest.mark.parametrize("how", DAMAGE)
def test_each_sort_of_damage_to_each_sort_of_file_is_one_fault(saved, step, how):
    change, words = DAMAGE[how]
    (folder,) = step.glob("arrays-*")
    chunks = {str(p.relative_to(folder)) for p in folder.rglob("c.*")}
    where = [name for name in WHERE if (folder / name).is_file()]
    assert len(where) == len(WHERE)
    for name in where:
        file = folder / name
        intact = file.read_bytes()
        change(file, intact)
        (fault,) = verify(step).faults
        assert fault.startswith(f"{name}: ")
        if how == "a flipped bit":
            # Its end is as it was, so that only reading all of it tells.
            words = "damaged (" if name in chunks else "another checksum"
        assert words in fault
        if file.is_dir():
            file.rmdir()
        file.write_bytes(intact)
    assert verify(step).faults == ()


def test_a_chunk_with_the_right_end_but_other_numbers_is_found(step):
    """Its size and what the manifest has of it are right; its numbers are not."""
    (chunk,) = step.glob("arrays-*/Param/packed/c.0")
    data = chunk.read_bytes()
    chunk.write_bytes(bytes(len(data) - 4) + data[-4:])
    (fault,) = verify(step).faults
    assert fault.startswith("Param/packed/c.0: damaged (")
    assert "checksum" in fault.lower() or "digest" in fault.lower()


def test_chunks_that_changed_places_are_found(step):
    """Each is whole in itself."""
    (folder,) = step.glob("arrays-*/Param/big")
    a, b = folder / "c.0.0", folder / "c.1.0"
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)
    assert [f.partition(": ")[0] for f in verify(step).faults] == [
        "Param/big/c.0.0",
        "Param/big/c.1.0",
    ]


def test_all_faults_are_told_and_the_rest_is_read_all_the_same(step):
    for name in ("Param/big/c.0.0", "Cache/packed/c.0", "BatchStat/zarr.json"):
        next(step.glob(f"arrays-*/{name}")).unlink()
    (bad,) = step.glob("arrays-*/Param/packed/c.0")
    data = bytearray(bad.read_bytes())
    data[0] ^= 1
    bad.write_bytes(data)
    assert {f.partition(": ")[0] for f in verify(step).faults} == {
        "Param/big/c.0.0",
        "Cache/packed/c.0",
        "BatchStat/zarr.json",
        "Param/packed/c.0",
    }


def test_a_step_without_its_arrays_misses_every_file(step):
    (folder,) = step.glob("arrays-*")
    files.on(folder).remove(folder)
    found = verify(step)
    assert len(found.faults) == found.files - 1
    assert all(f.endswith(": missing") for f in found.faults)


def test_what_does_not_belong_there_is_told_and_is_no_fault(step):
    (folder,) = step.glob("arrays-*")
    (folder / "Param" / "notes.txt").write_text("mine")
    (folder / "Param" / "big" / "c.9.0").write_bytes(b"")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "x").write_bytes(b"")
    found = verify(step)
    assert found.faults == ()
    assert found.extra == ("Param/big/c.9.0", "Param/notes.txt", "deep/er/x")


def test_a_damaged_manifest_is_an_error_of_its_own(step):
    file = step / "manifest.json"
    intact, rng = file.read_bytes(), random.Random(0)  # noqa: S311 - no secrets here
    for how in (faults.flip, faults.truncate, faults.foreign):
        for _ in range(20):
            how(file, rng)
            if file.read_bytes() == intact:
                continue
            with pytest.raises(DamagedError, match=r"manifest\.json"):
                verify(step)
            file.write_bytes(intact)
    file.unlink()
    with pytest.raises(CheckpointError):
        verify(step)


def test_a_step_of_another_number_is_no_step(step):
    step.rename(step.parent / "5")
    with pytest.raises(DamagedError, match="holds step 4: it was renamed or copied"):
        verify(step.parent)


def test_nothing_is_written_by_looking(step):
    before = {p: p.stat().st_mtime_ns for p in step.rglob("*")}
    verify(step)
    assert {p: p.stat().st_mtime_ns for p in step.rglob("*")} == before
    text = json.loads((step / "manifest.json").read_text())["manifest"]
    assert set(text["files"]) == {
        str(p.relative_to(step / text["folder"]))
        for p in (step / text["folder"]).rglob("*")
        if p.is_file()
    }
    assert files.steps(step.parent) == [4]


def test_a_folder_that_is_no_step_is_refused_by_verify(tmp_path):
    nnx.save(tmp_path, nnx.Rngs(0), step=0).path.rename(tmp_path / "copy")
    with pytest.raises(DamagedError, match="does not have the number of a step as its"):
        verify(tmp_path / "copy")


def test_a_step_replaced_while_it_is_verified_is_verified_again(tmp_path, monkeypatch):
    nnx.save(tmp_path, nnx.Rngs(0), step=0)
    real, changes = verifying.Reader.faults, iter(range(2))

    def replaced(reader, names):
        if next(changes, None) is not None:
            nnx.save(tmp_path, nnx.Rngs(0), step=0)
        return real(reader, names)

    monkeypatch.setattr(verifying.Reader, "faults", replaced)
    assert verify(tmp_path).faults == ()
