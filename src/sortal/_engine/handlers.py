"""How each type of node is taken apart and put together; those of Python and JAX."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax

from sortal._engine import paths
from sortal._engine.jax_compat import one_level
from sortal._engine.statics import static_key


class Handler:
    """How nodes of one type are taken apart and put together.

    ``tracked`` nodes have an identity: met twice they are one object, they may be
    part of a cycle, and they can be refilled in place. Others are values, rebuilt
    from their children; ``fixed`` ones never change while they live. ``flat`` nodes
    have keys that are paths. Nodes of a handler that ``notes_edits`` call
    ``statics.edits.note`` when their structure changes; those that ``counts_edits``
    also have a number of their own, ``_version``. Those that are ``exact`` are built
    with the very children that they are given, whatever their class. ``root`` nodes are
    carried into transforms whole, from wherever in an argument they are.
    """

    tracked = True
    fixed = False
    flat = False
    notes_edits = False
    counts_edits = False
    exact = False
    root = False

    def items(self, obj: Any) -> dict[Any, Any]:
        """The children by key, in the order in which leaves are numbered."""
        raise NotImplementedError

    def order(self, obj: Any) -> tuple[Any, ...] | None:
        """All keys in the order in which code meets them; None: that of ``items``.

        Code that loops over a dict of layers must meet them in the same order inside
        a transform, so two nodes that differ in order differ in structure.
        """
        return None

    def arranged(self, obj: Any, items: dict[Any, Any]) -> dict[Any, Any]:
        """``items``, children by key, in the order that ``obj`` has now."""
        order = self.order(obj)
        return items if order is None else {key: items[key] for key in order}

    def spec(self, obj: Any) -> Hashable:
        """What is needed besides the children to build it again; hashable."""
        return None

    def contents(self, nodes: Sequence[Any]) -> tuple[list[Any], Iterable[Any]]:
        """What says that nodes of this handler have the structure they had.

        Args:
          nodes: some nodes.

        Returns:
          A list that must stay equal, and what must stay identical one by one, where
          raw arrays may be exchanged for raw arrays. Of the latter there are as many
          while the former is equal.
        """
        items = list(map(self.items, nodes))
        about = [
            (tuple(i), self.order(x), self.spec(x))
            for x, i in zip(nodes, items, strict=True)
        ]
        return list(map(static_key, about)), itertools.chain.from_iterable(
            map(dict.values, items)
        )

    def shell(self, cls: type, spec: Any) -> Any:
        """An empty object of the type; for tracked nodes."""
        create: Any = cls.__new__
        return create(cls)

    def fill(self, obj: Any, spec: Any, items: dict[Any, Any]) -> None:
        """Makes ``items``, children by key in order, the whole content of ``obj``."""
        raise NotImplementedError

    def build(self, cls: type, spec: Any, items: dict[Any, Any]) -> Any:
        """Puts a value together from its children; for untracked nodes."""
        raise NotImplementedError

    def place(self, obj: Any, key: Any) -> tuple[Any, Any]:
        """The live object, and key in it, that hold the child at ``key``.

        Where it is a dict or list, that is read and written without the handler.
        """
        return obj, key

    def roles(self, obj: Any) -> Mapping[Any, str] | None:
        """Which children are marked ``data`` or ``static``."""
        return None

    def owner(self, obj: Any) -> Any:
        """What says by ``_trace`` and ``_place`` who may edit it; None: its holder."""
        return None

    def remove(self, obj: Any, key: Any) -> None:
        """Takes the child at ``key`` out; only where ``can_remove`` says so."""
        raise NotImplementedError

    def can_remove(self, key: Any) -> bool:
        """Whether the child at ``key`` can go without moving others."""
        return type(self).remove is not Handler.remove

    # By what they do, so that a pickled GraphDef finds the one that is equal.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))


class ListHandler(Handler):
    """Lists: children at their indices."""

    def contents(self, nodes: Sequence[Any]) -> tuple[list[Any], Iterable[Any]]:
        return list(map(len, nodes)), itertools.chain(*nodes)

    def items(self, obj: Any) -> dict[Any, Any]:
        return dict(enumerate(obj))

    def fill(self, obj: Any, spec: Any, items: dict[Any, Any]) -> None:
        obj[:] = items.values()


class DictHandler(Handler):
    """Dicts: children sorted by key, and built again in the order of insertion."""

    def items(self, obj: Any) -> dict[Any, Any]:
        return {key: obj[key] for key in sorted(obj, key=paths.order)}

    def order(self, obj: Any) -> tuple[Any, ...]:
        return tuple(obj)

    def contents(self, nodes: Sequence[Any]) -> tuple[list[Any], Iterable[Any]]:
        values = [x.values() for x in nodes]
        return [*map(len, nodes)], itertools.chain(*nodes, *values)

    def remove(self, obj: Any, key: Any) -> None:
        del obj[key]

    def fill(self, obj: Any, spec: Any, items: dict[Any, Any]) -> None:
        obj.clear()
        for key, child in items.items():
            obj[key] = child


class DefaultDictHandler(DictHandler):
    """Dicts that make what is missing: the factory is static."""

    def spec(self, obj: Any) -> Hashable:
        return obj.default_factory

    def contents(self, nodes: Sequence[Any]) -> tuple[list[Any], Iterable[Any]]:
        lengths, same = super().contents(nodes)
        return lengths, itertools.chain(same, [x.default_factory for x in nodes])

    def fill(self, obj: Any, spec: Any, items: dict[Any, Any]) -> None:
        super().fill(obj, None, items)
        obj.default_factory = spec


class TupleHandler(Handler):
    """Tuples and named tuples: values, rebuilt from their children."""

    tracked = False
    fixed = True

    def items(self, obj: Any) -> dict[Any, Any]:
        if hasattr(obj, "_fields"):
            return {name: getattr(obj, name) for name in sorted(obj._fields)}
        return dict(enumerate(obj))

    def build(self, cls: type, spec: Any, items: dict[Any, Any]) -> Any:
        return cls(**items) if hasattr(cls, "_fields") else cls(items.values())


class DataclassHandler(Handler):
    """Instances of plain dataclasses: children are all attributes set on them."""

    def items(self, obj: Any) -> dict[Any, Any]:
        names = {f.name for f in dataclasses.fields(obj) if hasattr(obj, f.name)}
        names.update(getattr(obj, "__dict__", ()))
        return {name: getattr(obj, name) for name in sorted(names)}

    def order(self, obj: Any) -> tuple[Any, ...]:
        own = getattr(obj, "__dict__", ())
        return (*own, *(name for name in self.items(obj) if name not in own))

    def fill(self, obj: Any, spec: Any, items: dict[Any, Any]) -> None:
        own = getattr(obj, "__dict__", ())
        for name in self.items(obj):
            if name in own or name not in items:
                object.__delattr__(obj, name)
        for name, child in items.items():
            object.__setattr__(obj, name, child)


class MethodHandler(Handler):
    """Bound methods: the object is the child, so that copies bind to copies."""

    tracked = False
    fixed = True

    def items(self, obj: Any) -> dict[Any, Any]:
        return {"__self__": obj.__self__}

    def spec(self, obj: Any) -> Hashable:
        return obj.__func__

    def build(self, cls: type, spec: Any, items: dict[Any, Any]) -> Any:
        return types.MethodType(spec, items["__self__"])


class PartialHandler(Handler):
    """Partials that hold state, which is below them as what a method is bound to is."""

    tracked = False
    flat = True

    def items(self, obj: Any) -> dict[Any, Any]:
        args = {("args", i): x for i, x in enumerate(obj.args)}
        named = {("keywords", k): obj.keywords[k] for k in sorted(obj.keywords)}
        return {**args, ("func",): obj.func, **named}

    def order(self, obj: Any) -> tuple[Any, ...]:
        named = [("keywords", key) for key in obj.keywords]
        return (*(("args", i) for i in range(len(obj.args))), ("func",), *named)

    def build(self, cls: type, spec: Any, items: dict[Any, Any]) -> Any:
        func = items.pop(("func",))
        args = [x for key, x in items.items() if key[0] == "args"]
        named = {key[1]: x for key, x in items.items() if key[0] == "keywords"}
        return cls(func, *args, **named)


class PytreeHandler(Handler):
    """Types registered with JAX: taken apart by JAX, one level at a time."""

    tracked = False

    def items(self, obj: Any) -> dict[Any, Any]:
        return dict(_level(obj)[0])

    def spec(self, obj: Any) -> Hashable:
        return _level(obj)[1]

    def build(self, cls: type, spec: Any, items: dict[Any, Any]) -> Any:
        return jax.tree_util.tree_unflatten(spec, items.values())


def _level(obj: Any) -> tuple[list[tuple[Any, Any]], Any]:
    return one_level(obj) or ([], None)
