"""What the bodies of classes say: ``nnx.Data[...]``, fields, abstract methods."""

from __future__ import annotations

import abc
import dataclasses
import re
from typing import Any

from sortal._engine.foreign import watch_classes

DATA, STATIC = "__data__", "__static__"
_ROLES = {DATA: "data", STATIC: "static"}
_WRITTEN = re.compile(r"(?:\w+\.)*(Data|Static)(?:\[|$)")


def _role(annotation: Any) -> str | None:
    if isinstance(annotation, str):
        found = _WRITTEN.match(annotation.strip("\"' "))
        return found[1].lower() if found else None
    for mark in getattr(annotation, "__metadata__", ()):
        if isinstance(mark, str) and mark in _ROLES:
            return _ROLES[mark]
    return None


def _role_of_field(field: Any) -> str | None:
    """What the metadata of a dataclass field says, also by its name in JAX."""
    if not isinstance(field, dataclasses.Field):
        return None
    static = field.metadata.get("static")
    by_name = None if static is None else "static" if static else "data"
    return field.metadata.get("role", by_name)


def _read(cls: Any) -> None:
    if not hasattr(cls, "_field_roles"):
        return  # a kind of Variable
    found = {k: _role(x) for k, x in vars(cls).get("__annotations__", {}).items()}
    found |= {k: _role_of_field(x) or found.get(k) for k, x in vars(cls).items()}
    roles = {k: role for k, role in found.items() if role}
    if roles:
        cls._field_roles = {**(cls._field_roles or {}), **roles}


def _abstract(cls: Any) -> None:
    """Has an object with abstract methods be refused, as ABCMeta does."""
    if isinstance(cls, abc.ABCMeta) or not hasattr(cls, "_field_roles"):
        return
    names = {k for base in cls.__mro__ for k, x in vars(base).items() if _is_open(x)}
    cls.__abstractmethods__ = frozenset(
        k for k in names if _is_open(getattr(cls, k, None))
    )


def _is_open(x: Any) -> bool:
    return getattr(x, "__isabstractmethod__", False)


watch_classes(_read)
watch_classes(_abstract)
