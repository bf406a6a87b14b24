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


def by_position(
    transform: Any, option: str, entries: Callable[[Any], int]
) -> Callable[..., Any]:
    """A transform whose functions may be given all their arguments by keyword.

    They are put where the signature of the function has them, so that they are what
    the option says of that position. Where it has entries for more positions than are
    given, those get the defaults of the signature.

    Args:
      transform: takes a function first.
      option: its option with an entry for each argument, or with positions.
      entries: takes a value of the option; how many arguments it speaks of.

    Returns:
      The transform.
    """
    signature = inspect.signature(transform)
    first = next(iter(signature.parameters))

    @functools.wraps(transform)
    def taking(*args: Any, **options: Any) -> Any:
        if not args and first not in options:
            return functools.partial(taking, **options)
        made = transform(*args, **options)
        given = signature.bind(*args, **options)
        given.apply_defaults()
        f, wanted = given.arguments[first], entries(given.arguments[option])

        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs or len(args) < wanted:
                args, kwargs = _placed(f, args, kwargs, wanted)
            return made(*args, **kwargs)

        return call

    return taking


def _placed(
    f: Any, args: Any, kwargs: dict[str, Any], wanted: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with those at their positions that were given by keyword."""
    # Not read by a program that only imports the names.
    from sortal.transforms._adapter.functions import parameters_of

    found, rest = list(args), dict(kwargs)
    for p in parameters_of(f)[len(args) :]:
        if p.kind is not p.POSITIONAL_OR_KEYWORD:
            break
        if p.name in rest:
            found.append(rest.pop(p.name))
        elif p.default is not p.empty and len(found) < wanted:
            found.append(p.default)
        else:
            break
    return tuple(found), rest


def axes(option: Any) -> int:
    """How many arguments ``in_axes`` has an entry for; 0 if it is one for all."""
    return len(option) if isinstance(option, tuple | list) else 0


def positions(option: Any) -> int:
    """How many arguments there must be for ``argnums``."""
    several = isinstance(option, tuple | list) and not hasattr(option, "argnum")
    found = [getattr(x, "argnum", x) for x in (option if several else (option,))]
    return max([x + 1 for x in found if isinstance(x, int)], default=0)


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
