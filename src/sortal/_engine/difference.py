"""How two structures differ, path by path."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from sortal._engine.nodes import LEAF, STATIC
from sortal._engine.paths import Path, show
from sortal._engine.schema import kind_name
from sortal._engine.statics import static_key


class Difference(NamedTuple):
    """One place where two structures differ."""

    path: Path
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = str(self.old), str(self.new)
        if old == new:  # look-alikes: two classes of one name
            old, new = _at_length(self.old), _at_length(self.new)
        return f"{show(self.path)}: {old} -> {new}"


class Fact(NamedTuple):
    """What is at one path: compared in full, printed shortly."""

    cls: type | None
    details: Hashable
    text: str
    order: tuple[Hashable, ...] = ()

    def among(self, keys: Collection[Hashable]) -> Fact:
        """With the order of those children only."""
        return self._replace(order=tuple(key for key in self.order if key in keys))

    def in_order(self) -> Fact:
        """With the order in the text."""
        names = ", ".join(x if isinstance(x, str) else repr(x) for x in self.order)
        return self._replace(text=f"{self.text} with {names} in this order")

    def __repr__(self) -> str:
        return self.text


ABSENT = Fact(None, None, "absent")


def _at_length(fact: Any) -> str:
    if not isinstance(fact, Fact) or fact.cls is None:
        return repr(fact)
    name = f"{fact.cls.__module__}.{fact.cls.__qualname__}"
    return f"{name} {fact.details!r}"


def facts_of(graphdef: Any) -> dict[Path, Any]:
    """What is at each path of a GraphDef: a Fact, or a Static."""
    facts: dict[Path, Any] = {}
    schema = graphdef.schema
    for path, (_, what, ref), first in graphdef.places():
        if what == STATIC:
            facts[path] = ref
        elif first != path:
            facts[path] = Fact(None, first, f"alias of {show(first)}")
        elif what == LEAF:
            kind, meta = schema.kinds[ref], schema.metadata[ref]
            shown = kind_name(kind) + (f" {dict(meta)}" if meta else "")
            facts[path] = Fact(kind, meta, shown)
        else:
            record = graphdef.records[ref]
            about = record.cls, record.spec, record.cls.__name__
            facts[path] = Fact(*about, record.order.value or ())
    return facts


def changes(
    old: Mapping[Any, Any], new: Mapping[Any, Any], absent: Any = ABSENT
) -> Iterator[tuple[Any, Any, Any]]:
    """Key, old and new value of what differs, such as two answers of ``facts_of``.

    What was added to a node or taken away has a row of its own, so only the order of
    the children that both have is compared.
    """
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, absent), new.get(key, absent)
        if isinstance(a, Fact) and isinstance(b, Fact) and a[:3] == b[:3]:
            a, b = a.among(b.order), b.among(a.order)
            pairs = zip(a.order, b.order, strict=True)
            moved = {x for x, y in pairs if static_key(x) != static_key(y)}
            if moved:
                yield key, a.among(moved).in_order(), b.among(moved).in_order()
        elif a != b:
            yield key, a, b
