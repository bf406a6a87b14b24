"""Paths: tuples of attribute names, dict keys and list indices from a root."""

from __future__ import annotations

import fnmatch
import functools
import gc
import types
from collections.abc import Hashable, Iterable
from typing import Any

from sortal.errors import ArgumentError

Path = tuple[Hashable, ...]


def order(key: Any) -> tuple[int, Any]:
    """A sort key for the entries of a path: integers, then strings, then the rest."""
    if isinstance(key, int):
        return (0, key)
    if isinstance(key, str):
        return (1, key)
    return (2, f"{type(key).__name__}:{key!r}")


def show(path: Iterable[Any]) -> str:
    """Prints a path as ``layers.0.kernel``; odd keys as ``['a b']``.

    Args:
      path: entries from the root.

    Returns:
      The text; ``<root>`` for the empty path.

    Example:
      >>> show(("layers", 0, "kernel"))
      'layers.0.kernel'
      >>> show(("table", "a.b", (1, 2)))
      "table['a.b'][(1, 2)]"
    """
    text = ""
    for key in path:
        if _is_plain(key):
            text += f".{key}" if text else str(key)
        else:
            text += f"[{key!r}]"
    return text or "<root>"


def _is_plain(key: Any) -> bool:
    if type(key) is int:
        return key >= 0
    # Digits in a string are set apart from an index, for which `parse` takes them.
    return isinstance(key, str) and not _digits(key) and not set(key) & _ODD


def _digits(key: str) -> bool:
    return key == "" or (key.isascii() and key.isdigit())


_ODD = frozenset(".[]* '\"")


def parse(text: str) -> Path:
    """Reads ``layers.0.kernel`` as a path; parts made of digits become integers.

    Args:
      text: entries joined by dots.

    Returns:
      The path.

    Raises:
      ArgumentError: an entry is empty.

    Example:
      >>> parse("layers.0.kernel")
      ('layers', 0, 'kernel')
    """
    parts = text.split(".")
    if not all(parts):
        raise ArgumentError(
            f"a path is names joined by single dots, found {text!r}. "
            "Write for example 'layers.0.kernel'."
        )
    return tuple(int(p) if _digits(p) else p for p in parts)


def matches(pattern: str, path: Path) -> bool:
    """Whether ``path`` fits a glob such as ``encoder.**.kernel``.

    ``*`` stands for one entry (or part of one), ``**`` for any number, none included.

    Args:
      pattern: entries joined by dots.
      path: the path to test, from its root.

    Returns:
      True where the whole path fits the whole pattern.

    Example:
      >>> matches("layers.*.kernel", ("layers", 0, "kernel"))
      True
      >>> matches("**.bias", ("layers", 0, "kernel"))
      False
    """
    return _matches(tuple(pattern.split(".")), tuple(map(str, path)))


@functools.lru_cache(maxsize=65536)
def _matches(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
    if not pattern:
        return not path
    head, rest = pattern[0], pattern[1:]
    if head == "**":
        return _matches(rest, path) or (bool(path) and _matches(pattern, path[1:]))
    return (
        bool(path) and fnmatch.fnmatchcase(path[0], head) and _matches(rest, path[1:])
    )


class PathKey:
    """A JAX key-path entry that stands for a whole path: ``['layers'][0]``.

    Args:
      path: entries from the root.

    Example:
      >>> str(PathKey(("layers", 0)))
      "['layers'][0]"
    """

    __slots__ = ("key",)

    def __init__(self, path: Path):
        self.key = path

    def __str__(self) -> str:
        return "".join(f"[{k!r}]" for k in self.key)

    def __repr__(self) -> str:
        return f"PathKey({self.key!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathKey) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


def locate(target: Any) -> Path | None:
    """Finds where a live object hangs, by asking the garbage collector.

    Slow: for error messages only, so that no live object need carry its path.

    Args:
      target: the object looked for.

    Returns:
      A path that leads to it from the outermost object found, or None where no
      object holds it under a name.
    """
    best: Path | None = None
    level: list[tuple[Any, Path]] = [(target, ())]
    seen = {id(target)}
    for _ in range(_LEVELS):
        # One question for all of a level, because each visits every object there is.
        holders = gc.get_referrers(*[obj for obj, _ in level])
        seen |= {id(level), *map(id, level)}  # the search holds what it looks at
        above: list[tuple[Any, Path]] = []
        for holder in holders:
            if id(holder) not in seen and not isinstance(holder, _NOT_OWNERS):
                path = _path_from(holder, level)
                if path is not None:
                    above.append((holder, path))
            seen.add(id(holder))
        del holders
        owned = [path for obj, path in above if path and hasattr(obj, "__dict__")]
        best = max(owned, key=len, default=best)
        level = above[:_WIDTH]
        if not level:
            break
    return best


_LEVELS, _WIDTH = 40, 32


def _path_from(holder: Any, level: list[tuple[Any, Path]]) -> Path | None:
    """The path from ``holder`` through one of the objects in ``level``."""
    if isinstance(holder, dict) and "__builtins__" in holder:
        return None
    for obj, path in level:
        # The dict of an object's attributes stands for the object itself.
        if getattr(holder, "__dict__", None) is obj:
            return path
        key = _key_in(holder, obj)
        if key is not None:
            return (key, *path)
    return None


_NOT_OWNERS = (type, types.ModuleType, types.FrameType, types.CellType)


def _key_in(owner: Any, target: Any) -> Hashable | None:
    if isinstance(owner, dict):
        items: Iterable[tuple[Any, Any]] = owner.items()
    elif isinstance(owner, (list, tuple)):
        items = enumerate(owner)
    else:
        items = getattr(owner, "__dict__", {}).items()
    return next((key for key, value in items if value is target), None)
