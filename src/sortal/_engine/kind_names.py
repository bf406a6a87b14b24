"""Names of kinds: the Flax Linen collection that each kind corresponds to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sortal._engine.variable import (
    BatchStat,
    Cache,
    Intermediate,
    Param,
    Perturbation,
    Variable,
)
from sortal.errors import ArgumentError

_kinds: dict[str, type[Variable]] = {
    "params": Param,
    "batch_stats": BatchStat,
    "cache": Cache,
    "intermediates": Intermediate,
    "perturbations": Perturbation,
}


def register_variable_name(
    name: str, typ: Any = None, *, overwrite: bool = False
) -> Callable[[Any], Any] | type[Variable]:
    """Gives a kind the name of a collection.

    Args:
      name: the collection, such as ``"params"``.
      typ: the kind; without it a decorator is returned.
      overwrite: whether the name may be taken from another kind.

    Returns:
      The kind, or the decorator.

    Raises:
      ArgumentError: another kind has the name.

    Example:
      >>> from sortal import nnx
      >>> @nnx.register_variable_name("tables")
      ... class Table(nnx.Variable): pass
      >>> nnx.variable_name_from_type(Table)
      'tables'
    """
    if typ is None:
        return functools.partial(register_variable_name, name, overwrite=overwrite)
    if name in _kinds and _kinds[name] is not typ and not overwrite:
        raise ArgumentError(
            f"the name {name!r} is that of the kind {_kinds[name].__name__}. Choose "
            "another, or pass overwrite=True."
        )
    _kinds[name] = typ
    return typ


def variable_type_from_name(
    name: str, /, *, base: type[Variable] = Variable, allow_register: bool = False
) -> type[Variable]:
    """The kind that has the name of a collection.

    Args:
      name: the collection.
      base: what a new kind is derived from.
      allow_register: whether a new kind is made for a name that none has.

    Returns:
      The kind.

    Raises:
      ArgumentError: no kind has the name.

    Example:
      >>> from sortal import nnx
      >>> nnx.variable_type_from_name("batch_stats")
      <class 'sortal.BatchStat'>
    """
    if name not in _kinds:
        if not allow_register:
            raise ArgumentError(
                f"no kind has the name {name!r}; there are {', '.join(_kinds)}. Write "
                "register_variable_name(name, kind), or pass allow_register=True."
            )
        _kinds[name] = type(name, (base,), {})
    return _kinds[name]


def variable_name_from_type(typ: type, /, *, allow_register: bool = False) -> str:
    """The name of the collection that a kind corresponds to.

    Args:
      typ: the kind.
      allow_register: whether a kind that has none gets that of its class.

    Returns:
      The name.

    Raises:
      ArgumentError: the kind has no name, or its class's name is that of another.

    Example:
      >>> from sortal import nnx
      >>> nnx.variable_name_from_type(nnx.Param)
      'params'
    """
    for name, kind in _kinds.items():
        if kind is typ:
            return name
    if not allow_register:
        raise ArgumentError(
            f"the kind {typ.__name__} has no name; write "
            "register_variable_name(name, kind), or pass allow_register=True."
        )
    register_variable_name(typ.__name__, typ)
    return typ.__name__
