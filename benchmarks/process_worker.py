"""What ``python -m benchmarks.processes`` runs in each process."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from sortal import distributed

EXAMPLE = Path(__file__).parents[1] / "examples" / "multiprocess.py"


def tiny(seed: int, steps: int) -> Any:
    """A model with every kind that training has, and little to compile."""
    rngs, dtype = sortal.Rngs(seed), widest()
    model = sortal.Sequential(
        sortal.Linear(8, 64, param_dtype=dtype, rngs=rngs),
        sortal.BatchNorm(64, param_dtype=dtype, rngs=rngs),
        sortal.Dropout(0.2, rngs=rngs),
        sortal.Linear(64, 8, param_dtype=dtype, rngs=rngs),
    )
    optimizer = sortal.Optimizer(model, optax.adam(1e-2), wrt=sortal.Param)
    return model, optimizer, sortal.MultiMetric(loss=sortal.metrics.Average("loss"))


def widest() -> Any:
    """float64 with ``JAX_ENABLE_X64``, else float32."""
    return jax.dtypes.canonicalize_dtype(np.float64)


@sortal.jit
def tiny_step(model: Any, optimizer: Any, metrics: Any, x: Any, y: Any) -> Any:
    """One step, in place; the loss."""
    loss, grads = sortal.value_and_grad(lambda m: ((m(x) - y) ** 2).mean())(model)
    metrics.update(loss=loss)
    optimizer.update(model, grads)
    return loss


def train(arguments: list[str]) -> None:
    """The example, with a tiny model besides; tells its pid, steps and bytes."""
    example = runpy.run_path(str(EXAMPLE))
    main = example["main"]
    names = main.__globals__

    def rows(seed: int) -> Any:
        rng = np.random.default_rng(seed)
        return names["Rows"](*rng.normal(size=(2, 300, 8)).astype(widest()))

    names["TASKS"]["tiny"] = (rows, tiny, tiny_step)
    draw, report = names["bar"].draw, sortal.sharding_report

    def noted(self: Any, step: int, loss: float) -> None:
        draw(self, step, loss)
        if jax.process_index() == 0:
            print(f"did {step}", flush=True)

    def reported(root: Any, *where: Any) -> Any:
        found = report(root, *where)
        leaves = jax.tree.leaves(sortal.state(root))
        shards = [s for x in leaves for s in words(x).addressable_shards]
        held = sum(s.data.nbytes for s in shards)
        due = found.on_device * jax.local_device_count()
        print(f"holds {held} bytes, {due} by the report", flush=True)
        return found

    names["bar"].draw, sortal.sharding_report = noted, reported
    print(f"pid {os.getpid()}", flush=True)
    sys.argv = ["multiprocess.py", *arguments]
    main()


def words(x: Any) -> Any:
    """An array, or the words of keys."""
    typed = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if typed else x


def start(_: str) -> None:
    """Begins, computes a sum over all processes, tells its ports, and ends."""
    distributed.initialize()
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    mine = np.ones(jax.local_device_count(), np.float32)
    total = jax.jit(jax.numpy.sum)(distributed.shard_batch(mine, mesh))
    assert float(total) == jax.device_count()
    print(f"listens {json.dumps(listening())}", flush=True)
    distributed.barrier("here")


def listening() -> list[str]:
    """The addresses, as in ``/proc/net``, at which this process waits for others."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            links.append(str(path.readlink()))
    mine = {x[8:-1] for x in links if x.startswith("socket:[")}
    tables = [Path(f"/proc/net/{x}").read_text() for x in ("tcp", "tcp6")]
    rows = [line.split() for text in tables for line in text.splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and row[9] in mine]


def big(megabytes: int, fill: float) -> Any:
    """A model of so many megabytes, divided over all devices, in 16 leaves."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    rows = megabytes * 2**20 // 4 // 16 // 1024
    there = NamedSharding(mesh, P("data"))

    def part(at: Any) -> Any:
        first = at[0].start or 0
        count = (at[0].stop or rows) - first
        return np.full((count, 1024), fill, np.float32) + np.arange(1024) + first

    return {
        f"w{i:02}": sortal.Param(
            jax.make_array_from_callback((rows, 1024), there, part)
        )
        for i in range(16)
    }


def moved() -> dict[str, int]:
    """The bytes that this process has asked the system to read and write so far."""
    text = Path("/proc/self/io").read_text()
    return {k: int(v) for k, v in re.findall(r"(rchar|wchar): (\d+)", text)}


def counted(where: str, megabytes: str) -> None:
    """Saves and restores; prints bytes and the least seconds of five."""
    distributed.initialize()
    model = big(int(megabytes), 0.0)
    mine = sum(
        s.data.nbytes for x in model.values() for s in x.value.addressable_shards
    )
    found: dict[str, Any] = {"process": jax.process_index(), "holds": mine}
    verbs = {
        "save": lambda i: sortal.save(where, model, step=i),
        "restore": lambda i: sortal.restore(where, model),
    }
    for verb, do in verbs.items():
        times = []
        for i in range(6):
            distributed.barrier("begin")
            before, began = moved(), time.perf_counter()
            do(i)
            times.append(time.perf_counter() - began)
            after = moved()
        found[verb] = min(times[1:])
        found[f"{verb} read"] = after["rchar"] - before["rchar"]
        found[f"{verb} wrote"] = after["wchar"] - before["wchar"]
    print(f"counted {json.dumps(found)}", flush=True)


def save(where: str, first: str) -> None:
    """Saves one step after another, until it is killed."""
    distributed.initialize()
    print(f"pid {os.getpid()}", flush=True)
    model = big(8, float(first))
    with sortal.Checkpoints(where, keep=4) as checkpoints:
        for i in itertools.count():
            print("saving", flush=True)
            checkpoints.save(model, step=int(first) + i, wait=i % 2 == 0)


def read(where: str) -> None:
    """Restores the newest step, and looks at its numbers."""
    distributed.initialize()
    model, due = big(8, -1.0), sortal.Checkpoints(where).latest()
    fill = due // 1000 * 1000
    sortal.restore(where, model)
    for (name, x), y in zip(big(8, float(fill)).items(), model.values(), strict=True):
        for one, two in zip(
            x.value.addressable_shards, y.value.addressable_shards, strict=True
        ):
            assert np.array_equal(one.data, two.data), name
    distributed.barrier("read")
    print("restored", due, flush=True)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    if verb == "train":
        train(arguments)
    else:
        {"start": start, "bytes": counted, "save": save, "read": read}[verb](*arguments)
