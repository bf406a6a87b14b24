"""The switches of NNX's two modes, and of how its Variables store their value.

Sortal has one mode, which takes what both take, so that a switch changes nothing; it
only knows the value that it was given.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Self

from sortal.nnx.walks import refuse_other_boxes


class _Switch:
    """A setting that is made by a call, a ``with`` block or a decorator.

    Args:
      value: the value.
    """

    _initial: ClassVar[bool] = True
    _values: ClassVar[threading.local]

    def __init_subclass__(cls) -> None:
        cls._values = threading.local()

    def __init__(self, value: bool, /):
        self._before, self._value = self.current_value(), value
        self._values.now = value

    @classmethod
    def current_value(cls) -> bool:
        """The value that was set last."""
        return getattr(cls._values, "now", cls._initial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._values.now = self._before

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        self._values.now = self._before  # it was made to decorate, not to set

        @functools.wraps(f)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with type(self)(self._value):
                return f(*args, **kwargs)

        return wrapper


class set_graph_mode(_Switch):  # noqa: N801
    """NNX's switch between its two modes; it changes nothing here.

    Args:
      value: True or False.

    Example:
      >>> from sortal import nnx
      >>> with nnx.set_graph_mode(True):
      ...     nnx.set_graph_mode.current_value()
      True
    """


class set_graph_updates(_Switch):  # noqa: N801
    """NNX's switch for edits of structure in transforms; they always work here.

    Args:
      value: True or False.

    Example:
      >>> from sortal import nnx
      >>> @nnx.set_graph_updates(False)
      ... def current():
      ...     return nnx.set_graph_updates.current_value()
      >>> current(), nnx.set_graph_updates.current_value()
      (False, True)
    """


def edits_in_place(graph: bool | None, graph_updates: bool | None) -> bool:
    """Whether a function with NNX's two keywords changes what it is given.

    Args:
      graph: the keyword; the mode that is set if None.
      graph_updates: likewise.

    Returns:
      True where both are.
    """
    graph = set_graph_mode.current_value() if graph is None else graph
    if graph_updates is None:
        graph_updates = set_graph_updates.current_value()
    return graph and graph_updates


class VarDefaults(Mapping[str, Any]):
    """How new Variables store their value: always in themselves."""

    hijax = ref = False

    def __getitem__(self, key: str) -> Any:
        return {"hijax": False, "ref": False}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("hijax", "ref"))

    def __len__(self) -> int:
        return 2

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        return f


def var_defaults(*, hijax: bool | None = None, ref: bool | None = None) -> VarDefaults:
    """How new Variables store their value: always in themselves.

    Args:
      hijax: only False, which changes nothing.
      ref: only False, which changes nothing.

    Returns:
      The defaults, as a mapping that is a ``with`` block and a decorator too.

    Raises:
      UnsupportedError: ``hijax`` or ``ref`` is True.

    Example:
      >>> from sortal import nnx
      >>> dict(nnx.var_defaults())
      {'hijax': False, 'ref': False}
    """
    refuse_other_boxes(hijax, ref)
    return VarDefaults()
