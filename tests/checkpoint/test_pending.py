"""Saves beside the program: safe from what it does next, and failures are told."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor, wait

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from benchmarks import faults
from sortal._engine.paths import show
from sortal.checkpoint import pending
from sortal.checkpoint.files import read_manifest
from sortal.checkpoint.layout import Layout
from sortal.checkpoint.taking import take
from sortal.errors import SaveError, WriterError


@pytest.fixture
def held(monkeypatch):
    """Saves wait until the event is set."""
    go = threading.Event()
    work = pending.Saving._guarded

    def guarded(self):
        assert go.wait(60)
        work(self)

    monkeypatch.setattr(pending.Saving, "_guarded", guarded)
    yield go
    go.set()


def test_what_happens_to_the_model_meanwhile_is_not_saved(tmp_path, held):
    """Donated, overwritten, deleted, and NumPy memory written to."""
    values = [jnp.full(5, 1.0), jnp.full(1_200_000, 2.0), jnp.full(7, 3.0)]
    root = {f"x{i}": nnx.Param(v) for i, v in enumerate(values)}
    root["numpy"] = raw = np.full(1_200_000, 4.0)
    root["small"] = raw[:3]
    del values
    saving = nnx.save(tmp_path, root, step=0, wait=False)
    assert not saving.done
    assert "under way" in repr(saving)
    step = jax.jit(lambda xs: [x * 0 for x in xs], donate_argnums=0)
    for name, new in zip(
        ("x0", "x1"), step([root["x0"].value, root["x1"].value]), strict=True
    ):
        root[name].value = new
    root["x2"].value.delete()
    raw[:] = 0
    filled = [jnp.full(1_200_000, 9.0) for _ in range(8)]  # takes what was set free
    held.set()
    assert saving.wait().done
    found = nnx.load_state(tmp_path)
    assert [float(found[f"x{i}"].value.min()) for i in range(3)] == [1, 2, 3]
    assert [float(found[f"x{i}"].value.max()) for i in range(3)] == [1, 2, 3]
    assert found["numpy"].min() == 4
    assert found["small"].min() == 4
    assert len(filled) == 8


class Note(nnx.Variable):
    pass


def test_what_becomes_of_the_structure_meanwhile_is_not_saved(tmp_path, held):
    """Leaves added, removed, retyped and shared; shapes and containers edited."""
    raw = np.arange(6.0)
    root = nnx.Module()
    root.layers = [nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones(4))]
    root.raw, root.key = raw, nnx.Variable(jax.random.key(3))
    root.note = Note({"a": [raw[:2], 7]}, sort="first")
    kept = {"metadata": {"at": [1, 2]}, "only": nnx.Not(nnx.BatchStat)}
    saving = nnx.save(tmp_path, root, step=0, wait=False, **kept)
    raw.resize((2, 3), refcheck=False)
    root.note.value["a"].append(jnp.ones(9))
    root.note.value["b"] = 1
    root.note.set_metadata(sort="second")
    root.layers.pop()
    root.layers.append(root.layers[0])
    root.layers[0].value = jnp.zeros((5, 5), jnp.int8)
    root.late = nnx.BatchStat(jnp.ones(1))
    root.key.value = jax.random.key(4)
    kept["metadata"]["at"].clear()
    del root.raw
    held.set()
    saving.wait()
    found = nnx.load_state(tmp_path)
    assert [show(path) for path in found.paths()] == [
        "key", "layers.0", "layers.1", "note", "raw"
    ]  # fmt: skip
    assert found["layers"][1].value.shape == (4,)
    assert found["layers"][0].value.dtype == jnp.float32
    assert found["raw"].shape == (6,)
    assert found["note"].sort == "first"
    assert found["note"].value["a"][1:] == [7]
    assert list(found["note"].value) == ["a"]
    assert jnp.array_equal(
        jax.random.key_data(found["key"].value), jax.random.key_data(jax.random.key(3))
    )
    manifest = read_manifest(tmp_path, 0)
    assert manifest.metadata == {"at": [1, 2]}
    assert manifest.aliases == ()


def test_arrays_on_several_devices_may_be_donated_meanwhile(tmp_path, held):
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    root = {}
    for size in (64, 2_097_152):  # packed, and by itself
        for spec in (("y",), ("x", "y"), ()):
            to = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
            value = np.arange(size, dtype=np.float32).reshape(-1, 4)
            root[f"w{size}{spec}"] = nnx.Param(jax.device_put(value, to))
    before = {name: np.array(x.value) for name, x in root.items()}
    saving = nnx.save(tmp_path, root, step=0, wait=False)
    step = jax.jit(lambda xs: [x * 0 for x in xs], donate_argnums=0)
    new = step([x.value for x in root.values()])
    for x, value in zip(root.values(), new, strict=True):
        x.value = value
    jax.block_until_ready(new)
    held.set()
    saving.wait()
    assert len(nnx.restore(tmp_path, root).leaves) == 6
    for name, x in root.items():
        assert np.array_equal(x.value, before[name])
        assert x.value.sharding.mesh == mesh


def test_what_cannot_be_saved_is_refused_at_once(tmp_path):
    root = {"a": nnx.Param(jnp.ones(3)), "b": nnx.Variable({1, 2})}
    with pytest.raises(SaveError, match=r"b \(Variable\): a set"):
        nnx.save(tmp_path, root, step=0, wait=False)
    root["b"] = nnx.Param(jnp.ones(3))
    root["b"].value.delete()
    with pytest.raises(SaveError, match=r"b \(Param\): its buffer was donated"):
        nnx.save(tmp_path, root, step=0, wait=False)
    with pytest.raises(SaveError, match="plain JSON"):
        nnx.save(tmp_path, nnx.Rngs(0), step=0, wait=False, metadata={"x": {1}})
    assert not any(tmp_path.iterdir())


def test_the_directory_is_taken_until_the_end(tmp_path, held):
    from sortal.checkpoint.disk import Lock

    saving = nnx.save(tmp_path, nnx.Rngs(0), step=0, wait=False)
    with pytest.raises(WriterError):
        Lock(tmp_path)
    held.set()
    saving.wait()
    Lock(tmp_path).release()


def test_a_restore_and_the_next_save_wait_for_it(tmp_path):
    for step in range(3):
        nnx.save(tmp_path, nnx.Rngs(step), step=step, wait=False)
    assert nnx.restore(tmp_path, nnx.Rngs(0)).step == 2


def test_a_save_that_is_about_to_begin_can_be_waited_for(tmp_path, monkeypatch):
    """Another thread asks for it before its own thread runs."""
    begin, asked = threading.Thread.start, []
    pool = ThreadPoolExecutor(1)

    def late(thread):
        if thread.name == "sortal save":
            asked.append(pool.submit(pending.settle, tmp_path))
            wait(asked, timeout=0.2)
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", late)
    nnx.save(tmp_path, nnx.Rngs(0), step=0, wait=False).wait()
    assert asked[0].result(60) is None
    pool.shutdown()


def fail(where) -> pending.Saving:
    root = faults.model(1)
    take(root, None, None, pin=True)  # compiles what JAX may keep in files
    with faults.small_files(100):
        saving = nnx.save(where, root, step=4, wait=False)
        while not saving.done:
            pass
    return saving


def test_a_failure_is_raised_by_wait(tmp_path):
    saving = fail(tmp_path)
    with pytest.raises(SaveError, match=r"the save of step 4 to .*, which ran beside"):
        saving.wait()
    assert "failed" in repr(saving)
    nnx.save(tmp_path, nnx.Rngs(0), step=5)  # told once is told


def test_a_failure_that_nobody_waited_for_is_raised_by_the_next_call(tmp_path):
    for ask in (
        lambda: nnx.save(tmp_path / "other", nnx.Rngs(0), step=0),
        lambda: nnx.restore(tmp_path, nnx.Rngs(0)),
        lambda: nnx.load_state(tmp_path),
        lambda: nnx.Checkpoints(tmp_path).close(),
    ):
        fail(tmp_path)
        with pytest.raises(SaveError, match="the save of step 4"):
            ask()


def test_at_exit_a_save_is_finished_and_a_failure_is_printed(tmp_path):
    program = """
