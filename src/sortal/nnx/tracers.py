"""Which trace is current, by NNX's names."""

from __future__ import annotations

from typing import Any

from sortal._engine.jax_compat import current_trace
from sortal.errors import TraceError

TraceContextError = TraceError


def current_jax_trace() -> Any:
    """A token for the trace that is current.

    Returns:
      The token; tokens of one trace are equal.

    Example:
      >>> from sortal import nnx
      >>> nnx.tracers.current_jax_trace() == nnx.tracers.current_jax_trace()
      True
    """
    return current_trace()


class TraceState:
    """The trace that was current when this object was made.

    Example:
      >>> import jax
      >>> from sortal import nnx
      >>> here = nnx.tracers.TraceState()
      >>> inside = []
      >>> _ = jax.jit(lambda x: inside.append(here.is_valid()) or x)(1.0)
      >>> here.is_valid(), inside
      (True, [False])
    """

    __slots__ = ("_trace",)

    def __init__(self) -> None:
        self._trace = current_trace()

    @property
    def jax_trace(self) -> Any:
        """The token of that trace."""
        return self._trace

    def is_valid(self) -> bool:
        """Whether that trace is current now."""
        return self._trace is current_trace()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TraceState) and self._trace is other._trace

    def __hash__(self) -> int:
        return hash(id(self._trace))
