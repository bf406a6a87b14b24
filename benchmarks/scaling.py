"""The command ``python -m benchmarks.scaling``: the table of docs/scaling.md.

A decoder of 8 billion parameters with Adam, on meshes of machines that nobody needs to
have: ``abstract`` makes neither arrays nor devices, ``sharding_report`` says what each
device would hold, and from each leaf's spec follows what a training step must move.

``--check`` compiles a step of a small one for eight devices, and compares what is
moved there.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from sortal.demo.llama import Config, Llama
from sortal.sharding import presets

EACH = 8
"""Devices of a host."""
LARGE = Config(
    vocabulary=128_256, features=4096, hidden=14_336, layers=32, heads=32,
    key_value_heads=8, tied=False,
)  # fmt: skip
SMALL = Config(
    vocabulary=256, features=64, hidden=128, layers=2, heads=4, key_value_heads=2
)
MESHES: tuple[tuple[int, dict[str, int], str], ...] = (
    (8, {"data": 64}, "data_parallel"),
    (8, {"data": 64}, "fsdp"),
    (64, {"data": 512}, "fsdp"),
    (64, {"replica": 8, "data": 64}, "fsdp"),
    (1024, {"data": 8192}, "fsdp"),
    (1024, {"replica": 16, "data": 512}, "fsdp"),
    (1024, {"replica": 128, "data": 64}, "fsdp"),
)
GATHERS = 2
"""A divided parameter is gathered for the forward pass, and for the backward one."""


class Moved(NamedTuple):
    """What a step moves: bytes that each device receives, and how many collectives."""

    gathered: float
    scattered: float
    reduced: float
    collectives: int
    smallest: float
    """The smallest part of a divided parameter on a device."""


def make(config: Config) -> Any:
    """Model and optimizer."""
    model = Llama(config, rngs=sortal.Rngs(0))
    return model, sortal.Optimizer(model, optax.adam(1e-4), wrt=sortal.Param)


def moved(report: Any, gathers: int = GATHERS) -> Moved:
    """What a training step must move, by the spec of each parameter.

    A ring, and any other way that moves no more than it must, brings each device all
    but its own part of what is gathered or scattered, and twice that of what is
    reduced.
    """
    devices = math.prod(dict(report.mesh.shape).values())
    gathered = scattered = reduced = 0.0
    count, smallest = 0, math.inf
    for row in report.rows:
        if not issubclass(row.kind, sortal.Param):
            continue
        parts = row.bytes // row.on_device
        replicas = devices // parts
        if parts > 1:
            gathered += gathers * row.bytes * (1 - 1 / parts)
            scattered += row.bytes * (1 - 1 / parts)
            count += gathers + 1
            smallest = min(smallest, row.on_device)
        if replicas > 1:
            reduced += 2 * row.on_device * (1 - 1 / replicas)
            count += 1
    return Moved(gathered, scattered, reduced, count, smallest)


def policy_of(name: str) -> Any:
    """A preset by its name."""
    return presets.fsdp("data") if name == "fsdp" else presets.data_parallel()


def table() -> str:
    """The table, as markdown."""
    heads = (
        "hosts", "mesh", "preset", "on each device", "all-gather", "reduce-scatter",
        "all-reduce", "collectives", "smallest part",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for hosts, axes, name in MESHES:
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
        planned = sortal.abstract(lambda: make(LARGE), mesh, policy_of(name))
        report = sortal.sharding_report(planned, mesh, policy_of(name))
        found = moved(report)
        cells = (
            f"{hosts:,}", " x ".join(f"{a} {n}" for a, n in axes.items()), name,
            _size(report.on_device), _size(found.gathered), _size(found.scattered),
            _size(found.reduced), f"{found.collectives:,}",
            "-" if found.smallest == math.inf else _size(found.smallest),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


# ------------------------------------------------------------------------------- check
_BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "f16": 2}


def compiled(name: str) -> dict[str, float]:
    """Bytes of each collective's result in a step compiled for eight devices."""
    mesh = jax.make_mesh((EACH,), ("data",), axis_types=(AxisType.Auto,))
    model, optimizer = sortal.init_sharded(lambda: make(SMALL), mesh, policy_of(name))
    there = NamedSharding(mesh, P("data"))
    tokens = jax.device_put(jnp.zeros((16, 32), jnp.int32), there)

    @sortal.jit
    def step(model: Any, optimizer: Any, tokens: Any) -> Any:
        def loss_fn(model: Any) -> Any:
            logits = model(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens
            ).mean()

        loss, grads = sortal.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    text = step.lower(model, optimizer, tokens).compile().as_text()
    found: dict[str, float] = {}
    for result, kind in re.findall(
        r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)\(", text
    ):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result):
            size = math.prod(int(d) for d in dims.split(",") if d)
            found[kind] = found.get(kind, 0) + size * _BYTES[dtype]
    return found


def check() -> None:
    """Compares a compiled step of a small model with the count by specs."""
    mesh = AbstractMesh((EACH,), ("data",))
    for name in ("data_parallel", "fsdp"):
        policy = policy_of(name)
        planned = sortal.abstract(lambda: make(SMALL), mesh, policy)
        report = sortal.sharding_report(planned, mesh, policy)
        params = [r for r in report.rows if issubclass(r.kind, sortal.Param)]
        divided = sum(r.bytes for r in params if r.on_device < r.bytes)
        whole = sum(r.bytes for r in params)
        print(f"{name}: parameters {whole:,} bytes, divided {divided:,}; compiled:")
        for kind, size in compiled(name).items():
            print(f"    {kind}: results of {size:,.0f} bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table.

    Args:
      arguments: the command line; the process's own if absent.

    Returns:
      The exit status, 0.
    """
    parser = argparse.ArgumentParser("benchmarks.scaling", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compile a small step")
    if parser.parse_args(arguments).check:
        jax.config.update("jax_num_cpu_devices", EACH)
        check()
    else:
        print(table())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
