"""Schema: the leaves of a structure without their values; how filters divide them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sortal._engine.foreign import handler_of_kind, variable_bases
from sortal._engine.nodes import ARRAYS
from sortal._engine.paths import Path, joined, show
from sortal._engine.statics import Interned, Metadata
from sortal._engine.variable import Variable
from sortal.errors import FilterError, listing
from sortal.filters import (
    All,
    Any_,
    At,
    Everything,
    Filter,
    Not,
    Nothing,
    OfType,
    Under,
    WithTag,
    leaf_filter,
    parts,
    to_filter,
)

Kind = type | None


def kind_name(kind: Kind) -> str:
    """How messages name a kind; raw arrays are ``unlabelled array``."""
    return "unlabelled array" if kind is None else kind.__name__


class Schema(Interned):
    """The leaves of a structure without their values: paths, kinds and metadata."""

    __slots__ = ("kinds", "metadata", "paths")

    paths: tuple[Path, ...]
    kinds: tuple[Kind, ...]
    metadata: tuple[Metadata, ...]

    @classmethod
    def of(
        cls, paths: Sequence[Path], kinds: Sequence[Kind], metadata: Sequence[Metadata]
    ) -> Schema:
        """The one Schema of these leaves, given in order."""
        parts = tuple(paths), tuple(kinds), tuple(metadata)
        return cls._intern(parts, *parts)

    def _setup(self, paths: Any, kinds: Any, metadata: Any) -> None:
        self.paths, self.kinds, self.metadata = paths, kinds, metadata

    @property
    def index(self) -> dict[Path, int]:
        """Path to position."""
        return self.memo("index", lambda: {p: i for i, p in enumerate(self.paths)})

    @property
    def has_foreign(self) -> bool:
        """Whether some of the leaves are Variables of another library."""
        kinds = filter(None, self.kinds)
        return self.memo("foreign", lambda: any(map(handler_of_kind, kinds)))

    def __len__(self) -> int:
        return len(self.paths)

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

        def compute() -> tuple[Hashable, ...]:
            return tuple(dict.fromkeys(p[0] for p in self.below(prefix)[0].paths))

        return self.memo(("children", prefix), compute)

    def of_kind(self, kind: Kind) -> Schema:
        """The same leaves, all of one kind."""

        def compute() -> Schema:
            return Schema.of(self.paths, [kind] * len(self), self.metadata)

        return self.memo(("kind", kind), compute)

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
      FilterError: a literal is no filter, an earlier filter swallows a later one, or a
        class is neither a kind, a base of kinds or a type of array, nor that of a leaf.
    """
    filters = tuple(map(to_filter, literals))
    if all(f.structural for f in filters):
        return schema.memo(filters, lambda: _divide(schema, filters, None))
    return _divide(schema, filters, leaves())


def _divide(
    schema: Schema, filters: tuple[Filter, ...], leaves: Sequence[Any] | None
) -> Selection:
    _check_classes(schema, filters, leaves)
    takes = [taken(f, schema, leaves) for f in filters]
    _check_order(filters, takes)
    rest = set(range(len(schema)))
    parts = []
    for found in takes:
        mine = tuple(sorted(found & rest))
        parts.append((schema.pick(mine), mine))
        rest -= found
    return Selection(tuple(parts), tuple(sorted(rest)))


def taken(f: Filter, schema: Schema, leaves: Sequence[Any] | None) -> set[int]:
    """The positions of the leaves that a filter takes.

    Args:
      f: the filter.
      schema: the leaves.
      leaves: the leaves themselves; None for filters that structure decides.

    Returns:
      The positions for which ``f.test`` is true.
    """
    paths, kinds, metadata = schema.paths, schema.kinds, schema.metadata
    values = leaves if leaves is not None else [None] * len(schema)
    texts = schema.memo("texts", lambda: list(map(joined, schema.paths)))

    def among(f: Any, at: set[int]) -> set[int]:
        # Exact types, because a subclass may test otherwise. What `test` would not be
        # asked, because an earlier part of a filter has decided, is not asked here.
        kind = type(f)
        if kind is Any_ and Everything() in f.filters:
            return at
        if kind is Any_:
            left = at
            for part in f.filters:
                left = left - among(part, left)
            return at - left
        if kind is All:
            for part in f.filters:
                at = among(part, at)
            return at
        if kind is Not:
            return at - among(f.filters[0], at)
        if kind is At or kind is Under:
            fits = f.fits()
            return {i for i in at if fits(texts[i])}
        return {i for i in at if f.test(paths[i], kinds[i], metadata[i], values[i])}

    return among(f, set(range(len(schema))))


