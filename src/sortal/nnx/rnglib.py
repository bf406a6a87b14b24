"""Random streams, by NNX's module name, with NNX's keywords."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from sortal import random
from sortal._engine.paths import Path, show
from sortal._engine.variable import RngCount as RngCount
from sortal._engine.variable import RngKey as RngKey
from sortal._engine.variable import RngState as RngState
from sortal.errors import RngError
from sortal.filters import leaf_filter
from sortal.functional import iter_graph
from sortal.nnx.keywords import ignoring
from sortal.nnx.modes import edits_in_place
from sortal.nnx.walks import recursive_map
from sortal.random import Rngs as Rngs
from sortal.random import RngStream as RngStream
from sortal.random import is_stream
from sortal.random import restore_rngs as restore_rngs

reseed = ignoring("graph")(random.reseed)

_ABSENT: Any = object()


def with_rngs(
    node: Any = _ABSENT,
    /,
    *,
    split: Any = None,
    fork: Any = None,
    broadcast: Any = None,
    only: Any = True,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """A copy of a model whose random streams are split, broadcast or forked.

    Args:
      node: whatever contains random streams; without it a decorator is returned, which
        does this to the arguments of a function.
      split: a shape, for all streams, or a mapping from filter to shape; such streams
        have that many keys.
      fork: a filter, or several; such streams are new ones, made with the next key.
      broadcast: as ``split``; such streams have the same key that many times.
      only: which streams to change at all.
      graph: ignored; for NNX compatibility.
      graph_updates: ignored; for NNX compatibility.

    Returns:
      The copy, which shares all other Variables; or the decorator.

    Raises:
      RngError: a stream is taken by several of ``split``, ``broadcast`` and ``fork``.

    Example:
      >>> from sortal import nnx
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> new = nnx.with_rngs(rngs, split={"params": 4}, fork=nnx.Not("params"))
      >>> new.params.key.shape, new.dropout.key.shape
      ((4,), ())
    """
    options = {"split": split, "fork": fork, "broadcast": broadcast, "only": only}
    if node is _ABSENT:
        return _of_arguments(lambda x: with_rngs(x, **options))
    several = isinstance(fork, list | tuple)
    forks = [] if fork is None else list(fork) if several else [fork]
    rules = {
        "split": _by_filter(split),
        "broadcast": _by_filter(broadcast),
        "fork": [(f, leaf_filter(f), None) for f in forks],
    }
    chosen = leaf_filter(only)

    def change(path: Path, x: Any) -> Any:
        if not is_stream(x) or not _takes(chosen, path, x):
            return x
        name, shape = _rule(path, x, rules)
        if name is None:
            return x
        return x.fork() if name == "fork" else getattr(x, name)(shape)

    return recursive_map(change, node)


def _by_filter(shapes: Any) -> list[tuple[Any, Any, Any]]:
    if shapes is None:
        return []
    table = shapes if isinstance(shapes, Mapping) else {...: shapes}
    return [(f, leaf_filter(f), shape) for f, shape in table.items()]


def _takes(chosen: Any, path: Path, stream: Any) -> bool:
    key, count = (*path, "key"), (*path, "count")
    return chosen(key, stream.key) and chosen(count, stream.count)


def _rule(path: Path, stream: Any, rules: dict[str, Any]) -> tuple[Any, Any]:
    """The first rule that takes a stream, and its shape; of several, the specific."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, table in rules.items():
        fits = ((f, x) for f, takes, x in table if _takes(takes, path, stream))
        found.update((name, rule) for rule in itertools.islice(fits, 1))
    specific = [name for name, (f, _) in found.items() if f not in (..., True)]
    if len(specific) > 1:
        raise RngError(
            f"the stream {show(path)} is taken by {' and by '.join(specific)}, each "
            "with a filter of its own. Write filters that do not overlap."
        )
    for name, (_, shape) in found.items():
        return name, shape
    return None, None


