"""Buffers that were donated to a call and are gone: how that is noticed and told."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path as File
from typing import Any

from sortal._engine import paths
from sortal._engine.jax_compat import ArrayImpl
from sortal.errors import StaleBufferError, listing

READING = (RuntimeError, ValueError)
"""What JAX raises where such a buffer is read, and XLA where JAX has not noticed."""

_donors: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def note_donor(owner: Any, fn: Any) -> None:
    """Notes a function that donates, for as long as ``owner`` lives."""
    name = getattr(fn, "__qualname__", type(fn).__name__).rpartition("<locals>.")[2]
    code = getattr(inspect.unwrap(fn), "__code__", None)
    place = code and f" ({File(code.co_filename).name}:{code.co_firstlineno})"
    _donors[owner] = f"{name}{place or ''}"


def is_gone(x: Any) -> bool:
    """Whether ``x`` is an array whose buffer was given away."""
    return type(x) is ArrayImpl and x.is_deleted()


def any_gone(values: Sequence[Any]) -> bool:
    """Whether any of the values is; quick where all are arrays."""
    try:
        return any(map(ArrayImpl.is_deleted, values))
    except TypeError:
        return any(map(is_gone, values))


def refuse_leaves(rows: Sequence[str], cause: BaseException | None = None) -> None:
    """Raises the error that lists leaves whose buffers are gone, if there are any."""
    if not rows:
        return
    donors = sorted(set(_donors.values()))[:5]
    known = f"Functions that donate: {', '.join(donors)}. " if donors else ""
    one = len(rows) == 1
    head = "1 leaf holds a buffer" if one else f"{len(rows)} leaves hold buffers"
    raise StaleBufferError(
        f"{head} that {'was' if one else 'were'} donated to an earlier call:\n"
        f"{listing(rows)}\n{known}Use the objects that call updated, or make the copy "
        "that must survive with clone(model, arrays=True)."
    ) from cause


def refuse_gone(variables: Iterable[Any], cause: Exception | None = None) -> None:
    """Says which of some Variables hold buffers that are gone.

    Args:
      variables: Variables, or anything else.
      cause: what JAX raised.

    Raises:
      StaleBufferError: some do; all are listed.
    """
    gone = [x for x in variables if is_gone(getattr(x, "_value", None))]
    rows = []
    for x, path in zip(gone, paths.locate(*gone), strict=True):
        where = f"{paths.show(path)} " if path else ""
        form = f"{x._value.dtype}[{','.join(map(str, x._value.shape))}]"
        rows.append(f"{where}({type(x).__name__}): {form}")
    refuse_leaves(rows, cause)
