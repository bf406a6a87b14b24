"""A Variable used as the array it holds: operators, items, conversions."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sortal._engine.stale import READING, is_gone, refuse_gone
from sortal.errors import InPlaceError


class ArrayOperators:
    """The methods by which a Variable acts as the array that it holds."""

    __slots__ = ()

    value: Any

    def __jax_array__(self) -> Any:
        value = jnp.asarray(self.value)
        if is_gone(value):  # JAX would not say whose it was
            refuse_gone([self])
        return value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            return np.array(self.value, dtype=dtype, copy=copy)
        except READING as e:
            refuse_gone([self], e)
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value(*args, **kwargs)  # type: ignore[operator]

    def __len__(self) -> int:
        return len(self.value)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value)  # type: ignore[call-overload]

    def __contains__(self, item: Any) -> bool:
        return item in self.value  # type: ignore[operator]

    def __bool__(self) -> bool:
        return bool(self.value)

    def __round__(self, digits: int = 0) -> Any:
        return round(self.value, digits)  # type: ignore[call-overload]


def plain(x: Any) -> Any:
    """The value of a Variable; anything else as it is."""
    return x.value if isinstance(x, ArrayOperators) else x


def with_item(value: Any, index: Any, new: Any) -> Any:
    """``value`` with ``value[index]`` replaced; the old value is left as it was."""
    new = plain(new)
    if isinstance(value, jax.Array):
        whole = index is Ellipsis and isinstance(new, jax.Array)
        return new if whole and _same_type(value, new) else value.at[index].set(new)
    if isinstance(value, np.ndarray):
        if isinstance(new, jax.Array):
            return jnp.asarray(value).at[index].set(new)
    elif index is Ellipsis:
        return new
    changed = copy.copy(value)
    changed[index] = new
    return changed


def _same_type(a: jax.Array, b: jax.Array) -> bool:
    # A weakly typed value in place of a strong one would make `jit` compile again.
    if a.shape != b.shape or a.dtype != b.dtype or a.weak_type != b.weak_type:
        return False
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return True  # the compiler decides where a traced value is placed
    return a.sharding == b.sharding


def _binary(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def forward(self: ArrayOperators, other: Any) -> Any:
        try:
            return function(self.value, plain(other))
        except READING as e:
            refuse_gone([self, other], e)
            raise

    return forward


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return _binary(lambda a, b: function(b, a))


def _unary(function: Callable[[Any], Any]) -> Callable[[ArrayOperators], Any]:
    def unary(self: ArrayOperators) -> Any:
        try:
            return function(self.value)
        except READING as e:
            refuse_gone([self], e)
            raise

    return unary


def _in_place(symbol: str) -> Callable[..., Any]:
    def in_place(self: ArrayOperators, other: Any) -> Any:
        raise InPlaceError(
            f"variable {symbol} x would put a plain array in the place of a "
            f"{type(self).__name__}. Write variable[...] {symbol} x."
        )

    return in_place


_BINARY = {
    "add": "+=", "sub": "-=", "mul": "*=", "matmul": "@=", "truediv": "/=",
    "floordiv": "//=", "mod": "%=", "pow": "**=", "lshift": "<<=",
    "rshift": ">>=", "and": "&=", "xor": "^=", "or": "|=",
}  # fmt: skip
for _name, _symbol in _BINARY.items():
    _function = getattr(operator, f"__{_name}__")
    setattr(ArrayOperators, f"__{_name}__", _binary(_function))
    setattr(ArrayOperators, f"__r{_name}__", _reflected(_function))
    setattr(ArrayOperators, f"__i{_name}__", _in_place(_symbol))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(ArrayOperators, f"__{_name}__", _binary(getattr(operator, f"__{_name}__")))
for _name in ("neg", "pos", "abs", "invert", "index"):
    setattr(ArrayOperators, f"__{_name}__", _unary(getattr(operator, f"__{_name}__")))
for _cast in (int, float, complex):
    setattr(ArrayOperators, f"__{_cast.__name__}__", _unary(_cast))
