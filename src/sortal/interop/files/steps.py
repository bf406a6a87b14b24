"""Steps of Sortal as entries: each array and plain value of each leaf."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sortal._engine.paths import show
from sortal.checkpoint.files import Location
from sortal.checkpoint.loading import Want
from sortal.checkpoint.restoring import read as read_wants
from sortal.checkpoint.store import Reader
from sortal.checkpoint.values import Array, Nest, Plain, Tree
from sortal.checkpoint.verifying import read_step
from sortal.errors import DamagedError
from sortal.interop.files.entries import Entry, Opened


def read(folder: Location) -> Opened:
    """Opens the folder of one step; no array is read."""
    m = read_step(folder)
    reader = Reader(folder / m.folder, m)

    def together(arrays: Sequence[Entry]) -> list[Any]:
        return read_wants(reader, [_want(*found[e.name]) for e in arrays])

    def get(name: Any) -> Any:
        return read_wants(reader, [_want(*found[name])])[0]

    found: dict[Any, tuple[Any, Any]] = {}
    entries: list[Entry] = []
    names: list[Any] = []
    for leaf in m.leaves:
        for name, x in _parts(leaf.path, leaf.value):
            names.append(name)
            found[name] = (leaf.path, x)
            reading = functools.partial(get, name)
            new = entry(name, x, m.kind_of(leaf).name, reading)
            entries.append(new._replace(inner=len(name) - len(leaf.path)))
    if len(set(names)) < len(names):
        raise DamagedError(f"{folder}: two arrays have one path")
    about = {
        "step": m.step, "created": m.created, "metadata": m.metadata,
        "metrics": dict(m.metrics), "versions": dict(m.versions),
        "aliases": [[show(a), show(b)] for a, b in m.aliases],
    }  # fmt: skip
    structures = {x.path: structure(x.value) for x in m.leaves if type(x.value) is Nest}
    return Opened(folder, "sortal", about, entries, structures, together)


def _want(path: Any, x: Array) -> Want:
    words = x if x.key is None else x._replace(key=None, shape=x.stored_shape)
    return Want(path, words, "numpy", x.dtype)


def entry(name: Any, x: Any, kind: str | None, get: Callable[[], Any]) -> Entry:
    """The entry of an array or plain value; ``get`` reads the array."""
    if isinstance(x, Plain):
        return Entry(name, x.shown, (), 0, lambda: x.value, kind, plain=True)
    dtype = x.dtype if x.key is None else f"key<{x.key.impl}>"
    return Entry(name, dtype, x.shape, x.nbytes, get, kind, x.sharding)


def _parts(path: Any, value: Tree) -> Iterator[tuple[Any, Array | Plain]]:
    """The arrays and plain values inside a value, with their paths."""
    if not isinstance(value, Nest):
        yield path, value
        return
    for n, (key, child) in enumerate(zip(value.keys, value.children, strict=True)):
        named = value.what == "dict" or key is not None
        yield from _parts((*path, key if named else n), child)


def structure(value: Tree) -> str:
    """The containers of a value as text, with ``*`` for each array and plain value.

    Example:
      >>> from sortal.checkpoint.values import describe
      >>> structure(describe({"a": 1, "b": (2, None)}, []))
      'dict(a=*, b=tuple(*, none()))'
    """
    if not isinstance(value, Nest):
        return "*"
    inside = (
        structure(x)
        if key is None and value.what != "dict"
        else f"{key}={structure(x)}"
        for key, x in zip(value.keys, value.children, strict=True)
    )
    return f"{value.name or value.what}({', '.join(inside)})"
