"""The classes and helpers that programs use, made once for each library."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import types
from typing import Any, NamedTuple

import numpy as np


# ------------------------------------------- plain Python, the same for every library
@dataclasses.dataclass
class D:
    """A node: what is in its fields, and set on it, are children."""

    a: Any = None
    b: Any = None

    __hash__ = None


@dataclasses.dataclass(frozen=True)
class FD:
    """A static where its fields are, else a node."""

    a: Any = None
    b: Any = None


class NT(NamedTuple):
    b: Any
    a: Any


@dataclasses.dataclass(frozen=True)
class OwnEq(FD):
    """Compared by its class's own rule, as a frozen dataclass's subclass may be."""

    OWN = True

    def __init__(self, a: Any, extra: Any):
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", None)
        object.__setattr__(self, "extra", extra)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.said() == other.said()

    def __hash__(self) -> int:
        return hash(self.said())

    def said(self) -> Any:
        return (type(self.a), self.a, type(self.extra), self.extra)


class SubEq(FD):
    """The same, and no dataclass of its own."""

    OWN = True
    __init__ = OwnEq.__init__
    __eq__ = OwnEq.__eq__
    __hash__ = OwnEq.__hash__
    said = OwnEq.said


class Plain:
    """An object of a class that no library knows."""

    def __init__(self, v: Any = None):
        self.v = v


class Callable(Plain):
    """The same, called like a layer."""

    def __call__(self, x: Any) -> Any:
        return x


class Attributed(list):
    """A list that may have attributes, which copies would lose."""


class Ordered(collections.OrderedDict):
    """A dict of a class of one's own."""


def relu(x: Any) -> Any:
    return x


def double(x: Any) -> Any:
    return x + x


PLAIN = {
    x.__name__: x
    for x in (
        *(D, FD, NT, OwnEq, SubEq, Plain, Callable, Attributed, Ordered),
        *(relu, double),
    )
}


def make(lib: Any) -> dict[str, Any]:
    """What is of a library: its own kinds and modules, under equal names.

    Args:
      lib: has ``Module``, ``Variable``, ``Param``, ``BatchStat`` and the verbs.

    Returns:
      Names and values for the globals of a program.
    """
    setup = {"__slots__": ()} if lib.slots else {}

    class K(lib.Variable):
        locals().update(setup)

    class K2(K):
        locals().update(setup)

    class A(lib.Module):
        W = 1

        def __init__(self, **attributes: Any):
            for name, value in attributes.items():
                setattr(self, name, value)

        def __call__(self, x: Any) -> Any:
            return x * 2 + self.W

        def method(self, x: Any) -> Any:
            return x

    class B(A):
        W = 5

    class C(lib.Module):
        W = 9
        __init__ = A.__init__
        __call__ = A.__call__
        method = A.method

    class L(lib.List):
        W = 3

    class M(lib.Dict):
        W = 7

    class RK(lib.Variable):
        locals().update(setup)

    @lib.dataclass
    class DM(lib.Module):
        W = 14
        a: Any = None
        r: Any = lib.data(default=0.5)
        s: Any = lib.static(default=2)
        method = A.method

    made = [K, K2, A, B, C, L, M, RK, DM]
    names = {cls.__name__: cls for cls in made}
    names |= {"P": lib.Param, "BS": lib.BatchStat, "V": lib.Variable}
    if lib.FlaxModule is not None:
        names |= _flax(lib)
    return names


def _flax(lib: Any) -> dict[str, Any]:
    setup = {"__slots__": ()} if lib.slots else {}

    class FP(lib.FlaxParam):
        locals().update(setup)

    class FP2(FP):
        locals().update(setup)

    class F(lib.FlaxModule):
        W = 13

        def __init__(self, **attributes: Any):
            for name, value in attributes.items():
                setattr(self, name, value)

    class F2(F):
        W = 17

    class FL(lib.FlaxList):
        W = 21

    class FM(lib.FlaxDict):
        W = 25

    return {cls.__name__: cls for cls in (FP, FP2, F, F2, FL, FM)}


# ------------------------------------------------ what a model is, as one number
def digest(lib: Any) -> Any:
    """A function that makes one number of all that a model holds, by plain Python."""

    def digest(root: Any) -> Any:
        seen: dict[int, int] = {}
        total: Any = 0.0
        step = 0
        stack = [root]
        while stack:
            x = stack.pop()
            step = step % 5 + 1
            if id(x) in seen:
                total = total + 64 * (seen[id(x)] + 1)
            elif isinstance(x, lib.kinds):
                seen[id(x)] = len(seen) % 3
                total = total + _sum(lib, x.get_value()) * step
            elif isinstance(x, lib.modules):
                seen[id(x)] = len(seen) % 3
                total = total + getattr(type(x), "W", 11) * step
                stack += [v for _, v in lib.attributes(x)]
            elif isinstance(x, list):
                seen[id(x)] = len(seen) % 3
                total = total + len(x)
                stack += x
            elif isinstance(x, dict):
                seen[id(x)] = len(seen) % 3
                stack += x.values()
            elif isinstance(x, tuple):
                stack += x
            elif isinstance(x, functools.partial):
                stack += [*x.args, *x.keywords.values()]
            elif dataclasses.is_dataclass(x):
                stack += x.__dict__.values()
            elif lib.is_array(x):
                total = total + _sum(lib, x) * step
            else:
                total = total + _number(x) * step
        return total

    return digest


def first(lib: Any) -> Any:
    """A function that gives the first module or Variable in a model, or itself."""

    def first(root: Any) -> Any:
        inside = [v for _, v in lib.attributes(root)]
        kinds = (*lib.kinds, *lib.modules)
        return next((v for v in inside if isinstance(v, kinds)), root)

    return first


def _sum(lib: Any, x: Any) -> Any:
    if lib.is_key(x):
        return lib.key_sum(x)
    return x.sum() if getattr(x, "ndim", 0) else x


def _number(x: Any) -> float:
    """What a static counts for: types and values differ."""
    if x is None:
        return 0.0
    if isinstance(x, bool):
        return 2.0 + x
    if isinstance(x, int):
        return float(x)
    if isinstance(x, float):
        return x if x == x else 7.0  # noqa: PLR0124 - NaN
    if isinstance(x, str):
        return float(len(x))
    return 11.0


def statics() -> dict[str, Any]:
    """Names for values that programs need beside the library's own."""
    return {
        "copy": copy,
        "functools": functools,
        "np": np,
        "nan": float("nan"),
        "MethodType": types.MethodType,
        **PLAIN,
    }
