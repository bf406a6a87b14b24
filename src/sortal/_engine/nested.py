"""Nested mappings and flat paths: one read as the other, and what a State may hold."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey

from sortal._engine import paths
from sortal._engine.paths import Path, PathKey, show
from sortal._engine.schema import Schema
from sortal.errors import PathError, listing


class _Empty:
    def __repr__(self) -> str:
        return "empty_node"


empty_node: Any = _Empty()
"""Stands for an empty mapping among leaves."""


def flatten(
    mapping: Mapping[Any, Any],
    is_leaf: Callable[[Path, Any], bool] | None = None,
    prefix: Path = (),
) -> Iterator[tuple[Path, Any]]:
    """The leaves of a nested mapping with their paths.

    Args:
      mapping: a mapping of leaves and mappings.
      is_leaf: takes a path and a mapping; True where it is to be kept whole.
      prefix: what all paths begin with.

    Yields:
      Pairs of path and leaf; an empty mapping gives ``empty_node``.
    """
    nested = isinstance(mapping, Mapping)
    if not nested or (is_leaf is not None and is_leaf(prefix, mapping)):
        yield prefix, mapping
    elif not mapping:
        yield prefix, empty_node
    else:
        for key, value in mapping.items():
            yield from flatten(value, is_leaf, (*prefix, key))


def nest(pairs: Iterable[tuple[Path, Any]]) -> dict:
    """Nested dicts of leaves with paths: the inverse of ``flatten``.

    Args:
      pairs: paths and leaves; no path runs through another.

    Returns:
      The dict.

    Raises:
      PathError: a leaf has the empty path.
    """
    nested: dict[Any, Any] = {}
    for path, leaf in pairs:
        if not path:
            raise PathError("a lone leaf has no key to stand under in a dict.")
        *above, last = path
        at = nested
        for key in above:
            at = at.setdefault(key, {})
        at[last] = {} if leaf is empty_node else leaf
    return nested


def ordered(items: Iterable[tuple[Path, Any]]) -> list[tuple[Path, Any]]:
    """Pairs of path and leaf in the order of paths, each path once.

    Args:
      items: the pairs.

    Returns:
      The same, sorted.

    Raises:
      PathError: a path is there twice, or runs through a leaf; all are listed.
    """
    found = sorted(items, key=lambda item: tuple(map(paths.order, item[0])))
    known = Counter(path for path, _ in found)
    twice = [path for path, count in known.items() if count > 1]
    if twice:
        raise PathError(
            "a path of a State can have one leaf only; given twice:\n" + _rows(twice)
        )
    through = [p for p in known if any(p[:n] in known for n in range(1, len(p)))]
    if through:
        raise PathError(
            "a path of a State cannot run through a leaf; found:\n" + _rows(through)
        )
    return found


def _rows(bad: list[Path]) -> str:
    return listing(map(show, sorted(bad, key=show)))


def equal(a: Any, b: Any) -> bool:
    """Whether two values have the same structure, shapes, dtypes and numbers.

    Args:
      a: an array or pytree.
      b: another.

    Returns:
      True where they do.
    """
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(
        jnp.shape(x) == jnp.shape(y)
        and getattr(x, "dtype", type(x)) == getattr(y, "dtype", type(y))
        and bool(jnp.all(x == y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


class Layout:
    """How the leaves of a State lie in the nested dicts that JAX sees.

    Equal for equal outermost keys, since JAX compares the dicts and the Variables in
    them itself: a State of bare values, such as a mask or labels, is thus a prefix of
    the State of Variables that it is about.
    """

    __slots__ = ("entries", "keys", "schema", "tree")

    def __init__(self, schema: Schema):
        lone = schema.paths == ((),)  # of a lone Variable
        parts = {None: 0} if lone else nest((path, 0) for path in schema.paths)
        self.schema, self.keys = schema, tuple(parts)
        self.entries = [PathKey(()) if lone else DictKey(key) for key in parts]
        self.tree = jax.tree.structure(tuple(map(_pytree, parts.values())))

    def __eq__(self, other: object) -> bool:
        # Entries, for a lone leaf and one below the key None have equal keys.
        return isinstance(other, Layout) and self.entries == other.entries

    def __hash__(self) -> int:
        return hash(self.keys)

    def __repr__(self) -> str:
        return ", ".join(map(repr, self.keys))


def _pytree(part: Any) -> Any:
    """Dicts, which JAX sorts by key, where that is the order of paths too."""
    if not isinstance(part, dict):
        return part
    inner = {key: _pytree(x) for key, x in part.items()}
    try:
        return inner if sorted(inner) == list(inner) else OrderedDict(inner)
    except TypeError:  # such as integers among strings
        return OrderedDict(inner)