def split_rngs(
    node: Any = _ABSENT,
    /,
    *,
    splits: int | tuple[int, ...],
    only: Any = ...,
    squeeze: bool = False,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``sortal.split_rngs``, which returns a copy where NNX's keywords ask for one.

    Args:
      node: whatever contains random streams; without it a decorator is returned.
      splits: how many keys each stream gets, a number or shape.
      only: which streams.
      squeeze: whether to take the first of the keys.
      graph: False returns a copy with split streams, and leaves the streams of
        ``node`` one key further; what ``set_graph_mode`` was given if absent.
      graph_updates: as ``graph``.

    Returns:
      What restores the streams, the copy, or the decorator.

    Example:
      >>> from sortal import nnx
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> new = nnx.split_rngs(rngs, splits=5, only="params", graph_updates=False)
      >>> new.params.key.shape, rngs.params.key.shape
      ((5,), ())
    """
    options = {"splits": splits, "only": only, "squeeze": squeeze}
    if edits_in_place(graph, graph_updates):
        first = () if node is _ABSENT else (node,)
        return random.split_rngs(*first, **options)
    if node is _ABSENT:
        return _of_arguments(lambda x: split_rngs(x, graph=False, **options))
    chosen = leaf_filter(only)

    def change(path: Path, x: Any) -> Any:
        if not is_stream(x) or not _takes(chosen, path, x):
            return x
        new = x.split(splits)
        return type(x)(new.key[0], tag=x.tag) if squeeze else new

    return recursive_map(change, node)


def fork_rngs(
    node: Any = _ABSENT,
    /,
    *,
    split: Any = None,
    graph: bool | None = None,
    graph_updates: bool | None = None,
) -> Any:
    """``sortal.fork_rngs``, which returns a copy where NNX's keywords ask for one.

    Args:
      node: whatever contains random streams; without it a decorator is returned.
      split: how many keys the new streams get: a number or shape, or a mapping from
        filter to one.
      graph: False returns a copy with new streams, and leaves the streams of ``node``
        one key further; what ``set_graph_mode`` was given if absent.
      graph_updates: as ``graph``.

    Returns:
      What restores the streams, the copy, or the decorator.

    Example:
      >>> from sortal import nnx
      >>> rngs = nnx.Rngs(0)
      >>> nnx.fork_rngs(rngs, graph=False).default is rngs.default
      False
    """
    if edits_in_place(graph, graph_updates):
        return (
            _forked(split) if node is _ABSENT else random.fork_rngs(node, split=split)
        )
    if node is _ABSENT:
        return _of_arguments(lambda x: fork_rngs(x, split=split, graph=False))
    table = split if isinstance(split, Mapping) else {...: split}
    rules = [(leaf_filter(f), shape) for f, shape in table.items()]

    def change(path: Path, x: Any) -> Any:
        if is_stream(x):
            for takes, shape in rules:
                if _takes(takes, path, x):
                    return x.fork() if shape is None else x.split(shape)
        return x

    return recursive_map(change, node)


def _forked(split: Any) -> Callable[[Any], Any]:
    """A decorator that forks the streams in arguments for as long as a call lasts."""

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with random.fork_rngs((args, kwargs), split=split):
                return f(*args, **kwargs)

        return wrapper

    return decorate


def _of_arguments(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator that changes the arguments of a function."""

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            new_args, new_kwargs = change((args, kwargs))
            return f(*new_args, **new_kwargs)

        return wrapper

    return decorate


def backup_keys(node: Any, /, *, graph: bool | None = None) -> list[tuple[Any, ...]]:
    """The keys and counts of all random streams, for ``restore_rngs``.

    Args:
      node: whatever contains random streams.
      graph: ignored; for NNX compatibility.

    Returns:
      A list of stream, key and count.

    Example:
      >>> from sortal import nnx
      >>> rngs = nnx.Rngs(0)
      >>> kept = nnx.rnglib.backup_keys(rngs)
      >>> key = rngs()
      >>> nnx.restore_rngs(kept)
      >>> bool((rngs() == key).all())
      True
    """
    return [(x, x.key[...], x.count[...]) for _, x in iter_graph(node) if is_stream(x)]
