"""Paths: tuples of attribute names, dict keys and list indices from a root."""

from __future__ import annotations

import functools
import gc
import itertools
import re
import types
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from sortal.errors import ArgumentError, EntryError

Path = tuple[Hashable, ...]


def order(key: Any) -> tuple[int, Any]:
    """A sort key for the entries of a path: integers, then strings, then the rest."""
    if isinstance(key, int):
        return (0, key)
    if isinstance(key, str):
        return (1, key)
    return (2, f"{type(key).__name__}:{key!r}")


def show(path: Iterable[Any]) -> str:
    """A path as text, ``layers.0.kernel``; keys that are no names as ``['a b']``.

    The empty path is ``<root>``.

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


def show_from(name: str, path: Path) -> str:
    """A path as text that begins with the name of what it leads on from.

    Example:
      >>> show_from("model", ("layers", 0)), show_from("state", ("a.b",))
      ('model.layers.0', "state['a.b']")
    """
    if not path or not name:
        return show(path) if path else name
    text = show(path)
    return name + (text if text.startswith("[") else f".{text}")


def _is_plain(key: Any) -> bool:
    if type(key) is int:
        return key >= 0
    # A string of digits is printed in quotes, because `parse` reads digits as an index.
    return isinstance(key, str) and not _digits(key) and not set(key) & _ODD


def _digits(key: str) -> bool:
    return key == "" or (key.isascii() and key.isdigit())


_ODD = frozenset(".[]* '\"")


def part(text: str) -> int | str:
    """One entry of a path: an integer if it is written as Python writes one.

    Example:
      >>> part("10"), part("01")
      (10, '01')
    """
    # Python refuses to read integers of very many digits.
    short = text.isascii() and text.isdigit() and len(text) < 19
    return int(text) if short and str(int(text)) == text else text


def parse(text: str) -> Path:
    """Reads ``layers.0.kernel`` as a path; parts made of digits become integers.

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
    r"""Whether ``path`` fits a glob such as ``encoder.**.kernel``; see ``glob``.

    Example:
      >>> matches("layers.*.kernel", ("layers", 0, "kernel"))
      True
      >>> matches("**.bias", ("layers", 0, "kernel"))
      False
      >>> matches(r"table.a\.b", ("table", "a.b"))
      True
    """
    return glob(pattern)(joined(path))


# Stands before each entry; one inside of an entry is written otherwise.
_SEP = "\0"


@functools.lru_cache(maxsize=65536)
def joined(path: Path) -> str:
    """A path as the text that globs are matched with."""
    texts = [str(key) for key in path]
    if any(_SEP in text or "\1" in text for text in texts):
        texts = [t.replace("\1", "\1\1").replace(_SEP, "\1\2") for t in texts]
    return "".join(f"{_SEP}{text}" for text in texts)


@functools.lru_cache(maxsize=4096)
def glob(pattern: str, below: bool = False) -> Callable[[str], bool]:
    """Compiles a glob: entries joined by single dots.

    ``**`` as a whole entry is any number of entries, none included. ``*`` in another is
    any run of characters in it. A backslash before ``.``, ``*`` or a backslash makes it
    an ordinary character. All else stands for itself; keys are compared as ``str``
    writes them.

    Args:
      pattern: the glob.
      below: whether it also fits all paths below those it names.

    Returns:
      A function of a ``joined`` path.

    Raises:
      ArgumentError: an entry is empty, or a backslash is before another character.
    """
    entries = _entries(pattern)
    if all(len(entry) == 1 for entry in entries):
        plain = joined(tuple(text for (text,) in entries))
        if not below:
            return plain.__eq__
        start = plain + _SEP
        return lambda text: text == plain or text.startswith(start)
    if below:
        entries = [*entries, ["", "", ""]]
    # Between two `**` the first place that fits will do, so no group is tried again.
    runs: list[str] = [""]
    for entry in entries:
        if len(entry) == 3 and not any(entry):
            runs.append("")
        else:
            runs[-1] += f"{_SEP}{_regex(entry)}(?![^{_SEP}])"
    skip = f"(?:{_SEP}[^{_SEP}]*)*"
    first, *middle = runs
    regex = first
    if middle:
        *inner, last = middle
        regex += "".join(f"(?>{skip}?{run})" for run in inner if run) + skip + last
    fits = re.compile(regex, re.DOTALL).fullmatch
    # Most paths fail by what is plain at either end, which is compared faster.
    start = joined(_plain_run(entries))
    end = joined(_plain_run(reversed(entries))[::-1])
    return lambda text: (
        text.startswith(start) and text.endswith(end) and fits(text) is not None
    )


def _plain_run(entries: Iterable[list[str]]) -> Path:
    """The entries before the first one with a star."""
    plain = itertools.takewhile(lambda entry: len(entry) == 1, entries)
    return tuple(text for (text,) in plain)


def _entries(pattern: str) -> list[list[str]]:
    """For each entry the literal texts around its stars."""
    entries = [[""]]
    chars = iter(pattern)
    for char in chars:
        if char == "\\":
            escaped = next(chars, "")
            if escaped not in ("\\", ".", "*"):
                raise ArgumentError(_misspelt(pattern))
            entries[-1][-1] += escaped
        elif char == ".":
            entries.append([""])
        elif char == "*":
            entries[-1].append("")
        else:
            entries[-1][-1] += char
    if any(entry == [""] for entry in entries):
        raise ArgumentError(_misspelt(pattern))
    return entries


