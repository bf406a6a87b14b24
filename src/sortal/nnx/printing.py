"""What ``print`` shows of Variables: small values, statistics on request.

The import of ``sortal.nnx`` adds this to the classes, for programs that print values as
Flax's guides do. Without it they print as their ``repr``, by dtype and shape.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sortal._engine.variable import Variable, describe, value_of

_SMALL = 64
"""How many numbers are shown at most."""
STATISTICS = "stats"


def _readable(x: Any) -> bool:
    """Whether the numbers of a value can be read here and now."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array | np.ndarray):
        return False
    plain = jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool
    if isinstance(x, np.ndarray) or not plain:
        return plain
    return x.is_fully_addressable and not x.is_deleted()


def text(value: Any, before: str, spec: str) -> str:
    """A value after some text, with which it is aligned.

    Args:
      value: the value.
      before: the text.
      spec: ``stats`` for mean and extremes.

    Returns:
      The text of the value.
    """
    if spec == STATISTICS and _readable(value) and value.size > 1:
        x = np.asarray(value).astype(np.float64)
        return f"{describe(value)}, mean {x.mean():.4g}, {x.min():.4g} to {x.max():.4g}"
    if not _readable(value) or value.size > _SMALL:
        return describe(value)
    head = f"{describe(value)}: "
    return head + np.array2string(np.asarray(value), prefix=before + head)


def _of_variable(variable: Any, before: str = "", spec: str = "") -> str:
    name = type(variable).__name__
    extra = "".join(f", {k}={v!r}" for k, v in variable._metadata.items())
    return f"{name}({text(variable._value, f'{before}{name}(', spec)}{extra})"


def _format_variable(self: Any, spec: str) -> str:
    """``stats`` for mean and extremes; else as the value is formatted."""
    if spec and spec != STATISTICS:
        return format(value_of(self), spec)
    return _of_variable(self, spec=spec)


_made: Any = Variable
_made.__str__, _made.__format__ = _of_variable, _format_variable
