"""Checkpoints in object stores, on moto's S3 server: the same promises as on disk."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.checkpoint import bucket, files, forks, layout, store, taking
from sortal.checkpoint.bucket import Address
from sortal.checkpoint.copying import copy_step
from sortal.checkpoint.verifying import verify
from sortal.errors import (
    ArgumentError,
    CheckpointError,
    DamagedError,
    NoCheckpointError,
    RestoreError,
    SaveError,
    WriterError,
)
from sortal.inspect.cli import main


class Last(nnx.Variable, checkpoint="keep-last"):
    pass


@pytest.fixture
def run(bucket_name):
    """The address of a directory in a bucket of its own."""
    return f"s3://{bucket_name}/runs/digits"


@pytest.fixture(autouse=True)
def small_chunks(request, monkeypatch):
    """Chunks of 64 KiB in the place of 4 MiB, so that small arrays are divided too."""
    if "real_sizes" not in request.fixturenames:
        monkeypatch.setattr(store, "CHUNK", 1 << 16)
        for module in (layout, taking):
            monkeypatch.setattr(module, "SMALL", 1 << 16)


@pytest.fixture
def real_sizes():
    """Leaves chunks as they are."""


def model(seed: int = 0, rows: int = 32) -> Any:
    """One of everything: packed, by itself, sharded, keys, NumPy and plain values."""
    rng = np.random.default_rng(seed)
    mesh = jax.make_mesh((8,), ("x",))
    to = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    root = nnx.Module()
    root.small = nnx.Param(jnp.asarray(rng.standard_normal((3, 5), np.float32)))
    root.large = nnx.Param(jnp.asarray(rng.standard_normal((rows, 1100), np.float32)))
    split = rng.standard_normal((rows, 1024), np.float32)
    root.split = nnx.BatchStat(jax.device_put(split, to))
    root.key = nnx.RngKey(jax.random.key(seed))
    root.raw = rng.standard_normal(7)
    root.odd = nnx.Variable({"a": [jnp.ones(2, jnp.bfloat16) * seed, seed], "b": None})
    return root


def bits(root: Any) -> list[bytes]:
    leaves = jax.tree.leaves(nnx.state(root))
    keys = (
        jax.dtypes.issubdtype(getattr(x, "dtype", int), jax.dtypes.prng_key)
        for x in leaves
    )
    return [
        np.asarray(jax.random.key_data(x) if is_key else x).tobytes()
        for x, is_key in zip(leaves, keys, strict=True)
    ]


def at(run: str, *names: str) -> Address:
    found = Address.of("/".join([run, *names]))
    assert found is not None
    return found


def keys(run: str) -> list[str]:
    return bucket.names(at(run))


def chunks(run: str) -> list[str]:
    return [name for name in keys(run) if "/c." in name]


@pytest.mark.parametrize("wait", [True, False])
def test_a_step_comes_back_to_the_bit(run, real_sizes, wait):
    root, other = model(1, rows=1056), model(2, rows=1056)
    saving = nnx.save(run, root, step=7, metadata={"epoch": 2}, wait=wait).wait()
    assert str(saving.path) == f"{run}/7"
    found = nnx.restore(run, other)
    assert bits(other) == bits(root)
    assert other.split.value.sharding == root.split.value.sharding
    assert (found.step, found.metadata) == (7, {"epoch": 2})
    assert nnx.load_state(run, only=nnx.Param).paths() == (("large",), ("small",))
    assert verify(run)[3:] == ((), ())


def test_the_files_are_those_on_disk(run, tmp_path):
    nnx.save(run, model(), step=3)
    nnx.save(tmp_path, model(), step=3)
    manifests = [files.read_manifest(x, 3) for x in (at(run), tmp_path)]
    assert manifests[0].files == manifests[1].files
    assert manifests[0].arrays == manifests[1].arrays
    local = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    folders = [m.folder for m in manifests]
    assert {name.replace(*folders) for name in keys(run)} == local


def test_a_manager_keeps_what_it_is_to_keep(run):
    with nnx.Checkpoints(run, keep=2, best="score") as kept:
        for step, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4]):
            kept.save({"w": nnx.Param(step)}, step=step, metrics={"score": score})
        assert kept.steps() == (1, 3, 4)
        assert (kept.latest(), kept.best()) == (4, 1)
        root = {"w": nnx.Param(0)}
        assert kept.restore(root, step="best").step == root["w"].value == 1
        kept.save(root, step=2, metrics={"score": 0.0})
        assert kept.latest() == 2
        kept.delete(1)
    assert nnx.Checkpoints(run).steps() == (2, 4)
    assert {name.partition("/")[0] for name in keys(run)} == {".lock", "2", "4"}


@pytest.mark.parametrize("how", ["cut", "longer", "missing"])
def test_a_step_that_is_not_whole_takes_no_place_among_those_kept(run, how):
    with nnx.Checkpoints(run, keep=2) as kept:
        for step in (1, 2, 3):
            kept.save({"w": nnx.Param(jnp.ones(3) * step)}, step=step)
            if step == 2:
                (chunk,) = (at(run, x) for x in chunks(run) if x.startswith("2/"))
                data = bucket.read(chunk)
                new = {"cut": data[:-1], "longer": data + b"x", "missing": None}[how]
                bucket._kvs(chunk).write(chunk.key, new).result()
        assert kept.steps() == (1, 2, 3)


def test_a_step_saved_again_is_replaced_whole(run):
    nnx.save(run, {"w": nnx.Param(jnp.ones(3)), "x": nnx.Cache(1)}, step=0)
    nnx.save(run, {"w": nnx.Param(jnp.zeros(3))}, step=0)
    assert nnx.load_state(run).paths() == (("w",),)
    assert len({name.split("/")[1] for name in keys(run) if "arrays-" in name}) == 1


def test_keep_last_goes_when_a_newer_step_is_saved(run):
    root = {"a": Last(jnp.ones(3)), "b": nnx.Param(jnp.ones(3))}
    root["c"] = Last(jnp.ones((110, 1000)))
    nnx.save(run, root, step=1)
    nnx.save(run, root, step=2)
    assert nnx.load_state(run, step=1).paths() == (("b",),)
    assert len(nnx.load_state(run, step=2).paths()) == 3
    assert verify(run, 1)[3:] == verify(run, 2)[3:] == ((), ())
    assert not [name for name in keys(run) if name.startswith("1/") and "~last" in name]


def test_damage_is_found_and_the_model_left_as_it_was(run):
    def part(seed):
        return {
            name: getattr(model(seed), name) for name in ("small", "large", "split")
        }

    nnx.save(run, part(1), step=0)
    nnx.save(run, part(2), step=1)
    ends = ("/c.0", "/c.0.0")  # one chunk of each array
    names = [x for x in chunks(run) if x[:2] == "1/" and x.endswith(ends)]
    other = part(3)
    sorts = (("flipped",), ("cut", "longer"), ("missing", "foreign"))
    for name, mine in zip(names, sorts, strict=True):
        data = bucket.read(at(run, name))
        kvs, key = bucket._kvs(at(run)), at(run, name).key
        ways = {
            "flipped": bytes([data[0] ^ 1]) + data[1:],
            "cut": data[:-5],
            "longer": data + b"x",
            "missing": None,
            "foreign": data[:-4] + b"0000",
        }
        for how, new in ((how, ways[how]) for how in mine):
            kvs.write(key, new).result()
            with pytest.raises(DamagedError):
                nnx.restore(run, other)
            (fault,) = verify(run).faults
            assert name.partition("/")[2].partition("/")[2] in fault, how
        kvs.write(key, data).result()
    assert bits(other) == bits(part(3))
    assert nnx.restore(run, other).step == 1


def test_a_damaged_newest_step_falls_back_to_a_whole_one(run):
    for step in (1, 2):
        nnx.save(run, model(step), step=step)
    bucket.remove(at(run, next(x for x in chunks(run) if x.startswith("2/"))))
    with pytest.raises(DamagedError, match=r"step 2, the newest in s3://"):
        nnx.restore(run, model())
    with pytest.warns(RuntimeWarning, match="step 1 of s3://.* instead of step 2"):
        assert nnx.restore(run, other := model(), fallback=True).step == 1
    assert bits(other) == bits(model(1))


def test_the_commands_read_and_write_it(run, tmp_path, capsys):
    nnx.save(run, {"w": nnx.Param(jnp.ones(3)), "n": nnx.Cache(1)}, step=1)
    nnx.save(run, {"w": nnx.Param(jnp.zeros(3)), "n": nnx.Cache(1)}, step=2)
    assert main(["inspect", run]) == 0
    assert f"{run}/2 (sortal, step 2)" in " ".join(capsys.readouterr().out.split())
    assert main(["diff", run, run, "--step-a", "1"]) == 1
    assert main(["diff", f"{run}/1", run, "--step-b", "1"]) == 0
    assert main(["verify", run]) == 0
    capsys.readouterr()
    bucket.remove(at(run, *chunks(run)[-1].split("/")))
    assert main(["verify", run]) == 1
    assert "missing" in capsys.readouterr().out
    bucket.write(at(run, "2"), {"manifest.json": b"junk"})
    assert main(["verify", run, "--step", "2"]) == 1
    assert main(["inspect", f"{run}/nothing"]) == 2
    assert f"no checkpoint in {run}/nothing" in capsys.readouterr().err


def test_a_step_goes_from_disk_to_a_store_and_back_whole(run, tmp_path, capsys):
    root = {"m": model(1), "l": Last(jnp.ones(2)), "p": nnx.Param(7)}
    here, there, back = str(tmp_path / "a"), f"{run}/b", str(tmp_path / "c")
    nnx.save(here, root, step=3, metadata={"epoch": 2})
    ways = (here, there), (there, f"{run}/c"), (f"{run}/c/3", back)
    for source, target in ways:
        assert main(["convert", source, target]) == 0
        assert main(["convert", source, target]) == 2
        assert f"{target} has a step 3 already" in capsys.readouterr().err
        assert main(["diff", here, target]) == 0
        assert verify(target)[3:] == ((), ())
    nnx.restore(
        back, other := {"m": model(2), "l": Last(jnp.zeros(2)), "p": nnx.Param(0)}
    )
    assert bits(other) == bits(root)
    nnx.save(there, root, step=4)
    assert "Last" in repr(nnx.load_state(f"{run}/c"))
    assert "Last" not in repr(nnx.load_state(there, step=3))


def test_files_of_others_come_from_a_store_and_go_to_none(run, tmp_path, capsys):
    nnx.save(run, {"w": nnx.Param(jnp.ones(3))}, step=1)
    assert main(["convert", run, str(tmp_path / "x.npz")]) == 0
    assert main(["convert", str(tmp_path / "x.npz"), f"{run}/new"]) == 0
    assert main(["diff", f"{run}/new", str(tmp_path / "x.npz")]) == 0
    before = keys(run)
    for target in (f"{run}/x.npz", f"orbax:{run}/x"):
        assert main(["convert", run, target]) == 2
        assert "this is read and written by the file system" in capsys.readouterr().err
    assert main(["inspect", f"{run}/x.safetensors"]) == 2
    assert keys(run) == before


def test_a_copy_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    path = nnx.save(tmp_path, model(), step=3).path
    real = bucket.write_file

    def failing(file, data):
        if file.name == "c.0.0":
            raise OSError(5, "the store is full")
        real(file, data)

    monkeypatch.setattr(bucket, "write_file", failing)
    with pytest.raises(SaveError, match=r"copying .* failed: .*the store is full"):
        copy_step(path, run)
    assert keys(run) == [".lock"]


def test_what_a_restore_would_read_is_known(run, tmp_path):
    for directory in (run, tmp_path):
        nnx.save(directory, model(), step=3)
    plans = [nnx.restore_plan(x, model()) for x in (run, tmp_path)]
    assert plans[0].of("split", 1) == plans[1].of("split", 1)
    assert plans[0].where == f"step 3 of {run}"


def test_what_a_killed_save_left_is_removed_by_the_next(run):
    nnx.save(run, model(), step=0)
    left = "arrays-000000000009-01234567"
    bucket.write(at(run, "5", left), {"zarr.json": b"{}", "Param/packed/c.0": b"x"})
    bucket.write(at(run, "0", left), {"Param/packed/c.0": b"x"})
    bucket.write(at(run, "5"), {"notes.txt": b"mine"})
    assert nnx.restore(run, model()).step == 0
    nnx.save(run, model(), step=1)
    assert not [name for name in keys(run) if left in name]
    assert "5/notes.txt" in keys(run)
    assert verify(run, 0)[3:] == ((), ())


def test_a_killed_writer_loses_no_committed_step(run):
    program = """