def _misspelt(pattern: str) -> str:
    return (
        f"{pattern!r}: a path is entries joined by single dots, such as "
        "'encoder.layers.0.kernel', and a backslash stands before a dot, a star or a "
        "backslash that belongs to an entry."
    )


def _regex(entry: list[str]) -> str:
    first, *rest = [joined((text,))[1:] for text in entry]
    regex = re.escape(first)
    for text in rest[:-1]:
        regex += f"(?>[^{_SEP}]*?{re.escape(text)})"
    return regex + (f"[^{_SEP}]*{re.escape(rest[-1])}" if rest else "")


class PathKey:
    """A JAX key-path entry for the whole path of a leaf: ``['layers'][0]``.

    A Module has all its Variables and raw arrays on one level of a JAX pytree.

    Example:
      >>> str(PathKey(("layers", 0)))
      "['layers'][0]"
      >>> PathKey(("layers", 0)).path
      ('layers', 0)
    """

    __slots__ = ("path",)

    def __init__(self, path: Path):
        self.path = path

    def __getattr__(self, name: str) -> Any:
        if name in {"key", "idx", "name"}:
            # Code written for one entry a level would compare it and match nothing.
            raise EntryError(
                f"entry.{name} of a JAX key path is one level's, but {self} is one "
                "entry for the whole path of a leaf in a Module. Write entry.path, "
                f"which is {self.path!r}; or map over nnx.state(model), whose key "
                "paths have an entry for each level."
            )
        raise AttributeError(name)

    def __str__(self) -> str:
        return "".join(f"[{k!r}]" for k in self.path)

    def __repr__(self) -> str:
        return f"PathKey({self.path!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathKey) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)


readers: dict[type, Callable[[Any], dict[Any, Any]]] = {}
"""By class, what gives the children of an object by the keys that paths have."""


def locate(*targets: Any) -> list[Path | None]:
    """For each object a path from the outermost object that holds it, or None.

    It asks the garbage collector, which is slow. It serves error messages only, so
    that no live object need carry its path.
    """
    wanted = set(map(id, targets))
    found: dict[int, Path] = {}
    # `gc.get_referrers` visits every object of the process. So it is called for one
    # target, and the others are searched for from the outermost object of that one.
    for target in targets[:_ASKED]:
        if id(target) not in found:
            top = _outermost(target, (id(targets),))
            below = _below(top, wanted) if top is not None else {}
            found = {**below, **found}
    return [found.get(id(target)) for target in targets]


_ASKED, _LEVELS, _WIDTH, _MOST = 8, 40, 32, 1_000_000
# How many nested containers may lie between a model and the next model above it.
_CONTAINERS = 4


def _outermost(target: Any, ours: tuple[int, ...]) -> Any:
    """The last model object on the way up from ``target``, else the last object.

    The user does not need to know what holds the outermost model, and each level
    visits every object of the process again. So the search ends a little above it.
    """
    last, model, above_model = None, None, 0
    level: tuple[Any, ...] = (target,)
    seen = {id(target), *ours}
    for _ in range(_LEVELS):
        seen.add(id(level))  # the search itself holds what it looks at
        above = [
            x
            for x in gc.get_referrers(*level)
            if id(x) not in seen and _holds(x, level)
        ]
        seen |= {id(above), *map(id, above)}
        owners = [x for x in above if _has_attributes(x)]
        models = [x for x in owners if hasattr(type(x), "_plans")]
        last = owners[0] if owners else last
        if models:
            model, above_model = models[0], 0
        else:
            above_model += model is not None
        level = tuple(above[:_WIDTH])
        if not level or above_model > _CONTAINERS:
            break
    return last if model is None else model


def _below(top: Any, wanted: set[int]) -> dict[int, Path]:
    """The shortest path from ``top`` to each object whose id is wanted."""
    found: dict[int, Path] = {}
    level: list[tuple[Any, Path]] = [(top, ())]
    seen = {id(top)}
    while level and len(found) < len(wanted) and len(seen) < _MOST:
        following = []
        for obj, path in level:
            if id(obj) in wanted:
                found.setdefault(id(obj), path)
            for key, x in _items(obj):
                if id(x) not in seen:
                    seen.add(id(x))
                    following.append((x, (*path, key)))
        level = following
    return found


_NOT_OWNERS = (type, types.ModuleType, types.FrameType, types.CellType)


def _has_attributes(x: Any) -> bool:
    return not isinstance(x, (dict, list, tuple)) and hasattr(x, "__dict__")


def _holds(holder: Any, level: Iterable[Any]) -> bool:
    if isinstance(holder, _NOT_OWNERS):
        return False
    inside = {id(x) for _, x in _items(holder)}
    if _has_attributes(holder):
        inside.add(id(holder.__dict__))
    return any(id(x) in inside for x in level)


def _items(holder: Any) -> Iterable[tuple[Any, Any]]:
    """What an object holds by key."""
    if isinstance(holder, dict):
        return () if "__builtins__" in holder else holder.items()
    if isinstance(holder, (list, tuple)):
        return enumerate(holder)
    if isinstance(holder, _NOT_OWNERS):
        return ()
    read = next((readers[c] for c in type(holder).__mro__ if c in readers), None)
    if read is not None:
        return read(holder).items()
    attributes = getattr(holder, "__dict__", None)
    return attributes.items() if type(attributes) is dict else ()
