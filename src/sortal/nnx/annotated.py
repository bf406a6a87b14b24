"""Annotations ``nnx.Data[...]`` and ``nnx.Static[...]`` in the bodies of classes."""

from __future__ import annotations

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


def _read(cls: Any) -> None:
    if not hasattr(cls, "_field_roles"):
        return  # a kind of Variable
    found = {k: _role(x) for k, x in vars(cls).get("__annotations__", {}).items()}
    roles = {k: role for k, role in found.items() if role}
    if roles:
        cls._field_roles = {**(cls._field_roles or {}), **roles}


watch_classes(_read)
