"""shard_batch in one process; tests/distributed/test_together.py has two."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sortal.distributed import batches, shard_batch
from sortal.errors import ShardingError

MESH = jax.make_mesh((4, 2), ("data", "model"))


def test_alone_it_is_device_put():
    x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    batch = {"x": x, "pair": (x[:, 0], x[:4])}
    found = shard_batch(batch, MESH, {"x": P(None, "model"), "pair": P("data")})
    for mine, due, spec in (
        (found["x"], x, P(None, "model")),
        (found["pair"][0], x[:, 0], P("data")),
        (found["pair"][1], x[:4], P("data")),
    ):
        want = jax.device_put(due, NamedSharding(MESH, spec))
        assert mine.sharding.is_equivalent_to(want.sharding, mine.ndim)
        assert mine.dtype == due.dtype
        assert np.array_equal(mine, due)
    assert shard_batch(x, MESH).sharding.spec == P("data")
    assert shard_batch(np.ones(()), MESH, P()).shape == ()


def test_all_that_does_not_fit_is_listed():
    batch = {
        "a": np.ones((6, 4)),
        "b": [1.0, np.ones(3)],
        "c": jnp.ones(8),
        "d": np.ones((8, 2)),
    }
    with pytest.raises(ShardingError) as found:
        shard_batch(batch, MESH)
    assert str(found.value) == (
        "this batch of process 0 cannot be divided over the mesh ('data': 4, 'model': "
        "2):\n"
        "  a [6, 4]: P('data'), but dimension 0, 6, is to be 4 parts of equal size\n"
        "  b.0 []: P('data'), but it is a float and no NumPy array of this process\n"
        "  b.1 [3]: P('data'), but dimension 0, 3, is to be 4 parts of equal size\n"
        "  c [8]: P('data'), but it is a ArrayImpl and no NumPy array of this process\n"
        "Each process gives NumPy arrays with the rows of its own devices."
    )


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (P("rows"), "the mesh has no axis 'rows'"),
        (P("data", "data"), "the axis 'data' stands there twice"),
        (P("data", None, None), "the spec has 3 entries for 2 dimensions"),
        ("data", "spec has 'data'; write jax.sharding.PartitionSpec"),
        ({"y": P()}, "neither a PartitionSpec nor a prefix of the batch"),
    ],
)
def test_a_spec_that_cannot_act_is_refused(spec, told):
    with pytest.raises(ShardingError, match=told):
        shard_batch({"x": np.ones((8, 2))}, MESH, spec)


def test_a_process_without_devices_in_the_mesh_is_told(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    batches._parts.cache_clear()
    with pytest.raises(ShardingError, match="none of the mesh's devices is one of"):
        shard_batch(np.ones((8, 2)), MESH)
    batches._parts.cache_clear()
