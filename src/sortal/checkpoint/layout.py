"""What a save writes: the records of leaves, and where each array goes."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sortal._engine.foreign import handler_of_kind
from sortal._engine.graphdef import GraphDef
from sortal._engine.paths import show
from sortal._engine.schema import kind_name
from sortal._engine.statics import EMPTY
from sortal._engine.variable import Variable
from sortal.checkpoint.manifest import (
    METADATA,
    Kind,
    Leaf,
    Path,
    Stored,
    encode_path,
    encoded_paths,
)
from sortal.checkpoint.store import ALIGN, SMALL, Piece, packed, stored_array
from sortal.checkpoint.taking import COPIED, ON_ONE, Split, Taken
from sortal.checkpoint.values import (
    DEPTH,
    RECORDS,
    Array,
    Place,
    Tree,
    arrays,
    describe,
    dtype_name,
    with_arrays,
)
from sortal.errors import SaveError, listing


class Layout(NamedTuple):
    """Everything about a save except the bytes, and where to take these from."""

    kinds: tuple[Kind, ...]
    leaves: tuple[Leaf, ...]
    aliases: tuple[tuple[Path, Path], ...]
    arrays: dict[str, Stored]
    packs: dict[str, list[tuple[int, Any]]]
    """The arrays of each pack, with their offsets; some are the bytes of many."""
    own: dict[str, list[Piece]]
    """This process's pieces of the arrays that are stored by themselves."""
    shared: frozenset[str]
    """Those of them that several processes write."""
    graphdef: str


def lay_out(taken: Taken) -> Layout:
    """Decides where each array goes. Touches no live object but arrays."""
    graphdef, schema = taken.graphdef, taken.graphdef.schema
    kinds, number = _kinds([schema.kinds[i] for i in taken.chosen])
    place, data = _Places(), iter(taken.data)
    paths = encoded_paths(schema)
    leaves = []
    for i, passing, value in zip(
        taken.chosen, taken.passing, taken.values, strict=True
    ):
        kind, path, metadata = number[schema.kinds[i]], paths[i], {}
        tree = value if type(value) in RECORDS else _described(value)
        new = place.all(tree, data, kinds[kind].group, path, passing)
        if (given := schema.metadata[i]) is not EMPTY:
            metadata = {k: v for k, v in given.items() if type(v) in METADATA}
        leaves.append(Leaf(path, kind, new, metadata, passing))
    return Layout(
        kinds,
        tuple(leaves),
        aliases_of(graphdef),
        place.stored(),
        place.packs(taken.copied),
        place.own,
        frozenset(place.shared),
        fingerprint(graphdef),
    )


def _described(array: Any) -> Tree:
    """As ``describe``; most arrays are alike, and that is much faster for them."""
    if type(array) is np.ndarray or type(array.sharding) is not ON_ONE:
        return describe(array, [])
    return _alike(array.shape, array.dtype, array.weak_type)


@functools.lru_cache(maxsize=1024)
def _alike(shape: tuple[int, ...], dtype: Any, weak: bool) -> Array:
    return Array(shape, dtype_name(dtype), "jax", weak)


