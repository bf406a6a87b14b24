"""What ``lower`` and ``compile`` return: programs compiled before they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Lowered:
    """A function of modules, lowered for one form of arguments.

    All else than ``compile`` is that of ``jax.stages.Lowered``.
    """

    def __init__(self, lowered: Any, call: Callable[..., Any]):
        self._lowered, self._call = lowered, call

    def compile(self, *args: Any, **kwargs: Any) -> Compiled:
        """The program, with the options of ``jax.stages.Lowered.compile``.

        Args:
          *args: the options.
          **kwargs: the same, by keyword.

        Returns:
          A Compiled.
        """
        return Compiled(self._lowered.compile(*args, **kwargs), self._call)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lowered:
        """The same, whose program is not given its first arguments.

        Args:
          args: the first arguments.
          kwargs: arguments by keyword.

        Returns:
          A Lowered.
        """

        def call(program: Any, rest: Any, named: dict[str, Any]) -> Any:
            return self._call(program, (*args, *rest), {**kwargs, **named})

        return Lowered(self._lowered, call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)


class Compiled:
    """A compiled program; called as the function, without what was static.

    What it changes in modules is written to them. All else is that of
    ``jax.stages.Compiled``.
    """

    def __init__(self, program: Any, call: Callable[..., Any]):
        self._program, self._call = program, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._program, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)
