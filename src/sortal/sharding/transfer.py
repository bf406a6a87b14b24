"""transfer: the values of one live model into another, wherever that one lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine.host import host_memory
from sortal._engine.jax_compat import outside_traces, put_pieces
from sortal._engine.leaves import Leaves, Slot, store_all
from sortal._engine.paths import Path, show
from sortal._engine.plan import Plan, bind
from sortal._engine.schema import kind_name, select
from sortal._engine.variable import Param
from sortal.errors import FilterError, TraceError, UpdateError, listing
from sortal.filters import to_filter
from sortal.sharding.mesh_axes import put_apart


class Transferred(NamedTuple):
    """What ``transfer`` did.

    Attributes:
      leaves: the paths whose values moved.
      bytes: the bytes that arrived on the devices, or in the host memory, that this
        process holds the other model on; each copy counts.

    Example:
      >>> import sortal as nnx
      >>> one, two = (nnx.Linear(2, 3, rngs=nnx.Rngs(seed)) for seed in (0, 1))
      >>> moved = nnx.transfer(one, two)
      >>> moved.leaves, moved.bytes
      ((('bias',), ('kernel',)), 36)
    """

    leaves: tuple[Path, ...]
    bytes: int


def transfer(model: Any, other: Any, /, *, only: Any = Param) -> Transferred:
    """Copies chosen values of a live model into another: all of them, or nothing.

    Each value goes to where the other model has that leaf, as on the mesh of a
    generator that runs beside a trainer. The other model's shapes, dtypes and shardings
    stay, so that its compiled functions go on without a new trace or program; leaves
    that are not chosen, such as caches, are not touched. The models share no memory
    afterwards, so that either may be donated. Until it ends, the other model's devices
    hold the chosen values twice.

    Args:
      model: where the values are: a Module, or a container of Modules and Variables.
      other: where they go: one of the same structure as far as ``only`` chooses.
      only: a filter; it chooses the same leaves of both.

    Returns:
      The paths and the number of bytes moved.

    Raises:
      UpdateError: paths, kinds, shapes or dtypes differ, or something is no array; all
        are listed and nothing is moved.
      FilterError: ``only`` takes nothing, or is no filter.
      TraceError: it is called inside a transform.

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> trainer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> generator = nnx.Linear(2, 3, rngs=nnx.Rngs(1))
      >>> moved = nnx.transfer(trainer, generator)
      >>> bool((trainer.kernel[...] == generator.kernel[...]).all())
      True
    """
    if not outside_traces():
        raise TraceError(
            "transfer inside a transform would move values while it is traced, and not "
            "when the compiled function is called. Call it outside."
        )
    here, there = _chosen(model, only), _chosen(other, only)
    if not here.at and not there.at:
        raise FilterError(
            f"only={to_filter(only)!r} takes none of the leaves of either model:\n"
            f"{listing(map(here.schema.describe, range(len(here.schema))))}"
        )
    if faults := _faults(here, there):
        raise UpdateError(
            f"the models do not match; nothing was moved:\n{listing(faults)}\n"
            "Choose with only= what both have, in one form."
        )
    values = [here.values[i] for i in here.at.values()]
    targets = [there.values[i] for i in there.at.values()]
    leaves, structure = jax.tree.flatten(values)
    like = jax.tree.leaves(targets)
    new = _copied(leaves, like)
    store_all(
        [Leaves(there.plan.leaves[i] for i in there.at.values())],
        jax.tree.unflatten(structure, new),
    )
    return Transferred(tuple(there.at), sum(map(_bytes, new)))


class _Chosen(NamedTuple):
    """A model's plan and values, and the places of the chosen leaves by path."""

    plan: Plan
    values: Sequence[Any]
    at: dict[Path, int]

    @property
    def schema(self) -> Any:
        return self.plan.graphdef.schema


