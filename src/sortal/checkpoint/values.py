"""The values of leaves as records: arrays, plain values, and containers of them."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sortal._engine.jax_compat import one_level
from sortal._engine.paths import order
from sortal.errors import DamagedError

DTYPES = frozenset(
    "bool int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64 "
    "float16 bfloat16 float32 float64 complex64 complex128 float4_e2m1fn "
    "float6_e2m3fn float6_e3m2fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
)
"""The dtypes that a checkpoint can hold, by name."""

PLAIN = (bool, int, float, complex, str, bytes)
DEPTH = 100
"""The greatest depth of nested containers."""


class Key(NamedTuple):
    """What makes uint32 words PRNG keys: the implementation, and words per key."""

    impl: str
    words: int


class Place(NamedTuple):
    """Where bytes are: the name of a stored array, and the offset in a pack."""

    array: str
    offset: int | None


class Array(NamedTuple):
    """One array of a value.

    ``form`` is ``jax``, ``numpy`` or ``scalar`` (a NumPy scalar). For PRNG keys,
    ``shape`` is that of the array of keys, and ``dtype`` is uint32.
    """

    shape: tuple[int, ...]
    dtype: str
    form: str = "jax"
    weak: bool = False
    key: Key | None = None
    sharding: Any = None
    place: Place | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape stored; keys have a last axis of words."""
        return self.shape if self.key is None else (*self.shape, self.key.words)

    @property
    def nbytes(self) -> int:
        """The number of bytes stored."""
        return _nbytes(self.stored_shape, self.dtype)

    @property
    def shown(self) -> str:
        """Such as ``float32[3,4]`` or ``key<threefry2x32>[]``."""
        dtype = self.dtype if self.key is None else f"key<{self.key.impl}>"
        return f"{dtype}[{','.join(map(str, self.shape))}]"


@functools.lru_cache(maxsize=4096)
def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * numpy_dtype(dtype).itemsize


class Plain(NamedTuple):
    """A Python scalar, string or bytes."""

    value: Any

    @property
    def shown(self) -> str:
        """Such as ``int``."""
        return type(self.value).__name__


class Nest(NamedTuple):
    """A container: ``dict``, ``list``, ``tuple``, ``none`` or ``node``.

    A ``node`` is any other pytree type, and ``name`` its class. The keys of a dict are
    sorted, as in JAX.
    """

    what: str
    name: str | None
    keys: tuple[Any, ...]
    children: tuple[Any, ...]

    @property
    def shown(self) -> str:
        """Such as ``dict(a: float32[3])``."""
        inside = (
            x.shown if k is None else f"{k}: {x.shown}"
            for k, x in zip(self.keys, self.children, strict=True)
        )
        return f"{self.name or self.what}({', '.join(inside)})"


Tree = Array | Plain | Nest
RECORDS = (Array, Plain, Nest)


class UnsavableError(TypeError):
    """Part of a value is of a type that a checkpoint cannot hold."""


@functools.lru_cache(maxsize=256)
def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name in ``DTYPES``."""
    return jnp.dtype(name)


@functools.lru_cache(maxsize=256)
def dtype_name(dtype: Any) -> str:
    """The name of a dtype; cached, because NumPy computes it each time."""
    return dtype.name


@functools.lru_cache(maxsize=256)
def is_storable(dtype: Any) -> bool:
    """Whether the bytes of such an array are stored as they are; not so PRNG keys."""
    return dtype.name in DTYPES


@functools.lru_cache(maxsize=256)
def _is_key(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def arrays(tree: Tree) -> Sequence[Array]:
    """All arrays of a value, in order."""
    if isinstance(tree, Array):
        return (tree,)
    if isinstance(tree, Nest):
        return [array for child in tree.children for array in arrays(child)]
    return ()


def with_arrays(tree: Tree, new: Iterator[Array]) -> Tree:
    """The same value with other arrays, taken in order."""
    if isinstance(tree, Array):
        return next(new)
    if isinstance(tree, Nest):
        children = tuple(with_arrays(child, new) for child in tree.children)
        return tree._replace(children=children)
    return tree


# --------------------------------------------------------------------- live values
GONE = "its buffer was donated to a call and is gone"


def without_values(array: Any) -> str:
    """Why an array has no values to be saved; empty where it has."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return "a shape without values"
    if isinstance(array, Tracer):
        return "a tracer, which was kept when a transform ended"
    return GONE if isinstance(array, jax.Array) and array.is_deleted() else ""


def describe(value: Any, live: list[Any]) -> Tree:
    """The record of a live value; its arrays are appended to ``live``, keys as words.

    Raises:
      UnsavableError: part of it is of another type than a checkpoint holds.
    """
    return _describe(value, live, 0)


def _describe(value: Any, live: list[Any], depth: int) -> Tree:
    if isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return _describe_array(value, live)
    cls = type(value)
    if cls in PLAIN:
        return Plain(value)
    if depth > DEPTH:
        raise UnsavableError("containers nested more than a hundred deep")
    if value is None:
        return Nest("none", None, (), ())
    if cls is dict:
        # In JAX's order, so that dicts with equal keys list their arrays alike.
        items = sorted(value.items(), key=lambda item: order(item[0]))
        return _nest("dict", None, items, live, depth)
    if cls is list or cls is tuple:
        return _nest(cls.__name__, None, [(None, x) for x in value], live, depth)
    level = one_level(value)
    if level is None:
        raise UnsavableError(f"a {cls.__name__}, {value!r:.60}")
    name = f"{cls.__module__}.{cls.__qualname__}"
    return _nest("node", name, level[0], live, depth)


