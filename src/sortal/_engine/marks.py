"""Marks: what ``data`` and ``static`` say of an attribute."""

from __future__ import annotations

import dataclasses
from typing import Any

from sortal.errors import ArgumentError

_ABSENT: Any = object()


class Marked:
    """What ``data`` and ``static`` hand to an attribute assignment."""

    __slots__ = ("role", "value")

    def __init__(self, role: str, value: Any):
        self.role = role
        self.value = value


def data(value: Any = _ABSENT, /, *, default: Any = _ABSENT, **options: Any) -> Any:
    """Marks an attribute as data, so that even a Python number in it is a leaf.

    Sortal finds arrays, Variables and modules in plain attributes, lists and dicts by
    itself; this is needed only for numbers, and for NNX code that has it.

    Args:
      value: what is assigned; without it a dataclass field is made.
      default: the dataclass field's default.
      **options: more options of ``dataclasses.field``.

    Returns:
      What to assign to the attribute, or the dataclass field.

    Raises:
      ArgumentError: a value and options of a field, or metadata that says ``static``.

    Example:
      >>> import jax
      >>> from sortal import nnx
      >>> class Schedule(nnx.Module):
      ...     def __init__(self):
      ...         self.rate = nnx.data(0.1)
      >>> jax.tree.leaves(Schedule())
      [0.1]
    """
    return _mark("data", value, default, options)


def static(value: Any = _ABSENT, /, *, default: Any = _ABSENT, **options: Any) -> Any:
    """Marks an attribute as static: part of the structure, never a leaf.

    Args:
      value: what is assigned, hashable; without it a dataclass field is made.
      default: the dataclass field's default.
      **options: more options of ``dataclasses.field``.

    Returns:
      What to assign to the attribute, or the dataclass field.

    Raises:
      ArgumentError: a value and options of a field, or metadata that says ``static``.

    Example:
      >>> from sortal import nnx
      >>> class Scale(nnx.Module):
      ...     def __init__(self):
      ...         self.size = nnx.static((2, 3))
      >>> Scale().size
      (2, 3)
    """
    return _mark("static", value, default, options)


def _mark(role: str, value: Any, default: Any, options: dict[str, Any]) -> Any:
    if default is not _ABSENT:
        options["default"] = default
    if value is not _ABSENT:
        if options:
            raise ArgumentError(
                f"{role} takes a value, or the options of a dataclass field, but not "
                f"both; found a value and {', '.join(options)}."
            )
        return Marked(role, value)
    metadata = {**options.pop("metadata", {}), "role": role}
    if "static" in metadata:
        raise ArgumentError(
            f"the metadata of {role} has 'static', which {role} itself says; leave it "
            "out."
        )
    return dataclasses.field(**options, metadata=metadata)