def _chosen(model: Any, only: Any) -> _Chosen:
    plan = bind(model)
    schema = plan.graphdef.schema
    places = select(schema, (only,), plan.view).parts[0][1]
    return _Chosen(plan, plan.values(), {schema.paths[i]: i for i in places})


# ---------------------------------------------------------------------------- matching
def _faults(here: _Chosen, there: _Chosen) -> list[str]:
    """All that keeps the chosen leaves of two models from being the same."""
    found = []
    for path, i in here.at.items():
        if path not in there.at:
            found.append(f"{here.schema.describe(i)}: only here")
            continue
        j, what = there.at[path], here.schema.describe(i)
        kinds = here.schema.kinds[i], there.schema.kinds[j]
        if kinds[0] is not kinds[1]:
            one, two = map(kind_name, kinds)
            found.append(f"kind: {show(path)} is {one} here, {two} in the other")
        found += _unlike(what, here.values[i], there.values[j])
        leaf = there.plan.leaves[j]
        if type(leaf) is Slot and not leaf.writable:
            found.append(
                f"{what}: a raw array in a tuple or other value of the other model, "
                "where nothing can be put; hold it in a Variable"
            )
    found += [
        f"{there.schema.describe(j)}: only in the other"
        for path, j in there.at.items()
        if path not in here.at
    ]
    return found


def _unlike(what: str, mine: Any, yours: Any) -> list[str]:
    ours, theirs = map(jax.tree.structure, (mine, yours))
    if ours != theirs:
        return [f"structure: {what} holds other containers in the other"]
    pairs = zip(jax.tree.leaves(mine), jax.tree.leaves(yours), strict=True)
    return [fault for x, y in pairs if (fault := _differing(what, x, y))]


def _differing(what: str, x: Any, y: Any) -> str:
    arrays = (jax.Array, np.ndarray)
    if not (isinstance(x, arrays) and isinstance(y, arrays)):
        names = f"a {type(x).__name__} here, a {type(y).__name__} in the other"
        return f"type: {what} is {names}; only arrays move"
    if x.shape != y.shape:
        return f"shape: {what} is {x.shape} here, {y.shape} in the other"
    if x.dtype != y.dtype:
        return f"dtype: {what} is {x.dtype} here, {y.dtype} in the other"
    if isinstance(x, jax.Array) and x.is_deleted():
        return f"{what}: its buffer was donated to a call and is gone"
    return ""


# ------------------------------------------------------------------------------ moving
def _copied(values: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Copies of values, each in the form and at the place of another array."""
    # Only words of keys have all that an array has.
    whole = [(_words(x), _words(y)) for x, y in zip(values, like, strict=True)]
    moving = [(x, y) for x, y in whole if isinstance(y, jax.Array)]
    placed = iter(
        put_apart([_unshared(x) for x, _ in moving], [y.sharding for _, y in moving])
    )
    new: list[Any] = [
        _as(next(placed), y) if isinstance(y, jax.Array) else np.array(x)
        for x, y in whole
    ]
    return [
        jax.random.wrap_key_data(x, impl=jax.random.key_impl(y)) if _is_key(y) else x
        for x, y in zip(new, like, strict=True)
    ]


def _unshared(x: Any) -> Any:
    # JAX keeps well-aligned memory of NumPy without a copy, whatever `may_alias` says.
    if isinstance(x, jax.Array):
        return x
    host = host_memory(x.shape, x.dtype)
    host[...] = x
    return host


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _words(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _as(x: jax.Array, like: jax.Array) -> jax.Array:
    """The same buffers with the other's weak type and commitment.

    Programs are compiled anew for another one of these.
    """
    if (x.committed, x.weak_type) == (like.committed, like.weak_type):
        return x
    shards = x.addressable_shards
    pieces, devices = [s.data for s in shards], [s.device for s in shards]
    return put_pieces(like, x.sharding, pieces, devices, like.committed)


def _bytes(x: Any) -> int:
    if isinstance(x, jax.Array):
        return sum(shard.data.nbytes for shard in x.addressable_shards)
    return x.nbytes
