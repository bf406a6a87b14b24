"""Variables of other libraries: the interface that the engine uses, and registration.

A library is registered when the engine meets the first class of its package. Until
then nothing of it is imported, and this file costs one look-up by type.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, TypeGuard

import jax

from sortal._engine.statics import Metadata
from sortal.errors import UnsupportedError

Kind = type | None


class VariableHandler:
    """How the Variables of one library are read, written and built."""

    fixed = notes_edits = False

    def values(self, variables: Sequence[Any]) -> list[Any]:
        """The bare values of several Variables."""
        raise NotImplementedError

    def write(self, variable: Any, value: Any) -> None:
        """Sets the bare value, without a check of the trace that owns the Variable."""
        raise NotImplementedError

    def entries(self, variables: Sequence[Any]) -> list[dict[str, Any]]:
        """The live metadata of several Variables; not to be changed."""
        raise NotImplementedError

    def contents(self, variables: Sequence[Any]) -> tuple[list[Any], Sequence[Any]]:
        """What must stay equal, and what identical, as in ``handlers.Handler``."""
        return self.entries(variables), ()

    def set_metadata(self, variable: Any, metadata: dict[str, Any]) -> None:
        """Replaces the metadata."""
        raise NotImplementedError

    def is_ours(self, variable: Any) -> bool:
        """Whether the Variable belongs to the current trace."""
        raise NotImplementedError

    def refusal(self, variable: Any) -> str:
        """Why the engine cannot take this Variable; empty where it can."""
        return ""

    def make(self, kind: type, value: Any, metadata: Metadata) -> Any:
        """Builds a Variable, owned by the current trace, without running hooks."""
        raise NotImplementedError


_pending: dict[str, Callable[[], None]] = {}
"""Modules of the libraries that are not registered yet, and what registers them."""
_translations: dict[type, Callable[[Any], Any]] = {}
_listeners: list[Callable[[type], Any]] = []
_handlers: dict[type, VariableHandler] = {}
_found: dict[type, VariableHandler | None] = {}
_twins: dict[type, type] = {}


def register_lazily(module: str, register: Callable[[], None]) -> None:
    """Has ``register`` called once, when the first class from ``module`` is met."""
    _pending[module] = register


def register_library_of(cls: type) -> None:
    """Registers the libraries that a class and its bases come from."""
    for base in cls.__mro__ if _pending else ():
        for module in list(_pending):
            if f"{base.__module__}.".startswith(f"{module}."):
                _register(module)


def register_imported(modules: Container[str]) -> None:
    """Registers libraries that the user has imported already, where Sortal can."""
    for module in [name for name in _pending if name in modules]:
        with contextlib.suppress(UnsupportedError):
            _register(module)


def _register(module: str) -> None:
    register = _pending.pop(module)
    try:
        register()
    except BaseException:
        _pending[module] = register  # so that the next object of it is refused as well
        raise


def watch_classes(listener: Callable[[type], Any]) -> None:
    """Has a function called with each class of Sortal's that is made from now on."""
    _listeners.append(listener)


def note_class(cls: type) -> None:
    """Calls the listeners with a new class of objects or Variables."""
    for listener in _listeners:
        listener(cls)


def register_native(theirs: type, translate: Callable[[Any], Any]) -> None:
    """Has ``translate`` turn instances of a class, or the class, into Sortal's own."""
    _translations[theirs] = translate


def to_native(tree: Any) -> Any:
    """A pytree of axes, shardings and the like, with other libraries' made Sortal's."""
    if not any(map(_is_translated, jax.tree.leaves(tree, is_leaf=_is_translated))):
        return tree  # not a copy: the user may change what is in it
    return jax.tree.map(translated, tree, is_leaf=_is_translated)


def translated(x: Any) -> Any:
    """One instance or class of another library as Sortal's own; else ``x`` itself."""
    return _translations[_class(x)](x) if _is_translated(x) else x


def _class(x: Any) -> type:
    return x if isinstance(x, type) else type(x)


def _is_translated(x: Any) -> bool:
    register_library_of(_class(x))
    return _class(x) in _translations


def register_variable(base: type, handler: VariableHandler) -> None:
    """Registers the handler of all Variables that derive from ``base``."""
    _handlers[base] = handler
    _found.clear()


def variable_bases() -> tuple[type, ...]:
    """The classes that all Variables of the libraries registered so far derive from."""
    return tuple(_handlers)


def handler_of_kind(kind: type) -> VariableHandler | None:
    """The handler for Variables of a class; None where no other library has it."""
    try:
        return _found[kind]
    except KeyError:
        register_library_of(kind)
        known = (_handlers[b] for b in kind.__mro__ if b in _handlers)
        found = _found[kind] = next(known, None)
        return found


def deep_copy(leaf: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy``, by which a Flax Variable would turn into its value."""
    kind, handler = type(leaf), handler_of_kind(type(leaf))
    if handler is None:
        return copy.deepcopy(leaf, memo)
    if id(leaf) not in memo:
        value = copy.deepcopy(handler.values([leaf])[0], memo)
        metadata = Metadata.of(handler.entries([leaf])[0])
        memo[id(leaf)] = handler.make(kind, value, metadata)
    return memo[id(leaf)]


def pair(ours: type, theirs: type) -> None:
    """Makes two kinds count as one, so that filters by either take both."""
    _twins[ours], _twins[theirs] = theirs, ours


def twin(kind: type) -> type:
    """The kind that is paired with ``kind``; itself where there is none."""
    return _twins.get(kind, kind)


def ancestry(kind: type) -> Iterator[type]:
    """A kind, its bases, and the kinds that they are paired with."""
    for base in kind.__mro__:
        yield base
        if base in _twins:
            yield _twins[base]


def is_kind(kind: Kind, wanted: type) -> TypeGuard[type]:
    """Whether ``kind`` is, or derives from, ``wanted`` or the kind paired with it."""
    if kind is None:
        return False
    return issubclass(kind, wanted) or (bool(_twins) and wanted in ancestry(kind))


def same_kind(a: Kind, b: Kind) -> bool:
    """Whether two kinds are one class, or a pair."""
    return a is b or (a is not None and b is not None and _twins.get(a) is b)
