"""The data of a page, and the page: one file of HTML that fetches nothing."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import string
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path as File
from typing import Any

import jax
import jax.numpy as jnp

from sortal._engine import variable
from sortal._engine.foreign import twin
from sortal._engine.paths import Path, show
from sortal.checkpoint.values import DTYPES, numpy_dtype
from sortal.errors import UnsupportedError
from sortal.inspect.html import compare
from sortal.inspect.html.numbers import Numbers, numbers
from sortal.inspect.html.source import (
    ARRAYS,
    Class,
    Item,
    Kind,
    Source,
    classes_of,
    read_arrays,
)
from sortal.inspect.naming import full_name
from sortal.nn.lora import LoRAParam

_WEB = File(__file__).parent / "web"
# The scripts of one part share their names; a later file uses those of earlier ones.
_PARTS = {
    "style": ("page.css",),
    "filters": ("filters.js",),
    "script": (
        "elements.js",
        "tree.js",
        "search.js",
        "detail.js",
        "treemap.js",
        "changes.js",
        "page.js",
    ),
}
_ABSTRACT_DTYPES = (
    "generic number inexact floating complexfloating integer signedinteger "
    "unsignedinteger"
).split()
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
_SAFE = 1 << 53


# ------------------------------------------------------------------------- interning
class _Table:
    """Values, each once; what is written of a leaf is a number in it."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._at: dict[Hashable, int] = {}

    def add(self, key: Hashable, row: Callable[[], Any] | None = None) -> int:
        if key not in self._at:
            self._at[key] = len(self.rows)
            self.rows.append(key if row is None else row())
        return self._at[key]


class _Tables:
    def __init__(self) -> None:
        self.keys, self.kinds, self.classes = _Table(), _Table(), _Table()
        self.dtypes, self.texts, self.shapes = _Table(), _Table(), _Table()

    def path(self, path: Path) -> list[int]:
        return [self.keys.add((type(k), k), lambda k=k: _key(k)) for k in path]

    def text(self, text: str) -> int:
        return self.texts.add(_valid(text))

    def class_(self, cls: Class) -> int:
        return self.classes.add(cls, lambda: [cls.name, cls.full])

    def kind(self, kind: Kind) -> int:
        def row() -> dict[str, Any]:
            classes = list(map(self.class_, kind.classes))
            return {"label": kind.label, "name": kind.full, "is": classes}

        return self.kinds.add(kind, row)

    def dtype(self, dtype: Any) -> int:
        return self.dtypes.add(str(dtype), lambda: [str(dtype), _names_of(dtype)])


def _key(key: Any) -> Any:
    """An entry of a path: a number or text where it is shown as it is, else its facts.

    ``s`` is what globs compare, ``r`` its repr, ``n`` the number that it is equal to.
    """
    if type(key) is int and 0 <= key < _SAFE:
        return key
    text = _valid(str(key))
    if type(key) is str and show((key,)) == key and text == key:
        return key
    row: dict[str, Any] = {"s": text, "r": _valid(repr(key)), "t": type(key).__name__}
    if isinstance(key, (int, float)) and abs(key) < _SAFE:
        row["n"] = float(key) if isinstance(key, float) else int(key)
    return row