def _nest(what: str, name: str | None, items: Any, live: list[Any], depth: int) -> Nest:
    keys, children = [], []
    for key, child in items:
        if what != "node" and type(key) not in (str, int, type(None)):
            raise UnsavableError(f"a {what} with the key {key!r}")
        keys.append(key if type(key) in (str, int, type(None)) else str(key))
        children.append(_describe(child, live, depth + 1))
    if len(set(keys)) < len(keys) != keys.count(None):
        raise UnsavableError(f"a {name} with several keys of one text: {keys}")
    return Nest(what, name, tuple(keys), tuple(children))


def _describe_array(value: Any, live: list[Any]) -> Array:
    if isinstance(value, (np.ma.MaskedArray, np.matrix)):
        name = type(value).__name__
        raise UnsavableError(f"a {name}, of which only the numbers would be kept")
    form = _form(value)
    key, sharding = None, getattr(value, "sharding", None)
    shape, dtype = value.shape, value.dtype
    if form == "jax" and _is_key(dtype):
        key, dtype = _key_of(value), np.dtype(np.uint32)
        if not isinstance(value, jax.ShapeDtypeStruct):
            value = jax.random.key_data(value)
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise UnsavableError(f"an array of dtype {dtype}")
    live.append(value)
    weak = bool(getattr(value, "weak_type", False))
    return Array(tuple(shape), name, form, weak, key, spec_of(sharding))


def _form(value: Any) -> str:
    if isinstance(value, np.generic):
        return "scalar"
    return "numpy" if isinstance(value, np.ndarray) else "jax"


def _key_of(value: Any) -> Key:
    found: list[str] = []

    def words(key: Any) -> Any:
        # Here the key is a tracer, so that abstract ones are asked like others.
        found.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    one = jax.eval_shape(words, jax.ShapeDtypeStruct((), value.dtype))
    return Key(found[0], one.shape[-1])


def spec_of(sharding: Any) -> Any:
    """A sharding as plain data; None where one device holds the array.

    ``{"mesh": {axis: size}, "spec": [...]}`` for a NamedSharding, else ``{"text":
    repr}``.
    """
    if sharding is None or isinstance(sharding, jax.sharding.SingleDeviceSharding):
        return None
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = [list(x) if isinstance(x, tuple) else _axis(x) for x in sharding.spec]
        return {"mesh": dict(sharding.mesh.shape), "spec": spec}
    return {"text": repr(sharding)[:1000]}


def _axis(x: Any) -> Any:
    return x if x is None or isinstance(x, str) else str(x)


# -------------------------------------------------------------------- back to live
def build(tree: Tree, made: Iterator[Any], like: Any = None) -> Any:
    """A value from its record and its arrays, in order.

    ``like`` is a live value of the same structure; it says how to build pytree nodes.
    """
    if isinstance(tree, Array):
        return next(made)
    if isinstance(tree, Plain):
        return tree.value
    if tree.what == "none":
        return None
    if tree.what != "node":
        inside = _inside(tree, like)
        items = [build(x, made, y) for x, y in zip(tree.children, inside, strict=True)]
        if tree.what == "dict":
            return dict(zip(tree.keys, items, strict=True))
        return items if tree.what == "list" else tuple(items)
    level = None if like is None else one_level(like)
    if level is None and (cls := tuple_of(tree)) is not None:
        return tuple.__new__(cls, [build(x, made) for x in tree.children])
    if level is None:
        raise DamagedError(
            f"a value is a {tree.name}, which only a model that has one can build. "
            "Restore into a model, or leave the leaf out with only=."
        )
    pairs, treedef = level
    items = [build(x, made, y) for x, (_, y) in zip(tree.children, pairs, strict=True)]
    return jax.tree_util.tree_unflatten(treedef, items)


def tuple_of(tree: Nest) -> Any:
    """The class of a named tuple, such as the states of optax, where it is loaded.

    None for any other node. Nothing is imported, and none of its code is run.
    """
    parts = (tree.name or "").split(".")
    for n in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:n]))
        if found is not None:
            for name in parts[n:]:
                found = getattr(found, "__dict__", {}).get(name)
            fields = getattr(found, "_fields", None)
            named = isinstance(found, type) and issubclass(found, tuple)
            return found if named and fields == tree.keys else None
    return None


def _inside(tree: Nest, like: Any) -> list[Any]:
    if like is None:
        return [None] * len(tree.children)
    return [like[k] for k in tree.keys] if tree.what == "dict" else list(like)


def difference(stored: Tree, live: Tree, cast: Callable[[str, str], bool]) -> str:
    """How a stored and a live value disagree, in a word or two; empty where they agree.

    ``cast`` says whether one dtype may be converted to another.
    """
    if isinstance(stored, Array) and isinstance(live, Array):
        if stored.shape != live.shape:
            return "shape"
        if (stored.key is None) != (live.key is None):
            return "dtype"
        if stored.key != live.key:
            return "PRNG implementation"
        same = stored.dtype == live.dtype or cast(stored.dtype, live.dtype)
        return "" if same else "dtype"
    if isinstance(stored, Plain) and isinstance(live, Plain):
        return "" if type(stored.value) is type(live.value) else "type"
    if not (isinstance(stored, Nest) and isinstance(live, Nest)):
        return "type"
    if (stored.what, stored.name) != (live.what, live.name):
        return "structure"
    if stored.keys != live.keys:
        return "structure"
    pairs = zip(stored.children, live.children, strict=True)
    return next((d for x, y in pairs if (d := difference(x, y, cast))), "")
