"""How two structures differ, path by path."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from sortal._engine.nodes import LEAF, STATIC
from sortal._engine.paths import Path, show
from sortal._engine.schema import kind_name


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
            facts[path] = Fact(record.cls, record.spec, record.cls.__name__)
    return facts
