"""Why JAX refused arguments, in words of the function; looked at only after it has."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from sortal._engine.jax_compat import ArrayImpl
from sortal._engine.paths import show
from sortal._engine.schema import kind_name
from sortal._engine.stale import is_gone, refuse_leaves
from sortal._engine.state import State
from sortal._engine.statics import PLACEMENT, is_hashable
from sortal._engine.variable import describe, is_variable, value_of
from sortal.errors import ArgumentError, ShardingError, listing
from sortal.transforms._adapter.binding import BoundArguments
from sortal.transforms._adapter.functions import parameters_of
from sortal.transforms._adapter.tracing import FlatModule


def explain_failure(
    fn: Any,
    bound: BoundArguments,
    static: Collection[Any],
    cause: Exception,
    *,
    option: str | None = "static_argnames",
) -> None:
    """Says why JAX refused a call of a compiled function, where that is known.

    Args:
      fn: the user's function.
      bound: its arguments.
      static: the positions and names of those that are static.
      cause: what JAX raised.
      option: as for ``refuse_arguments``.

    Raises:
      StaleBufferError: a leaf holds a buffer that is gone.
      ArgumentError: an argument is nothing that JAX can take.
      ShardingError: arrays are bound to different devices, or to others than ``shard``
        put them on, or go to an Explicit mesh on which no argument lies.
    """
    refuse_stale(fn, bound, cause)
    refuse_arguments(fn, bound, static, cause, option=option)
    _refuse_meshless(fn, bound, static, cause)
    _refuse_displaced(bound, cause)
    refuse_devices(fn, bound, static, cause)


def refuse_stale(fn: Any, bound: BoundArguments, cause: BaseException) -> None:
    """Says which leaves hold buffers that are gone, where that is why JAX refused.

    After any other error in a call that donates, its own buffers are gone too.

    Args:
      fn: the user's function.
      bound: the arguments of the call.
      cause: what JAX raised.

    Raises:
      StaleBufferError: some do; all are listed.
    """
    said = str(cause).partition("\n")[0]  # tracebacks of callbacks may follow
    if "deleted" not in said and "donat" not in said.lower():
        return
    refuse_leaves(_gone(fn, bound), cause)


def note_lost(fn: Any, bound: BoundArguments, failure: BaseException) -> None:
    """Adds to what a call that donates has raised which arrays are gone with it.

    Args:
      fn: the user's function.
      bound: the arguments of the call.
      failure: what it raised.
    """
    rows = _gone(fn, bound)
    if rows:
        failure.add_note(
            "the call failed, and left no values where buffers were donated:\n"
            f"{listing(rows)}\nRestore these, or call without donation what may fail."
        )


def _gone(fn: Any, bound: BoundArguments) -> list[str]:
    """The arrays of a call whose buffers are gone, by argument, path and kind."""
    return [
        f"{where}: {describe(value)}"
        for _, name, x in named_arguments(fn, bound)
        for where, value in _arrays(name, x)
        if is_gone(value)
    ]


def _arrays(name: str, argument: Any) -> Iterator[tuple[str, Any]]:
    """The arrays of an argument, with path and kind where they belong to an object."""
    pairs = jax.tree_util.tree_leaves_with_path(
        argument, is_leaf=lambda x: isinstance(x, (FlatModule, State))
    )
    for path, x in pairs:
        at = f"{name}{jax.tree_util.keystr(path)}"
        if isinstance(x, State):
            for below, leaf in x.flat_state():
                kind = type(leaf) if is_variable(leaf) else None
                where = f"{at}: {show(below)} ({kind_name(kind)})"
                yield from ((where, v) for v in jax.tree.leaves(value_of(leaf)))
        elif isinstance(x, FlatModule):
            d, kinds = x.definition, x.definition.graphdef.schema.kinds
            for below, k, value in zip(d.paths, d.leaves, x.values, strict=True):
                where = f"{at}: {show(below)} ({kind_name(kinds[k])})"
                yield from ((where, v) for v in jax.tree.leaves(value))
        else:
            yield at, x


def refuse_arguments(
    fn: Any,
    bound: BoundArguments,
    static: Collection[Any],
    cause: Exception,
    *,
    option: str | None = "static_argnames",
    first: int = 0,
) -> None:
    """Says which arguments JAX cannot take, and what to write.

    Args:
      fn: the user's function.
      bound: its arguments.
      static: the positions and names of those that are static.
      cause: what JAX raised.
      option: the option that makes arguments static, None where there is none.
      first: how many arguments stand before those of the call.

    Raises:
      ArgumentError: arguments are neither models, arrays nor numbers, or static and not
        hashable; all are listed.
    """
    unhashable, bad, settings = [], [], []
    for key, name, x in named_arguments(fn, bound):
        if key in static:
            if not is_hashable(x):
                unhashable.append(f"{name}: {describe(x)}")
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(x):
            if not _goes_in(leaf):
                bad.append(f"{name}{jax.tree_util.keystr(path)}: {describe(leaf)}")
                by_name = option == "static_argnames"
                settings += [] if path else [name if by_name else key - first]
    if unhashable:
        raise ArgumentError(
            f"static arguments must be hashable; found:\n{listing(unhashable)}\n"
            "Leave data out of static_argnums and static_argnames; use a tuple for "
            "a list."
        ) from cause
    if bad:
        names = ", ".join(map(repr, settings)) or "..."
        remedy = "Let the function close over settings."
        if option:
            remedy = (
                "Settings go into arguments of their own, which "
                f"{option}=[{names}] names."
            )
        raise ArgumentError(
            "arguments of a compiled function are models, arrays and numbers; "
            f"found:\n{listing(bad)}\n{remedy}"
        ) from cause


def refuse_devices(
    fn: Any, bound: BoundArguments, static: Collection[Any], cause: Exception
) -> None:
    """Says which arguments lie on other devices than most.

    Args:
      fn: the user's function.
      bound: its arguments.
      static: the positions and names of those that are static.
      cause: what JAX raised.

    Raises:
      ShardingError: arrays are bound to several sets of devices, or to others than a
        mesh inside has; all are listed.
    """
    at: dict[Any, list[str]] = {}
    for key, name, x in named_arguments(fn, bound):
        if key in static:
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(x):
            # What is bound to no device goes where the others are.
            if not isinstance(leaf, Tracer) and getattr(leaf, "committed", False):
                where = f"{name}{jax.tree_util.keystr(path)}"
                at.setdefault(in_order(leaf.sharding), []).append(where)
    if len(at) == 1 and "incompatible devices" in str(cause):
        ((devices, names),) = at.items()
        raise ShardingError(
            "a mesh inside the function, as of a shard_map or constraint, has other "
            f"devices, or in another order, than the {named_devices(devices)} of these:"
            f"\n{listing(names)}\n{_PUT}"
        ) from cause
    if len(at) < 2:
        return
    most = max(at, key=lambda devices: (len(at[devices]), len(devices)))
    rows = [
        f"{where}: {other_devices(devices, most)}"
        for devices, names in at.items()
        if devices != most
        for where in names
    ]
    raise ShardingError(
        f"a compiled function needs all arrays on the same devices; "
        f"{len(at[most])} arrays lie on {named_devices(most)}, and these on others:\n"
        f"{listing(rows)}\n{_PUT}"
    ) from cause


_PUT = (
    "Put models there by shard(model, mesh, policy), and other arrays by "
    "jax.device_put(x, NamedSharding(mesh, P()))."
)


def in_order(sharding: Any) -> tuple[Any, ...]:
    """The devices of a sharding, in the order that a program takes them in."""
    if isinstance(sharding, NamedSharding):
        mesh: Any = sharding.mesh
        return tuple(mesh.devices.flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def _refuse_meshless(
    fn: Any, bound: BoundArguments, static: Collection[Any], cause: Exception
) -> None:
    """Says so where arrays go to an Explicit mesh on which no argument lies."""
    if "Please enter your `jit` into a mesh context" not in str(cause):
        return
    rows = [
        f"{where}: {named_devices(x.sharding.device_set)}"
        for key, name, argument in named_arguments(fn, bound)
        if key not in static
        for where, x in _arrays(name, argument)
        if isinstance(x, jax.Array) and not isinstance(x, Tracer)
    ]
    raise ShardingError(
        "the function puts arrays on a mesh of Explicit axes, was called outside of "
        f"jax.set_mesh(mesh), and uses none that lies there:\n{listing(rows)}\nCall it "
        "within jax.set_mesh(mesh), or put the model there before: shard(model, mesh, "
        "policy)."
    ) from cause


def _refuse_displaced(bound: BoundArguments, cause: Exception) -> None:
    """Says so where leaves lie on other devices than ``shard`` put them on."""
    if "incompatible devices" not in str(cause):
        return
    rows = []
    for plan in bound.plans:
        schema = plan.graphdef.schema
        leaves = zip(plan.values(), schema.metadata, strict=True)
        for i, (x, metadata) in enumerate(leaves):
            there = metadata.get(PLACEMENT)
            if there is None or not (isinstance(x, ArrayImpl) and x.committed):
                continue
            if in_order(x.sharding) != in_order(there):
                here = named_devices(x.sharding.device_set)
                due = named_devices(there.device_set)
                rows.append(f"{schema.describe(i)}: {here}; shard put it on {due}")
    if rows:
        raise ShardingError(
            "these lie on other devices than shard put them on, where a compiled "
            f"function is to leave them:\n{listing(rows)}\nCopy values from one mesh "
            "to another by transfer(source, model), or call shard(model, mesh) again."
        ) from cause


def named_arguments(fn: Any, bound: BoundArguments) -> Iterator[tuple[Any, str, Any]]:
    """Each argument with its position or keyword, and its name in the signature."""
    names = [p.name for p in parameters_of(fn) if p.kind is not p.VAR_POSITIONAL]
    for i, x in enumerate(bound.args):
        yield i, names[i] if i < len(names) else f"argument {i}", x
    for name, x in bound.kwargs.items():
        yield name, name, x


def named_devices(devices: Any) -> str:
    """Several devices as their number, one by its own."""
    numbers = sorted(device.id for device in devices)
    return f"device {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} devices"


def other_devices(found: Collection[Any], due: Collection[Any]) -> str:
    """The same of devices that are not those due, or not in their order."""
    again = ", the same in another order" if set(found) == set(due) else ""
    return named_devices(found) + again


def _goes_in(x: Any) -> bool:
    if isinstance(x, (bool, int, float, complex)) or hasattr(x, "__jax_array__"):
        return True
    array = hasattr(x, "dtype") and hasattr(x, "shape") and not isinstance(x, type)
    if not isinstance(x, (np.ndarray, np.generic)):
        return array
    # NumPy's objects, text, times and other byte order are no data of a program.
    return x.dtype.isnative and x.dtype.kind not in set("OSUMm")
