"""What a save takes of a model before it returns: the leaves, and their values held."""

from __future__ import annotations

import functools
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sortal._engine.graphdef import GraphDef
from sortal._engine.host import is_near, to_host
from sortal._engine.paths import show
from sortal._engine.plan import bind
from sortal._engine.schema import Schema, path_hints, select
from sortal.checkpoint.manifest import Path, encode_path, encoded_paths
from sortal.checkpoint.store import ALIGN, SMALL, Piece
from sortal.checkpoint.values import (
    GONE,
    PLAIN,
    Array,
    Tree,
    UnsavableError,
    describe,
    dtype_name,
    is_storable,
    without_values,
)
from sortal.errors import SaveError, listing
from sortal.filters import to_filter
from sortal.policy.policy import Policy, answers

ON_ONE = jax.sharding.SingleDeviceSharding
COPIED = object()
"""Stands for an array whose bytes are in ``Taken.copied``."""
_TINY = 4096
"""The most bytes of an array that is copied, which takes less time than to hold it."""


class Split(NamedTuple):
    """An array in the parts that the devices of this process hold, each once.

    ``shard`` is the shape of each part. ``shared``: other processes have other parts.
    """

    shard: tuple[int, ...] | None
    shared: bool
    pieces: list[Piece]


class Taken(NamedTuple):
    """The leaves to save; all of it stays as it is, whatever becomes of the model.

    A value is a record, or an array whose record is still to be made: its shape and
    dtype outlive its buffer. ``data`` has all arrays in order, each whole, Split or
    COPIED. ``copied`` has the bytes of the last, each followed by zeros up to the next
    multiple of ALIGN.
    """

    graphdef: GraphDef
    chosen: Sequence[int]
    passing: list[bool]
    values: list[Tree | Any]
    data: list[Any]
    copied: np.ndarray


def take(root: Any, only: Any, policy: Policy | None, pin: bool) -> Taken:
    """Chooses the leaves to save, and refuses what a checkpoint cannot hold.

    ``only`` is a filter or None. The policy's setting ``checkpoint`` is read. ``pin``
    holds values as they are now, whatever the program does with the model next: JAX's
    buffers against donation, NumPy's arrays by a copy. Everything that needs no live
    object is left to ``lay_out``, which may run beside the program.
    """
    plan = bind(root)
    schema, live = plan.graphdef.schema, plan.values()
    _refuse_statics(root)
    chosen: Sequence[int] = range(len(schema))
    if only is not None:
        chosen = select(schema, (only,), plan.view).parts[0][1]
    keep = answers("checkpoint", schema, policy, plan.view, default="keep")
    if "drop" in keep:
        chosen = [i for i in chosen if keep[i] != "drop"]
    if len(schema) and not chosen:
        what = "the policy" if only is None else f"only={to_filter(only)!r}"
        raise SaveError(
            f"nothing to save: {what} takes none of the {len(schema)} "
            f"leaves:\n{listing(map(schema.describe, range(len(schema))))}"
            + path_hints(schema, (to_filter(only),))
        )
    if encoded_paths(schema) is not schema.paths:
        paths = [schema.paths[i] for i in chosen]
        _refuse_namesakes(paths)
        _refuse_addresses(paths)
    passing = [keep[i] == "keep-last" for i in chosen]
    return Taken(plan.graphdef, chosen, passing, *_hold(schema, chosen, live, pin))


def _hold(
    schema: Schema, chosen: Sequence[int], live: list[Any], pin: bool
) -> tuple[list[Any], list[Any], np.ndarray]:
    """The values and the arrays of leaves; refuses all unsavable leaves at once."""
    values, data, faults = [], [], []
    copies = _Copies()
    for i in chosen:
        value = live[i]
        if (record := copies.add(value)) is not None:
            values.append(record)
            data.append(COPIED)
            continue
        try:
            if not (_is_array(type(value)) and is_storable(value.dtype)):
                inside: list[Any] = []
                values.append(describe(value, inside))
                data += [_held(x, pin) for x in inside]
            elif type(value) is np.ndarray:
                # Its shape can be changed in place, so its record is a copy's.
                values.append(held := _held(value, pin))
                data.append(held)
            elif type(value.sharding) is ON_ONE:  # as _held does, faster
                data.append(_on_one(value, pin))
                values.append(value)
            else:
                data.append(_held(value, pin))
                values.append(value)
        except UnsavableError as e:
            faults.append(f"{schema.describe(i)}: {e}")
        except RuntimeError:
            if not live[i].is_deleted():
                raise
            faults.append(f"{schema.describe(i)}: {GONE}")
    if faults:
        raise SaveError(
            "a checkpoint holds arrays, Python scalars, strings, and pytrees of these; "
            f"found:\n{listing(faults)}\nNothing was saved. Leave them out with only=, "
            "or put them into metadata=."
        )
    if pin and not {memoryview, object}.issuperset(map(type, data)):
        data = _off_devices(data)
    return values, data, copies.bytes()


