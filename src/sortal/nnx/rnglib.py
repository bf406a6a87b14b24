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
from sortal.filters import to_filter
from sortal.functional import iter_graph
from sortal.nnx.keywords import ignoring
from sortal.nnx.walks import recursive_map
from sortal.random import Rngs as Rngs
from sortal.random import RngStream as RngStream
from sortal.random import restore_rngs as restore_rngs

fork_rngs = ignoring("graph", "graph_updates")(random.fork_rngs)
reseed = ignoring("graph")(random.reseed)
split_rngs = ignoring("graph", "graph_updates")(random.split_rngs)

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

        def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(f)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                new_args, new_kwargs = with_rngs((args, kwargs), **options)
                return f(*new_args, **new_kwargs)

            return wrapper

        return decorate
    several = isinstance(fork, list | tuple)
    forks = [] if fork is None else list(fork) if several else [fork]
    rules = {
        "split": _by_filter(split),
        "broadcast": _by_filter(broadcast),
        "fork": [(f, to_filter(f), None) for f in forks],
    }
    chosen = to_filter(only)

    def change(path: Path, x: Any) -> Any:
        if not isinstance(x, RngStream) or not _takes(chosen, path, x):
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
    return [(f, to_filter(f), shape) for f, shape in table.items()]


def _takes(chosen: Any, path: Path, stream: Any) -> bool:
    """Whether a filter takes a stream, by itself or, as for a tag, by its key."""
    return chosen(path, stream) or chosen((*path, "key"), stream.key)


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
    return [
        (x, x.key[...], x.count[...])
        for _, x in iter_graph(node)
        if isinstance(x, RngStream)
    ]