import resource, sys
import jax.numpy as jnp
import sortal as nnx
where = sys.argv[1]
nnx.save(where + "/good", nnx.Rngs(0), step=1, wait=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
nnx.save(where + "/bad", {"x": nnx.Param(jnp.ones(1_000_000))}, step=2, wait=False)
"""
    done = run(program, tmp_path)
    assert done.returncode == 1
    assert nnx.restore(tmp_path / "good", nnx.Rngs(1)).step == 1
    assert "sortal: the save of step 2 to" in done.stderr
    assert "failed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_save_that_outlives_the_main_thread_is_committed(tmp_path):
    """By then the pools of ``concurrent.futures`` take no more work."""
    program = """
import sys, time
import jax.numpy as jnp
import sortal as nnx
from sortal.checkpoint import saving
real = saving.descriptions
saving.descriptions = lambda *a: (time.sleep(0.5), real(*a))[1]
nnx.save(sys.argv[1], {"x": nnx.Param(jnp.arange(3_000_000))}, step=1, wait=False)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    found = nnx.load_state(tmp_path)["x"].value
    np.testing.assert_array_equal(found, np.arange(3_000_000))


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_failure_at_exit_is_the_exit_code_and_other_handlers_run(tmp_path):
    program = """
import atexit, resource, sys
import jax.numpy as jnp
import sortal as nnx
nnx.save
atexit.register(lambda: print("goodbye"))
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
nnx.save(sys.argv[1], {"x": nnx.Param(jnp.ones(1_000_000))}, step=2, wait=False)
"""
    done = run(program, tmp_path)
    assert done.returncode == 1
    assert "sortal: the save of step 2 to" in done.stderr
    assert done.stdout == "goodbye\n"


@pytest.mark.parametrize("imported", ["nnx.save", ""])
def test_a_save_in_a_handler_at_exit_is_done(tmp_path, imported):
    program = f"""
import atexit, sys
import jax.numpy as jnp
import sortal as nnx
{imported}
x = nnx.Param(jnp.arange(3_000_000))
atexit.register(lambda: nnx.save(sys.argv[1], dict(x=x), step=1, wait=False))
"""
    done = run(program, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = nnx.load_state(tmp_path)["x"].value
    np.testing.assert_array_equal(found, np.arange(3_000_000))


@pytest.mark.parametrize("imported", ["nnx.save", ""])
def test_a_failed_save_in_a_handler_at_exit_is_the_exit_code(tmp_path, imported):
    (tmp_path / "file").write_text("")
    program = f"""
import atexit, resource, sys
import jax.numpy as jnp
import sortal as nnx
{imported}
def late():
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
    nnx.save(sys.argv[1], dict(x=nnx.Param(jnp.ones(1_000_000))), step=1, wait=False)
atexit.register(late)
"""
    done = run(program, tmp_path / "run")
    assert done.returncode == 1
    assert "sortal: the save of step 1 to" in done.stderr


def test_metadata_is_that_of_the_call(tmp_path, held):
    metadata = {"epoch": [1]}
    saving = nnx.save(tmp_path, nnx.Rngs(0), step=0, metadata=metadata, wait=False)
    metadata["epoch"].append(2)
    held.set()
    saving.wait()
    assert nnx.restore(tmp_path, nnx.Rngs(0)).metadata == {"epoch": [1]}


@pytest.mark.parametrize("how", ["done", "waited", "failed"])
def test_a_finished_save_holds_no_buffers(tmp_path, how):
    array = np.ones(1_200_000)
    gone = weakref.ref(array)
    root = {"x": nnx.Param(jnp.ones(3)), "n": array}
    limit = faults.small_files(100) if how == "failed" else contextlib.nullcontext()
    with limit:
        saving = nnx.save(tmp_path, root, step=0, wait=how == "waited")
        while not saving.done:
            pass
    gc.collect()
    kept = [
        x for x in gc.get_objects()
        if isinstance(x, Layout) and any(p.data.size == 1_200_000
                                         for ps in x.own.values() for p in ps)
    ]  # fmt: skip
    assert kept == []
    del root, array
    gc.collect()
    assert gone() is None
    if how == "failed":
        with pytest.raises(SaveError):
            saving.wait()


def test_a_process_whose_threads_cannot_start_saves_and_ends(tmp_path):
    program = """
import sys, threading
import jax.numpy as jnp
import sortal as nnx
real, count = threading.Thread.start, [0]
def start(self):
    count[0] += 1
    if count[0] > int(sys.argv[2]):
        raise RuntimeError("can't start new thread")
    real(self)
threading.Thread.start = start
nnx.save(sys.argv[1], {"x": nnx.Param(jnp.arange(3_000_000))}, step=1)
"""
    for most in (0, 2):
        done = run(program, tmp_path / str(most), most)
        assert (done.returncode, done.stderr) == (0, "")
        assert nnx.load_state(tmp_path / str(most))["x"].value[-1] == 2_999_999


def test_a_process_that_was_interrupted_in_a_save_ends(tmp_path):
    program = """
import sys
import jax.numpy as jnp
import sortal as nnx
from sortal.checkpoint import disk
def interrupted(self):
    raise KeyboardInterrupt
disk.Syncs.finish = interrupted
try:
    nnx.save(sys.argv[1], {"x": nnx.Param(jnp.arange(3))}, step=1)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = run(program, tmp_path)
    assert (done.returncode, done.stdout) == (0, "interrupted\n")


FORK = """
import os, sys, warnings
warnings.simplefilter("ignore")
import jax.numpy as jnp
import sortal as nnx
def child(do):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            do()
            print("nothing", flush=True)
        except BaseException as e:
            print(type(e).__name__, str(e).splitlines()[0], flush=True)
        os._exit(0)
    print("code", os.waitpid(pid, 0)[1])
"""


def test_a_forked_child_is_refused_in_a_sentence(tmp_path):
    program = """
nnx.save(sys.argv[1], nnx.Rngs(0), step=1)
child(lambda: nnx.save(sys.argv[1], nnx.Rngs(0), step=2))
child(lambda: nnx.load_state(sys.argv[1]))
"""
    done = run(FORK + program, tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("SaveError this process was forked from one that had")
    assert lines[2].startswith("RestoreError this process was forked from one that had")
    assert lines[1::2] == ["code 0", "code 0"]


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    program = """
import time
kept = nnx.Checkpoints(sys.argv[1])
kept.save(nnx.Rngs(0), step=1)
pid = os.fork()
if pid == 0:
    time.sleep(30)
    os._exit(0)
kept.close()
nnx.save(sys.argv[1], nnx.Rngs(0), step=2)
kept.save(nnx.Rngs(0), step=3)
second = os.fork()
if second == 0:
    kept.close()  # what the child closes stays held by its parent
    os._exit(0)
os.waitpid(second, 0)
try:
    nnx.save(sys.argv[1], nnx.Rngs(0), step=4)
except nnx.errors.WriterError as e:
    print("refused")
os.kill(pid, 9)
"""
    done = run(FORK + program, tmp_path)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
