"""What is a node, a leaf or a static; Node, the base of objects with attributes."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import functools
import itertools
import operator
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from sortal._engine import handlers, paths
from sortal._engine.foreign import note_class, register_library_of
from sortal._engine.handlers import Handler, MethodHandler, TupleHandler
from sortal._engine.jax_compat import current_trace, one_level
from sortal._engine.marks import Marked
from sortal._engine.statics import edits, is_hashable
from sortal._engine.variable import foreign_write, is_variable
from sortal.errors import StructureError


class Child(enum.IntEnum):
    """What a child of a node is."""

    NODE = 0
    LEAF = 1
    STATIC = 2


NODE, LEAF, STATIC = Child.NODE, Child.LEAF, Child.STATIC


class Node:
    """Base of objects with attributes; counts attribute writes and keeps plans.

    The counter tells the engine, in one comparison of integers, that an object still
    has the structure it was planned with; ``statics.edits`` that no object has
    changed at all. A write that goes round ``__setattr__`` (``vars(obj)[name] = x``)
    is noticed only when it changes the number of attributes.

    Like Variables, an object belongs to the trace that it was made in: an attribute
    set from inside another would leak a tracer.
    """

    __slots__ = ("__dict__", "__weakref__", "_plans", "_roles", "_trace", "_version")

    _field_roles: ClassVar[dict[str, str] | None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        node = object.__new__(cls)
        _set_trace(node, current_trace())
        _set_version(node, 0)
        set_plans(node, ())
        _set_roles(node, cls._field_roles)
        return node

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        slots = vars(cls).get("__slots__")
        if slots:
            raise StructureError(
                f"class {cls.__name__} has __slots__, {slots!r}, in which no transform "
                "finds an attribute; leave them out."
            )
        note_class(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._trace is not current_trace():
            raise foreign_write([(self, (name,), f"of a {type(self).__name__}")])
        old = self.__dict__.get(name, _ABSENT)
        if type(value) is Marked:
            role, value, old = value.role, value.value, _ABSENT
            _refuse_data(self, name, value, role)
            _set_roles(self, {**(self._roles or {}), name: role})
        elif self._roles:
            _refuse_data(self, name, value, self._roles.get(name))
        object.__setattr__(self, name, value)
        if type(old) not in leaf_types or type(value) not in leaf_types:
            _note_edit(self)

    def __delattr__(self, name: str) -> None:
        if self._trace is not current_trace():
            raise foreign_write([(self, (name,), f"of a {type(self).__name__}")])
        object.__delattr__(self, name)
        if self._roles and name in self._roles:
            declared = (self._field_roles or {}).get(name)
            left = {**self._roles, name: declared}
            _set_roles(self, {k: v for k, v in left.items() if v} or None)
        _note_edit(self)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        # What is compared by identity, such as a function or a setting, would as a
        # copy be another structure, and everything compiled would compile again.
        _keep_statics(self, memo, memo.setdefault(_keep_statics, {}))
        node = memo[id(self)] = Node.__new__(type(self))
        node.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return node

    @property
    def _place(self) -> tuple[Any, paths.Path, str]:
        return self, (), type(self).__name__

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, str] | None]:
        return (dict(self.__dict__), self._roles)

    def __setstate__(self, state: Any) -> None:
        attributes, roles = state if isinstance(state, tuple) else (state, None)
        self.__dict__.update(attributes or {})
        _set_roles(self, roles)
        _note_edit(self)


def _refuse_data(node: Node, name: str, value: Any, role: str | None) -> None:
    if role == "static" and _holds_data(value):
        raise StructureError(
            f"cannot assign data, a {type(value).__name__}, to {name} of a "
            f"{type(node).__name__}, which is declared static and would be no leaf. "
            "Take the declaration off, or mark the value data."
        )


def _note_edit(node: Node) -> None:
    _set_version(node, node._version + 1)
    edits.note()


_ABSENT: Any = object()
_set_trace: Callable[[Node, Any], None] = Node.__dict__["_trace"].__set__
_set_version: Callable[[Node, int], None] = Node.__dict__["_version"].__set__
_set_roles: Callable[[Node, Any], None] = Node.__dict__["_roles"].__set__
set_plans: Callable[[Node, Any], None] = Node.__dict__["_plans"].__set__
_get_roles: Callable[[Any], Any] = operator.attrgetter("_roles")
get_dict: Callable[[Any], dict[str, Any]] = Node.__dict__["__dict__"].__get__

ATOMS = frozenset(
    (bool, int, float, complex, str, bytes, type(None), type, types.FunctionType)
)
"""Exact types of what holds nothing that the engine could find."""
ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
"""The types of raw arrays."""
leaf_types: set[type] = {np.ndarray}
"""Exact types of raw arrays met so far: replacing one by another keeps structure."""


class ObjectHandler(Handler):
    """Node subclasses: children are the attributes, sorted by name.

    They are built again in the order of assignment, in which code may loop over them.
    """

    notes_edits = counts_edits = True
    exact = root = True

    def items(self, obj: Any) -> dict[Any, Any]:
        attributes = get_dict(obj)
        return {name: attributes[name] for name in sorted(attributes)}

    def spec(self, obj: Any) -> Hashable:
        return tuple(sorted(obj._roles.items())) if obj._roles else None

    def order(self, obj: Any) -> tuple[Any, ...]:
        return tuple(get_dict(obj))

    def shell(self, cls: type, spec: Any) -> Any:
        return Node.__new__(cls)

    def contents(self, nodes: Sequence[Any]) -> tuple[list[Any], Iterable[Any]]:
        dicts = list(map(get_dict, nodes))
        roles = map(_get_roles, nodes)
        values = map(dict.values, dicts)
        return list(map(len, dicts)), itertools.chain(dicts, roles, *dicts, *values)

    def place(self, obj: Any, key: Any) -> tuple[Any, Any]:
        # The dict rather than the object: a plan must not keep its root alive.
        return get_dict(obj), key

    def roles(self, obj: Any) -> Mapping[Any, str] | None:
        return obj._roles

    def owner(self, obj: Any) -> Any:
        return obj

    def remove(self, obj: Any, key: Any) -> None:
        delattr(obj, key)

    def fill(self, obj: Any, spec: Any, items: dict[Any, Any]) -> None:
        attributes = get_dict(obj)
        edited = len(attributes) > 0  # else its plans see it by the number of them
        attributes.clear()
        attributes.update(items)
        _set_roles(obj, dict(spec) if spec else None)
        if edited:
            _note_edit(obj)


_tuple, _partial = TupleHandler(), handlers.PartialHandler()
_dataclass, _pytree = handlers.DataclassHandler(), handlers.PytreeHandler()
_registry: dict[type, Handler] = {}
_found: dict[type, Any] = {}


def _held(
    obj: Any, seen: dict[int, Any] | None = None, into: Any = Handler
) -> Iterator[tuple[Any, Any]]:
    """An object and all that it holds, each once, with what ``handler_of`` says.

    ``seen`` are objects to leave out, by id, to which those found are added; ``into``
    the handlers of nodes that are looked into.
    """
    seen = {} if seen is None else seen
    stack = [obj]
    while stack:
        x = stack.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x  # held, so that no other object gets this id
        handler = handler_of(x)
        yield x, handler
        if isinstance(handler, into):
            stack += handler.items(x).values()
        elif isinstance(x, (set, frozenset)):
            stack += x


def _keep_statics(obj: Any, memo: dict[Any, Any], seen: dict[int, Any]) -> None:
    """Tells ``copy.deepcopy`` to take the statics below ``obj`` as they are."""
    for x, handler in _held(obj, seen):
        static = handler is STATIC and is_hashable(x)
        if static or (handler not in (STATIC, LEAF) and is_static_value(x)):
            memo[id(x)] = x


def register_node(node_type: type, handler: Handler) -> None:
    """Teaches the engine how to take apart and build objects of a type.

    Args:
      node_type: the type; subclasses that have no handler of their own use it too.
      handler: the Handler.

    Example:
      >>> import sortal as nnx
      >>> from sortal._engine.handlers import Handler
      >>> class Bag:
      ...     def __init__(self, *items): self.items = items
      >>> class BagHandler(Handler):
      ...     def items(self, obj): return dict(enumerate(obj.items))
      ...     def fill(self, obj, spec, items): obj.items = tuple(items.values())
      >>> nnx.register_node(Bag, BagHandler())
      >>> nnx.state(Bag(nnx.Param(1.0))).paths()
      ((0,),)
    """
    _registry[node_type] = handler
    if handler is not LEAF and handler.tracked and not handler.flat:
        paths.readers[node_type] = handler.items
    _found.clear()


def handler_of(obj: Any) -> Any:
    """The Handler for an object, or ``LEAF`` or ``STATIC``.

    Args:
      obj: any object.

    Returns:
      ``LEAF`` for Variables and raw arrays, a Handler for nodes, else ``STATIC``.
    """
    cls = type(obj)
    try:
        return _found[cls]
    except KeyError:
        found = _found[cls] = _classify(cls, obj)
        return found


def is_node_class(cls: type) -> bool:
    """Whether all objects of a class are nodes, so that none is ever a leaf.

    Args:
      cls: any class.

    Returns:
      True for classes that are registered, and those derived from them.
    """
    register_library_of(cls)
    return any(base in _registry for base in cls.__mro__)


def is_object(x: Any) -> bool:
    """Whether ``x`` is a Module or its like, of any library: no Variable or container.

    Args:
      x: anything.

    Returns:
      True for objects that transforms carry as a whole, and whose plans are kept.
    """
    return getattr(handler_of(x), "root", False)


def is_root(x: Any) -> bool:
    """Whether transforms carry ``x`` as a whole: a Variable, or an object of kinds.

    Args:
      x: anything.

    Returns:
      True for Variables, Modules and their like, of Sortal or of another library.
    """
    return is_variable(x) or is_object(x)


def holds_leaves(x: Any) -> bool:
    """Whether a value is a leaf, or a tuple or frozenset with one in it."""
    return any(handler is LEAF for _, handler in _held(x, into=TupleHandler))


def _holds_data(x: Any) -> bool:
    """Whether a value is a Variable, an array or an object, or a container of such."""
    return any(h is LEAF or is_object(y) for y, h in _held(x))


def _classify(cls: type, obj: Any) -> Any:
    if is_variable(obj):
        return LEAF
    if isinstance(obj, ARRAYS):
        leaf_types.add(cls)
        return LEAF
    for base in cls.__mro__:
        if base in _registry:
            return _registry[base]
    if obj is None or issubclass(cls, type):
        return STATIC
    if one_level(obj) is not None:
        return _pytree
    if dataclasses.is_dataclass(cls):
        return _dataclass
    return STATIC


register_node(Node, ObjectHandler())
register_node(types.MethodType, MethodHandler())
register_node(list, handlers.ListHandler())
register_node(dict, handlers.DictHandler())
register_node(collections.defaultdict, handlers.DefaultDictHandler())
register_node(tuple, _tuple)
register_node(functools.partial, _partial)
register_node(jax.tree_util.Partial, _pytree)


def is_static_value(obj: Any) -> bool:
    """Whether a value is static with all that it holds, and so one static itself.

    Args:
      obj: no leaf.

    Returns:
      True for statics, and for tuples, methods, partials and frozen dataclasses with no
      leaf or mutable inside.
    """
    for x, handler in _held(obj):
        if handler is STATIC:
            fits = not hidden_state(x)
        elif isinstance(handler, MethodHandler):
            fits = handler_of(x.__self__) is STATIC
        else:
            frozen = handler is _dataclass and type(x).__dataclass_params__.frozen
            fits = frozen or handler is _tuple or handler is _partial
        if not fits:
            return False
    # What is refused makes it a node, so that the culprit in it has its own path.
    try:
        return is_hashable(obj)
    except RecursionError:  # refused whole, lest it be divided by the stack's height
        return True


@functools.cache
def class_state(cls: type) -> Mapping[str, str]:
    """Class attributes that hold Variables or Modules, by name, with their type's."""
    found = {k: x for base in reversed(cls.__mro__) for k, x in vars(base).items()}
    return {name: type(x).__name__ for name, x in found.items() if is_root(x)}


def hidden_state(obj: Any) -> str:
    """Names what holds Variables and objects in a static one, where JAX is blind.

    That is looked for in its attributes and in containers there, of any depth, and not
    in further static objects, which may lead anywhere.
    """
    if type(obj) in ATOMS or isinstance(obj, type):
        return ""
    if isinstance(obj, (set, frozenset)):
        return ", ".join(sorted(type(x).__name__ for x, _ in _held(obj) if is_root(x)))
    attributes = {name: getattr(obj, name, None) for name in _slots(type(obj))}
    own = getattr(obj, "__dict__", None)
    found = []
    for name, value in {**attributes, **(own if type(own) is dict else {})}.items():
        state = next((x for x, _ in _held(value) if is_root(x)), None)
        if state is not None:
            where = "" if state is value else f" in a {type(value).__name__}"
            found.append(f"{name} ({type(state).__name__}{where})")
    return ", ".join(found)


@functools.cache
def _slots(cls: type) -> list[str]:
    """The attributes that classes with ``__slots__`` keep outside of the dict."""
    bases = (vars(base) for base in cls.__mro__ if "__slots__" in vars(base))
    kind = types.MemberDescriptorType
    return [name for base in bases for name, x in base.items() if isinstance(x, kind)]
