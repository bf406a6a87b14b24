"""The command ``python -m benchmarks.sharded``: calls over eight devices.

Both contenders hold the same arrays in the same shards. It is a command of its own, for
the number of devices is set before JAX starts, and would change all other rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax

import sortal
from benchmarks import report
from benchmarks import workload as w
from benchmarks.peers import sortal_peer
from benchmarks.report import Table
from benchmarks.timing import Effort, compare
from sortal.sharding import presets

DEVICES, MOST = 8, 1.15
STEP = "sharded step that changes all leaves"
NOOP = "sharded no-op"
ALONE = "no-op on one device, after all that"


def table(shape: w.Blocks, effort: Effort) -> Table:
    """Times a no-op and a step on a model divided over the devices by FSDP.

    Args:
      shape: the model.
      effort: how long to measure.

    Returns:
      The Table.
    """
    mesh = jax.make_mesh((DEVICES,), ("data",))
    alone = sortal_peer.build(shape)
    roots = sortal.shard(sortal_peer.build(shape), mesh, presets.fsdp(min_size=1))
    made = Table(
        f"Calls over {DEVICES} devices",
        "microseconds per call, medians",
        notes=["raw JAX takes flat lists of the same arrays, in the same shards."],
    )
    rows = {
        NOOP: {"sortal": sortal_peer.noop(roots), "raw jax": _noop(roots)},
        STEP: {"sortal": _step(roots), "raw jax": _raw_step(roots)},
        ALONE: {"sortal": sortal_peer.noop(alone), "raw jax": _noop(alone)},
    }
    for row, calls in rows.items():
        made.rows.append(report.timed_row(row, compare(calls, effort)))
    return made


def _leaves(roots: Any) -> list[Any]:
    return jax.tree.leaves(sortal.state(roots))


def _noop(roots: Any) -> Callable[[], Any]:
    noop, leaves = jax.jit(lambda leaves: None), _leaves(roots)
    return lambda: noop(leaves)


def _step(roots: Any) -> Callable[[], Any]:
    @sortal.jit
    def plus(*roots: Any) -> None:
        sortal.update(roots, jax.tree.map(lambda x: x + 1, sortal.state(roots)))

    def call() -> Any:
        plus(*roots)
        # One by one, for the plan of an object is kept, that of a tuple is not.
        values = [x for root in roots for x in sortal.state(root).values_list()]
        return jax.block_until_ready(values)[-1]

    return call


def _raw_step(roots: Any) -> Callable[[], Any]:
    live = [_leaves(roots)]
    places = [x.sharding for x in live[0]]
    plus = jax.jit(lambda leaves: [x + 1 for x in leaves], out_shardings=places)

    def call() -> Any:
        live[0] = plus(live[0])
        return jax.block_until_ready(live[0])[-1]

    return call


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints.

    Args:
      arguments: the command line; the process's own if absent.

    Returns:
      The exit status: 0, whether or not the target was met.
    """
    parser = argparse.ArgumentParser("benchmarks.sharded", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds")
    quick = parser.parse_args(arguments).quick
    jax.config.update("jax_num_cpu_devices", DEVICES)
    effort = Effort(2, 0.001, 1) if quick else Effort(7)
    made = table(w.Blocks(2 if quick else 50), effort)
    print(report.facts_text(report.facts()), made.markdown(), sep="\n")
    for row in (NOOP, STEP):
        found = made.row(row)
        ratio = found.values["sortal/raw"] if found else float("nan")
        met = "met" if ratio <= MOST else "MISSED"
        print(f"{met}: {row}, sortal/raw: {ratio:.2f}, at most {MOST:g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