# ------------------------------------------------------------------ kinds and paths
def qualified(cls: type) -> str:
    """The name of a class, with its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_kind(cls: type) -> bool:
    """Whether a class is a kind: of Variables, or of those of another library."""
    return issubclass(cls, Variable) or handler_of_kind(cls) is not None


def bases_of(kind: type) -> list[type]:
    """The kinds that a kind derives from, nearest first."""
    return list(filter(is_kind, kind.__mro__[1:]))


def _kinds(found: list[Any]) -> tuple[tuple[Kind, ...], dict[Any, int]]:
    number: dict[Any, int] = {}
    kinds: list[Kind] = []
    for kind in found:
        if kind in number:
            continue
        taken = {k.group.casefold() for k in kinds}
        if kind is None:
            new = Kind(None, (), free("unlabelled", taken))
        else:
            bases = bases_of(kind)
            group = free(file_name(kind.__name__), taken)
            new = Kind(qualified(kind), tuple(map(qualified, bases)), group)
        number[kind] = len(kinds)
        kinds.append(new)
    return tuple(kinds), number


_ODD = re.compile(r"[^A-Za-z0-9_.=@-]")


def file_name(text: str) -> str:
    """A file name for a text, valid on every system; equal texts give equal names."""
    name = _ODD.sub(lambda m: "".join(f"%{b:02X}" for b in _utf8(m[0])), text)
    name = name.replace(".", "%2E", 1) if name.startswith(".") else name
    if len(name) > 100:
        name = f"{name[:80]}~{hashlib.sha256(_utf8(text)).hexdigest()[:16]}"
    return name or "%"


def _utf8(text: str) -> bytes:
    # Undecodable file names hold lone surrogates.
    return text.encode(errors="surrogatepass")


def free(name: str, taken: set[str]) -> str:
    """A name not taken yet, case ignored, as some file systems ignore it."""
    found, n = name, 2
    while found.casefold() in taken:
        found, n = f"{name}~{n}", n + 1
    return found


def aliases_of(graphdef: GraphDef) -> tuple[tuple[Path, Path], ...]:
    """Pairs of an alias path and the first path of the same leaf or node."""
    return graphdef.memo("checkpoint aliases", lambda: _aliases(graphdef))


def _aliases(graphdef: GraphDef) -> tuple[tuple[Path, Path], ...]:
    pairs = (
        (encode_path(path), encode_path(first))
        for path, _, first in graphdef.places()
        if first != path
    )
    return tuple(sorted(pairs, key=lambda pair: tuple(map(show, pair))))


def fingerprint(graphdef: GraphDef) -> str:
    """A hash of types, kinds and sharing by path.

    Settings are left out: a model saved in training may be restored after ``eval()``.
    """

    def compute() -> str:
        schema = graphdef.schema
        rows = [
            f"{p!r}: {kind_name(None) if k is None else qualified(k)}"
            for p, k in zip(encoded_paths(schema), schema.kinds, strict=True)
        ]
        rows += [f"{a!r} = {b!r}" for a, b in aliases_of(graphdef)]
        if graphdef.records:
            rows += [f"node {qualified(r.cls)}" for r in graphdef.records]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    return graphdef.memo("checkpoint fingerprint", compute)


# ---------------------------------------------------------------------------- places
class _Pack:
    """Small arrays one after the other, each at a multiple of ALIGN."""

    def __init__(self, name: str):
        self.name, self.end = name, 0
        self._parts: list[tuple[int, Any]] = []
        self._next = -1

    def add(self, size: int, data: Any) -> Place:
        """Where an array goes."""
        at = self.end + -self.end % ALIGN
        self.end, self._next = at + size, -1
        self._parts.append((at, data))
        return Place(self.name, at)

    def add_copied(self, size: int, begin: int) -> Place:
        """Where an array goes whose bytes begin at an index of the copied ones.

        Nearly always they go on there where those of the array before end.
        """
        at = self.end + -self.end % ALIGN
        self.end = at + size
        if begin == self._next:
            self._parts[-1][1][1] = begin + size
        else:
            self._parts.append((at, [begin, begin + size]))
        self._next = begin + size + -size % ALIGN
        return Place(self.name, at)

    def parts(self, copied: np.ndarray) -> list[tuple[int, Any]]:
        """The arrays, and the bytes of several in a row, each with its offset."""
        return [
            (at, copied[slice(*x)] if type(x) is list else x) for at, x in self._parts
        ]


class _Places:
    """Assigns storage: small arrays go into packs, others are stored by themselves."""

    def __init__(self) -> None:
        self.own: dict[str, list[Piece]] = {}
        self.shared: set[str] = set()
        self._packs: dict[tuple[str, bool], _Pack] = {}
        self._stored: dict[str, Stored] = {}
        self._names: set[str] = set()
        self._copied = 0

    def all(
        self, tree: Tree, data: Iterator[Any], group: str, path: Path, passing: bool
    ) -> Tree:
        """The value, with a place for each of its arrays."""
        if type(tree) is Array:
            return self._placed(tree, next(data), group, path, passing)
        new = [
            self._placed(array, next(data), group, path, passing)
            for array in arrays(tree)
        ]
        return with_arrays(tree, iter(new))

    def _placed(
        self, array: Array, data: Any, group: str, path: Path, passing: bool
    ) -> Array:
        size = array.nbytes
        if size == 0:
            return array
        if data is not COPIED and (type(data) is Split or size >= SMALL):
            place = self._by_itself(array, data, group, path, passing)
        else:
            pack = self._packs.get((group, passing))
            if pack is None:
                name = f"{group}/packed~last" if passing else f"{group}/packed"
                pack = self._packs[group, passing] = _Pack(name)
            if data is COPIED:
                place = pack.add_copied(size, self._copied)
                self._copied += size + -size % ALIGN
            else:
                place = pack.add(size, data)
        return Array(*array[:-1], place)

    def _by_itself(
        self, array: Array, data: Any, group: str, path: Path, passing: bool
    ) -> Place:
        last = "~last" if passing else ""
        taken = (f"{group}/{x}" for x in ("packed", "packed~last", "zarr.json"))
        taken = self._names.union(map(str.casefold, taken))
        wanted = f"{group}/{file_name(show(path))}{last}"
        name = free(wanted, taken)
        self._names.add(name.casefold())
        if not isinstance(data, Split):
            data = Split(None, False, [Piece((0,) * data.ndim, data)])
        self._stored[name] = stored_array(array, data.shard)
        self.own[name] = data.pieces
        if data.shared:
            self.shared.add(name)
        return Place(name, None)

    def packs(self, copied: np.ndarray) -> dict[str, list[tuple[int, Any]]]:
        """The arrays of each pack, with their offsets."""
        return {pack.name: pack.parts(copied) for pack in self._packs.values()}

    def stored(self) -> dict[str, Stored]:
        """All arrays to write, by name."""
        packs = {pack.name: packed(pack.end) for pack in self._packs.values()}
        return {**packs, **self._stored}


def check_json(what: str, x: Any) -> None:
    """Refuses values that JSON would not give back unchanged; all are listed."""
    faults = list(_not_json(what, x, ()))
    if faults:
        raise SaveError(
            f"{what}= must be plain JSON, so that it is read back unchanged; found:\n"
            f"{listing(sorted(faults))}\nUse lists, dicts with strings as keys, "
            "strings, bools, None and finite numbers."
        )


def _not_json(at: str, x: Any, above: tuple[int, ...]) -> Iterator[str]:
    if id(x) in above:
        yield f"{at}: something that contains itself"
    elif len(above) > DEPTH:
        yield f"{at}: more than a hundred containers deep"
    elif type(x) is dict:
        for key, value in x.items():
            if type(key) is not str:
                yield f"{at}: the key {key!r}"
            yield from _not_json(f"{at}[{key!r}]", value, (*above, id(x)))
    elif type(x) is list:
        for i, value in enumerate(x):
            yield from _not_json(f"{at}[{i}]", value, (*above, id(x)))
    elif type(x) is float:
        if not math.isfinite(x):
            yield f"{at}: {x}"
    elif type(x) is int:
        if x.bit_length() > 14_000:  # Python reads no more than 4,300 digits
            yield f"{at}: an integer of {x.bit_length():,} bits"
    elif x is not None and type(x) not in (str, bool):
        yield f"{at}: a {type(x).__name__}"
