"""The filters, by NNX's module name."""

from __future__ import annotations

import typing as _typing
from collections.abc import Sequence

from sortal._engine.paths import Path
from sortal.errors import FilterError
from sortal.filters import All as All
from sortal.filters import Any_, to_filter
from sortal.filters import Everything as Everything
from sortal.filters import Filter as Filter
from sortal.filters import Not as Not
from sortal.filters import Nothing as Nothing
from sortal.filters import OfType as OfType
from sortal.filters import PathContains as PathContains
from sortal.filters import PathIn as PathIn
from sortal.filters import WithTag as WithTag

Any, PathParts, to_predicate = Any_, Path, to_filter


def filters_to_predicates(filters: Sequence[_typing.Any]) -> tuple[Filter, ...]:
    """Reads filter literals that divide leaves among them.

    Args:
      filters: the literals.

    Returns:
      The filters.

    Raises:
      FilterError: one is no filter, or one after ``...`` would take nothing.

    Example:
      >>> from sortal import nnx
      >>> nnx.filterlib.filters_to_predicates((nnx.Param, ...))
      (Param, ...)
    """
    ends = [f is ... or f is True for f in filters]
    if True in ends and not all(ends[ends.index(True) :]):
        raise FilterError(
            "`...` or `True` can only be used as the last filters; what comes after "
            f"one would take nothing. Found {tuple(filters)}."
        )
    return tuple(to_filter(f) for f in filters)
