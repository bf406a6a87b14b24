"""GraphDef: what a structure is apart from its values; building objects from it."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from sortal._engine.difference import Difference, changes, facts_of
from sortal._engine.handlers import Handler
from sortal._engine.nodes import LEAF, NODE, STATIC, Child
from sortal._engine.paths import Path
from sortal._engine.schema import Schema
from sortal._engine.statics import Interned, Static
from sortal._engine.variable import make_all


class Entry(NamedTuple):
    """One child of a node: a node or leaf by number, or a Static."""

    key: Hashable
    what: Child
    ref: Any


class Record(NamedTuple):
    """One node: its type, what its handler needs, and its children.

    ``entries`` are in the order in which leaves are numbered; ``order`` holds the keys
    as code meets them, or None where that is the same.
    """

    cls: type
    handler: Handler
    spec: Static
    order: Static
    entries: tuple[Entry, ...]


class GraphDef(Interned):
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

    __slots__ = ("records", "root", "schema")

    root: Entry
    records: tuple[Record, ...]
    schema: Schema

    @classmethod
    def of(cls, root: Any, records: Any, schema: Any) -> GraphDef:
        """The one GraphDef of this structure."""
        parts = root, tuple(records), schema
        return cls._intern(parts, *parts)

    def _setup(self, root: Any, records: Any, schema: Any) -> None:
        self.root, self.records, self.schema = root, records, schema

    # Annotations name the model: `GraphDef[Model]`.
    __class_getitem__ = classmethod(types.GenericAlias)

    def places(self, top: Entry | None = None) -> Iterator[tuple[Path, Entry, Path]]:
        """Each Entry from the root, or another, down, in the order of the walk.

        Yields:
          Its path, the Entry, and the path at which its node or leaf was met first.
        """
        seen: dict[Any, Path] = {}
        # With a stack of its own, so that no depth is too deep.
        todo: list[tuple[Path, Entry]] = [((), top or self.root)]
        while todo:
            path, entry = todo.pop()
            _, what, ref = entry
            if what == NODE and (what, ref) not in seen:
                record = self.records[ref]
                for e in reversed(record.entries):
                    key = e.key if record.handler.flat else (e.key,)
                    todo.append((path + key, e))
            first = path if what == STATIC else seen.setdefault((what, ref), path)
            yield path, entry, first

    @property
    def aliases(self) -> tuple[tuple[Path, int], ...]:
        """The other paths of leaves, with the leaves' numbers."""
        return tuple(
            (path, entry.ref)
            for path, entry, first in self.places()
            if entry.what == LEAF and first != path
        )

    def diff(self, other: GraphDef) -> list[Difference]:
        """What differs from ``other``, path by path.

        Args:
          other: the GraphDef to compare with; seen as the newer one.

        Returns:
          One Difference for each path where the two disagree.
        """
        return [Difference(*x) for x in changes(facts_of(self), facts_of(other))]

    def leaves_below(self, top: Entry) -> dict[Path, int]:
        """The numbers of the leaves below one Entry, by their path from there."""
        return {
            path: entry.ref
            for path, entry, first in self.places(top)
            if entry.what == LEAF and first == path
        }

    def build_leaves(self, values: Sequence[Any], metadata: Any = None) -> list[Any]:
        """Wraps values, given in order, in new Variables of their kinds."""
        schema = self.schema
        return make_all(schema.kinds, values, metadata or schema.metadata)

    def shells(self) -> list[Any]:
        """All nodes in order, still empty; None for values, which ``fill`` builds."""
        return [
            handler.shell(cls, spec.value) if handler.tracked else None
            for cls, handler, spec, _, _ in self.records
        ]

    def fill(self, nodes: list[Any], leaves: Any, which: Sequence[int]) -> None:
        """Gives the nodes numbered ``which`` their children.

        Children have higher numbers than the value-like nodes that hold them, so going
        backwards every value is complete before its holder asks for it.
        """
        steps = self.memo("steps", lambda: list(map(_step, self.records)))
        for n in reversed(which):
            cls, handler, tracked, spec, template, below, inside = steps[n]
            items = template.copy()
            for key, ref in below:
                items[key] = leaves[ref]
            for key, ref in inside:
                items[key] = nodes[ref]
            if tracked:
                handler.fill(nodes[n], spec, items)
            else:
                nodes[n] = handler.build(cls, spec, items)

    def build(self, leaves: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Builds the objects around ``leaves``.

        Args:
          leaves: Variables and raw arrays in order.

        Returns:
          The root, and all nodes in order.
        """
        nodes = self.shells()
        self.fill(nodes, leaves, range(len(nodes)))
        what, ref = self.root[1:]
        root = ref.value if what is STATIC else (leaves if what else nodes)[ref]
        return root, nodes

    def __repr__(self) -> str:
        name = self.records[0].cls.__name__ if self.records else "leaf"
        return (
            f"GraphDef({name}: {len(self.records)} nodes, {len(self.schema)} leaves, "
            f"{len(self.aliases)} aliases)"
        )


def _step(record: Record) -> tuple[Any, ...]:
    """What building one node takes, laid out for speed; in its statics are gaps."""
    cls, handler, spec, order, entries = record
    template = {key: x.value if what == STATIC else None for key, what, x in entries}
    if order.value is not None:
        template = {key: template[key] for key in order.value}
    leaves = [(key, ref) for key, what, ref in entries if what == LEAF]
    nodes = [(key, ref) for key, what, ref in entries if what == NODE]
    return cls, handler, handler.tracked, spec.value, template, leaves, nodes


jax.tree_util.register_static(GraphDef)
