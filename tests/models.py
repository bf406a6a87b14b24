"""Small models that several test files use, and ways to look at them from outside.

``portrait`` and ``untouched`` walk objects by ``vars`` alone, so that what they
say does not depend on the engine under test.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import sortal


class Count(sortal.Variable):
    """A kind of the tests' own."""


class Linear(sortal.Module):
    def __init__(self, n_in: int, n_out: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        kernel = rng.normal(size=(n_in, n_out))
        self.kernel = sortal.Param(jnp.asarray(kernel, jnp.float32))
        self.bias = sortal.Param(jnp.zeros(n_out))

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel + self.bias


class Norm(sortal.Module):
    """Centres by the batch mean and keeps a running one."""

    def __init__(self, n: int):
        self.scale = sortal.Param(jnp.ones(n))
        self.mean = sortal.BatchStat(jnp.zeros(n))
        self.use_running_average = False

    def __call__(self, x: Any) -> Any:
        mean = self.mean.value
        if not self.use_running_average:
            mean = x.mean(0)
            self.mean[...] = 0.9 * self.mean + 0.1 * mean
        return (x - mean) * self.scale


class Net(sortal.Module):
    """Two layers in a list, a norm, and a count of calls."""

    def __init__(self, seed: int = 0):
        self.layers = [Linear(3, 4, seed), Linear(4, 2, seed + 1)]
        self.norm = Norm(4)
        self.calls = Count(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        hidden = jnp.tanh(self.norm(self.layers[0](x)))
        return self.layers[1](hidden)


class Holder(sortal.Module):
    """An object with the attributes given."""

    def __init__(self, **attributes: Any):
        for name, value in attributes.items():
            setattr(self, name, value)


def portrait(obj: Any, seen: dict[int, int] | None = None) -> Any:
    """All there is to know of an object graph but identity; sharing by numbers."""
    seen = {} if seen is None else seen
    plain = (str, int, float, bool, type(None), type)
    if isinstance(obj, (jax.Array, np.ndarray)):
        return ("array", str(obj.dtype), obj.shape, _bytes(obj))
    if isinstance(obj, plain) or (callable(obj) and not isinstance(obj, sortal.Module)):
        return ("static", type(obj), repr(obj))
    if type(obj) is tuple:
        return ("tuple", [portrait(x, seen) for x in obj])
    if id(obj) in seen:
        return ("again", seen[id(obj)])
    seen[id(obj)] = len(seen)
    if isinstance(obj, sortal.Variable):
        return (type(obj), obj.get_metadata(), portrait(obj.value, seen))
    if isinstance(obj, dict):
        return (type(obj), [(k, portrait(v, seen)) for k, v in obj.items()])
    if isinstance(obj, list):
        return (type(obj), [portrait(v, seen) for v in obj])
    items = sorted(vars(obj).items())
    return (type(obj), [(k, portrait(v, seen)) for k, v in items])


def _bytes(array: Any) -> bytes:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array).tobytes()


def objects(obj: Any, found: dict[int, Any] | None = None) -> dict[int, Any]:
    """Every Module, container and Variable below ``obj``, by identity."""
    found = {} if found is None else found
    if id(obj) in found:
        return found
    if isinstance(obj, sortal.Variable):
        found[id(obj)] = obj
    elif isinstance(obj, (sortal.Pytree, list, dict, tuple)):
        found[id(obj)] = obj
        inside = obj.values() if isinstance(obj, dict) else obj
        for x in vars(obj).values() if isinstance(obj, sortal.Pytree) else inside:
            objects(x, found)
    return found


@contextlib.contextmanager
def untouched(*models: Any) -> Iterator[None]:
    """Claims that no value, attribute, sharing or identity in ``models`` changes."""
    before, parts = portrait(models), objects(models)
    yield
    assert portrait(models) == before
    assert objects(models).keys() == parts.keys()


def has_tracer(obj: Any) -> bool:
    """Whether a tracer hangs anywhere below ``obj``."""
    leaves: list[Any] = []
    for x in objects(obj).values():
        if isinstance(x, sortal.Variable):
            leaves += jax.tree.leaves(x.value)
        elif isinstance(x, sortal.Pytree):
            leaves += list(vars(x).values())
        else:
            leaves += list(x.values() if isinstance(x, dict) else x)
    return any(isinstance(x, jax.core.Tracer) for x in leaves)


KINDS = (sortal.Param, sortal.BatchStat, sortal.Cache, Count)


@st.composite
def models(draw: Any) -> Any:
    """Modules of modules, containers, Variables, arrays and statics, with sharing."""
    pool: list[Any] = []
    numbers = st.integers(-3, 3)

    def array() -> Any:
        shape = draw(st.sampled_from([(), (2,), (1, 3)]))
        dtype = draw(st.sampled_from(["float32", "int32"]))
        make = draw(st.sampled_from([np.full, jnp.full]))
        return make(shape, draw(numbers), dtype)

    def variable() -> Any:
        metadata = {"tag": "x"} if draw(st.booleans()) else {}
        return draw(st.sampled_from(KINDS))(array(), **metadata)

    def static() -> Any:
        return draw(
            st.sampled_from([1, 1.0, True, "name", None, (1, ("a",)), jnp.tanh])
        )

    def part(depth: int) -> Any:
        kinds = ["variable", "array", "static"]
        kinds += ["module", "list", "dict", "tuple"] if depth else []
        kinds += ["again"] if pool else []
        what = draw(st.sampled_from(kinds))
        if what == "again":
            return draw(st.sampled_from(pool))
        if what in {"array", "static"}:
            return array() if what == "array" else static()
        n = draw(st.integers(0, 3))
        names = draw(st.permutations("abc"))[:n]
        if what == "variable":
            made = variable()
        elif what == "module":
            made = Holder(**{k: part(depth - 1) for k in names})
        elif what == "dict":
            made = {k: part(depth - 1) for k in names}
        else:
            made = [part(depth - 1) for _ in range(n)]
            if what == "tuple":
                return tuple(made)
        pool.append(made)
        return made

    names = draw(st.permutations("wxyz"))[: draw(st.integers(1, 4))]
    return Holder(**{k: part(3) for k in names})
