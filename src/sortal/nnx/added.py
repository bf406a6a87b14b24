"""Adds to a class of the core what only NNX code uses of it."""

from __future__ import annotations

from typing import Any

_OF_EVERY_CLASS = {*vars(type("Empty", (), {})), "__slots__"}


def add_members(cls: Any, names: type) -> None:
    """Gives a class all that ``names`` defines.

    Args:
      cls: the class, which is changed.
      names: a class that is never instantiated.

    Example:
      >>> from sortal.nnx.added import add_members
      >>> class Point: ...
      >>> class Names:
      ...     def __len__(self):
      ...         return 2
      >>> add_members(Point, Names)
      >>> len(Point())
      2
    """
    for name, member in vars(names).items():
        if name not in _OF_EVERY_CLASS:
            setattr(cls, name, member)
