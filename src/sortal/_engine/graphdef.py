"""GraphDef and Schema: what a structure is apart from its values; interned."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from sortal._engine.nodes import Handler
from sortal._engine.paths import Path, show
from sortal._engine.statics import EMPTY, Metadata, static_key
from sortal._engine.variable import make_all
from sortal.errors import FilterError, listing
from sortal.filters import Everything, Filter, to_filter

Kind = type | None
NODE, LEAF, STATIC = 0, 1, 2


class Static:
    """A static value together with the key that it is compared and hashed by."""

    __slots__ = ("_hash", "key", "value")

    def __init__(self, value: Any):
        self.key = static_key(value)
        self.value = value
        self._hash = hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> Any:
        # The hash of a string differs from process to process.
        return (Static, (self.value,))

    def __repr__(self) -> str:
        return repr(self.value)


class Entry(NamedTuple):
    """One child of a node: a node or leaf by number, or a Static."""

    key: Hashable
    what: int
    ref: Any


class Record(NamedTuple):
    """One node: its type, what its handler needs, and its children."""

    cls: type
    handler: Handler
    spec: Static
    entries: tuple[Entry, ...]


class _Interned:
    """Equal objects are one object; equality and hashing are those of identity."""

    __slots__ = ("__weakref__", "_key")

    _pool: weakref.WeakValueDictionary[Any, Any]

    def __init_subclass__(cls) -> None:
        cls._pool = weakref.WeakValueDictionary()

    @classmethod
    def _intern(cls, *key: Any) -> Any:
        found = cls._pool.get(key)
        if found is None:
            found = object.__new__(cls)
            found._key = key
            found._setup(*key)
            found = cls._pool.setdefault(key, found)
        return found

    def _setup(self, *key: Any) -> None:
        raise NotImplementedError

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        return (type(self)._intern, self._key)


class Schema(_Interned):
    """The leaves of a structure without their values: paths, kinds and metadata."""

    __slots__ = ("_index", "_memo", "_tree", "kinds", "metadata", "paths")

    paths: tuple[Path, ...]
    kinds: tuple[Kind, ...]
    metadata: tuple[Metadata, ...]

    @classmethod
    def of(
        cls, paths: Sequence[Path], kinds: Sequence[Kind], metadata: Sequence[Metadata]
    ) -> Schema:
        """The one Schema of these leaves, given in order."""
        return cls._intern(tuple(paths), tuple(kinds), tuple(metadata))

    def _setup(self, paths: Any, kinds: Any, metadata: Any) -> None:
        self.paths, self.kinds, self.metadata = paths, kinds, metadata
        self._index: dict[Path, int] | None = None
        self._memo: dict[Any, Any] = {}

    @property
    def index(self) -> dict[Path, int]:
        """Path to position."""
        if self._index is None:
            self._index = {path: i for i, path in enumerate(self.paths)}
        return self._index

    def __len__(self) -> int:
        return len(self.paths)

    def memo(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, computed once for this schema and ``key``."""
        try:
            return self._memo[key]
        except KeyError:
            if len(self._memo) > 256:
                self._memo.clear()
            found = self._memo[key] = compute()
            return found

    def pick(self, indices: Sequence[int]) -> Schema:
        """The schema of some of the leaves."""
        return Schema.of(
            [self.paths[i] for i in indices],
            [self.kinds[i] for i in indices],
            [self.metadata[i] for i in indices],
        )

    def below(self, prefix: Path) -> tuple[Schema, tuple[int, ...]]:
        """The leaves below ``prefix`` with paths from there, and their positions."""

        def compute() -> tuple[Schema, tuple[int, ...]]:
            n = len(prefix)
            at = tuple(
                i for i, p in enumerate(self.paths) if p[:n] == prefix and len(p) > n
            )
            part = self.pick(at)
            cut = Schema.of([p[n:] for p in part.paths], part.kinds, part.metadata)
            return cut, at

        return self.memo(("below", prefix), compute)

    def children(self, prefix: Path) -> tuple[Hashable, ...]:
        """The next entries that paths below ``prefix`` have, in order."""
        below, _ = self.below(prefix)
        return self.memo(
            ("children", prefix),
            lambda: tuple(dict.fromkeys(p[0] for p in below.paths)),
        )

    def of_kind(self, kind: Kind, metadata: Metadata | None = None) -> Schema:
        """The same leaves, all of one kind."""
        return self.memo(
            ("kind", kind, metadata),
            lambda: Schema.of(
                self.paths,
                [kind] * len(self),
                self.metadata if metadata is None else [metadata] * len(self),
            ),
        )

    def rows(self, leaves: Sequence[Any] | None) -> Iterator[tuple[Any, ...]]:
        """Path, kind, metadata and leaf of each; leaves None where not at hand."""
        at = leaves if leaves is not None else [None] * len(self)
        return zip(self.paths, self.kinds, self.metadata, at, strict=True)

    def describe(self, i: int) -> str:
        """``layers.0.kernel (Param)``."""
        return f"{show(self.paths[i])} ({kind_name(self.kinds[i])})"

    def __repr__(self) -> str:
        return f"Schema({', '.join(map(self.describe, range(len(self))))})"


