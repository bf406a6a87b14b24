"""Arrays that go from a file to devices by parts, whatever their sharding."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sortal.checkpoint.loading import Want
from sortal.checkpoint.values import Array
from sortal.errors import RestoreError
from sortal.interop.files import landing
from sortal.interop.files.landing import land


def mesh(**axes):
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


SHARDINGS = {
    "uncommitted": None,
    "one": SingleDeviceSharding(jax.devices()[3]),
    "rows": NamedSharding(mesh(d=8), P("d")),
    "columns": NamedSharding(mesh(d=8), P(None, "d")),
    "both": NamedSharding(mesh(a=2, b=4), P("b", "a")),
    "some copies": NamedSharding(mesh(a=2, b=4), P("a")),
    "copies": NamedSharding(mesh(d=8), P()),
}


def want(x, sharding, dtype=None, weak=False):
    stored = Array(x.shape, x.dtype.name, "numpy")
    dtype = dtype or x.dtype.name
    return Want(("w",), stored, "jax", dtype, weak, sharding, sharding is not None)


@pytest.fixture(params=["whole", "by parts"])
def small(monkeypatch, request):
    """Limits so small that arrays of a test have several parts."""
    monkeypatch.setattr(landing, "_PART", 4096)
    if request.param == "by parts":
        monkeypatch.setattr(landing, "_LARGE", 1024)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sharding", SHARDINGS.values(), ids=SHARDINGS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_sharding_gets_its_pieces(sharding, axis, dtype):
    x = np.random.default_rng(0).standard_normal((88, 72), np.float32)
    sizes = []

    def read(at):
        sizes.append(x[at].nbytes)
        return x[at]

    found = land(want(x, sharding, dtype), axis, read)
    assert found.dtype == dtype
    assert found.committed == (sharding is not None)
    assert sharding is None or found.sharding == sharding
    assert np.array_equal(found, x.astype(dtype))
    assert max(sizes) <= 4096
    places = found.sharding.addressable_devices_indices_map(x.shape).values()
    pieces = len(set(map(str, places)))
    # Each piece is read once, whatever the number of its copies; last parts overlap.
    assert sum(sizes) <= x.nbytes + pieces * 4096


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1,), (5000,)])
def test_shapes_of_every_sort(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for sharding in (None, SHARDINGS["one"], SHARDINGS["copies"]):
        assert np.array_equal(land(want(x, sharding), 0, lambda at: x[at]), x)


@pytest.mark.usefixtures("small")
def test_weak_types_and_memory_that_may_be_donated():
    x = np.ones((64, 64), np.float32)
    weak = land(want(x, None, weak=True), 0, lambda at: x[at])
    assert weak.weak_type
    for sharding in (None, SHARDINGS["rows"], SHARDINGS["copies"]):
        found = land(want(x, sharding), 0, lambda at: x[at])
        jax.jit(jnp.negative, donate_argnums=0)(found)
        assert found.is_deleted()


@pytest.mark.usefixtures("small")
def test_a_value_that_the_dtype_cannot_hold_is_refused():
    x = np.full((64, 64), 1e30, np.float32)
    with pytest.raises(RestoreError, match="that float16 cannot hold"):
        land(want(x, None, "float16"), 0, lambda at: x[at])


PROGRAM = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from sortal import nnx
from sortal.interop.files.pretrained import load_pretrained

def status(name):
    text = open("/proc/self/status").read()
    return int(re.search(name + r":\\s+(\\d+)", text)[1]) << 10

model = {"w": nnx.Param(jax.ShapeDtypeStruct((1 << 16, 1 << 10), jnp.float32))}
before = status("VmRSS")
load_pretrained(sys.argv[1], model, {"w": "w"})
assert model["w"].value[-1, -1] == 7
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_array_is_never_in_memory_twice(tmp_path):
    size = 256 << 20
    header = {"w": {"dtype": "F32", "shape": [1 << 16, 1 << 10],
                    "data_offsets": [0, size]}}  # fmt: skip
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(size - 4, 1)  # a hole: zeros, of which nothing is on disk
        file.write(np.float32(7).tobytes())
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    assert int(told.stdout) < size + (100 << 20)
