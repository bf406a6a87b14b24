"""Transforms called outside of any trace: what is compiled for them, and kept.

JAX knows a loop or branch again by its function, which is another one at each call of
a transform here. The transform is kept under ``jit`` instead. But a compiled function
goes on with the values that it saw when it was traced; so all that could change unseen
must be known first.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import sys
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax.tree_util as jtu
import numpy as np
from jax.sharding import Mesh, PartitionSpec, Sharding

from sortal._engine.graphdef import GraphDef
from sortal._engine.jax_compat import outside_traces
from sortal._engine.nodes import STATIC, is_root
from sortal._engine.plan import bind
from sortal._engine.schema import Schema
from sortal._engine.statics import static_key
from sortal.policy.policy import Policy
from sortal.sharding.mesh_axes import in_force
from sortal.transforms._adapter.binding import Joint
from sortal.transforms._adapter.prefixes import ByKind, Carry
from sortal.transforms.compile import Jitted, jit

_KEPT = 64
_programs: dict[Hashable, Callable[..., Any]] = {}
_PLAIN = (
    *(str, bytes, int, float, complex, np.generic, np.dtype),
    *(type(None), type(Ellipsis), PartitionSpec, Sharding, Mesh),
)
_SLOTS = (
    *(types.MemberDescriptorType, types.GetSetDescriptorType),
    type(Joint.graphdef),  # a field of a NamedTuple
)
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
_LIBRARIES = frozenset(
    "builtins chex einops flax jax jaxlib numpy optax sortal abc collections "
    "dataclasses functools itertools math operator reprlib typing".split()
)


class _Unknown(Exception):  # noqa: N818 - no error: ends a search
    """Something that may change without anybody noticing."""


def kept(
    call: Callable[..., Any], fixed: Any, given: Any, **options: Any
) -> Callable[..., Any]:
    """``call`` under ``jit``, the same one while nothing changes that it refers to.

    Args:
      call: a transform as a function of all that may be traced; besides, it refers to
        ``fixed`` only, and its code says which transform it is.
      fixed: the user's functions, and options, in tuples.
      given: the arguments of the call; the methods of the objects in them, and their
        static attributes, are what the user's functions refer to as well.
      **options: those of ``jit``.

    Returns:
      The compiled function; or ``call`` as it is inside of another trace, whose tracers
      must not be kept, and where ``captures`` knows no key.
    """
    if not outside_traces():
        return call
    known = captures((fixed, in_force(), _referred(given)))
    if known is None:
        return call
    key = (call.__code__, known)
    found = _programs.get(key)
    if found is None:
        if len(_programs) >= _KEPT:
            _programs.pop(next(iter(_programs)), None)
        found = _programs[key] = jit(call, **options)
    return found


def _referred(given: Any) -> tuple[Any, ...]:
    """The types of the objects in arguments, and their static attributes."""
    leaves, treedef = jtu.tree_flatten(given, is_leaf=is_root)
    found = list(_nodes(treedef))
    for graphdef in dict.fromkeys(bind(x).graphdef for x in leaves if is_root(x)):
        found += graphdef.memo("referred", lambda g=graphdef: _structure(g))
    return tuple(found)


def _structure(graphdef: GraphDef) -> tuple[Any, ...]:
    schema, records = graphdef.schema, graphdef.records
    found: list[Any] = [*(r.cls for r in records), *schema.kinds]
    for record in records:
        if isinstance(record.spec.value, jtu.PyTreeDef):
            found += record.spec.value.node_data() or ()
        found += [e.ref.value for e in record.entries if e.what == STATIC]
    for metadata in dict.fromkeys(schema.metadata):
        found += dict(metadata).values()
    return _unsure(found)


def _nodes(treedef: Any) -> tuple[Any, ...]:
    """The types of the nodes of a tree, and what else they are made of."""
    found = list(treedef.node_data() or ())
    for child in treedef.children():
        found += _nodes(child)
    return _unsure(found)


def _unsure(found: list[Any]) -> tuple[Any, ...]:
    """What of this may change, or may refer to something that may."""
    different = {id(x): x for x in found}.values()
    return tuple(x for x in different if not _is_settled(x))


def _is_settled(x: Any) -> bool:
    if isinstance(x, type):
        return not _is_users(x)
    if isinstance(x, (tuple, list, frozenset)):
        return all(map(_is_settled, x))
    return isinstance(x, (*_PLAIN, Schema))


def captures(fn: Any) -> Hashable | None:
    """A key that changes whenever something changes that a function refers to.

    Looked at are the names that a function and those it calls by name use: numbers and
    text by value, functions by code, classes with all their methods and attributes, and
    parts of well-known libraries by identity.

    Args:
      fn: a function, or several in a tuple.

    Returns:
      The key, or None where the function refers to arrays, to objects, or to anything
      else that may change.

    Example:
      >>> import jax.numpy as jnp
      >>> def scaled(by):
      ...     return lambda x: x * by
      >>> captures(scaled(0.5)) == captures(scaled(0.25))
      False
      >>> captures(scaled(jnp.ones(3))) is None
      True
    """
    found: list[Any] = []
    try:
        _visit(fn, found, set(), ())
        key = tuple(found)
        hash(key)
    except (_Unknown, TypeError, AttributeError, RecursionError):
        return None
    return key


def _visit(x: Any, found: list[Any], seen: set[int], names: tuple[str, ...]) -> None:
    if isinstance(x, _PLAIN):
        found.append(static_key(x))
    elif isinstance(x, type):
        _visit_class(x, found, seen)
    elif isinstance(x, types.ModuleType):
        if not _is_library(x.__name__):
            if not names:  # nobody knows what of it is used
                raise _Unknown
            for name in names:
                if name in vars(x):
                    _visit(vars(x)[name], found, seen, names)
    elif isinstance(x, (tuple, list, set, frozenset)):
        found.append((type(x), len(x)))
        for child in x:
            _visit(child, found, seen, names)
    elif isinstance(x, (dict, types.MappingProxyType)):
        _visit(tuple(x.items()), found, seen, names)
    elif isinstance(x, types.FunctionType):
        _visit_function(x, found, seen)
    elif isinstance(x, functools.partial):
        _visit((x.func, x.args, x.keywords), found, seen, names)
    elif isinstance(x, (types.BuiltinFunctionType, np.ufunc, enum.Enum, type(Carry))):
        found.append(x)
    elif dataclasses.is_dataclass(x) and not is_root(x):
        fields = tuple(getattr(x, f.name) for f in dataclasses.fields(x))
        _visit((type(x), fields, getattr(x, "__dict__", None)), found, seen, names)
    elif isinstance(x, ByKind):
        _visit((type(x), x.filters, x.answers), found, seen, names)
    elif isinstance(x, Policy):
        _visit((Policy, x.rows), found, seen, names)
    elif isinstance(x, Jitted):
        _visit(vars(x)["__wrapped__"], found, seen, names)
    elif callable(x) and type(x).__module__.partition(".")[0] in ("jax", "jaxlib"):
        # A compiled function is what it wraps; jnp's ufuncs wrap nothing.
        found.append(x)
        _visit(getattr(x, "__wrapped__", None), found, seen, names)
    else:
        raise _Unknown


def _visit_function(fn: types.FunctionType, found: list[Any], seen: set[int]) -> None:
    found.append(fn.__code__)
    # A function's code may lie in a library while what it wraps is the user's.
    plain = _is_library(fn.__globals__.get("__name__", "")) and not fn.__closure__
    if plain or id(fn) in seen:
        return
    seen.add(id(fn))
    names = tuple(dict.fromkeys(_names(fn.__code__)))
    if not _is_library(fn.__globals__.get("__name__", "")):
        looked_up = _global_names(fn.__code__)
        if looked_up is None:
            raise _Unknown
        for name in looked_up:
            if name in fn.__globals__:
                _visit(fn.__globals__[name], found, seen, names)
    for cell in fn.__closure__ or ():
        try:
            inside = cell.cell_contents
        except ValueError:
            raise _Unknown from None
        _visit(inside, found, seen, names)
    _visit((fn.__defaults__, fn.__kwdefaults__), found, seen, names)


def _visit_class(cls: type, found: list[Any], seen: set[int]) -> None:
    found.append(cls)
    for base in cls.__mro__:
        if not _is_users(base) or id(base) in seen or issubclass(base, enum.Enum):
            continue
        seen.add(id(base))
        for name, value in vars(base).items():
            for part in _parts(name, value):
                _visit(part, found, seen, ())


def _parts(name: str, value: Any) -> tuple[Any, ...]:
    """What of an attribute of a class may be run or read, beside its slots."""
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, property):
        return (value.fget, value.fset)
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, types.FunctionType):
        return (value,)
    silent = name.startswith(("__", "_abc_impl", "_pytree__"))
    return () if silent or isinstance(value, _SLOTS) else (value,)


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...] | None:
    """Names looked up among globals, as attributes are not; None if it imports."""
    found: list[str] = []
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME" and not _is_library(step.argval):
            return None
        if step.opname in _LOADS:
            found.append(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            below = _global_names(constant)
            if below is None:
                return None
            found += below
    return tuple(dict.fromkeys(found))


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_users(cls: Any) -> bool:
    above = cls.__module__.partition(".")[0]
    return above not in sys.stdlib_module_names and not _is_library(above)


def _is_library(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] in _LIBRARIES