class Selection(NamedTuple):
    """What some filters take: for each its schema and positions; and the rest."""

    parts: tuple[tuple[Schema, tuple[int, ...]], ...]
    rest: tuple[int, ...]


def select(
    schema: Schema, literals: tuple[Any, ...], leaves: Callable[[], Sequence[Any]]
) -> Selection:
    """Divides leaves among filters; the first that takes a leaf has it.

    Args:
      schema: the leaves.
      literals: filters or filter literals.
      leaves: gives the leaves themselves, for filters that look at values.

    Returns:
      The Selection, kept with the schema where structure alone decides.

    Raises:
      FilterError: a literal is no filter, or an earlier filter swallows a later one.
    """
    try:
        found = schema._memo.get(literals)
    except TypeError:
        found = None
    if type(found) is Selection:
        return found
    filters = tuple(map(to_filter, literals))
    _check_order(filters)
    if all(f.structural for f in filters):
        return schema.memo(filters, lambda: _remember(schema, literals, filters))
    return _divide(schema, filters, leaves())


def _remember(
    schema: Schema, literals: tuple[Any, ...], filters: tuple[Filter, ...]
) -> Selection:
    found = _divide(schema, filters, None)
    if all(isinstance(x, type) or x is Ellipsis for x in literals):
        schema._memo[literals] = found
    return found


def _divide(
    schema: Schema, filters: tuple[Filter, ...], leaves: Sequence[Any] | None
) -> Selection:
    takes = [
        frozenset(i for i, row in enumerate(schema.rows(leaves)) if f.test(*row))
        for f in filters
    ]
    for later in range(len(filters)):
        for earlier in range(later):
            if takes[later] and takes[later] < takes[earlier]:
                raise FilterError(_swallowed(filters, earlier, later))
    rest = range(len(schema))
    parts = []
    for taken in takes:
        mine = tuple(i for i in rest if i in taken)
        parts.append((schema.pick(mine), mine))
        rest = [i for i in rest if i not in taken]
    return Selection(tuple(parts), tuple(rest))


def _check_order(filters: tuple[Filter, ...]) -> None:
    last = len(filters) - 1
    for later, f in enumerate(filters):
        for earlier in range(later):
            swallows = filters[earlier].covers(f)
            if swallows and not (later == last and _is_rest(f, filters[earlier])):
                raise FilterError(_swallowed(filters, earlier, later))


def _is_rest(last: Filter, earlier: Filter) -> bool:
    return isinstance(last, Everything) and not isinstance(earlier, Everything)


def _swallowed(filters: tuple[Filter, ...], earlier: int, later: int) -> str:
    return (
        f"filter {later + 1}, {filters[later]!r}, can take nothing: filter "
        f"{earlier + 1}, {filters[earlier]!r}, comes first and takes all of it. Write "
        f"the narrower one first: {filters[later]!r}, {filters[earlier]!r}."
    )