def _valid(text: str) -> str:
    """The text, without halves of characters, which no file of UTF-8 can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


@functools.cache
def _dtype_filters() -> dict[str, Any]:
    """Names that ``Dtyped`` may be given in a page, and what each stands for."""
    found = {name: getattr(jnp, name) for name in _ABSTRACT_DTYPES}
    found |= {name: numpy_dtype(name) for name in sorted(DTYPES)}
    return found | {"bool_": jnp.bool_, "prng_key": jax.dtypes.prng_key}


def _names_of(dtype: Any) -> list[str]:
    """The names of dtypes, abstract ones too, whose filters take a dtype."""
    if isinstance(dtype, str):
        if dtype.startswith("key<"):
            return ["prng_key", "generic"]
        if dtype not in DTYPES:
            return []
        dtype = numpy_dtype(dtype)
    return [n for n, d in _dtype_filters().items() if jnp.issubdtype(dtype, d)]


# ------------------------------------------------------------------------------ data
def data_of(
    source: Source, other: Source | None, values: bool, title: str | None
) -> dict[str, Any]:
    """All that a page shows, as data for JSON; each array is read once."""
    tables = _Tables()
    items, found, changes = source.items, [], []
    there = {item.path: item for item in other.items} if other is not None else {}
    both = [item for item in items if item.path in there]
    kinds = other is None or (source.labelled and other.labelled)
    for item in items:
        read = read_arrays(item) if values else ([], "values were not asked for")
        found.append(_numbers_of(item, read))
        if item.path in there:
            other_item = there[item.path]
            changes += compare.changed(item, other_item, read, kinds, values)
        del read  # or it would be in memory beside the next one
    data = {
        "title": _valid(title or source.title),
        "about": [[_valid(a), _valid(b)] for a, b in source.about],
        "leaves": _leaves(items, tables),
        "numbers": found,
        "nodes": [
            [tables.path(path), tables.text(node.cls),
             [[_valid(k), tables.text(x)] for k, x in node.statics]]
            for path, node in source.nodes.items()
        ],
    }  # fmt: skip
    if other is not None:
        changes += compare.one_sided(source, other, "removed")
        changes += compare.one_sided(other, source, "added")
        data["changes"] = _changes(changes, both, other, values, tables)
    return data | _tables(tables)


def _leaves(items: Sequence[Item], tables: _Tables) -> dict[str, list[Any]]:
    """The leaves by column; a path begins with how much of the last one it repeats."""
    paths, last = [], []
    for item in items:
        path = tables.path(item.path)
        pairs = zip(path, last, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        same = min(len(path), len(last)) if same is None else same
        paths.append([same, *path[same:]])
        last = path
    text, shapes = tables.text, tables.shapes
    return {
        "path": paths,
        "kind": [tables.kind(x.kind) for x in items],
        "dtype": [tables.dtype(x.dtype) if x.dtype != "" else -1 for x in items],
        "shape": [-1 if x.shape is None else shapes.add(x.shape) for x in items],
        "text": [text(x.text) for x in items],
        "elements": [x.elements for x in items],
        "bytes": [x.bytes for x in items],
        "device": [x.on_device for x in items],
        "spec": [text(x.spec) for x in items],
        "by": [text(x.by) for x in items],
        "lies": [text(x.lies) for x in items],
        "tag": [-1 if x.tag is None else text(x.tag) for x in items],
        "metadata": [
            text("\n".join(f"{k} = {v}" for k, v in x.metadata)) for x in items
        ],
        "aliases": [
            [n, list(map(tables.path, x.aliases))]
            for n, x in enumerate(items)
            if x.aliases
        ],
    }


def _tables(tables: _Tables) -> dict[str, Any]:
    list(map(tables.class_, ARRAYS.values()))
    pairs = [(kind, twin(kind)) for kind in _kinds_of_the_library()]
    twins = [(kind, other) for kind, other in pairs if other is not kind]
    for kind, _ in pairs:
        tables.class_(Class(kind.__name__, full_name(kind)))
    for kind, _ in twins:
        list(map(tables.class_, classes_of(kind)))
    return {
        "keys": tables.keys.rows,
        "kinds": tables.kinds.rows,
        "classes": tables.classes.rows,
        "twins": [list(map(full_name, pair)) for pair in twins],
        "dtypes": tables.dtypes.rows,
        "dtypeNames": sorted(_dtype_filters()),
        "dtypeTexts": sorted(DTYPES),
        "texts": tables.texts.rows,
        "shapes": tables.shapes.rows,
    }


def _kinds_of_the_library() -> list[type]:
    known = [x for x in vars(variable).values() if isinstance(x, type)]
    return [x for x in (*known, LoRAParam) if issubclass(x, variable.Variable)]


def _numbers_of(item: Item, read: compare.Read) -> Any:
    """The facts of the numbers of a leaf, or why there are none, as data for JSON."""
    why = item.unread or read[1]
    found = None if why else numbers(read[0])
    if found is None:
        return why or "no numbers"
    mean, std = (None if x is None else _plain(x) for x in (found.mean, found.std))
    rest = [found.zeros, found.nans, found.infinities, found.count]
    low, high = _plain(found.low), _plain(found.high)
    return [low, high, mean, std, *rest, *_heights(found)]


def _plain(x: float | None) -> Any:
    """A number for JSON: of integers all digits, of others seven."""
    if x is None or isinstance(x, int):
        return x if x is None or abs(x) < _SAFE else str(x)
    short = float(f"{x:.7g}")
    return short if math.isfinite(short) else str(x)


def _heights(found: Numbers) -> tuple[int, str]:
    """The fullest bin, and each bin as two digits of base 64: 4095 is the fullest."""
    most = max(found.bins, default=0)
    heights = [-(-n * 4095 // most) for n in found.bins]
    return most, "".join(_DIGITS[h // 64] + _DIGITS[h % 64] for h in heights)


def _changes(
    changes: list[compare.Change],
    both: list[Item],
    other: Source,
    values: bool,
    tables: _Tables,
) -> dict[str, Any]:
    def largest(x: float | None) -> Any:
        return x if x is None or math.isfinite(x) else str(x)

    return {
        "title": _valid(other.title),
        "values": values,
        "rows": [
            [tables.path(c.path), tables.kind(c.kind), c.what, tables.text(c.detail),
             largest(c.largest)]
            for c in changes
        ],
        "kinds": [
            [k.label, k.both, k.counts, largest(k.largest)]
            for k in compare.counted(changes, both)
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------ page
def page(data: dict[str, Any]) -> str:
    """The page of some data.

    The page allows itself its own two scripts and its own style sheet by their hashes,
    and nothing else: no other script, and no address to fetch anything from.

    Raises:
      UnsupportedError: Jinja2 is not installed.
    """
    try:
        import jinja2
        import markupsafe
    except ImportError:
        raise UnsupportedError(
            "a picture is drawn with Jinja2, which is not installed. Install it with: "
            "pip install jinja2, or pip install 'sortal[show]'"
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_WEB),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    parts = {name: _read(*files) for name, files in _PARTS.items()}
    return environment.get_template("page.html").render(
        title=data["title"],
        data=markupsafe.Markup(_embedded(data)),  # noqa: S704 - escaped by _embedded
        **{name: markupsafe.Markup(text) for name, text in parts.items()},  # noqa: S704
        **{f"{name}_hash": _hash(text) for name, text in parts.items()},
    )


def _read(*files: str) -> str:
    """Files of the page, one after the other."""
    return "\n".join((_WEB / file).read_text(encoding="utf-8") for file in files)


def _embedded(data: Any) -> str:
    """JSON that may stand in a script element, for it has no ``<``, ``>`` and ``&``."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