import sys
import numpy as np
import sortal as nnx
with nnx.Checkpoints(sys.argv[1], keep=2) as kept:
    for step in range((kept.latest() or 0) + 1, 1000):
        root = {"w": nnx.Param(np.full(9_000, step)), "n": nnx.Param(step)}
        kept.save(root, step=step)
        print(step, flush=True)
"""
    rng = np.random.default_rng(0)
    words = [sys.executable, "-c", program, run]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **quiet) as process:
        told = [process.stdout.readline() for _ in range(3)]
        time.sleep(rng.random() * 0.3)
        process.kill()
        told += process.stdout.read().split()
    last = max(map(int, told))
    state = nnx.load_state(run)
    assert state["n"].value in (last, last + 1)
    assert (state["w"].value == state["n"].value).all()
    assert verify(run).faults == ()
    nnx.save(run, {"n": nnx.Param(0)}, step=0)
    folders = {tuple(x.split("/")[:2]) for x in keys(run) if "arrays-" in x}
    assert len(folders) == len(nnx.Checkpoints(run).steps()) <= 4


def test_a_save_that_fails_leaves_what_was_there(run, monkeypatch):
    nnx.save(run, model(1), step=0)
    before = keys(run)

    def failing(file, temporary, data):
        raise OSError(5, "the store is full")

    monkeypatch.setattr(bucket, "publish", failing)
    for step in (0, 1):
        with pytest.raises(SaveError, match=r"nothing was committed.*store is full"):
            nnx.save(run, model(2), step=step)
    assert keys(run) == before
    assert nnx.restore(run, other := model()).step == 0
    assert bits(other) == bits(model(1))


@pytest.mark.parametrize("when", ["sync_tree", "fingerprints"])
def test_the_writer_that_began_first_is_refused_at_its_commit(run, monkeypatch, when):
    real, others = getattr(bucket, when), iter([2])

    def meanwhile(root, given):
        found = list(real(root, given) or ())
        for step in others:
            nnx.save(run, {"w": nnx.Param(step)}, step=step)
        return found

    monkeypatch.setattr(bucket, when, meanwhile)
    with pytest.raises(WriterError, match="another writer has taken over s3://"):
        nnx.save(run, {"w": nnx.Param(1)}, step=1)
    assert nnx.Checkpoints(run).steps() == (2,)


def test_a_manager_takes_the_directory_over_again(run):
    with nnx.Checkpoints(run) as kept:
        kept.save({"w": nnx.Param(1)}, step=1)
        nnx.save(run, {"w": nnx.Param(2)}, step=2)
        kept.save({"w": nnx.Param(3)}, step=3)
        assert kept.steps() == (1, 2, 3)


def test_a_manifest_written_meanwhile_is_not_replaced(run):
    nnx.save(run, {"w": nnx.Param(1)}, step=1)
    file = at(run, "1", "manifest.json")
    stamp = bucket._kvs(file).read(file.key).result().stamp
    bucket.write(file.parent, {"manifest.json": b"another"})
    assert not bucket._swap(bucket._kvs(file), file.key, b"x", stamp.generation)
    assert bucket.read(file) == b"another"


def test_what_is_not_there_is_said(run):
    with pytest.raises(NoCheckpointError, match=f"no checkpoint in {run}"):
        nnx.restore(run, model())
    nnx.save(run, model(), step=4)
    with pytest.raises(NoCheckpointError, match=r"no step 5 .* steps there are: 4"):
        nnx.restore(run, model(), step=5)
    with pytest.raises(NoCheckpointError, match=f"write '{run}', step=4"):
        nnx.restore(f"{run}/4", model())
    with pytest.raises(RestoreError, match="missing: x"):
        nnx.restore(run, {"x": nnx.Param(jnp.ones(1))})
    with pytest.raises(SaveError, match=r"write to s3://nowhere/run: .*NoSuchBuck"):
        nnx.save("s3://nowhere/run", model(), step=0)
    with pytest.raises(SaveError, match=r"write to s3://nowhere/: .*NoSuchBuck"):
        nnx.save("s3://nowhere", model(), step=0)


def test_a_store_that_does_not_answer_is_an_error_of_ours(run, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    retries = {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}
    once = forks.context(s3_request_retries=retries)
    monkeypatch.setattr(bucket, "_context", lambda settings: once)
    with pytest.raises(SaveError, match=f"cannot write to {run}: .*connect"):
        nnx.save(run, model(), step=0)
    for read in (nnx.load_state, verify, lambda at: nnx.Checkpoints(at).steps()):
        with pytest.raises(CheckpointError, match=f"{run}.* cannot be read: .*connect"):
            read(run)
    with pytest.raises(DamagedError, match=r"manifest.json cannot be read: .*connect"):
        nnx.restore(run, model(), step=3)


def test_a_bucket_itself_is_a_directory(run):
    name = run.split("/")[2]
    nnx.save(f"s3://{name}", {"w": nnx.Param(1), "x": Last(1)}, step=1)
    nnx.save(f"s3://{name}/", {"w": nnx.Param(2)}, step=2)
    assert nnx.restore(f"s3://{name}/", root := {"w": nnx.Param(0)}).step == 2
    assert root["w"].value == 2
    assert {x.split("/")[0] for x in bucket.names(at(f"s3://{name}"))} == {
        ".lock", "1", "2"
    }  # fmt: skip
    bucket.write(at(f"s3://{name}"), {"x": b"y"})
    assert bucket.read(at(f"s3://{name}", "x")) == b"y"


def test_neighbours_whose_names_begin_alike_are_left_alone(run):
    nnx.save(run, {"w": nnx.Param(1)}, step=1)
    nnx.save(run + "2", {"w": nnx.Param(2)}, step=10)
    nnx.save(run, {"w": nnx.Param(1)}, step=10)
    with nnx.Checkpoints(run) as kept:
        kept.delete(1)
    assert nnx.Checkpoints(run).steps() == nnx.Checkpoints(run + "2").steps() == (10,)


def test_only_what_lies_below_is_removed_whatever_the_store_lists(run, monkeypatch):
    """An emulator of Google's store lists all of a bucket, whatever is asked for."""
    real = bucket._kvs

    class ListsAll:
        def __init__(self, at):
            self._kvs = real(at)
            self.read, self.write = self._kvs.read, self._kvs.write
            self.delete_range = lambda keys: self._kvs.delete_range(
                ts.KvStore.KeyRange()
            )

        def list(self, keys, **how):
            return self._kvs.list(ts.KvStore.KeyRange(), **how)

    ts = pytest.importorskip("tensorstore")
    nnx.save(f"{run}2", {"w": nnx.Param(2)}, step=1)
    monkeypatch.setattr(bucket, "_kvs", ListsAll)
    for step in (1, 2, 2):
        nnx.save(run, {"w": nnx.Param(jnp.ones(2))}, step=step)
    assert nnx.Checkpoints(run).steps() == (1, 2)
    assert verify(run, 1)[3:] == verify(run, 2)[3:] == ((), ())
    assert nnx.load_state(f"{run}2")["w"].value == 2


