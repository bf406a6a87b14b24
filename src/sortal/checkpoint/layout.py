"""What a save writes: the chosen leaves, their records, and where each array goes."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from sortal._engine.foreign import handler_of_kind
from sortal._engine.graphdef import GraphDef
from sortal._engine.paths import show
from sortal._engine.plan import bind
from sortal._engine.schema import Schema, kind_name, select
from sortal._engine.variable import Variable
from sortal.checkpoint.manifest import METADATA, Kind, Leaf, Path, Stored
from sortal.checkpoint.store import ALIGN, SMALL, Piece, packed, stored_array
from sortal.checkpoint.values import (
    DEPTH,
    PLAIN,
    Array,
    Place,
    Tree,
    UnsavableError,
    arrays,
    describe,
    with_arrays,
)
from sortal.errors import SaveError, listing
from sortal.filters import to_filter
from sortal.policy.policy import Policy, answers


class Layout(NamedTuple):
    """Everything about a save except the bytes, and where to take these from."""

    kinds: tuple[Kind, ...]
    leaves: tuple[Leaf, ...]
    aliases: tuple[tuple[Path, Path], ...]
    arrays: dict[str, Stored]
    packs: dict[str, list[tuple[int, Any]]]
    """The arrays of each pack, with their offsets."""
    own: dict[str, list[Piece]]
    """This process's pieces of the arrays that are stored by themselves."""
    shared: frozenset[str]
    """Those of them that several processes write."""
    graphdef: str


def lay_out(root: Any, only: Any, policy: Policy | None, pin: bool) -> Layout:
    """Decides what is saved and where each array goes.

    ``only`` is a filter or None. The policy's setting ``checkpoint`` is read. ``pin``
    copies values, so that they stay as they are whatever the program does with the
    model next.
    """
    plan = bind(root)
    schema, values = plan.graphdef.schema, plan.values()
    _refuse_statics(root)
    chosen = range(len(schema))
    if only is not None:
        chosen = select(schema, (only,), plan.view).parts[0][1]
    keep = answers("checkpoint", schema, policy, plan.view, default="keep")
    chosen = [i for i in chosen if keep[i] != "drop"]
    if len(schema) and not chosen:
        what = "the policy" if only is None else f"only={to_filter(only)!r}"
        raise SaveError(
            f"nothing to save: {what} takes none of the {len(schema)} "
            f"leaves:\n{listing(map(schema.describe, range(len(schema))))}"
        )
    trees, live = _leaf_values(schema, chosen, values)
    kinds, number = _kinds([schema.kinds[i] for i in chosen])
    place = _Places(pin)
    leaves = []
    for i, tree in zip(chosen, trees, strict=True):
        kind, passing = number[schema.kinds[i]], keep[i] == "keep-last"
        path = encode_path(schema.paths[i])
        group = kinds[kind].group
        new = place.all(tree, live, group, path, passing)
        metadata = {k: v for k, v in schema.metadata[i].items() if type(v) in METADATA}
        leaves.append(Leaf(path, kind, new, metadata, passing))
    _refuse_namesakes(leaves)
    _refuse_addresses([schema.paths[i] for i in chosen])
    return Layout(
        kinds,
        tuple(leaves),
        aliases_of(plan.graphdef),
        place.stored(),
        place.packs,
        place.own,
        frozenset(place.shared),
        fingerprint(plan.graphdef),
    )


def _leaf_values(
    schema: Schema, chosen: list[int], values: list[Any]
) -> tuple[list[Tree], Iterator[Any]]:
    """The records of leaves and their arrays; refuses all unsavable leaves at once."""
    trees, live, faults = [], [], []
    for i in chosen:
        before = len(live)
        try:
            trees.append(describe(values[i], live))
        except UnsavableError as e:
            faults.append(f"{schema.describe(i)}: {e}")
        if what := _not_there(live[before:]):
            faults.append(f"{schema.describe(i)}: {what}")
    if faults:
        raise SaveError(
            "a checkpoint holds arrays, Python scalars, strings, and pytrees of these; "
            f"found:\n{listing(faults)}\nNothing was saved. Leave them out with only=, "
            "or put them into metadata=."
        )
    return trees, iter(live)


def _not_there(live: list[Any]) -> str:
    for x in live:
        if isinstance(x, jax.ShapeDtypeStruct):
            return "a shape without values"
        if isinstance(x, jax.Array) and x.is_deleted():
            return "its buffer was donated to a call and is gone"
    return ""


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


