"""What a save promises of the disk: all is there before the step counts."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import jax.numpy as jnp
import pytest

import sortal as nnx
from sortal.checkpoint import disk, files
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
    assert len(list(path.rglob("c.*"))) == 5
    due = {p.stat().st_ino for p in path.rglob("*")}
    due |= {path.stat().st_ino, tmp_path.stat().st_ino}
    assert due <= set(before_commit) | {path.stat().st_ino}
    # The name itself is made to survive by syncing its folder once more.
    assert synced[-1] != synced[0]
    assert path.stat().st_ino in synced[len(before_commit) :]


def test_a_deletion_first_makes_the_step_not_count(tmp_path, monkeypatch):
    nnx.save(tmp_path, nnx.Rngs(0), step=0)
    monkeypatch.setattr(files, "clean_step", lambda directory, step, keep: None)
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
    there, root = set(path.rglob("*")), faults.model(0, 1.0)
    nnx.save(tmp_path / "other", root, step=0)  # compiles what JAX may keep in files
    with faults.small_files(10), pytest.raises(nnx.errors.SaveError):
        nnx.save(tmp_path, root, step=0)
    assert set(path.rglob("*")) == there


def test_syncs_reports_every_fault_and_syncs_the_rest(tmp_path, monkeypatch):
    seen = []

    def failing(path):
        seen.append(path.name)
        if path.name.startswith("bad"):
            raise OSError(5, f"no {path.name}")

    monkeypatch.setattr(disk, "sync", failing)
    names = ["a", "bad1", "b", "bad2", *map(str, range(20))]
    syncs = disk.Syncs()
    for name in names:
        syncs.add(tmp_path / name)
    assert sorted(str(e) for e in syncs.finish()) == [
        "[Errno 5] no bad1",
        "[Errno 5] no bad2",
    ]
    assert sorted(seen) == sorted(names)


def test_syncs_asks_the_system_about_the_files(tmp_path):
    (tmp_path / "there").write_bytes(b"x")
    syncs = disk.Syncs()
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
    ],
)
def test_an_address_of_no_object_store_is_refused(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for at in ("hdfs://bucket/run", "http://host/x", Path("gs://bucket/run"), "s3://"):
        with pytest.raises(ArgumentError, match=r"found the address .\w+:/"):
            call(at)
    with pytest.raises(ArgumentError, match="an address has no empty part"):
        call("s3://bucket/a/../b")
    with pytest.raises(ArgumentError, match=r"found a Linear\. It comes first"):
        call(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    assert list(tmp_path.iterdir()) == []


def test_an_address_of_a_file_is_its_path(tmp_path):
    nnx.save(f"file://{tmp_path}/a%20b", nnx.Rngs(0), step=3)
    assert files.steps(tmp_path / "a b") == [3]
    assert nnx.restore(tmp_path / "a b", nnx.Rngs(1)).step == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda at: exchange.open_arrays(at),
        lambda at: exchange.export(at, nnx.Rngs(0)),
    ],
)
def test_an_address_is_refused_rather_than_made_a_folder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for at in ("gs://bucket/x.gguf", "s3://bucket/run.npz", Path("gs://bucket/run")):
        with pytest.raises(ArgumentError, match=r"found the address .(gs|s3):/"):
            call(at)
    with pytest.raises(ArgumentError, match=r"found a Linear\. It comes first"):
        call(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    assert list(tmp_path.iterdir()) == []


def test_a_colon_in_a_name_is_no_address(tmp_path):
    assert files.local(tmp_path / "a:b" / "c").name == "c"
    assert files.local("2026-11-25T10:00:00/run").is_absolute()


def test_a_path_above_and_the_home_folder_are_what_a_shell_makes_of_them(
    tmp_path, monkeypatch
):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    big = {"x": nnx.Param(jnp.arange(1_100_000))}
    assert nnx.save("../run", big, step=1).path == tmp_path / "run" / "1"
    assert nnx.restore("../a/../run", big).step == 1
    nnx.save("~/run", big, step=2)
    assert files.steps(tmp_path / "home" / "run") == [2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "home", "run"]
    # Above a link is above what it leads to, as for the system.
    (tmp_path / "a" / "b").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    assert files.local(tmp_path / "link" / ".." / "x") == tmp_path / "a" / "x"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", r"empty; the present folder is '\.'"),
        ("a\0b", "no zero bytes"),
        ("a\\..\\..\\b", "no backslashes, which TensorStore takes for slashes"),
        ("a\ud800b", "no text in UTF-8"),
        (b"a\xffb", "no text in UTF-8"),
    ],
)
def test_a_path_that_is_another_one_for_tensorstore_is_refused(
    tmp_path, monkeypatch, name, why
):
    """With a backslash, the arrays were written outside of the directory."""
    monkeypatch.chdir(tmp_path)
    for do in (nnx.restore, lambda at, root: nnx.save(at, root, step=0)):
        with pytest.raises(ArgumentError, match=why):
            do(name, nnx.Rngs(0))
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_is_refused_and_its_target_left(tmp_path):
    (tmp_path / "mine").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(nnx.errors.SaveError, match="cannot write to"):
        nnx.save(run, nnx.Rngs(0), step=0)
    assert (tmp_path / "mine").read_text() == "mine"
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(nnx.errors.SaveError, match="not a regular file"):
        nnx.save(run, nnx.Rngs(0), step=0)


def test_a_file_system_without_locks_is_no_other_writer(tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(nnx.errors.SaveError, match="system without locks") as caught:
        nnx.save(tmp_path, nnx.Rngs(0), step=0)
    assert not isinstance(caught.value, nnx.errors.WriterError)


def test_locks_that_keep_nobody_out_are_noticed_at_the_first_save(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    for _ in range(2):
        with pytest.raises(nnx.errors.SaveError, match=r"whose locks .* two writers"):
            nnx.save(tmp_path, nnx.Rngs(0), step=0)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    nnx.save(tmp_path, nnx.Rngs(0), step=0)


@pytest.mark.parametrize("what", ["fsync of files", "fsync of folders", "rename"])
def test_what_a_file_system_cannot_do_is_said_at_the_first_save(
    tmp_path, monkeypatch, what
):
    fsync = os.fsync

    def unsupported(at, *_):
        if what == "rename" or ("folders" in what) == stat.S_ISDIR(
            os.fstat(at).st_mode
        ):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(at)

    if what == "rename":
        monkeypatch.setattr(Path, "replace", unsupported)
    else:
        monkeypatch.setattr(os, "fsync", unsupported)
    named = what.partition(" ")[0]
    with pytest.raises(
        nnx.errors.SaveError, match=rf"cannot do what saves rely on \({named}: Invalid"
    ):
        nnx.save(tmp_path / "run", nnx.Rngs(0), step=0)
    assert list((tmp_path / "run").iterdir()) == []


def test_the_file_system_is_checked_once_and_nothing_is_left(tmp_path, monkeypatch):
    checked = []
    real = disk.check_file_system
    monkeypatch.setattr(
        disk, "check_file_system", lambda *a: (checked.append(a), real(*a))
    )
    for step in range(3):
        nnx.save(tmp_path, nnx.Rngs(0), step=step)
    assert len(checked) == 1
    assert {p.name for p in tmp_path.iterdir()} == {".lock", "0", "1", "2"}


def test_a_leftover_that_cannot_be_removed_is_told_and_blocks_no_save(
    tmp_path, monkeypatch
):
    left = tmp_path / "1" / "arrays-0123456789abcdef"
    left.mkdir(parents=True)
    real = disk.shutil.rmtree

    def denied(path):
        if path == left:
            raise PermissionError(13, "Permission denied", str(path))
        real(path)

    monkeypatch.setattr(disk.shutil, "rmtree", denied)
    with pytest.warns(UserWarning, match="cannot be removed: .*0123456789abcdef"):
        nnx.save(tmp_path, nnx.Rngs(0), step=2)
    assert files.steps(tmp_path) == [2]


def test_a_sync_that_fails_after_the_commit_says_that_the_step_is_there(
    tmp_path, monkeypatch
):
    real = disk.sync

    def failing(path):
        if path.name == "1" and (path / "manifest.json").exists():
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(disk, "sync", failing)
    with pytest.raises(nnx.errors.SaveError, match="can be restored, but") as caught:
        nnx.save(tmp_path, nnx.Rngs(0), step=1)
    assert "nothing was committed" not in str(caught.value)
    assert nnx.restore(tmp_path, nnx.Rngs(1)).step == 1


def test_a_sync_that_fails_in_any_way_commits_nothing(tmp_path, monkeypatch):
    real = disk.sync

    def failing(path):
        if path.name == "c.0":
            raise MemoryError
        real(path)

    monkeypatch.setattr(disk, "sync", failing)
    with pytest.raises(nnx.errors.SaveError, match="nothing was committed"):
        nnx.save(tmp_path, nnx.Rngs(0), step=1)
    assert files.steps(tmp_path) == []
