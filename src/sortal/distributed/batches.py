"""shard_batch: the part of a batch that each process has loaded, as one array."""

from __future__ import annotations

import functools
import itertools
import json
import math
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sortal._engine.jax_compat import plain_key
from sortal._engine.paths import show
from sortal.distributed.meeting import TIMEOUT, exchange, processes
from sortal.errors import ShardingError, listing
from sortal.policy.rule import format_answer
from sortal.sharding.mesh_axes import axes_of, show_sizes, spec_fault

_known: set[Any] = set()
"""Forms of batches that all processes have given together."""
_calls = itertools.count()


def shard_batch(
    batch: Any, mesh: Mesh, spec: Any = None, timeout: float = TIMEOUT
) -> Any:
    """Makes global arrays of what each process has loaded, without a copy to others.

    Every process gives the rows that its own devices are to hold: with ``P("data")``
    and the devices of the mesh in the order of ``jax.devices()``, process 0 the first
    part of the batch, process 1 the second, of equal sizes. Devices that hold the same
    part, in whatever process, must be given the same numbers. With one process it is
    ``jax.device_put``.

    When a process gives a batch of another structure, shape, dtype or spec than any
    before, it compares them with those of all others, which must give it too.

    Args:
      batch: a NumPy array, or a pytree of these, of this process.
      mesh: the mesh, with devices of all processes.
      spec: a PartitionSpec, or a pytree of these that is a prefix of the batch's; the
        first mesh axis divides the first dimension if absent.
      timeout: how many seconds to wait for the others, where forms are compared.

    Returns:
      The batch, with global arrays in the place of the local ones.

    Raises:
      ArgumentError: ``timeout`` is no number of seconds.
      ShardingError: an array is no NumPy array, or has a shape that its spec cannot
        divide; all are listed. Or processes have given batches of different forms.
      DistributedError: some processes did not give a batch of this form in time.

    Example:
      >>> import jax
      >>> import numpy as np
      >>> from sortal.distributed import shard_batch
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> batch = {"image": np.ones((4, 8)), "label": np.zeros(4, np.int32)}
      >>> shard_batch(batch, mesh)["image"].shape
      (4, 8)
    """
    spec = PartitionSpec(mesh.axis_names[0]) if spec is None else spec
    rows, treedef = jtu.tree_flatten_with_path(batch)
    specs = _specs(spec, batch)
    bad, made = [], []
    for (keys, x), entry in zip(rows, specs, strict=True):
        found, fault = _global_shape(x, mesh, entry)
        if fault:
            path = show(map(plain_key, keys))
            shown = format_answer("spec", entry)
            bad.append(f"{path} {list(np.shape(x))}: {shown}, but {fault}")
        made.append((x, NamedSharding(mesh, entry) if not fault else None, found))
    if bad:
        known = show_sizes(mesh.shape)
        raise ShardingError(
            f"this batch of process {jax.process_index()} cannot be divided over the "
            f"mesh ({known}):\n{listing(bad)}\nEach process gives NumPy arrays with "
            "the rows of its own devices."
        )
    forms = [
        (shape, x.dtype, entry)
        for (x, _, shape), entry in zip(made, specs, strict=True)
    ]
    form = mesh, treedef, *forms
    if form not in _known:
        _compare(mesh, [keys for keys, _ in rows], forms, timeout)
        _known.add(form)
    arrays = [
        jax.make_array_from_process_local_data(sharding, x, shape)
        for x, sharding, shape in made
    ]
    return jtu.tree_unflatten(treedef, arrays)


def _compare(mesh: Mesh, paths: list[Any], forms: list[Any], timeout: float) -> None:
    """Refuses a batch that has another form in another process."""
    count = jax.process_count()
    if len({device.process_index for device in mesh.devices.flat}) < count:
        return  # a mesh of some processes only, which nothing brings together
    mine = [
        f"{show(map(plain_key, keys))}: {jax.dtypes.canonicalize_dtype(dtype)}"
        f"[{','.join(map(str, shape))}] "
        f"{format_answer('spec', entry)}"
        for keys, (shape, dtype, entry) in zip(paths, forms, strict=True)
    ]
    matter = f"shard_batch of a new form ({'; '.join(mine)[:500]})"
    texts = exchange(f"batch/{next(_calls)}", json.dumps(mine), matter, timeout)
    found = list(map(json.loads, texts))
    odd = [i for i in range(count) if found[i] != found[0]]
    if odd:
        first, other = found[0], found[odd[0]]
        bad = [f"{x} in process 0" for x in first if x not in other]
        bad += [f"{x} in process {odd[0]}" for x in other if x not in first]
        raise ShardingError(
            f"{processes(odd)} of {count} gave another batch than process 0, of all "
            f"processes together:\n{listing(bad)}\nEach process gives as many rows for "
            "each of its devices, of the same dtypes; drop or fill the last batch."
        )


def _specs(spec: Any, batch: Any) -> list[PartitionSpec]:
    def is_spec(x: Any) -> bool:
        return isinstance(x, PartitionSpec)

    try:
        found = jax.tree.broadcast(spec, batch, is_leaf=is_spec)
    except ValueError as e:
        raise ShardingError(
            f"spec={spec!r} is neither a PartitionSpec nor a prefix of the batch: {e}"
        ) from e
    flat = jax.tree.leaves(found, is_leaf=is_spec)
    odd = [x for x in flat if not is_spec(x)]
    if odd:
        raise ShardingError(f"spec has {odd[0]!r}; write jax.sharding.PartitionSpec.")
    return flat


def _global_shape(
    x: Any, mesh: Mesh, spec: PartitionSpec
) -> tuple[tuple[int, ...], str]:
    """The shape of all processes' arrays together, or why there is none."""
    if not isinstance(x, np.ndarray):
        return (), f"it is a {type(x).__name__} and no NumPy array of this process"
    sizes = dict(mesh.shape)
    if fault := spec_fault((0,) * x.ndim, spec, sizes):
        return (), fault
    whole = list(x.shape)
    for d, (mine, parts) in enumerate(_parts(mesh, spec)):
        if not mine:
            return (), "none of the mesh's devices is one of this process"
        if x.shape[d] % mine:
            of = f"{mine} of the {parts} parts" if mine < parts else f"{parts} parts"
            return (), f"dimension {d}, {x.shape[d]}, is to be {of} of equal size"
        whole[d] = x.shape[d] // mine * parts
    return tuple(whole), ""


@functools.lru_cache(maxsize=64)
def _parts(mesh: Mesh, spec: PartitionSpec) -> list[tuple[int, int]]:
    """For each entry of a spec: how many parts this process has, and how many all."""
    here = jax.process_index()
    places = [
        at
        for at, device in np.ndenumerate(mesh.devices)
        if device.process_index == here
    ]
    entries: list[list[int]] = [[] for _ in spec]
    for d, axis in axes_of(spec):
        entries[d].append(mesh.axis_names.index(axis))
    return [
        (
            len({tuple(at[a] for a in axes) for at in places}),
            math.prod(mesh.devices.shape[a] for a in axes),
        )
        for axes in entries
    ]
