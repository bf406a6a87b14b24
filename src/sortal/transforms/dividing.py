"""The specs by which arguments are divided over devices, and why they do not fit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec, Sharding

from sortal.errors import ShardingError, listing
from sortal.policy.rule import format_answer
from sortal.sharding.mesh_axes import axes_of, short, show_sizes, spec_fault
from sortal.sharding.resolution import spec_for
from sortal.transforms._adapter.prefixes import Spread
from sortal.transforms._adapter.tracing import is_flat_module
from sortal.transforms.refusals import in_order, named_devices, other_devices

_Row = tuple[str, Any, PartitionSpec]
"""What an array is called, the array, and its spec in ``in_specs``."""


def spec_on(mesh: Any) -> Callable[..., Any]:
    """How ``shard_map`` reads answers: as specs, functions of shape and mesh called.

    Args:
      mesh: the mesh that was given, or None.

    Returns:
      A function of an answer, and of the value of the leaf where that is known.
    """

    def spec(answer: Any, value: Any = None) -> Any:
        found = getattr(answer, "spec", answer)
        if isinstance(answer, Sharding) and isinstance(found, PartitionSpec):
            return short(found)
        depends = callable(answer) and value is not None
        if answer is None or depends:
            return spec_for(answer, value, mesh, lambda: "in_specs")
        return answer

    return spec


def refuse_specs(
    spread: Spread, mesh: Any, manual: Collection[Any] | None, cause: Exception
) -> None:
    """Says so where it is why JAX refused a call; looked at only after it has.

    Args:
      spread: the specs of the arguments.
      mesh: the mesh that was given, or None.
      manual: the axes over which is mapped; all if None or empty.
      cause: what JAX raised.

    Raises:
      ShardingError: there is no mesh, it has other devices than arrays, or specs do not
        fit the arrays or the mesh; all are listed.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ShardingError(
            "shard_map has no mesh. Pass mesh=, or call it within jax.set_mesh(mesh)."
        ) from cause
    rows = [*_of_models(spread), *_of_others(spread)]
    sizes = dict(mesh.shape)
    bad = [
        f"{name} {list(np.shape(x))}: {format_answer('spec', spec)}, but {fault}"
        for name, x, spec in rows
        if (fault := _fault(np.shape(x), spec, sizes, manual))
    ]
    if bad:
        raise ShardingError(
            f"shard_map cannot divide these over the mesh ({show_sizes(sizes)}) by "
            f"their in_specs:\n{listing(bad)}\nGive them another spec there, or "
            "another shape, such as a batch that is padded to a multiple."
        ) from cause
    _refuse_layouts(rows, cause)
    _refuse_devices(rows, mesh, cause)


def _fault(shape: Any, spec: Any, sizes: Any, manual: Any) -> str:
    """Why an array cannot be divided by a spec; empty where it can."""
    beyond = {axis for _, axis in axes_of(spec)} - set(manual or sizes)
    inside = ", ".join(map(repr, sorted(beyond & sizes.keys())))
    fault = spec_fault(shape, spec, sizes)
    return fault or (f"{inside} is not in axis_names" if inside else "")


def _refuse_layouts(rows: list[_Row], cause: Exception) -> None:
    """On an Explicit mesh each array must lie as its spec says."""
    if "does not match the specs of the input" not in str(cause):
        return
    bad = []
    for name, x, spec in rows:
        pair = short(jax.typeof(x).sharding.spec), short(spec)
        if len(set(pair)) > 1:
            here, due = (format_answer("spec", one) for one in pair)
            bad.append(f"{name}: {here}; in_specs: {due}")
    if bad:
        raise ShardingError(
            "on a mesh of Explicit axes shard_map takes arrays that lie as in_specs "
            f"says; these lie otherwise:\n{listing(bad)}\nWrite in in_specs how they "
            "lie, or put models there by shard(model, mesh, policy), and other arrays "
            "by jax.sharding.reshard(x, spec)."
        ) from cause


def _refuse_devices(rows: list[_Row], mesh: Any, cause: Exception) -> None:
    """What is bound to devices must be bound to those of the mesh."""
    if "incompatible devices" not in str(cause):
        return
    mine = tuple(mesh.devices.flat) if isinstance(mesh, Mesh) else ()
    bad = [
        f"{name}: {other_devices(x.sharding.device_set, mine)}"
        for name, x, _ in rows
        if not isinstance(x, Tracer)
        and getattr(x, "committed", False)
        and in_order(x.sharding) != mine
    ]
    if bad and mine:
        raise ShardingError(
            f"the mesh of shard_map has {named_devices(mine)}, and these arrays are "
            f"bound to others:\n{listing(bad)}\nPut models there by shard(model, "
            "mesh), and other arrays by jax.device_put(x, NamedSharding(mesh, P()))."
        ) from cause


def _of_models(spread: Spread) -> Iterator[_Row]:
    for plan, specs in zip(spread.bound.plans, spread.roots, strict=True):
        schema = plan.graphdef.schema
        for i, (spec, value) in enumerate(zip(specs, plan.values(), strict=True)):
            for x in jax.tree.leaves(value):
                yield schema.describe(i), x, spec


def _of_others(spread: Spread) -> list[_Row]:
    rows: list[_Row] = []

    def note(name: str, path: Any, spec: Any, part: Any) -> None:
        if not is_flat_module(spec):
            for below, x in jtu.tree_leaves_with_path(part):
                rows.append((f"{name}{jtu.keystr((*path, *below))}", x, spec))

    for i, (prefix, arg) in enumerate(zip(spread.args, spread.bound.args, strict=True)):
        jtu.tree_map_with_path(
            functools.partial(note, f"argument {i}"),
            prefix,
            arg,
            is_leaf=lambda x: isinstance(x, PartitionSpec) or is_flat_module(x),
        )
    return rows
