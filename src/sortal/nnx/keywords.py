"""Keywords of NNX that are accepted and have no effect.

Flax NNX has two modes; ``graph`` and ``graph_updates`` choose one. Sortal has one mode:
shared objects and edits of their structure always go through transforms.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_IGNORED = "  {}: ignored; for NNX compatibility.\n"
_EMPTY = "  {}: must be empty; for NNX compatibility.\n"


def ignoring(*names: str, empty: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """A function of Sortal that also takes keywords of NNX.

    Args:
      *names: the keywords.
      empty: keywords that would have an effect in NNX; only empty values are taken.

    Returns:
      A decorator. What it makes has the function's name, its documentation and its
      signature, with the keywords added.
    """

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def taking(*args: Any, **kwargs: Any) -> Any:
            if kwargs:
                for name in names:
                    kwargs.pop(name, None)
                for name in empty:
                    if not kwargs.get(name, True):
                        del kwargs[name]
            return function(*args, **kwargs)

        made: Any = taking
        made.__signature__ = _signature(function, (*names, *empty))
        made.__doc__ = _documentation(function, names, empty)
        return made

    return decorate


def _signature(function: Any, names: tuple[str, ...]) -> inspect.Signature:
    """The function's signature, with the keywords in place of ``**_unknown``."""
    known = inspect.signature(function)
    parameters = list(known.parameters.values())
    last = []
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        last = [parameters.pop()]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in names
    ]
    last = [p for p in last if not p.name.startswith("_")]
    return known.replace(parameters=[*parameters, *last])


def _documentation(
    function: Any, names: tuple[str, ...], empty: tuple[str, ...]
) -> str:
    """The function's docstring, with the keywords at the end of its Args section."""
    text = inspect.cleandoc(function.__doc__ or "")
    before, args, after = text.partition("Args:\n")
    told, gap, rest = after.partition("\n\n")
    added = "".join([*map(_IGNORED.format, names), *map(_EMPTY.format, empty)])
    return f"{before}{args}{told}\n{added.rstrip()}{gap}{rest}"