class _Copies:
    """The bytes of the small arrays in memory of the host.

    Copies take half the time of what keeps a buffer from being donated, and leave no
    objects for the garbage collector.
    """

    def __init__(self) -> None:
        self._file = io.BytesIO()
        self._last: Any = None
        self._is_here = False

    def add(self, value: Any) -> Array | None:
        """The record of an array that was copied; None for any other value."""
        if not (_is_jax(type(value)) and (tiny := _tiny(value.aval))):
            return None
        if (sharding := value.sharding) is not self._last:  # arrays share one mostly
            self._last = sharding
            self._is_here = type(sharding) is ON_ONE and is_near(sharding)
        if not self._is_here:
            return None
        try:
            # Refuses arrays whose axes lie in another order; `bytes` would not.
            self._file.write(value)
        except BufferError:  # so, or deleted
            return None
        record, tail = tiny
        if tail:
            self._file.write(tail)
        return record

    def bytes(self) -> np.ndarray:
        """All of them, each followed by zeros up to a multiple of ALIGN."""
        return np.frombuffer(self._file.getbuffer(), np.uint8)


@functools.lru_cache(maxsize=64)
def _is_jax(cls: type) -> bool:
    return issubclass(cls, jax.Array)


@functools.lru_cache(maxsize=4096)
def _tiny(aval: Any) -> tuple[Array, bytes] | None:
    """The record of an array that is to be copied, and the zeros that follow it."""
    # Of other dtypes than NumPy's own, JAX gives no buffer.
    if is_storable(aval.dtype) and aval.dtype.isbuiltin == 1:
        record = Array(aval.shape, dtype_name(aval.dtype), "jax", aval.weak_type)
        if 0 < record.nbytes <= _TINY:
            return record, bytes(-record.nbytes % ALIGN)
    return None


def _off_devices(data: list[Any]) -> list[Any]:
    """With the arrays that an accelerator still has in memory of the host."""
    leaves, treedef = jax.tree.flatten(data)
    there = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
    for i, x in zip(there, to_host([leaves[i] for i in there]), strict=True):
        # Of a CPU's own memory, a view keeps the buffer from being donated.
        leaves[i] = np.asarray(x) if x is leaves[i] else x
    return treedef.unflatten(leaves)


@functools.lru_cache(maxsize=64)
def _is_array(cls: type) -> bool:
    return cls is np.ndarray or issubclass(cls, jax.Array)


def _on_one(live: Any, pin: bool) -> Any:
    """An array of one device; with ``pin``, its memory itself where the host has it."""
    try:
        if pin and live.dtype.isbuiltin == 1:  # others have no memoryview
            # It keeps the buffer from being donated, as asarray does, and is faster.
            return memoryview(live)
    except BufferError:  # on an accelerator, or deleted
        pass
    if live.is_deleted():
        raise UnsavableError(GONE)
    return live


def _held(live: Any, pin: bool) -> Any:
    """Any array, whole or in its parts; with ``pin``, as it is now for good."""
    if why := without_values(live):
        raise UnsavableError(why)
    sharding = getattr(live, "sharding", None)
    if sharding is None:  # of NumPy
        return live.copy() if pin else live
    if type(sharding) is ON_ONE:
        return _on_one(live, pin)
    if live.is_fully_replicated:
        return _on_one(live.addressable_data(0), pin)
    if live.is_fully_addressable and live.nbytes < SMALL:
        return _on_one(live, pin)
    return Split(
        sharding.shard_shape(live.shape),
        not live.is_fully_addressable,
        [
            Piece(tuple(s.start or 0 for s in part.index), _on_one(part.data, pin))
            for part in live.addressable_shards
            if part.replica_id == 0
        ],
    )


def _refuse_statics(root: Any) -> None:
    """Refuses scalars in plain containers: they look saved, and are static."""
    found: list[str] = []
    seen: set[int] = set()
    todo: list[tuple[Path, Any]] = [((), root)]
    while todo:
        path, x = todo.pop()
        if type(x) in (dict, list, tuple):
            if id(x) in seen:
                continue
            seen.add(id(x))
        if type(x) is dict:
            todo += [((*path, key), child) for key, child in x.items()]
        elif type(x) in (list, tuple):
            todo += [((*path, i), child) for i, child in enumerate(x)]
        elif type(x) in PLAIN or isinstance(x, np.generic):
            found.append(f"{show(path)}: {x!r:.60}")
    if found:
        raise SaveError(
            "numbers and strings in plain containers are static, and checkpoints hold "
            f"no static values; found:\n{listing(sorted(found))}\nPut them into "
            "metadata=, or into Variables."
        )


def _refuse_namesakes(paths: Iterable[Any]) -> None:
    """Keys other than strings and integers are stored as text, which may collide."""
    if found := namesakes(map(encode_path, paths)):
        raise SaveError(
            "several leaves have one path once their keys are text; found:\n"
            f"{listing(found)}\nUse strings or integers as keys."
        )


def _refuse_addresses(paths: Iterable[Any]) -> None:
    """A key whose text holds its address has another one in the next process."""
    found = [
        show(path)
        for path in paths
        if any(type(k) not in (str, int) and _ADDRESS.search(repr(k)) for k in path)
    ]
    if found:
        raise SaveError(
            "keys whose repr holds an address in memory, under which no other process "
            f"would find them; found:\n{listing(found)}\nUse strings or integers as "
            "keys, or give their class a __repr__."
        )


_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")


def namesakes(paths: Iterable[Any]) -> list[str]:
    """The stored paths that occur more than once."""
    return [show(path) for path, n in Counter(paths).items() if n > 1]