def test_addresses_are_read_strictly():
    assert Address.of("s3://a-b/c/d/") == ("s3", "a-b", "c/d")
    assert Address.of("gs://a-b/%20x") == ("gs", "a-b", " x")
    assert str(Address.of("s3://a-b") / "c" / "d") == "s3://a-b/c/d"
    for text in ("s3:/a/b", "http://a/b", "s3://", "S3://bucket/x", "/s3://bucket"):
        assert Address.of(text) is None
    for text in ("s3://bucket/a//b", "gs://bucket/../b", "s3://bucket/."):
        with pytest.raises(ArgumentError, match="has no empty part"):
            Address.of(text)


@pytest.mark.parametrize("wait", [True, False])
def test_a_step_comes_back_from_googles_store_to_the_bit(google, wait):
    root = {"m": model(1), "last": Last(jnp.ones(3))}
    for _ in range(2):  # the second replaces the first
        nnx.save(google, root, step=7, metadata={"epoch": 2}, wait=wait).wait()
    other = {"m": model(2), "last": Last(jnp.zeros(3))}
    found = nnx.restore(google, other)
    assert bits(other) == bits(root)
    assert (found.step, found.metadata) == (7, {"epoch": 2})
    assert verify(google)[3:] == ((), ())
    assert len({x.split("/")[1] for x in keys(google) if "arrays-" in x}) == 1


def test_a_manager_keeps_in_googles_store_what_it_is_to_keep(google):
    with nnx.Checkpoints(google, keep=2, best="score") as kept:
        for step, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4]):
            root = {"w": nnx.Param(jnp.ones(3) * step)}
            kept.save(root, step=step, metrics={"score": score})
        assert kept.steps() == (1, 3, 4)
    (chunk,) = (x for x in chunks(google) if x.startswith("4/"))
    data = bucket.read(at(google, chunk))
    for new in (data[:-1], bytes([data[0] ^ 1]) + data[1:], None):
        bucket._kvs(at(google)).write(at(google, chunk).key, new).result()
        with pytest.raises(DamagedError, match="step 4, the newest in gs://"):
            nnx.restore(google, root)


def test_googles_store_is_written_on_condition_that_nobody_wrote_meanwhile(google):
    file = at(google, "1", "manifest.json")
    for before, ours in ((bucket._look(file).stamp, b"a"), (None, b"b")):
        stamp = before or bucket._look(file).stamp
        assert bucket._swap(bucket._kvs(file), file.key, ours, stamp.generation)
        assert not bucket._swap(bucket._kvs(file), file.key, b"x", stamp.generation)
        assert bucket.read(file) == ours
