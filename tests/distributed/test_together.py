"""Two processes: what they must do together, and hold alike."""

from __future__ import annotations

import json

PROGRAM = """
import json, sys
from sortal import distributed
distributed.initialize(heartbeat_timeout=60)
import jax, jax.numpy as jnp
import numpy as np
import sortal as nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from sortal.errors import DistributedError, ShardingError
from sortal.sharding import presets

said = {}
def fails(kind, call):
    try:
        call()
    except kind as e:
        return str(e)
    return "no error"

here = jax.process_index()
mesh = jax.make_mesh((2, 2), ("data", "model"))

# ---------------------------------------------------------------------- shard_batch
rows = np.arange(4, dtype=np.float32).reshape(2, 2) + 10 * here
batch = distributed.shard_batch({"x": rows, "y": rows[:, 0]}, mesh)
said["batch"] = [batch["x"].shape, batch["y"].shape, float(batch["x"].sum())]
# The axis "model" lies within a process, so that each gives all of its columns.
both = distributed.shard_batch(rows, mesh, P("data", "model"))
said["both"] = [both.shape, [s.data.shape for s in both.addressable_shards]]
whole = distributed.shard_batch(np.ones((3, 2)), mesh, P())
said["whole"] = whole.shape
flat = jax.make_mesh((4,), ("data",))
said["uneven"] = fails(
    ShardingError, lambda: distributed.shard_batch({"x": [np.ones((3, 2))]}, flat)
)

rows = np.ones((2 + 2 * here, 2), np.float32)
said["ragged"] = fails(
    ShardingError, lambda: distributed.shard_batch({"x": rows, "y": rows[:2]}, flat)
)

# ---------------------------------------------------------------------- assert_same
def model(seed=0):
    return nnx.Linear(2, 4, rngs=nnx.Rngs(seed))

same = nnx.shard(model(), mesh, presets.fsdp("data", min_size=1))
distributed.assert_same({"model": same, "own": model(), "rngs": nnx.Rngs(1)})
apart = nnx.shard(nnx.Rngs(1), mesh)
pair = nnx.shard({"p": nnx.Variable((jnp.ones(4), jax.random.key(3)))}, mesh)["p"]
assert pair.value[0].sharding.mesh == pair.value[1].sharding.mesh == mesh
said["placed"] = [apart.default.key.value.sharding.is_fully_addressable, bool(
    (apart.default.key.value.addressable_data(0) == jax.random.key(1)).all()
)]
other = model()
other.kernel[...] += here * 1e-7
said["differs"] = fails(DistributedError, lambda: distributed.assert_same(other))
distributed.assert_same(other, only=nnx.At("bias"))
wider = {"a": nnx.Param(jnp.zeros(2 + here))}
said["wider"] = fails(DistributedError, lambda: distributed.assert_same(wider))
# Replicas of one shard, in two processes.
across = jax.make_mesh((4,), ("data",))
halves = np.arange(4.0).reshape(2, 2) + 100 * here
grid = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2).T, ("part", "copy"))
split = jax.make_array_from_callback(
    (2, 2), NamedSharding(grid, P("part")), lambda at: halves[at]
)
said["replicas"] = fails(
    DistributedError, lambda: distributed.assert_same({"w": nnx.Param(split)})
)
keys = nnx.Rngs(here)
said["keys"] = fails(DistributedError, lambda: distributed.assert_same(keys))

# -------------------------------------------------------------------------- metrics
metrics = nnx.MultiMetric(
    loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy()
)

@nnx.jit
def note(metrics, x, labels):
    metrics.update(loss=x.sum(-1), logits=x, labels=labels)

labels = distributed.shard_batch(np.array([1, here], np.int32), mesh)
for _ in range(2):
    for _ in range(2):
        note(metrics, batch["x"], labels)
    said.setdefault("metrics", []).append(
        {k: float(v) for k, v in metrics.compute().items()}
    )
    metrics.reset()

# -------------------------------------------------------------------------- barriers
distributed.barrier("x")
distributed.barrier("x")
if here == 0:
    said["alone"] = fails(
        DistributedError, lambda: distributed.barrier("never", timeout=1)
    )
distributed.barrier("over")
if here == 1:
    said["late"] = fails(
        DistributedError, lambda: distributed.barrier("never", timeout=1)
    )
distributed.barrier("end")
if here == 1:
    said["lone"] = fails(
        DistributedError, lambda: distributed.shard_batch(np.ones(6), flat, timeout=1)
    )
distributed.barrier("end of the end")
said["again"] = fails(DistributedError, distributed.initialize)
print(json.dumps(said))
"""


def test_two_processes_share_a_batch_and_metrics_and_are_told_what_differs(launch):
    code, out, err = launch(PROGRAM, devices=2).end()
    assert code == 0, err[-3000:]
    told = {line[1]: json.loads(line[4:]) for line in out if line[4:5] == "{"}
    for rank in "01":
        said = told[rank]
        assert said["batch"] == [[4, 2], [4], 52.0]
        assert said["both"] == [[4, 2], [[2, 1], [2, 1]]]
        assert said["whole"] == [3, 2]
        assert said["uneven"] == (
            f"this batch of process {rank} cannot be divided over the mesh ('data': 4):"
            "\n  x.0 [3, 2]: P('data'), but dimension 0, 3, is to be 2 of the 4 parts "
            "of equal size\nEach process gives NumPy arrays with the rows of its own "
            "devices."
        )
        assert said["ragged"] == (
            "process 1 of 2 gave another batch than process 0, of all processes "
            "together:\n  x: float32[4,2] P('data') in process 0\n  x: float32[8,2] "
            "P('data') in process 1\nEach process gives as many rows for each of its "
            "devices, of the same dtypes; drop or fill the last batch."
        )
        assert said["placed"] == [False, True]
        assert "First difference: kernel (Param), in process 1 of 2." in said["differs"]
        assert (
            "First difference: a (Param): float32[2], in process 1 of 2, which has "
            "a (Param): float32[3]." in said["wider"]
        )
        assert "First difference: w (Param), in process 1 of 2." in said["replicas"]
        assert "process 1 of 2" in said["keys"]
        # Labels are 1, 0, 1, 1 and each image's largest logit is the second.
        once = {"loss": 13.0, "accuracy": 0.75}
        assert said["metrics"] == [once, once]
        assert "initialize() is called once" in said["again"]
    assert (
        "barrier 'never': process 1 of 2 did not come within 1 s." in told["0"]["alone"]
    )
    assert "came when the others had given up" in told["1"]["late"]
    assert told["1"]["lone"].startswith(
        "shard_batch of a new form (<root>: float32[12] P('data')): process 0 of 2 did "
        "not come within 1 s."
    )