def _check_classes(
    schema: Schema, filters: tuple[Filter, ...], leaves: Sequence[Any] | None
) -> None:
    """Refuses classes that can take nothing, in any model or but for a leaf of this."""
    for f in filters:
        leaf_filter(f)
    named = (f.type for f in parts(filters) if isinstance(f, OfType))
    odd = [cls for cls in named if not _takes_by_itself(cls)]
    if not odd:
        return
    values = [x for _, kind, _, x in schema.rows(leaves) if kind is None]
    idle = [c.__name__ for c in odd if not any(_is_instance(x, c) for x in values)]
    if idle:
        raise FilterError(
            f"{', '.join(idle)}: no kind, and none of the {len(schema)} leaves is one, "
            "so that it takes nothing. Name a kind such as Param, or a type of array "
            "such as jax.Array."
        )


def _takes_by_itself(cls: type) -> bool:
    """Whether it is a kind, a base of a kind there is, or about types of arrays."""
    if issubclass(cls, Variable) or handler_of_kind(cls) is not None:
        return True
    try:
        return (
            issubclass(cls, ARRAYS)
            or any(issubclass(array, cls) for array in ARRAYS)
            or _derives(cls, (Variable, *variable_bases()))
        )
    except TypeError:  # a protocol that no class can be asked for
        return False


def _derives(cls: type, kinds: Iterable[type]) -> bool:
    return any(issubclass(k, cls) or _derives(cls, k.__subclasses__()) for k in kinds)


def _is_instance(x: Any, cls: type) -> bool:
    try:
        return isinstance(x, cls)
    except TypeError:
        return False


def _check_order(filters: tuple[Filter, ...], takes: list[set[int]]) -> None:
    """Refuses a filter for which an earlier one leaves nothing, whatever the leaves."""
    for n, later in enumerate(filters):
        last = n == len(filters) - 1 and isinstance(later, Everything)
        for k, earlier in enumerate(filters[:n]):
            # `...` as the last one asks for the rest only, and Nothing for nothing.
            rest = last and not isinstance(earlier, Everything)
            covered = earlier.covers(later) and not (rest or Nothing().covers(later))
            if covered or (takes[n] and takes[n] < takes[k]):
                raise FilterError(
                    f"filter {n + 1}, {later!r}, can take nothing: filter {k + 1}, "
                    f"{earlier!r}, comes first and takes all of it. "
                    + (
                        "Write it once."
                        if earlier == later
                        else f"Write the narrower one first: {later!r}, {earlier!r}."
                    )
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
    raise FilterError(
        f"Non-exhaustive filters: {', '.join(map(repr, filters))} leave {len(rest)} "
        f"{'leaf' if len(rest) == 1 else 'leaves'} over:\n"
        + listing(schema.describe(i) for i in rest)
        + "\nAdd a filter for them, or ... as the last one."
        + path_hints(schema, filters)
    )


def path_hints(schema: Schema, filters: Iterable[Filter]) -> str:
    """What to write for strings in filters that are paths, and no tags, of leaves.

    Args:
      schema: the leaves.
      filters: the filters.

    Returns:
      A line for each such string, after a line break; or nothing.
    """
    tags = {metadata.get("tag") for metadata in schema.metadata}
    texts = [".".join(map(str, path)) + "." for path in schema.paths]
    found = (f.tag for f in parts(filters) if isinstance(f, WithTag))
    return "".join(
        f"\n{tag!r} is read as a tag; for the path write Under({tag!r})."
        for tag in dict.fromkeys(found)
        if tag not in tags and any(text.startswith(f"{tag}.") for text in texts)
    )