def _refuse_namesakes(leaves: list[Leaf]) -> None:
    """Keys other than strings and integers are stored as text, which may collide."""
    if found := namesakes(leaf.path for leaf in leaves):
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


# ------------------------------------------------------------------ kinds and paths
def qualified(cls: type) -> str:
    """The name of a class, with its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def bases_of(kind: type) -> list[type]:
    """The kinds that a kind derives from, nearest first."""
    return [
        base
        for base in kind.__mro__[1:]
        if issubclass(base, Variable) or handler_of_kind(base) is not None
    ]


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


def encode_path(path: Any) -> Path:
    """A path as JSON can hold it: integers, strings, and other keys as text."""
    return tuple(
        k if type(k) in (str, int) else f"<{type(k).__name__}> {k!r}" for k in path
    )


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
            for p, k in zip(map(encode_path, schema.paths), schema.kinds, strict=True)
        ]
        rows += [f"{a!r} = {b!r}" for a, b in aliases_of(graphdef)]
        if graphdef.records:
            rows += [f"node {qualified(r.cls)}" for r in graphdef.records]
        return hashlib.sha256("\n".join(rows).encode()).hexdigest()

    return graphdef.memo("checkpoint fingerprint", compute)


# ---------------------------------------------------------------------------- places
class _Places:
    """Assigns storage: small arrays go into packs, others are stored by themselves."""

    def __init__(self, pin: bool):
        self.packs: dict[str, list[tuple[int, Any]]] = {}
        self.own: dict[str, list[Piece]] = {}
        self.shared: set[str] = set()
        self._ends: dict[str, int] = {}
        self._stored: dict[str, Stored] = {}
        self._names: set[str] = set()
        self._pin = pin

    def all(
        self, tree: Tree, live: Iterator[Any], group: str, path: Path, passing: bool
    ) -> Tree:
        """The value, with a place for each of its arrays."""
        if type(tree) is Array:
            return self._place(tree, next(live), group, path, passing)
        new = [
            self._place(array, next(live), group, path, passing)
            for array in arrays(tree)
        ]
        return with_arrays(tree, iter(new))

    def _place(
        self, array: Array, live: Any, group: str, path: Path, passing: bool
    ) -> Array:
        size = array.nbytes
        if size == 0:
            return array
        whole, shard = _whole(live)
        if whole is None or size >= SMALL:
            last = "~last" if passing else ""
            taken = (f"{group}/{x}" for x in ("packed", "packed~last", "zarr.json"))
            taken = self._names.union(map(str.casefold, taken))
            wanted = f"{group}/{file_name(show(path))}{last}"
            name = free(wanted, taken)
            self._names.add(name.casefold())
            self._stored[name] = stored_array(array, shard)
            self.own[name] = [self._held(piece) for piece in _pieces(live, whole)]
            if whole is None:
                self.shared.add(name)
            return array._replace(place=Place(name, None))
        name = f"{group}/packed~last" if passing else f"{group}/packed"
        at = -(-self._ends.get(name, 0) // ALIGN) * ALIGN
        self._ends[name] = at + size
        data = self._held(Piece((), whole)).data if self._pin else whole
        self.packs.setdefault(name, []).append((at, data))
        return Array(*array[:-1], Place(name, at))

    def _held(self, piece: Piece) -> Piece:
        if not self._pin:
            return piece
        if isinstance(piece.data, np.ndarray):
            return piece._replace(data=piece.data.copy())
        # On CPU a view, which keeps the buffer from being donated; else a copy.
        return piece._replace(data=np.asarray(piece.data))

    def stored(self) -> dict[str, Stored]:
        """All arrays to write, by name."""
        packs = {name: packed(end) for name, end in self._ends.items()}
        return {**packs, **self._stored}


def _whole(live: Any) -> tuple[Any, tuple[int, ...] | None]:
    """The array, if this process has all of it, and the shape of its shards."""
    if not isinstance(live, jax.Array):
        return live, None
    if live.is_fully_replicated:
        alone = len(live.sharding.device_set) == 1
        return (live if alone else live.addressable_data(0)), None
    shard = live.sharding.shard_shape(live.shape)
    return (live if live.is_fully_addressable else None), shard


def _pieces(live: Any, whole: Any) -> list[Piece]:
    if not isinstance(live, jax.Array) or live.is_fully_replicated:
        return [Piece((0,) * live.ndim, whole)]
    return [
        Piece(tuple(s.start or 0 for s in shard.index), shard.data)
        for shard in live.addressable_shards
        if shard.replica_id == 0
    ]


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
    elif x is not None and type(x) not in (str, int, bool):
        yield f"{at}: a {type(x).__name__}"