def check_exhaustive(schema: Schema, literals: tuple[Any, ...], rest: Any) -> None:
    """Refuses a division that leaves leaves over.

    Args:
      schema: the leaves.
      literals: the filters as written.
      rest: positions that no filter took.

    Raises:
      FilterError: ``rest`` is not empty; every leaf in it is listed.
    """
    if not rest:
        return
    filters = [to_filter(x) for x in literals]
    tags = {metadata.get("tag") for metadata in schema.metadata}
    texts = [".".join(map(str, path)) + "." for path in schema.paths]
    hints = [
        f"\n{literal!r} is read as a tag; for the path write Under({literal!r})."
        for literal in literals
        if isinstance(literal, str) and literal not in tags
        if any(text.startswith(f"{literal}.") for text in texts)
    ]
    raise FilterError(
        f"the filters {', '.join(map(repr, filters))} leave {len(rest)} "
        f"{'leaf' if len(rest) == 1 else 'leaves'} over:\n"
        + listing(schema.describe(i) for i in rest)
        + "\nAdd a filter for them, or ... as the last one."
        + "".join(hints)
    )


class GraphDef(_Interned):
    """An immutable, interned description of everything but the values.

    Two equal structures share one GraphDef, so that comparing and hashing it costs
    nothing. It is what ``split`` returns first and ``merge`` takes first.

    Example:
      >>> import sortal as nnx
      >>> a = nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> b = nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(1)))
      >>> a is b
      True
    """

    __slots__ = ("_memo", "_steps", "aliases", "records", "root", "schema")

    root: Entry
    records: tuple[Record, ...]
    schema: Schema
    aliases: tuple[tuple[Path, int], ...]

    @classmethod
    def of(cls, root: Any, records: Any, schema: Any, aliases: Any) -> GraphDef:
        """The one GraphDef of this structure."""
        return cls._intern(root, tuple(records), schema, tuple(aliases))

    def _setup(self, root: Any, records: Any, schema: Any, aliases: Any) -> None:
        self.root, self.records, self.schema = root, records, schema
        self.aliases = aliases
        self._memo: dict[Any, Any] = {}
        self._steps: list[Step] | None = None

    memo = Schema.memo
    # Annotations name the model: `GraphDef[Model]`.
    __class_getitem__ = classmethod(types.GenericAlias)

    def diff(self, other: GraphDef) -> list[Difference]:
        """What differs from ``other``, path by path.

        Args:
          other: the GraphDef to compare with; seen as the newer one.

        Returns:
          One Difference for each path where the two disagree.
        """
        old, new = facts_of(self), facts_of(other)
        return [
            Difference(path, old.get(path, ABSENT), new.get(path, ABSENT))
            for path in dict.fromkeys([*old, *new])
            if old.get(path, ABSENT) != new.get(path, ABSENT)
        ]

    def build_leaves(self, values: Sequence[Any], metadata: Any = None) -> list[Any]:
        """Wraps values, given in order, in new Variables of their kinds."""
        schema = self.schema
        return make_all(schema.kinds, values, metadata or schema.metadata)

    def build(self, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Builds the objects around ``leaves``.

        Args:
          leaves: Variables and raw arrays in order.

        Returns:
          The root, and all nodes in order.
        """
        steps = self._steps
        if steps is None:
            steps = self._steps = list(map(Step, self.records))
        nodes = [s.handler.shell(s.cls, s.spec) if s.tracked else None for s in steps]
        fill(steps, nodes, leaves, range(len(nodes)))
        return resolve(self.root, nodes, leaves), nodes

    def __repr__(self) -> str:
        name = self.records[0].cls.__name__ if self.records else "leaf"
        return (
            f"GraphDef({name}: {len(self.records)} nodes, {len(self.schema)} leaves, "
            f"{len(self.aliases)} aliases)"
        )


class Step:
    """What building one node takes, laid out for speed."""

    __slots__ = ("cls", "handler", "leaves", "nodes", "spec", "template", "tracked")

    def __init__(self, record: Record):
        self.cls, self.handler, self.spec = (
            record.cls,
            record.handler,
            record.spec.value,
        )
        self.tracked = record.handler.tracked
        self.template = {
            e.key: e.ref.value if e.what == STATIC else None for e in record.entries
        }
        self.nodes = [(e.key, e.ref) for e in record.entries if e.what == NODE]
        self.leaves = [(e.key, e.ref) for e in record.entries if e.what == LEAF]


def fill(
    steps: Sequence[Step], nodes: list[Any], leaves: Any, which: Sequence[int]
) -> None:
    """Gives the nodes numbered ``which`` their children; values are built on the way.

    Children have higher numbers than the value-like nodes that hold them, so going
    backwards every value is complete before its holder asks for it.
    """
    for n in reversed(which):
        step = steps[n]
        items = step.template.copy()
        for key, ref in step.leaves:
            items[key] = leaves[ref]
        for key, ref in step.nodes:
            items[key] = nodes[ref]
        if step.tracked:
            step.handler.fill(nodes[n], step.spec, items)
        else:
            nodes[n] = step.handler.build(step.cls, step.spec, items)


def resolve(entry: Entry, nodes: Sequence[Any], leaves: Sequence[Any]) -> Any:
    """The object that an entry stands for."""
    if entry.what == STATIC:
        return entry.ref.value
    return (nodes if entry.what == NODE else leaves)[entry.ref]


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


class Difference(NamedTuple):
    """One place where two structures differ."""

    path: Path
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = str(self.old), str(self.new)
        if old == new:  # look-alikes: two classes of one name, two orders of a dict
            old, new = _at_length(self.old), _at_length(self.new)
        return f"{show(self.path)}: {old} -> {new}"


class Fact(NamedTuple):
    """What is at one path: compared in full, printed shortly."""

    cls: type | None
    details: Hashable
    text: str

    def __str__(self) -> str:
        return self.text


def _at_length(fact: Any) -> str:
    if not isinstance(fact, Fact) or fact.cls is None:
        return repr(fact)
    name = f"{fact.cls.__module__}.{fact.cls.__qualname__}"
    return f"{name} {fact.details!r}"


def facts_of(graphdef: GraphDef) -> dict[Path, Any]:
    """What is at each path: a Fact, or a Static."""
    facts: dict[Path, Any] = {}
    seen: dict[int, Path] = {}
    schema = graphdef.schema

    # With a stack of its own, so that no depth is too deep.
    pending: list[tuple[Entry, Path]] = [(graphdef.root, ())]
    while pending:
        entry, path = pending.pop()
        if entry.what == STATIC:
            facts[path] = entry.ref
        elif entry.what == LEAF:
            owner, kind = schema.paths[entry.ref], schema.kinds[entry.ref]
            meta = schema.metadata[entry.ref]
            shown = kind_name(kind) + (f" {dict(meta)}" if meta else "")
            facts[path] = Fact(kind, meta, shown)
            if owner != path:
                facts[path] = Fact(None, owner, f"alias of {show(owner)}")
        elif entry.ref in seen:
            owner = seen[entry.ref]
            facts[path] = Fact(None, owner, f"alias of {show(owner)}")
        else:
            seen[entry.ref] = path
            record = graphdef.records[entry.ref]
            facts[path] = Fact(record.cls, record.spec, record.cls.__name__)
            children = [(c, join(record, path, c.key)) for c in record.entries]
            pending += reversed(children)
    return facts


def join(record: Record, path: Path, key: Any) -> Path:
    """The path of a node's child."""
    return path + key if record.handler.flat else (*path, key)


def kind_name(kind: Kind) -> str:
    """How messages name a kind; raw arrays are ``unlabelled array``."""
    return "unlabelled array" if kind is None else kind.__name__


def plain_leaf_schema(paths: Sequence[Path]) -> Schema:
    """A schema of raw arrays at ``paths``."""
    return Schema.of(paths, [None] * len(paths), [EMPTY] * len(paths))


jax.tree_util.register_static(GraphDef)
