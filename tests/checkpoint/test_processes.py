"""Several processes save and restore one checkpoint together, or fail together."""

from __future__ import annotations

import gc
import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import sortal as nnx
from sortal.checkpoint import processes
from sortal.distributed import meeting
from sortal.errors import CheckpointError

PROGRAM = """
import json, sys, warnings
from pathlib import Path
import jax
index, port, where = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address = "127.0.0.1:" + port
jax.distributed.initialize(
    address, 2, index, coordinator_bind_address=address, heartbeat_timeout_seconds=10,
    shutdown_timeout_seconds=10,
)
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import sortal as nnx
from sortal.errors import SaveError

mesh = Mesh(np.array(jax.devices()), ("x",))
value = np.arange(8 * 150_000, dtype=np.float32).reshape(8, -1)

def placed(x, spec):
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])

root = {
    "split": nnx.Param(placed(value, P("x"))),
    "small": nnx.Param(placed(value[:, :3], P("x"))),
    "same": nnx.Param(placed(value[0], P())),
    "here": nnx.Cache(jnp.arange(3)),
}
said = []
for step, wait in ((0, True), (1, False)):
    nnx.save(where, root, step=step, wait=wait).wait()

# One process cannot save: all are told, and nothing is there.
bad = {**root, "here": nnx.Cache(object() if index == 1 else jnp.arange(3))}
try:
    nnx.save(where, bad, step=2)
except SaveError as e:
    said.append("process 1" in str(e) and "here (Cache)" in str(e))

def like(x, spec):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

into = {
    "split": nnx.Param(like(value, P(None, "x"))),
    "small": nnx.Param(like(value[:, :3], P())),
    "same": nnx.Param(like(value[0], P("x"))),
    "here": nnx.Cache(jnp.zeros(3, int)),
}
said.append(nnx.restore(where, into).step)
for name, due in (("split", value), ("small", value[:, :3]), ("same", value[0])):
    for shard in into[name].value.addressable_shards:
        said.append(bool(np.array_equal(shard.data, due[shard.index])))

# The newest step is damaged: all take the one before.
if index == 0:
    next(Path(where).glob("1/arrays-*/Cache/packed/c.0")).unlink()
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    said.append(nnx.restore(where, into, fallback=True).step == 0)
said.append("instead of step 1" in str(told[-1].message))
print(json.dumps(said), flush=True)
"""


def test_two_processes_save_and_restore_shards_of_one_array(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    where = tmp_path / "steps"
    children = [
        subprocess.Popen(
            [sys.executable, str(program), str(i), port, str(where)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    told = [child.communicate(timeout=240) for child in children]
    for child, (out, err) in zip(children, told, strict=True):
        assert child.returncode == 0, err[-3000:]
        assert json.loads(out.splitlines()[-1]) == [True, 1] + [True] * 8
    assert [p.name for p in sorted(where.iterdir())] == [".lock", "0", "1"]
    # And one process reads what two have written.
    found = nnx.load_state(where, step=0)
    value = np.arange(8 * 150_000, dtype=np.float32).reshape(8, -1)
    assert np.array_equal(found["split"].value, value)
    assert np.array_equal(found["small"].value, value[:, :3])
    assert found["here"].value.tolist() == [0, 1, 2]
    # Each device's shard is a file of its own, so that no two processes share one.
    assert len(list(where.glob("0/arrays-*/Param/small/c.*"))) == 4


def test_processes_that_cannot_talk_are_told_how_to(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(CheckpointError, match=r"call sortal\.distributed\.initia"):
        processes.Group("saving")


def test_a_process_that_does_not_answer_is_named(monkeypatch):
    class Client:
        def key_value_set(self, key, value):
            self.said = key, value

        def wait_at_barrier(self, key, milliseconds):
            assert milliseconds == 600_000
            raise RuntimeError("DEADLINE_EXCEEDED")

        def key_value_dir_get(self, key):
            return [self.said]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(meeting, "coordinator", Client)
    group = processes.Group("saving step 1")
    with pytest.raises(
        CheckpointError, match="saving step 1: process 1 of 2 did not come within 600 s"
    ):
        group.decide("begin", None)


def test_a_fault_in_one_process_is_one_in_all():
    with pytest.raises(CheckpointError, match=r"^no room$"):
        processes.Group("saving").decide("begin", None, "no room")
    assert processes.Group("saving").decide("begin", 3) == [3]


def test_the_collector_is_as_it_was_after_a_block_without_it():
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        with processes.uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() == before
    gc.enable()
