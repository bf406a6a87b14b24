"""Errors that are Flax's too, for code that catches them by Flax's names.

``except flax.errors.TraceContextError`` catches ``TraceError`` where Flax is loaded
when the error is raised; the import of ``sortal.nnx`` sees to that.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from sortal.errors import TraceError


@functools.cache
def _also(theirs: type[Exception]) -> type[TraceError]:
    def reduce(self: Exception) -> Any:
        return TraceError, self.args

    return type("TraceError", (TraceError, theirs), {"__reduce__": reduce})


def _new(cls: type[TraceError], *args: Any) -> TraceError:
    theirs = getattr(sys.modules.get("flax.errors"), "TraceContextError", None)
    if cls is TraceError and theirs is not None:
        cls = _also(theirs)
    return ValueError.__new__(cls, *args)


_TRACE_ERROR: Any = TraceError
_TRACE_ERROR.__new__ = _new
