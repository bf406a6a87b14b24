"""Nested mappings flattened to one level and back, by NNX's names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from sortal._engine.nested import empty_node as empty_node
from sortal._engine.nested import flatten, nest
from sortal._engine.paths import Path
from sortal.errors import ArgumentError

IsLeaf = Callable[[Path, Any], bool]


def flatten_mapping(
    xs: Mapping[Any, Any],
    /,
    *,
    keep_empty_nodes: bool = False,
    is_leaf: IsLeaf | None = None,
    sep: str | None = None,
) -> dict[Any, Any]:
    """A nested mapping as one dict from paths to leaves.

    Args:
      xs: a nested mapping, such as a State.
      keep_empty_nodes: whether empty mappings are kept, as ``empty_node``.
      is_leaf: takes a path and a mapping; True where it is to be kept whole.
      sep: joins the keys of a path to one string; paths are tuples if absent.

    Returns:
      The dict.

    Raises:
      ArgumentError: ``xs`` is no mapping, or ``sep`` is given and a key is no string.

    Example:
      >>> from sortal import nnx
      >>> nnx.traversals.flatten_mapping({"a": {"b": 1}, "c": 2}, sep="/")
      {'a/b': 1, 'c': 2}
    """
    return {
        _join(path, sep): leaf
        for path, leaf in _flatten(xs, is_leaf)
        if leaf is not empty_node or (keep_empty_nodes and path)
    }


def flatten_to_sequence(
    xs: Mapping[Any, Any], /, *, is_leaf: IsLeaf | None = None
) -> list[tuple[Any, Any]]:
    """A nested mapping as a list of pairs of path and leaf.

    Args:
      xs: a nested mapping, such as a State.
      is_leaf: takes a path and a mapping; True where it is to be kept whole.

    Returns:
      The pairs; empty mappings are left out.

    Raises:
      ArgumentError: ``xs`` is no mapping.

    Example:
      >>> from sortal import nnx
      >>> nnx.traversals.flatten_to_sequence({"a": {"b": 1}, "c": 2})
      [(('a', 'b'), 1), (('c',), 2)]
    """
    return [pair for pair in _flatten(xs, is_leaf) if pair[1] is not empty_node]


def unflatten_mapping(xs: Any, /, *, sep: str | None = None) -> dict[Any, Any]:
    """Nested dicts of leaves with paths; the inverse of ``flatten_mapping``.

    Args:
      xs: a mapping from paths to leaves, or pairs of them.
      sep: what joins the keys of a path; paths are tuples if absent.

    Returns:
      The nested dicts.

    Raises:
      ArgumentError: ``xs`` is neither a mapping nor iterable.

    Example:
      >>> from sortal import nnx
      >>> nnx.traversals.unflatten_mapping({("a", "b"): 1, ("c",): 2})
      {'a': {'b': 1}, 'c': 2}
    """
    if not isinstance(xs, Iterable):
        raise ArgumentError(
            f"unflatten_mapping takes a mapping of paths to leaves, or pairs of them; "
            f"found a {type(xs).__name__}."
        )
    pairs = xs.items() if isinstance(xs, Mapping) else xs
    return nest((key if sep is None else key.split(sep), leaf) for key, leaf in pairs)


def _flatten(xs: Any, is_leaf: IsLeaf | None) -> Iterator[tuple[Path, Any]]:
    if not isinstance(xs, Mapping):
        raise ArgumentError(
            "a nested mapping is expected, such as a State or a dict; found a "
            f"{type(xs).__name__}."
        )
    return flatten(xs, is_leaf)


def _join(path: tuple[Any, ...], sep: str | None) -> Any:
    if sep is None:
        return path
    try:
        return sep.join(path)
    except TypeError:
        raise ArgumentError(
            f"sep={sep!r} joins keys that are strings; found the path {path}. Leave "
            "sep out, or write sep.join(map(str, path))."
        ) from None
