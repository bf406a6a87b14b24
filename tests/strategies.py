"""Generated models, States and filters that all property tests share.

Models are built from everything the engine claims to understand: nested lists,
dicts, tuples, named tuples, dataclasses, Modules, shared Variables and sub-modules,
cycles, raw arrays and statics, with leaves of many kinds, two of which have one name.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import sortal


class LoRA(sortal.Param):
    """A kind below another."""


class Count(sortal.Variable, axis=0):
    """A kind with an option."""


BatchStat = type("BatchStat", (sortal.Variable,), {"__module__": __name__})
"""A kind that has the name of another."""

KINDS = (
    sortal.Variable,
    sortal.Param,
    LoRA,
    sortal.BatchStat,
    BatchStat,
    sortal.Cache,
    Count,
)
NAMES = ("a", "b", "bias", "kernel", "layers", "x1")
KEYS = (*NAMES, 0, 1, 12, "0", "a b", "a.b")


class Box(sortal.Module):
    """A Module with whatever attributes it is given."""

    def __init__(self, **attributes: Any):
        for name, value in attributes.items():
            setattr(self, name, value)


class OtherBox(sortal.Module):
    """Another type of Module."""

    __init__ = Box.__init__


class Pair(NamedTuple):
    """A named tuple whose fields are not in sorted order."""

    right: Any
    left: Any = None


@dataclasses.dataclass(eq=False)
class Cell:
    """A plain dataclass."""

    weight: Any
    note: Any = "note"


@dataclasses.dataclass(frozen=True)
class Config:
    """A frozen dataclass: a static where what it holds is static."""

    rate: Any
    inner: Any = None


shapes = st.sampled_from([(), (1,), (2,), (2, 3), (0, 2)])
dtypes = st.sampled_from([jnp.float32, jnp.int32, jnp.bfloat16, jnp.bool_])


@st.composite
def numpy_arrays(draw: Any) -> np.ndarray:
    """Small NumPy arrays of small whole numbers: exact in every dtype."""
    shape, dtype = draw(shapes), draw(dtypes)
    start = draw(st.integers(-3, 3))
    count = int(np.prod(shape))
    return np.arange(start, start + count).reshape(shape).astype(dtype)


arrays = st.one_of(numpy_arrays(), numpy_arrays().map(jnp.asarray))
jax_arrays = numpy_arrays().map(jnp.asarray)
statics = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([0.0, -0.0, 1.0, float("nan"), 1.5]),
    st.sampled_from(["", "relu", "same"]),
    st.sampled_from([jnp.float32, max, frozenset({1, "a"}), Config(1), b"x"]),
    st.tuples(st.integers(0, 1), st.sampled_from(["a", 1.0])),
)
metadata = st.dictionaries(
    st.sampled_from(["tag", "T", "out_sharding", "unit"]),
    st.sampled_from(["dropout", "params", None, 1, True, ("data", None), float("nan")]),
    max_size=2,
)
kinds = st.sampled_from(KINDS)


@st.composite
def variables(draw: Any, values: Any = jax_arrays) -> sortal.Variable:
    """A Variable of any kind with some metadata."""
    return draw(kinds)(draw(values), **draw(metadata))


class _Builder:
    """Draws one model; what was drawn before may be met again."""

    def __init__(self, draw: Any, shared: bool, cycles: bool, raw: bool):
        self.draw, self.shared, self.cycles, self.raw = draw, shared, cycles, raw
        self.variables: list[Any] = []
        self.modules: list[Any] = []
        self.open: list[Any] = []

    def pick(self, options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def variable(self) -> Any:
        if self.shared and self.variables and self.draw(st.booleans()):
            return self.pick(self.variables)
        made = self.draw(variables())
        self.variables.append(made)
        return made

    def module(self, depth: int) -> Any:
        if self.shared and self.modules and self.draw(st.integers(0, 4)) == 0:
            return self.pick(self.modules)
        made = self.pick([Box, Box, OtherBox])()
        self.open.append(made)
        names = self.draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
        for name in names:
            setattr(made, name, self.child(depth - 1))
        if self.cycles and self.draw(st.integers(0, 4)) == 0:
            made.back = self.pick(self.open)
        self.open.pop()
        self.modules.append(made)
        return made

    def child(self, depth: int) -> Any:
        leaves = ["variable", "variable", "static"] + ["array"] * self.raw
        inner = ["module", "module", "list", "dict", "tuple", "pair", "cell", "config"]
        what = self.pick(leaves + inner if depth > 0 else leaves)
        if what == "variable":
            return self.variable()
        if what == "static":
            return self.draw(statics)
        if what == "array":
            return self.draw(arrays)
        if what == "module":
            return self.module(depth)
        if what == "dict":
            keys = self.draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=3))
            return {key: self.child(depth - 1) for key in keys}
        size = self.draw(st.integers(0, 3))
        if what in ("list", "tuple"):
            items = [self.child(depth - 1) for _ in range(size)]
            return items if what == "list" else tuple(items)
        node = {"pair": Pair, "cell": Cell, "config": Config}[what]
        return node(self.child(depth - 1), self.child(depth - 1))


@st.composite
def models(
    draw: Any,
    depth: int = 3,
    shared: bool = True,
    cycles: bool = True,
    raw: bool = True,
) -> sortal.Module:
    """A small Module of anything.

    ``shared`` lets a Variable or module hang in several places, ``cycles`` lets modules
    refer to those that hold them, ``raw`` allows arrays outside of Variables.
    """
    return _Builder(draw, shared, cycles, raw).module(depth)


@st.composite
def flat_leaves(draw: Any, leaves: Any = None) -> dict[tuple[Any, ...], Any]:
    """Path -> Variable or array, where no path runs through another."""
    leaf = leaves if leaves is not None else st.one_of(variables(), jax_arrays)
    paths = draw(
        st.lists(
            st.lists(st.sampled_from(KEYS), min_size=1, max_size=3).map(tuple),
            unique=True,
            max_size=6,
        )
    )
    kept = [
        p for p in paths if not any(p != q and p[: len(q)] == q for q in set(paths))
    ]
    return {path: draw(leaf) for path in kept}


def states(leaves: Any = None) -> Any:
    """A State of Variables and arrays."""
    return flat_leaves(leaves).map(sortal.State.from_flat_path)


def _callable_even(path: Any, leaf: Any) -> bool:
    return len(path) % 2 == 0


def _callable_jax(path: Any, leaf: Any) -> bool:
    return isinstance(getattr(leaf, "value", leaf), jax.Array)


literals = st.one_of(
    kinds,
    st.sampled_from(["dropout", "params", "absent", ..., True, False, None]),
    st.sampled_from([sortal.Param | BatchStat, sortal.Param[jax.Array], jax.Array]),
    st.sampled_from([_callable_even, _callable_jax]),
    st.sampled_from(["**", "*", "a.**", "**.kernel", "layers.*", "0.*"]).map(sortal.At),
    st.sampled_from(["a", "layers", "a.b", "*", "layers.0"]).map(sortal.Under),
    st.sampled_from(KEYS).map(sortal.PathContains),
    st.sampled_from(["a", "e", 1]).map(lambda k: sortal.PathContains(k, exact=False)),
    st.lists(st.lists(st.sampled_from(KEYS), max_size=2).map(tuple), max_size=3).map(
        lambda paths: sortal.PathIn(*paths)
    ),
    st.sampled_from(
        [sortal.Shaped((2,)), sortal.Shaped(ndim=0), sortal.Shaped(ndim=2)]
    ),
    st.sampled_from([jnp.floating, jnp.int32, jnp.bool_]).map(sortal.Dtyped),
)
"""What users write for a filter, one at a time."""

filters = st.recursive(
    literals,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(lambda fs: sortal.Any(*fs)),
        st.lists(inner, max_size=3).map(lambda fs: sortal.All(*fs)),
        inner.map(sortal.Not),
    ),
    max_leaves=5,
).map(sortal.to_filter)
"""Filters, built from literals by all combinators."""


@st.composite
def located_leaves(draw: Any) -> tuple[tuple[Any, ...], Any]:
    """A path and a Variable or array, as filters see them."""
    path = tuple(draw(st.lists(st.sampled_from(KEYS), max_size=3)))
    return path, draw(st.one_of(variables(), arrays))
