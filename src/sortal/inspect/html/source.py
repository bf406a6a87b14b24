"""What a page shows, whether it comes from a model or from a file: leaves as items."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding

from sortal._engine.foreign import ancestry
from sortal._engine.nodes import NODE, STATIC
from sortal._engine.paths import Path as ModelPath
from sortal._engine.plan import bind
from sortal._engine.statics import EMPTY
from sortal._engine.tables import nbytes
from sortal.checkpoint.manifest import Manifest
from sortal.checkpoint.verifying import read_step
from sortal.errors import SortalError, UnsupportedError
from sortal.inspect.html.numbers import host
from sortal.inspect.naming import full_name, labels
from sortal.inspect.rows import leaves as leaf_rows
from sortal.inspect.rows import show_value
from sortal.interop.files.entries import Entry, Opened, in_batches
from sortal.interop.files.exchange import open_arrays
from sortal.policy.rule import format_answer
from sortal.sharding.report import sharding_report

_LONGEST = 300
_KEYS = "random keys are no numbers"
UNLABELLED = "unlabelled array"


class Class(NamedTuple):
    """A class that filters may name: its name, and that with its module."""

    name: str
    full: str


ARRAYS = {
    jax.Array: Class("Array", "jax.Array"),
    np.ndarray: Class("ndarray", "numpy.ndarray"),
    jax.ShapeDtypeStruct: Class("ShapeDtypeStruct", "jax.ShapeDtypeStruct"),
}
"""Types of arrays, which filters may name where arrays are in no Variable."""


class Kind(NamedTuple):
    """A kind: how the page calls it, and all classes that take its leaves.

    ``full`` is None for arrays outside of Variables, whose classes are types of arrays.
    """

    label: str
    full: str | None
    classes: tuple[Class, ...]


class Item(NamedTuple):
    """One leaf.

    ``shape`` is None where the value is no array, ``dtype`` empty. ``text`` describes
    the value. ``spec``, ``by`` and ``lies`` are as in ``ShardingRow``, as text; empty
    where nothing is known. ``on_device`` counts the bytes on one device. ``arrays``
    gives all parts of the value in host memory, and is None where there are none.
    ``unread`` says why there are no facts about numbers.
    """

    path: ModelPath
    kind: Kind
    shape: tuple[int, ...] | None
    dtype: Any
    text: str
    elements: int
    bytes: int
    on_device: int
    spec: str = ""
    by: str = ""
    lies: str = ""
    aliases: tuple[ModelPath, ...] = ()
    tag: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    arrays: Callable[[], list[np.ndarray]] | None = None
    unread: str = ""


class Node(NamedTuple):
    """An object that holds leaves: its class and its static attributes, as text."""

    cls: str
    statics: tuple[tuple[str, str], ...]


class Source(NamedTuple):
    """All that is shown of one model or file.

    ``labelled`` says whether it has kinds at all, which most formats of files do not.
    """

    title: str
    about: tuple[tuple[str, str], ...]
    items: tuple[Item, ...]
    nodes: Mapping[ModelPath, Node]
    labelled: bool


def source_of(thing: Any, step: int | str, sharding: Mapping[str, Any]) -> Source:
    """What is to be shown of a model, or of a file if ``thing`` is a path."""
    if isinstance(thing, (str, os.PathLike)):
        return _file(open_arrays(thing, step), Path(thing).resolve().name)
    return _model(thing, sharding)


# --------------------------------------------------------------------------- models
def _model(root: Any, sharding: Mapping[str, Any]) -> Source:
    plan = bind(root)
    schema, values = plan.graphdef.schema, plan.values()
    kinds = _kinds_of(schema.kinds, values)
    places = _places(root, values, sharding)
    items = tuple(
        Item(
            row.path,
            kind,
            None if shape is None else tuple(shape),
            getattr(value, "dtype", ""),
            row.value,
            row.elements,
            row.bytes,
            *place,
            row.aliases,
            tag if isinstance(tag := metadata.get("tag"), str) else None,
            tuple((str(k), shown(x)) for k, x in metadata.items()),
            *_reader(value),
        )
        for row, value, kind, metadata, place in zip(
            leaf_rows(root), values, kinds, schema.metadata, places, strict=True
        )
        for shape in [getattr(value, "shape", None)]
    )
    nodes = _nodes(plan.graphdef)
    return Source(_title(nodes), (), items, nodes, True)


def _title(nodes: Mapping[ModelPath, Node]) -> str:
    """The class of the root; of a plain container the classes of what is in it."""
    root = nodes[()].cls if () in nodes else "One leaf"
    inside = dict.fromkeys(node.cls for path, node in nodes.items() if len(path) == 1)
    plain = root in {"tuple", "list", "dict"} and 0 < len(inside) <= 3
    return " and ".join(inside) if plain else root


def _kinds_of(kinds: Sequence[Any], values: Sequence[Any]) -> list[Kind]:
    names = labels(kinds)
    made: dict[Any, Kind] = {}
    found = []
    for kind, value in zip(kinds, values, strict=True):
        key = type(value) if kind is None else kind
        if key not in made:
            full = None if kind is None else full_name(kind)
            made[key] = Kind(names[kind], full, classes_of(kind, value))
        found.append(made[key])
    return found


def classes_of(kind: Any, value: Any = None) -> tuple[Class, ...]:
    """The classes whose filters take Variables of a kind, or a raw array."""
    if kind is None:
        return tuple(name for cls, name in ARRAYS.items() if isinstance(value, cls))
    bases = (c for c in ancestry(kind) if c.__module__ not in {"builtins", "typing"})
    return tuple(dict.fromkeys(Class(c.__name__, full_name(c)) for c in bases))


def _places(
    root: Any, values: Sequence[Any], sharding: Mapping[str, Any]
) -> Iterator[tuple[int, str, str, str]]:
    """For each leaf the bytes on one device, its spec, who gave it, where it lies."""
    given = sharding["mesh"] is not None or sharding["policy"] is not None
    if not given and jax.sharding.get_abstract_mesh().empty:
        yield from map(_lying, values)
        return
    for row in sharding_report(root, **sharding).rows:
        lies = "" if row.lies is None else format_answer("spec", row.lies)
        yield row.on_device, format_answer("spec", row.spec), row.by, lies


def _lying(value: Any) -> tuple[int, str, str, str]:
    count, specs = 0, []
    for x in jax.tree.leaves(value):
        found = getattr(x, "sharding", None)
        if isinstance(found, NamedSharding):
            specs.append(format_answer("spec", found.spec))
        if found is None or isinstance(x, Tracer):
            count += nbytes(x)
        else:
            count += math.prod(found.shard_shape(x.shape)) * x.dtype.itemsize
    return count, ", ".join(dict.fromkeys(specs)), "", ""


def _reader(value: Any) -> tuple[Callable[[], list[np.ndarray]] | None, str]:
    parts = jax.tree.leaves(value)
    if any(isinstance(x, (jax.ShapeDtypeStruct, Tracer)) for x in parts):
        return None, "abstract: it has no values"
    arrays = [x for x in parts if isinstance(x, jax.Array)]
    if any(x.is_deleted() for x in arrays):
        return None, "its memory was given away (donated)"
    if not all(x.is_fully_addressable for x in arrays):
        return None, "it lies on devices of other processes too"
    keys = any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in arrays)
    return lambda: list(map(host, parts)), _KEYS if keys else ""


def _nodes(graphdef: Any) -> dict[ModelPath, Node]:
    found: dict[ModelPath, Node] = {}
    statics: dict[ModelPath, list[tuple[str, str]]] = {}
    for path, entry, first in graphdef.places():
        if entry.what == NODE and path == first:
            statics[path] = []
            cls = graphdef.records[entry.ref].cls.__name__
            found[path] = Node(cls, ())
        elif entry.what == STATIC and path[:-1] in statics:
            text = shown(entry.ref.value)
            statics[path[:-1]].append((str(path[-1]), text))
    return {path: node._replace(statics=tuple(statics[path]))
            for path, node in found.items()}  # fmt: skip


def shown(x: Any) -> str:
    """The repr of an object, cut; of functions and classes the name.

    Example:
      >>> shown(1.5), shown(len), shown("x" * 400)[-8:]
      ('1.5', 'len', 'xxxxx...')
    """
    if isinstance(x, type) or callable(x):
        name = getattr(x, "__qualname__", None)
        if isinstance(name, str):
            return name[:_LONGEST]
    try:
        text = repr(x)
    except Exception as e:  # noqa: BLE001 - another library's repr may do anything
        return f"<{type(x).__name__}, whose repr raises {type(e).__name__}>"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


# ---------------------------------------------------------------------------- files
def _file(opened: Opened, name: str) -> Source:
    about = [("file", str(opened.path)), ("format", opened.format)]
    about += [(k, shown(x)) for k, x in opened.about.items() if k != "aliases" and x]
    m = read_step(opened.path) if opened.format == "sortal" else None
    groups: dict[ModelPath, list[Entry]] = {}
    # One array that cannot be read would take its batch with it.
    batches = opened.together is not None
    for e in in_batches(opened, opened.entries) if batches else opened.entries:
        groups.setdefault(e.name[: len(e.name) - e.inner], []).append(e)
    kinds, metadata, aliases = _recorded(m, opened)
    items = tuple(
        _entries(path, found, kinds, metadata.get(path, EMPTY), aliases.get(path, ()))
        for path, found in groups.items()
    )
    title = name if m is None else f"{name}, step {m.step}"
    return Source(title, tuple(about), items, {}, m is not None)


def _recorded(
    m: Manifest | None, opened: Opened
) -> tuple[
    dict[Any, Kind], dict[ModelPath, Any], dict[ModelPath, tuple[ModelPath, ...]]
]:
    """The kinds by full name, and for each path its metadata, and its other paths."""
    array = Kind(UNLABELLED, None, classes_of(None, np.empty(0)))
    kinds: dict[Any, Kind] = {None: array}
    if m is None:
        names = dict.fromkeys(e.kind for e in opened.entries if e.kind is not None)
        kinds |= {x: Kind(_last(x), x, (Class(_last(x), x),)) for x in names}
        return kinds, {}, {}
    named = {k.name: k.bases for k in m.kinds if k.name is not None}
    short = list(map(_last, named))
    for name, bases in named.items():
        label = name if short.count(_last(name)) > 1 else _last(name)
        classes = tuple(Class(_last(x), x) for x in (name, *bases))
        kinds[name] = Kind(label, name, classes)
    metadata = {leaf.path: dict(leaf.metadata) for leaf in m.leaves}
    paths, aliases = list(metadata), {}
    for other, first in m.aliases:
        for path in [p for p in paths if p[: len(first)] == first]:
            aliases[path] = (*aliases.get(path, ()), (*other, *path[len(first) :]))
    return kinds, metadata, aliases


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _entries(
    path: ModelPath,
    found: list[Entry],
    kinds: Mapping[Any, Kind],
    metadata: Mapping[Any, Any],
    aliases: tuple[ModelPath, ...],
) -> Item:
    """The item of all entries of one leaf."""
    one = found[0] if len(found) == 1 and not found[0].inner else None
    array = one if one is not None and not one.plain else None
    spec, on_device = _stored_place(found)
    texts = [_text(e) for e in found[:3]] + ["..."] * (len(found) > 3)
    tag = metadata.get("tag")
    return Item(
        path,
        kinds[found[0].kind],
        None if array is None else array.shape,
        "" if array is None else array.dtype,
        ", ".join(texts),
        sum(e.elements for e in found),
        sum(e.nbytes for e in found),
        on_device,
        spec,
        aliases=aliases,
        tag=tag if isinstance(tag, str) else None,
        metadata=tuple((str(k), shown(x)) for k, x in metadata.items()),
        arrays=functools.partial(_read, found),
        unread=_KEYS if any(e.dtype.startswith("key<") for e in found) else "",
    )


def _stored_place(found: list[Entry]) -> tuple[str, int]:
    """The specs that entries were saved with, and their bytes on one device."""
    texts, count = [], 0
    for e in found:
        spec = e.spec or {}
        axes = [a if isinstance(a, list) else [a] for a in spec.get("spec", ())]
        sizes = [spec["mesh"].get(a, 1) for group in axes for a in group if a]
        count += e.nbytes // max(math.prod(sizes), 1)
        if "spec" in spec:
            entries = (tuple(a) if isinstance(a, list) else a for a in spec["spec"])
            texts.append(f"P({', '.join(map(repr, entries))})")
        elif "text" in spec:
            texts.append(spec["text"])
    return ", ".join(dict.fromkeys(texts)), count


def _text(e: Entry) -> str:
    if e.plain:
        return show_value(e.read())
    return f"{e.dtype}[{','.join(map(str, e.shape))}]"


def _read(found: list[Entry]) -> list[np.ndarray]:
    return [host(_decoded(e)) for e in found]


def _decoded(e: Entry) -> Any:
    """What an entry holds; of quantised blocks the numbers they stand for."""
    x = e.read()
    if e.plain or x.dtype != np.uint8 or e.dtype == "uint8":
        return x
    return _dequantised(e.dtype, x)


def _dequantised(dtype: str, x: np.ndarray) -> np.ndarray:
    try:
        import gguf

        return gguf.dequantize(x, gguf.GGMLQuantizationType[dtype.upper()])
    except (ImportError, KeyError, NotImplementedError) as e:
        raise UnsupportedError(f"the dtype {dtype} is not known here") from e


def read_arrays(item: Item) -> tuple[list[np.ndarray], str]:
    """The arrays of an item, or why there are none."""
    if item.arrays is None:
        return [], item.unread
    try:
        return item.arrays(), ""
    except (SortalError, OSError) as e:
        return [], f"it cannot be read: {e}"
