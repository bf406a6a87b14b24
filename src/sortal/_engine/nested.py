"""Nested mappings and flat paths: one read as the other, and what a State may hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sortal._engine import paths
from sortal._engine.paths import Path, show
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
    if is_leaf is not None and is_leaf(prefix, mapping):
        yield prefix, mapping
    elif not mapping:
        yield prefix, empty_node
    else:
        for key, value in mapping.items():
            path = (*prefix, key)
            if isinstance(value, Mapping):
                yield from flatten(value, is_leaf, path)
            else:
                yield path, value


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
    _refuse(
        "a path of a State can have one leaf only; given twice",
        [path for path, count in known.items() if count > 1],
    )
    _refuse(
        "a path of a State cannot run through a leaf; found",
        [p for p in known if any(p[:n] in known for n in range(1, len(p)))],
    )
    return found


def _refuse(what: str, at: list[Path]) -> None:
    if at:
        raise PathError(f"{what}:\n{listing(map(show, sorted(at, key=show)))}")


def locate_all(
    known: Sequence[Path],
    given: Iterable[tuple[Path, Any]],
    where: Callable[[Path], Any],
) -> list[tuple[int, Any]]:
    """Finds paths whose integers may have become strings, as file formats make them.

    Args:
      known: the paths to be found.
      given: pairs of path and anything.
      where: the position of a path in ``known``, or None.

    Returns:
      Pairs of a position in ``known`` and that thing.

    Raises:
      PathError: some of the paths are not known; all are listed.
    """
    by_text = {tuple(map(str, path)): i for i, path in enumerate(known)}
    found, unknown = [], []
    for path, value in given:
        at = where(path)
        if at is None:
            at = by_text.get(tuple(map(str, path)))
        if at is None:
            unknown.append(show(path))
        else:
            found.append((at, value))
    if unknown:
        raise PathError(
            "replace_by_pure_dict was given paths that this State does not have:\n"
            + listing(unknown)
            + "\nIt has:\n"
            + listing(map(show, known))
        )
    return found


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
