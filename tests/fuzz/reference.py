"""What Sortal documents, over plain Python objects and NumPy; imports none of it.

The verbs walk the objects anew at each call, the transforms call their function then
and there: nothing is kept, copied into a trace or compiled. Only errors that the
programs provoke are known here, by the names of Sortal's classes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import numbers
import operator
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np


class ArgumentError(ValueError): ...


class AxisError(ValueError): ...


class FilterError(ValueError): ...


class GradientError(TypeError): ...


class LoopError(TypeError): ...


class MergeError(ValueError): ...


class OptimizerError(ValueError): ...


class PathError(KeyError): ...


class PathAttributeError(PathError, AttributeError): ...


class StructureError(ValueError): ...


class TraceError(ValueError): ...


class UpdateError(ValueError): ...


class VariableAttributeError(AttributeError): ...


class Left(BaseException):
    """The program left what this reference computes exactly."""


# ------------------------------------------------------------------ arrays
_LIMIT = 2.0**20
_SHORTER = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}


class Arr:
    """An immutable array; inside of ``grad`` also its derivatives by every input."""

    __slots__ = ("__weakref__", "dot", "val")
    __array_priority__ = 1000
    __array_ufunc__ = None
    __hash__ = None

    def __init__(self, val: Any, dot: Any = None):
        val = np.asarray(val)
        if val.dtype in _SHORTER:
            val = val.astype(_SHORTER[val.dtype])
        self.val = val
        self.dot = dot
        if val.size and val.dtype.kind == "f" and not np.abs(val).max() < _LIMIT:
            raise Left

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__slots__ and _traces.now is not None:
            raise Left  # some of JAX's tracers have attributes, others have not
        object.__setattr__(self, name, value)

    shape = property(lambda self: self.val.shape)
    dtype = property(lambda self: self.val.dtype)
    ndim = property(lambda self: self.val.ndim)

    def __add__(self, other: Any) -> Arr:
        a, b = self, lift(other)
        dot = _sum_dots(_spread(a.dot, a, b), _spread(b.dot, b, a))
        return Arr(a.val + b.val, dot)

    __radd__ = __add__

    def __neg__(self) -> Arr:
        return Arr(-self.val, None if self.dot is None else -self.dot)

    def __sub__(self, other: Any) -> Arr:
        return self + -lift(other)

    def __rsub__(self, other: Any) -> Arr:
        return lift(other) + -self

    def __mul__(self, other: Any) -> Arr:
        a, b = self, lift(other)
        first = None if a.dot is None else _spread(a.dot, a, b) * b.val
        second = None if b.dot is None else _spread(b.dot, b, a) * a.val
        return Arr(a.val * b.val, _sum_dots(first, second))

    __rmul__ = __mul__

    def sum(self) -> Arr:
        if self.dot is None:
            return Arr(self.val.sum())
        return Arr(self.val.sum(), self.dot.reshape(len(self.dot), -1).sum(1))

    def __getitem__(self, index: Any) -> Arr:
        if index is Ellipsis:
            return self
        if not isinstance(index, (int, slice, Arr)):
            raise TypeError
        return Arr(self.val[index], None if self.dot is None else self.dot[:, index])

    def __iter__(self) -> Iterator[Arr]:
        if not self.ndim:
            raise TypeError
        return (self[i] for i in range(len(self.val)))

    def __gt__(self, other: Any) -> Arr:
        return Arr(self.val > lift(other).val)

    def __lt__(self, other: Any) -> Arr:
        return Arr(self.val < lift(other).val)

    def __bool__(self) -> bool:
        return bool(self.val)

    def __int__(self) -> int:
        return int(self.val)

    def __float__(self) -> float:
        return float(self.val)

    def __index__(self) -> int:
        return int(self.val)

    def __copy__(self) -> Arr:
        return self

    def __deepcopy__(self, memo: Any) -> Arr:
        return self


class Key(Arr):
    """A typed key of random numbers, by the data that JAX keeps in it."""

    __slots__ = ()
    shape = property(lambda self: ())
    dtype = property(lambda self: "key<fry>")
    ndim = property(lambda self: 0)

    def __getitem__(self, index: Any) -> Key:
        if index is Ellipsis:
            return self
        raise IndexError

    def _refuse(self, *others: Any) -> Any:
        raise TypeError

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __neg__ = __gt__ = __lt__ = __bool__ = __float__ = __int__ = _refuse


def key(seed: int) -> Key:
    return Key(np.array([0, seed], np.uint32))


def is_key(x: Any) -> bool:
    return isinstance(x, Key)


def key_sum(x: Key) -> Arr:
    return Arr(np.float32(x.val.sum()))


def _spread(dot: Any, mine: Arr, other: Arr) -> Any:
    """Derivatives of ``mine`` in the shape that it has beside ``other``."""
    if dot is None or mine.val.shape == other.val.shape or other.val.ndim == 0:
        return dot
    shape = np.broadcast_shapes(mine.val.shape, other.val.shape)
    extra = len(shape) - mine.val.ndim
    dot = dot.reshape(len(dot), *[1] * extra, *mine.val.shape)
    return np.broadcast_to(dot, (len(dot), *shape))


def _sum_dots(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def lift(x: Any) -> Arr:
    """Any number or array as an Arr."""
    if isinstance(x, Arr):
        return x
    if isinstance(x, Variable):
        return lift(x.value)
    return Arr(np.asarray(x))


def stack(parts: list[Any]) -> Arr:
    """Equal arrays on top of one another."""
    parts = [lift(p) for p in parts]
    vals = np.stack([p.val for p in parts])
    if all(p.dot is None for p in parts):
        return Arr(vals)
    n = next(len(p.dot) for p in parts if p.dot is not None)
    zeros = np.zeros
    dots = [zeros((n, *p.shape)) if p.dot is None else p.dot for p in parts]
    return Arr(vals, np.stack(dots, axis=1))


def is_array(x: Any) -> bool:
    return isinstance(x, (Arr, np.ndarray))


# ----------------------------------------------------------------- objects
class _Traces(threading.local):
    def __init__(self) -> None:
        self.now: Any = None


_traces = _Traces()


class Marked:
    def __init__(self, role: str, value: Any):
        self.role, self.value = role, value


def data(value: Any = None, **field: Any) -> Any:
    return _declared("data", field) if field else Marked("data", value)


def static(value: Any = None, **field: Any) -> Any:
    return _declared("static", field) if field else Marked("static", value)


def _declared(role: str, field: Any) -> Any:
    return dataclasses.field(**field, metadata={"role": role})


def dataclass(cls: Any) -> Any:
    """A module of fields, some of which are declared data or static."""
    made = dataclasses.dataclass(eq=False, repr=False)(cls)
    fields = dataclasses.fields(made)
    made.DECLARED = {f.name: f.metadata["role"] for f in fields if "role" in f.metadata}
    return made


class Module:
    """An object whose attributes are its children."""

    __slots__ = ("__dict__", "__weakref__", "_roles", "_trace")
    DECLARED: ClassVar[dict[str, str]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        obj = object.__new__(cls)
        object.__setattr__(obj, "_roles", dict(cls.DECLARED))
        object.__setattr__(obj, "_trace", _traces.now)
        return obj

    def __setattr__(self, name: str, value: Any) -> None:
        _check_owner(self)
        roles = self._roles
        if type(value) is Marked:
            roles, value = {**roles, name: value.role}, value.value
        if roles.get(name) == "static" and _holds_data(value):
            raise StructureError
        object.__setattr__(self, "_roles", roles)
        object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        _check_owner(self)
        object.__delattr__(self, name)
        kept = {k: r for k, r in self._roles.items() if k != name}
        declared = self.DECLARED.get(name) if name in self._roles else None
        object.__setattr__(
            self, "_roles", kept | ({name: declared} if declared else {})
        )

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        for found in _statics_below(self, {}):
            memo[id(found)] = found
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        object.__setattr__(new, "_roles", dict(self._roles))
        return new

    def set_attributes(self, **attributes: Any) -> None:
        """What ``train`` and ``eval`` do."""
        every = [x for _, x in Walk(self).every if isinstance(x, Module)]
        modules = [x for x in every if not isinstance(x, (Rngs, RngStream))]
        for module in modules:
            for name, value in attributes.items():
                if hasattr(module, name) and getattr(module, name) is not value:
                    setattr(module, name, value)

    def train(self) -> None:
        self.set_attributes(deterministic=False, use_running_average=False)

    def eval(self) -> None:
        self.set_attributes(deterministic=True, use_running_average=True)


class List(Module):
    """A list that is a module; its items are attributes named by digits."""

    __slots__ = ()

    def __init__(self, items: Any = (), /):
        self.extend(items)

    def __len__(self) -> int:
        return next(i for i in itertools.count() if str(i) not in self.__dict__)

    def __iter__(self) -> Iterator[Any]:
        return (x for _, x in self._rows())

    def __getitem__(self, index: int) -> Any:
        return self._rows()[index][1]

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, slice):
            rows = self._rows()
            rows[index] = map(_row, value)
            self._refill(rows)
        else:  # as an attribute is set: a mark that was there stays
            setattr(self, str(range(len(self))[index]), value)

    def __delitem__(self, index: Any) -> None:
        rows = self._rows()
        del rows[index]
        self._refill(rows)

    def append(self, value: Any) -> None:
        setattr(self, str(len(self)), value)

    def extend(self, values: Any) -> None:
        for x in values:
            self.append(x)

    def insert(self, index: int, value: Any) -> None:
        rows = self._rows()
        rows.insert(index, _row(value))
        self._refill(rows)

    def reverse(self) -> None:
        self._refill(self._rows()[::-1])

    def clear(self) -> None:
        while len(self):
            self.pop()

    def pop(self, index: int = -1) -> Any:
        found = self[index]
        del self[index]
        return found

    def _rows(self) -> list[tuple[Any, Any]]:
        """Marks and items."""
        names = map(str, range(len(self)))
        return [(self._roles.get(n), self.__dict__[n]) for n in names]

    def _refill(self, rows: list[tuple[Any, Any]]) -> None:
        """All of it or nothing; what is no item stays."""
        if any(role == "static" and _holds_data(x) for role, x in rows):
            raise StructureError
        if len(self) or rows:
            _check_owner(self)
        for i in range(len(self)):
            delattr(self, str(i))
        for i, (role, x) in enumerate(rows):
            setattr(self, str(i), Marked(role, x) if role else x)


def _row(value: Any) -> tuple[Any, Any]:
    return (value.role, value.value) if isinstance(value, Marked) else (None, value)


class Dict(Module):
    """A dict that is a module; its items are its attributes."""

    __slots__ = ()

    def __init__(self, items: Any = (), /, **more: Any):
        self.update({**dict(items), **more})

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str):
            raise ArgumentError
        setattr(self, key, value)

    def __delitem__(self, key: str) -> None:
        if key not in self.__dict__:
            raise KeyError
        delattr(self, key)

    def update(self, items: Mapping[str, Any]) -> None:
        for key, value in items.items():
            self[key] = value

    def pop(self, key: str) -> Any:
        found = self[key]
        del self[key]
        return found

    def clear(self) -> None:
        for key in list(self):
            del self[key]


class FlaxModule(Module):
    """Stands for a module of Flax."""


class FlaxList(FlaxModule):
    """Stands for Flax's List, which keeps its last attribute when it gets shorter."""

    __slots__ = ()

    def __init__(self, items: Any = (), /):
        self._length = 0
        for x in items:
            self.append(x)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self.__dict__[str(range(len(self))[index])]

    def __setitem__(self, index: int, value: Any) -> None:
        setattr(self, str(range(len(self))[index]), value)

    def __delitem__(self, index: int) -> None:
        at, n = range(len(self))[index], len(self)
        delattr(self, str(at))
        for i in range(at + 1, n):
            setattr(self, str(i - 1), self.__dict__[str(i)])
        self._length = n - 1

    def append(self, value: Any) -> None:
        setattr(self, str(len(self)), value)
        self._length = len(self) + 1

    def insert(self, index: int, value: Any) -> None:
        for i in range(len(self), index, -1):
            setattr(self, str(i), self.__dict__[str(i - 1)])
        setattr(self, str(index), value)
        self._length = len(self) + 1


class FlaxDict(FlaxModule):
    """Stands for Flax's Dict."""

    __slots__ = ()
    __init__ = Dict.__init__
    __getitem__ = Dict.__getitem__
    __setitem__ = Dict.__setitem__
    __delitem__ = Dict.__delitem__
    update = Dict.update


LISTS = (List, FlaxList)


def _check_owner(obj: Any) -> None:
    if obj._trace is not _traces.now:
        raise TraceError


def _statics_below(obj: Any, seen: dict[int, Any]) -> Iterator[Any]:
    if is_array(obj) or isinstance(obj, Variable) or id(obj) in seen:
        return
    seen[id(obj)] = obj
    if is_node(obj):
        for _, child in children(obj):
            yield from _statics_below(child, seen)
    elif hashable(obj):
        yield obj


class Variable:
    """A box for one value."""

    __slots__ = ("__weakref__", "_meta", "_trace", "_value")

    def __init__(self, value: Any, **metadata: Any):
        put = object.__setattr__
        put(self, "_value", value)
        put(self, "_meta", metadata)
        put(self, "_trace", _traces.now)

    @property
    def value(self) -> Any:
        return self._value

    def get_value(self) -> Any:
        return self._value

    def set_value(self, value: Any) -> None:
        _check_owner(self)
        object.__setattr__(self, "_value", value)

    def get_metadata(self) -> dict[str, Any]:
        return dict(self._meta)

    def set_metadata(self, name: str, value: Any) -> None:
        _check_owner(self)
        object.__setattr__(self, "_meta", {**self._meta, name: value})

    def del_metadata(self, name: str) -> None:
        if name not in self._meta:
            raise VariableAttributeError
        _check_owner(self)
        kept = {k: v for k, v in self._meta.items() if k != name}
        object.__setattr__(self, "_meta", kept)

    def __getitem__(self, index: Any) -> Any:
        return lift(self._value)[index]

    def __iter__(self) -> Any:
        raise TypeError if is_array(self._value) else Left

    def __setitem__(self, index: Any, value: Any) -> None:
        if not is_array(self._value) or type(index) not in (str, int):
            raise Left
        raise TypeError if isinstance(index, str) else IndexError  # all are scalars

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "value":
            raise VariableAttributeError
        self.set_value(value)

    def __deepcopy__(self, memo: Any) -> Variable:
        return make(type(self), copy.deepcopy(self._value), self._meta)


def make(kind: type, value: Any, metadata: Mapping[str, Any]) -> Any:
    """A Variable that belongs to the current trace, its ``__init__`` not run."""
    new = object.__new__(kind)
    object.__setattr__(new, "_value", value)
    object.__setattr__(new, "_meta", dict(metadata))
    object.__setattr__(new, "_trace", _traces.now)
    return new


class Param(Variable):
    __slots__ = ()


class BatchStat(Variable):
    __slots__ = ()


class FlaxVariable(Variable):
    """Stands for a Variable of Flax."""

    __slots__ = ()


class FlaxParam(FlaxVariable):
    __slots__ = ()


class RngKey(Variable):
    __slots__ = ()


class RngCount(Variable):
    __slots__ = ()


class RngStream(Module):
    """Counts the keys that it gives out; what they are no program asks."""

    def __init__(self, seed: int, tag: str):
        self.tag = tag
        self.key = RngKey(key(seed), tag=tag)
        self.count = RngCount(Arr(np.uint32(0)), tag=tag)

    def __call__(self) -> None:
        _check_owner(self.count)
        if not isinstance(self.key._value, Key):
            raise TypeError
        count = lift(self.count._value)
        if count.shape or count.dtype != np.uint32:
            raise Left
        self.count.set_value(Arr(count.val + np.uint32(1)))


class Rngs(Module):
    """Streams by name; where there is none of a name, the one named default."""

    def __init__(self, default: int, **seeds: int):
        for name, seed in {**seeds, "default": default}.items():
            setattr(self, name, RngStream(seed, name))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "default" not in self.__dict__:
            raise AttributeError
        return self.__dict__["default"]


# Either library's kind is taken for the other's.
Variable.TWIN, FlaxVariable.TWIN = FlaxVariable, Variable
Param.TWIN, FlaxParam.TWIN = FlaxParam, Param
BatchStat.TWIN = RngKey.TWIN = RngCount.TWIN = None


# ----------------------------------------------------------------- statics
def static_key(value: Any) -> Any:
    """Equal where two statics mean the same; TypeError where there is no hash."""
    kind = type(value)
    if kind is float:
        return (kind, value.hex())
    if isinstance(value, tuple):
        return (kind, tuple(map(static_key, value)))
    if isinstance(value, frozenset):
        return (kind, frozenset(map(static_key, value)))
    if isinstance(value, (np.generic, complex)):
        return (kind, repr(value))
    hash(value)
    own = "__eq__" in vars(kind) and dataclasses.is_dataclass(kind)
    if own and "__dataclass_fields__" in vars(kind) and not hasattr(kind, "OWN"):
        fields = dataclasses.fields(value)
        return (kind, tuple(static_key(getattr(value, f.name)) for f in fields))
    return (kind, value)


def hashable(value: Any) -> bool:
    try:
        static_key(value)
    except TypeError:
        return False
    return True


_ATOMS = (str, int, float, bool, type(None), types.FunctionType, type)


def is_node(x: Any) -> bool:
    """Whether an object has children, rather than being a leaf or a static."""
    if type(x) in _ATOMS or is_array(x) or isinstance(x, (Variable, type)):
        return False
    if isinstance(x, (Module, list, dict, State)):
        return True
    if isinstance(x, types.MethodType):
        return is_node(x.__self__) or isinstance(x.__self__, Variable)
    if isinstance(x, functools.partial):
        inside = [child for _, child in children(x)]
        return any(map(_has_state, inside)) or _hides_state(x)
    if isinstance(x, tuple) or _is_frozen(x):
        inside = [child for _, child in children(x)]
        plain = not any(map(_has_state, inside))
        return not (plain and hashable(x))
    return dataclasses.is_dataclass(x)


def _holds_data(x: Any, above: tuple[Any, ...] = ()) -> bool:
    """Whether a value is an array, a Variable or a Module, or holds one."""
    if is_array(x) or isinstance(x, (Variable, Module)):
        return True
    if any(x is held for held in above):
        return False
    if isinstance(x, (set, frozenset)):
        return any(_holds_data(child, (*above, x)) for child in x)
    if not isinstance(x, functools.partial) and not is_node(x):
        return False
    return any(_holds_data(child, (*above, x)) for _, child in children(x))


def _is_frozen(x: Any) -> bool:
    return dataclasses.is_dataclass(x) and type(x).__dataclass_params__.frozen


def _has_state(x: Any) -> bool:
    return is_array(x) or isinstance(x, Variable) or is_node(x)


def order(key: Any) -> tuple[int, Any]:
    """Integers, then strings, then the rest."""
    if isinstance(key, int):
        return (0, key)
    if isinstance(key, str):
        return (1, key)
    return (2, f"{type(key).__name__}:{key!r}")


def path_order(path: Any) -> Any:
    return tuple(map(order, path))


def children(x: Any) -> list[tuple[Any, Any]]:
    """Keys and children, in the order in which leaves are numbered."""
    if isinstance(x, LISTS):
        items = [(int(k) if k.isdigit() else k, v) for k, v in x.__dict__.items()]
        return sorted(items, key=lambda item: order(item[0]))
    if isinstance(x, Module):
        return sorted(x.__dict__.items(), key=lambda item: item[0])
    if isinstance(x, dict):
        return [(k, x[k]) for k in sorted(x, key=order)]
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return [(k, getattr(x, k)) for k in sorted(x._fields)]
    if isinstance(x, (list, tuple)):
        return list(enumerate(x))
    if isinstance(x, State):
        return [(path, x.leaf(path)) for path in x.paths()]
    if isinstance(x, types.MethodType):
        return [("__self__", x.__self__)]
    if isinstance(x, functools.partial):
        args = [(("args", i), a) for i, a in enumerate(x.args)]
        named = [(("keywords", k), x.keywords[k]) for k in sorted(x.keywords)]
        return [*args, (("func",), x.func), *named]
    names = {f.name for f in dataclasses.fields(x) if hasattr(x, f.name)}
    return [(n, getattr(x, n)) for n in sorted(names | set(x.__dict__))]


def met(x: Any) -> tuple[Any, ...]:
    """Names and keys in the order in which code meets them."""
    if isinstance(x, functools.partial):
        return tuple(x.keywords)
    return tuple(x if isinstance(x, dict) else getattr(x, "__dict__", ()))


LEAF, STATIC, NODE, AGAIN = "leaf", "static", "node", "again"


@dataclasses.dataclass
class Leaf:
    """Where a leaf hangs; ``var`` is None for a raw array."""

    path: tuple[Any, ...]
    var: Any
    holder: Any
    key: Any

    @property
    def kind(self) -> type | None:
        return None if self.var is None else type(self.var)

    @property
    def value(self) -> Any:
        if self.var is not None:
            return self.var._value
        holder, key = self.holder, self.key
        if isinstance(holder, State):
            return holder.leaf(key)
        if isinstance(holder, (dict, list)) or _is_row(holder):
            return holder[key]
        if isinstance(holder, functools.partial):
            return dict(children(holder))[key]
        return holder if key is None else getattr(holder, str(key))

    def put(self, value: Any) -> None:
        """Writes past all checks; the holder must be writable."""
        if self.var is not None:
            object.__setattr__(self.var, "_value", value)
        elif isinstance(self.holder, (dict, list)):
            self.holder[self.key] = value
        elif isinstance(self.holder, State):
            self.holder.put(self.key, value)
        else:
            object.__setattr__(self.holder, str(self.key), value)

    @property
    def writable(self) -> bool:
        values = (tuple, functools.partial)
        return self.var is not None or not isinstance(self.holder, values)


def _is_row(x: Any) -> bool:
    return isinstance(x, tuple) and not hasattr(x, "_fields")


_VALUES = (tuple, types.MethodType, functools.partial)


class Walk:
    """One traversal: the leaves, all objects, and a template to build copies from."""

    def __init__(self, root: Any):
        self.leaves: list[Leaf] = []
        self.aliases: list[tuple[Any, int]] = []
        self.every: list[tuple[Any, Any]] = []  # path and object, children first
        self.nodes: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []
        self._bad = False
        self.template = self._visit(root, (), root, None, None)
        if self._bad:
            raise StructureError

    def _visit(self, x: Any, path: Any, holder: Any, key: Any, role: Any) -> Any:
        if role == "static":
            return self._static(x)
        if isinstance(x, Variable):
            found = self._numbers.get(id(x))
            if found is not None:
                self.aliases.append((path, found))
                return (LEAF, found)
            self._numbers[id(x)] = len(self.leaves)
            return self._leaf(Leaf(path, x, holder, key), x)
        if is_array(x):
            return self._leaf(Leaf(path, None, holder, key), x)
        plain = isinstance(x, (tuple, list, dict))
        if not is_node(x) and not (role and plain):
            # In what is marked data, numbers are leaves.
            called = isinstance(x, (types.MethodType, functools.partial))
            data = role == "data" and not called and not _is_frozen(x)
            if data or (role and isinstance(x, (numbers.Number, np.generic))):
                return self._leaf(Leaf(path, None, holder, key), x)
            return self._static(x)
        return self._node(x, path, "inside data" if role and plain else None)

    def _leaf(self, leaf: Leaf, x: Any) -> Any:
        self.leaves.append(leaf)
        self.every.append((leaf.path, x))
        return (LEAF, len(self.leaves) - 1)

    def _static(self, x: Any) -> Any:
        self._bad |= _hides_state(x) or isinstance(x, Marked) or not hashable(x)
        return (STATIC, x)

    def _node(self, x: Any, path: Any, role: Any) -> Any:
        value = isinstance(x, _VALUES)
        number = self._numbers.get(id(x))
        if number is not None and not value:
            return (AGAIN, number)
        if isinstance(x, (list, dict)) and getattr(x, "__dict__", None):
            self._bad = True
        number = len(self.nodes)
        self.nodes.append(x)
        if not value:
            self._numbers[id(x)] = number
        roles = x._roles if isinstance(x, Module) else {}
        parts = []
        for key, child in children(x):
            flat = isinstance(x, (State, functools.partial))
            below = (*path, *key) if flat else (*path, key)
            mine = roles.get(str(key), role) if roles else role
            parts.append((key, self._visit(child, below, x, key, mine)))
        self.every.append((path, x))
        if isinstance(x, Module):
            spec: Any = dict(roles)
        elif isinstance(x, dict):
            spec = getattr(x, "default_factory", None)
        else:
            spec = x.__func__ if isinstance(x, types.MethodType) else None
        return (NODE, type(x), number, spec, met(x), parts)

    def graphdef(self) -> GraphDef:
        schema = [(x.path, x.kind, _meta(x)) for x in self.leaves]
        return GraphDef(self.template, schema)


def _hides_state(x: Any) -> bool:
    """Whether a static holds what should be a node or leaf, directly or in tuples."""
    if isinstance(x, (tuple, frozenset)):
        return any(map(_hides_state, x))
    if isinstance(x, Variable):
        return True
    if isinstance(x, (type, types.FunctionType)):
        return False
    if isinstance(x, functools.partial):
        held = (x.func, *x.args, *x.keywords.values())
        return any(_hides_state(v) or _holds_object(v) for v in held)
    inside = getattr(x, "__dict__", {}).values()
    if any(map(_holds_object, inside)):
        return True
    return _is_frozen(x) and any(map(_hides_state, inside))


def _holds_object(x: Any, above: tuple[Any, ...] = ()) -> bool:
    """Whether a value is a Variable or Module, or a container with one in it."""
    if isinstance(x, (Variable, Module)):
        return True
    if any(x is held for held in above):
        return False
    inside = list(x) if isinstance(x, (set, frozenset)) else []
    if is_node(x) or isinstance(x, functools.partial):
        inside = [child for _, child in children(x)]
    return any(_holds_object(child, (*above, x)) for child in inside)


def _meta(leaf: Leaf) -> dict[str, Any]:
    return {} if leaf.var is None else dict(leaf.var._meta)


class GraphDef:
    """A template and what is to be filled into it."""

    def __init__(self, template: Any, schema: list[Any]):
        self.template, self.schema = template, schema

    def key(self) -> Any:
        """Equal for equal structures."""
        leaves = [(p, k, _meta_key(m)) for p, k, m in self.schema]
        return (_template_key(self.template), tuple(leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphDef) and self.key() == other.key()

    __hash__ = None

    def build(self, leaves: list[Any]) -> Any:
        return _build(self.template, leaves, {})


def _meta_key(meta: Mapping[str, Any]) -> Any:
    return frozenset((k, static_key(v)) for k, v in meta.items())


def _template_key(t: Any) -> Any:
    if t[0] == STATIC:
        return (STATIC, static_key(t[1]))
    if t[0] != NODE:
        return t
    spec = t[3]
    if isinstance(spec, dict):
        spec = tuple(sorted(spec.items()))
    parts = tuple((type(k), k, _template_key(child)) for k, child in t[5])
    return (*t[:3], spec, t[4], parts)


def _build(t: Any, leaves: list[Any], nodes: dict[int, Any]) -> Any:
    if t[0] == LEAF:
        return leaves[t[1]]
    if t[0] == STATIC:
        return t[1]
    if t[0] == AGAIN:
        return nodes[t[1]]
    _, cls, number, spec, order, parts = t
    if issubclass(cls, _VALUES):
        items = {k: _build(child, leaves, nodes) for k, child in parts}
        if issubclass(cls, types.MethodType):
            return types.MethodType(spec, items["__self__"])
        if issubclass(cls, functools.partial):
            args = [x for key, x in items.items() if key[0] == "args"]
            named = {key: items["keywords", key] for key in order}
            return cls(items["func",], *args, **named)
        return cls(**items) if hasattr(cls, "_fields") else cls(items.values())
    if issubclass(cls, State):
        new: Any = State()
    elif issubclass(cls, Module):
        new = cls.__new__(cls)
        object.__setattr__(new, "_roles", dict(spec))
    else:
        new = cls.__new__(cls)
    nodes[number] = new
    items = {k: _build(child, leaves, nodes) for k, child in parts}
    if isinstance(new, Module):
        named = {str(k): x for k, x in items.items()}
        new.__dict__.update((k, named[k]) for k in order)
    elif isinstance(new, list):
        new.extend(items.values())
    elif isinstance(new, dict):
        if spec is not None:
            new.default_factory = spec
        new.update((k, items[k]) for k in order)
    elif isinstance(new, State):
        new.items.update(items)
    else:
        for name in dict.fromkeys((*order, *items)):
            object.__setattr__(new, name, items[name])
    return new


# ------------------------------------------------------------------- State
class State:
    """Leaves by path; a view of a part has a parent and what its paths begin with."""

    __hash__ = None

    def __init__(self, mapping: Any = (), /):
        self.parent: Any = None
        self.prefix: Any = ()
        self.items: dict[Any, Any] = {}
        if mapping:
            self._fill(nested_items(mapping))

    @classmethod
    def of(cls, pairs: Any) -> State:
        new = cls()
        new._fill(pairs)
        return new

    def _fill(self, pairs: Any) -> None:
        found = sorted(pairs, key=lambda pair: path_order(pair[0]))
        paths = [path for path, _ in found]
        known = set(paths)
        if len(known) < len(paths):
            raise PathError
        if any(p[:n] in known for p in paths for n in range(1, len(p))):
            raise PathError
        self.items = dict(found)

    def paths(self) -> tuple[Any, ...]:
        if self.parent is None:
            return tuple(self.items)
        n, mine = len(self.prefix), self.prefix
        every = self.parent.paths()
        return tuple(p[n:] for p in every if p[:n] == mine and len(p) > n)

    def leaf(self, path: Any) -> Any:
        if self.parent is not None:
            return self.parent.leaf((*self.prefix, *path))
        return self.items[path]

    def whole(self) -> tuple[State, Any]:
        """The State that is no view, and what its paths to here begin with."""
        root, prefix = self, ()
        while root.parent is not None:
            root, prefix = root.parent, (*root.prefix, *prefix)
        return root, prefix

    def put(self, path: Any, leaf: Any) -> None:
        root, prefix = self.whole()
        root.items[(*prefix, *path)] = leaf

    def drop(self, path: Any) -> None:
        root, prefix = self.whole()
        del root.items[(*prefix, *path)]

    def __iter__(self) -> Iterator[Any]:
        return iter(dict.fromkeys(p[0] for p in self.paths() if p))

    def __getitem__(self, key: Any) -> Any:
        if (key,) in self.paths():
            return self.leaf((key,))
        if key not in list(self):
            raise PathError
        view = State()
        view.parent, view.prefix = self, (key,)
        return view

    def __setitem__(self, key: Any, leaf: Any) -> None:
        root, prefix = self.whole()
        gone = {(*prefix, *p) for p in self.paths() if p[:1] == (key,)}
        new = {(*prefix, *p): x for p, x in nested_items({key: leaf})}
        kept = {p: x for p, x in root.items.items() if p not in gone - new.keys()}
        for path, x in new.items():
            old = kept.get(path)
            if isinstance(old, Variable) and not isinstance(x, Variable):
                old.set_value(x)
            else:
                kept[path] = x
        root._fill(kept.items())

    def __delitem__(self, key: Any) -> None:
        if key not in list(self):
            raise PathError
        root, prefix = self.whole()
        prefix = (*prefix, key)
        n = len(prefix)
        root.items = {p: x for p, x in root.items.items() if p[:n] != prefix}

    def flat(self) -> list[tuple[Any, Any]]:
        return [(p, self.leaf(p)) for p in self.paths()]

    def map(self, f: Callable[[Any, Any], Any]) -> State:
        return State.of((p, _own_box(f(p, x))) for p, x in self.flat())

    def __or__(self, other: Any) -> State:
        return State.merge(self, other)

    def __sub__(self, other: Any) -> State:
        gone = set(as_state(other).paths())
        return State.of((p, _own_box(x)) for p, x in self.flat() if p not in gone)

    @staticmethod
    def merge(*states: Any) -> State:
        found: dict[Any, Any] = {}
        for s in states:
            found.update(as_state(s).flat())
        return State.of((p, _own_box(x)) for p, x in found.items())

    def filter(self, *filters: Any) -> Any:
        parts, _ = divide(self._rows(), filters)
        return _one_or_several(map(self._part, parts))

    def split(self, *filters: Any) -> Any:
        parts, rest = divide(self._rows(), filters)
        if rest:
            raise FilterError
        return _one_or_several(map(self._part, parts))

    def _rows(self) -> list[Any]:
        return [(p, x if isinstance(x, Variable) else None) for p, x in self.flat()]

    def _part(self, at: list[int]) -> State:
        flat = self.flat()
        return State.of((flat[i][0], _own_box(flat[i][1])) for i in at)

    def to_pure_dict(self) -> dict[Any, Any]:
        nested: dict[Any, Any] = {}
        for path, leaf in self.flat():
            if not path:
                raise PathError
            at = nested
            for key in path[:-1]:
                at = at.setdefault(key, {})
            at[path[-1]] = leaf._value if isinstance(leaf, Variable) else leaf
        return nested


def _own_box(x: Any) -> Any:
    if isinstance(x, Variable):
        return make(type(x), _own(x._value), x._meta)
    return _own(x)


def _one_or_several(states: Any) -> Any:
    states = tuple(states)
    return states[0] if len(states) == 1 else states


def nested_items(mapping: Any, prefix: Any = ()) -> Iterator[tuple[Any, Any]]:
    if isinstance(mapping, State):
        yield from (((*prefix, *p), _own_box(x)) for p, x in mapping.flat())
        return
    for key, value in mapping.items():
        if isinstance(value, (Mapping, State)):
            yield from nested_items(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def as_state(x: Any) -> State:
    if isinstance(x, State):
        return x
    if isinstance(x, Mapping):
        return State.of(nested_items(x))
    raise ArgumentError


# ----------------------------------------------------------------- filters
@dataclasses.dataclass(frozen=True)
class Not:
    of: Any


@dataclasses.dataclass(frozen=True)
class Under:
    prefix: str


@dataclasses.dataclass(frozen=True)
class All:
    parts: tuple[Any, ...]

    def __init__(self, *parts: Any):
        object.__setattr__(self, "parts", parts)


def read(f: Any) -> Any:
    """A literal as one of: True, False, class, str, Not, Under, All, tuple."""
    if f is Ellipsis or f is True:
        return True
    if f is None or f is False:
        return False
    if isinstance(f, (tuple, list)):
        return tuple(map(read, f))
    if isinstance(f, Not):
        return Not(read(f.of))
    if isinstance(f, All):
        return All(*map(read, f.parts))
    if isinstance(f, (type, str, Under)):
        return f
    raise FilterError


def takes(f: Any, path: Any, var: Any) -> bool:
    if isinstance(f, bool):
        return f
    if isinstance(f, type):
        return var is not None and any(issubclass(k, f) for k in _kinds(type(var)))
    if isinstance(f, str):
        return var is not None and var._meta.get("tag") == f
    if isinstance(f, tuple):
        return any(takes(part, path, var) for part in f)
    if isinstance(f, All):
        return all(takes(part, path, var) for part in f.parts)
    if isinstance(f, Not):
        return not takes(f.of, path, var)
    wanted = tuple(f.prefix.split("."))
    return tuple(map(str, path))[: len(wanted)] == wanted


def _kinds(kind: type) -> tuple[type, ...]:
    """A class, and the one of the other library that is paired with it."""
    twin = getattr(kind, "TWIN", None)
    return (kind,) if twin is None else (kind, twin)


def covers(a: Any, b: Any) -> bool:
    """Whether all that ``b`` can take is taken by ``a``, from the two alone."""
    if a is True:
        return True
    if isinstance(a, type) and isinstance(b, type):
        return any(issubclass(k, a) for k in _kinds(b))
    if isinstance(a, Not) and isinstance(b, Not):
        return covers(b.of, a.of)
    if isinstance(a, Under) and isinstance(b, Under):
        return f"{b.prefix}.".startswith(f"{a.prefix}.")
    if isinstance(a, tuple) and any(covers(part, b) for part in a):
        return True
    if isinstance(a, All) and a.parts and all(covers(part, b) for part in a.parts):
        return True
    if isinstance(b, tuple):
        return all(covers(a, part) for part in b)
    if isinstance(b, All):
        return any(covers(a, part) for part in b.parts)
    return type(a) is type(b) and a == b


def divide(rows: list[Any], literals: Any) -> tuple[list[list[int]], list[int]]:
    """Which row each filter takes first, and which rows none does."""
    filters = [read(f) for f in literals]
    last = len(filters) - 1
    for later, f in enumerate(filters):
        if covers(False, f):
            continue  # it asks for nothing
        for earlier in filters[:later]:
            rest = later == last and f is True and earlier is not True
            if covers(earlier, f) and not rest:
                raise FilterError
    sets = [{i for i, row in enumerate(rows) if takes(f, *row)} for f in filters]
    for later, mine in enumerate(sets):
        if any(mine and mine < before for before in sets[:later]):
            raise FilterError
    left = list(range(len(rows)))
    parts = []
    for mine in sets:
        parts.append([i for i in left if i in mine])
        left = [i for i in left if i not in mine]
    return parts, left


# ------------------------------------------------------------------- verbs
def _own(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def _snapshot(leaves: list[Leaf]) -> State:
    return State.of(
        (x.path, _own(x.value) if x.var is None else _boxed(x)) for x in leaves
    )


def _boxed(leaf: Leaf) -> Any:
    return make(leaf.kind, _own(leaf.value), leaf.var._meta)


def _divided(walk: Walk, filters: Any) -> Any:
    return divide([(x.path, x.var) for x in walk.leaves], filters)


def state(node: Any, *filters: Any) -> Any:
    walk = Walk(node)
    parts, _ = _divided(walk, filters or (...,))
    return _one_or_several(_snapshot([walk.leaves[i] for i in p]) for p in parts)


def split(node: Any, *filters: Any) -> tuple[Any, ...]:
    walk = Walk(node)
    parts, rest = _divided(walk, filters or (...,))
    if rest:
        raise FilterError
    states = [_snapshot([walk.leaves[i] for i in p]) for p in parts]
    return (walk.graphdef(), *states)


def graphdef(node: Any) -> GraphDef:
    return Walk(node).graphdef()


def same_kind(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or vars(a).get("TWIN") is b


def _match(schema: list[Any], states: list[State]) -> tuple[dict[int, Any], bool]:
    """The leaf given for each of a schema, and whether something does not fit."""
    index = {path: i for i, (path, _, _) in enumerate(schema)}
    found: dict[int, Any] = {}
    bad = False
    for s in states:
        for path, leaf in s.flat():
            at = index.get(path)
            kind = type(leaf) if isinstance(leaf, Variable) else None
            if at is None or at in found:
                bad = True
                continue
            bad |= kind is not None and not same_kind(kind, schema[at][1])
            found[at] = leaf
    return found, bad


def merge(definition: GraphDef, *states: Any) -> Any:
    found, bad = _match(definition.schema, [as_state(s) for s in states])
    if bad or len(found) < len(definition.schema):
        raise MergeError
    leaves = []
    for i, (_, kind, meta) in enumerate(definition.schema):
        leaf = found[i]
        if isinstance(leaf, Variable):
            value, meta = leaf._value, leaf._meta
        else:
            value = leaf
        value = _own(value)
        leaves.append(value if kind is None else make(kind, value, meta))
    return definition.build(leaves)


def _form(value: Any) -> Any:
    if is_array(value) or isinstance(value, np.generic):
        return (value.shape, value.dtype)
    return ((), np.dtype(np.float32 if isinstance(value, float) else np.int32))


def update(node: Any, *states: Any, strict: bool = True) -> None:
    walk = Walk(node)
    given = [as_state(s) for s in states]
    schema = [(x.path, x.kind, None) for x in walk.leaves]
    found, bad = _match(schema, given)
    new = []
    for i, leaf in found.items():
        value = _own(leaf._value if isinstance(leaf, Variable) else leaf)
        at = walk.leaves[i]
        bad |= strict and _form(value) != _form(at.value)
        bad |= not at.writable
        # What is no array would be a static at the next walk.
        number = not is_array(value) and type(value) is not type(at.value)
        bad |= at.var is None and number
        new.append((at, value))
    if bad:
        raise UpdateError
    for at, _ in new:
        if at.var is not None:
            _check_owner(at.var)
    for at, value in new:
        at.put(value)


def pop(node: Any, *filters: Any) -> Any:
    if not filters:
        raise FilterError
    walk = Walk(node)
    parts, _ = _divided(walk, filters)
    taken = _one_or_several(_snapshot([walk.leaves[i] for i in p]) for p in parts)
    gone = {i for p in parts for i in p}
    removals = []
    for holder in walk.nodes:
        for key, child in children(holder):
            if _is_gone(walk, gone, holder, key, child):
                item = isinstance(holder, LISTS) and isinstance(key, int)
                if item or not isinstance(holder, (Module, dict, State)):
                    raise StructureError
                removals.append((holder, key))
    for i in gone:
        if walk.leaves[i].var is not None:
            _check_owner(walk.leaves[i].var)
    for holder, key in removals:
        if isinstance(holder, Module):
            delattr(holder, key)
        elif isinstance(holder, State):
            with contextlib.suppress(KeyError):  # a part of it has lost it already
                holder.drop(key)
        else:
            del holder[key]
    return taken


def _is_gone(walk: Walk, gone: set[int], holder: Any, key: Any, child: Any) -> bool:
    roles = holder._roles if isinstance(holder, Module) else {}
    for i in gone:
        leaf = walk.leaves[i]
        if leaf.var is not None:
            if leaf.var is child and roles.get(str(key)) != "static":
                return True
        elif leaf.holder is holder and leaf.key == key:
            return True
    return False


def clone(node: Any, variables: bool = True) -> Any:
    walk = Walk(node)
    if variables:
        leaves = [_own(x.value) if x.var is None else _boxed(x) for x in walk.leaves]
    else:
        leaves = [x.value if x.var is None else x.var for x in walk.leaves]
    return walk.graphdef().build(leaves)


def mapped(node: Any) -> Any:
    """``jax.tree.map`` of the identity."""
    walk = Walk(node)
    leaves = [x.value for x in walk.leaves]
    leaves = [
        v if x.var is None else make(x.kind, v, x.var._meta)
        for x, v in zip(walk.leaves, leaves, strict=True)
    ]
    return walk.graphdef().build(leaves)


def variables(node: Any, *filters: Any) -> Any:
    walk = Walk(node)
    parts, _ = _divided(walk, filters or (...,))
    live = [x.value if x.var is None else x.var for x in walk.leaves]
    return _one_or_several(
        State.of((walk.leaves[i].path, live[i]) for i in p) for p in parts
    )


def iter_graph(node: Any) -> list[Any]:
    return Walk(node).every


class Optimizer(Module):
    """Gradient descent with momentum."""

    def __init__(self, model: Any, rates: tuple[float, float], *, wrt: Any):
        leaves = self._chosen(model, wrt)
        if not leaves:
            raise OptimizerError
        self.rates, self.wrt = rates, wrt
        self.form = tuple((x.path, *_form(x.value)) for x in leaves)
        self.step = Variable(Arr(np.uint32(0)))
        self.moments = [Variable(Arr(np.zeros(x.value.shape))) for x in leaves]

    def _chosen(self, model: Any, wrt: Any) -> list[Leaf]:
        walk = Walk(model)
        parts, _ = _divided(walk, (wrt,))
        leaves = [walk.leaves[i] for i in parts[0]]
        if any(not is_array(x.value) or is_key(x.value) for x in leaves):
            raise OptimizerError
        return leaves

    def update(self, model: Any, grads: State) -> None:
        leaves = self._chosen(model, self.wrt)
        given = dict(grads.flat())
        form = tuple((x.path, *_form(x.value)) for x in leaves)
        if form != self.form or list(given) != [x.path for x in leaves]:
            raise OptimizerError
        for owner in (self.step, *(x.var for x in leaves)):
            _check_owner(owner)
        rate, decay = self.rates
        for leaf, moment in zip(leaves, self.moments, strict=True):
            gradient = lift(given[leaf.path]) + lift(moment._value) * decay
            moment.set_value(gradient)
            leaf.put(lift(leaf.value) - gradient * rate)
        self.step.set_value(Arr(lift(self.step._value).val + np.uint32(1)))


# -------------------------------------------------------------- transforms
def _roots(tree: Any) -> list[Any]:
    """The objects among arguments or outputs, as transforms carry them."""
    if isinstance(tree, (Module, Variable)):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [r for x in tree for r in _roots(x)]
    if isinstance(tree, dict):
        return [r for x in tree.values() for r in _roots(x)]
    return []


def _restorer(walk: Walk) -> Callable[[], None]:
    """Puts all that a walk met back to what it is now."""
    put = object.__setattr__
    undo: list[Callable[[], None]] = []
    for leaf in walk.leaves:
        if leaf.var is not None:
            v, value, meta = leaf.var, leaf.var._value, leaf.var._meta
            undo.append(lambda v=v, x=value, m=meta: _reset(v, x, m))
    for x in walk.nodes:
        if isinstance(x, Module):
            undo.append(
                lambda x=x, c=x.__class__, d=dict(x.__dict__), r=x._roles: (
                    x.__dict__.clear(),
                    x.__dict__.update(d),
                    put(x, "_roles", r),
                    put(x, "__class__", c),
                )
            )
        elif isinstance(x, list):
            undo.append(lambda x=x, d=list(x): x.__setitem__(slice(None), d))
        elif isinstance(x, (dict, functools.partial)):
            held = x if isinstance(x, dict) else x.keywords
            undo.append(lambda x=held, d=dict(held): (x.clear(), x.update(d)))
        elif isinstance(x, State):
            whole = x.whole()[0]
            undo.append(lambda x=whole, d=dict(whole.items): put(x, "items", d))
        elif dataclasses.is_dataclass(x):
            undo.append(
                lambda x=x, d=dict(x.__dict__): (
                    x.__dict__.clear(),
                    x.__dict__.update(d),
                )
            )
    return lambda: [f() for f in undo]


def _reset(variable: Variable, value: Any, metadata: Any) -> None:
    object.__setattr__(variable, "_value", value)
    object.__setattr__(variable, "_meta", metadata)


@contextlib.contextmanager
def _inside(tree: Any, *, compiled: bool = True) -> Iterator[Any]:
    """A trace that the objects in ``tree`` were passed to; undone by an error.

    Every value is another array in it, so that a write shows by identity.
    """
    roots = tuple(_roots(tree))
    walk = Walk(roots)
    restore = _restorer(walk)
    outer, token = _traces.now, object()
    owners = [x.var for x in walk.leaves if x.var is not None]
    owners += [x for x in walk.nodes if isinstance(x, Module)]
    for x in owners:
        if x._trace is not outer:
            raise TraceError
    before = [(x, x.value) for x in walk.leaves]
    entered = []
    taken = (Arr, np.ndarray, np.generic)
    # None is an empty tree to JAX.
    inside = [(x, v) for x, v in before if x.writable and v is not None]
    numbered = (*taken, numbers.Number)
    if compiled and not all(isinstance(v, numbered) for _, v in inside):
        raise ArgumentError
    for leaf, value in inside:
        if not compiled and not isinstance(value, taken):
            continue  # a gradient only closes over it
        inner = lift(value)
        inner = type(inner)(inner.val, inner.dot)
        leaf.put(inner)
        entered.append((leaf, value, inner))
    for x in owners:
        object.__setattr__(x, "_trace", token)
    _traces.now = token
    try:
        yield walk
    except BaseException:
        _traces.now = outer
        restore()
        for x in owners:
            object.__setattr__(x, "_trace", outer)
        raise
    _traces.now = outer
    kept = {id(inner): value for _, value, inner in entered}
    # What was taken out of the arguments has been edited as well.
    every = [x for _, x in walk.every if isinstance(x, (Variable, Module, list, dict))]
    _come_out((*roots, *every), owners, kept, outer, compiled)


def _come_out(
    roots: Any, owners: list[Any], kept: dict[int, Any], outer: Any, compiled: bool
) -> None:
    """What was only read has its own value again.

    Numbers that a compiled function writes are arrays afterwards.
    """
    objects = [*owners]
    for root in roots:
        objects += _reachable(root)
    for x in objects:
        if isinstance(x, (Variable, Module)):
            object.__setattr__(x, "_trace", outer)
    for leaf in Walk(roots).leaves:
        if not leaf.writable:
            continue
        value = leaf.value
        if id(value) in kept:
            leaf.put(kept[id(value)])
        elif compiled and value is not None and not is_array(value):
            leaf.put(lift(value))


def _reachable(root: Any) -> list[Any]:
    return [x for _, x in Walk(root).every]


def _released(out: Any, outer: Any) -> Any:
    """What a call returns belongs to the trace outside; containers are new."""
    out = _rebuilt(out)
    for root in _roots(out):
        for x in _reachable(root):
            if isinstance(x, (Variable, Module)):
                object.__setattr__(x, "_trace", outer)
    return out


def _rebuilt(out: Any) -> Any:
    if isinstance(out, tuple) and hasattr(out, "_fields"):
        return type(out)(*map(_rebuilt, out))
    if isinstance(out, (list, tuple)):
        return type(out)(map(_rebuilt, out))
    if isinstance(out, dict):
        return type(out)((k, _rebuilt(v)) for k, v in out.items())
    return lift(out) if isinstance(out, (int, float)) else out


def _call(f: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    f, first = _unbound(f)
    args = (*first, *args)
    with _inside((args, kwargs)):
        out = f(*args, **kwargs)
        Walk(tuple(_roots((args, kwargs, out))))
    return _released(out, _traces.now)


def _unbound(f: Any) -> tuple[Any, tuple[Any, ...]]:
    if isinstance(f, types.MethodType) and isinstance(f.__self__, Module):
        return f.__func__, (f.__self__,)
    if isinstance(f, Module):
        return type(f).__call__, (f,)
    if isinstance(f, functools.partial):
        inner, first = _unbound(f.func)
        if f.keywords:
            inner = functools.partial(inner, **f.keywords)
        return inner, (*first, *f.args)
    return f, ()


def jit(f: Any) -> Any:
    return lambda *args, **kwargs: _call(f, args, kwargs)


def remat(f: Any) -> Any:
    return lambda *args, **kwargs: _call(f, args, kwargs)


def _has_dots(x: Any) -> bool:
    return isinstance(x, Arr) and x.dot is not None


def _arrays(tree: Any) -> list[Arr]:
    if isinstance(tree, (list, tuple)):
        return [a for x in tree for a in _arrays(x)]
    return [tree] if isinstance(tree, Arr) else []


class _Undone(Exception):  # noqa: N818 - no error: ends a trial
    """Has what a branch did taken back."""


@contextlib.contextmanager
def _steady(tree: Any) -> Iterator[None]:
    """A branch or step, which may write values and nothing else."""
    roots = tuple(_roots(tree))
    before = _outline(roots)
    yield
    after = _outline(roots)
    same = len(before[1]) == len(after[1])
    if not same or not all(map(operator.is_, before[1], after[1])):
        raise LoopError
    if before[0] != after[0] or before[2] != after[2]:
        raise LoopError
    # Arrays in a tuple change with the tuple, which is no value that can be written.
    if not all(map(operator.is_, before[3], after[3])):
        raise LoopError


@contextlib.contextmanager
def _step(tree: Any) -> Iterator[None]:
    """A step of NNX's loops, which may also put new objects in the place of others.

    What it moves, or writes to before it replaces it, would be lost.
    """
    roots = tuple(_roots(tree))
    before = _outline(roots)
    contents = list(map(_content, before[1]))
    yield
    after = _outline(roots)
    if before[0] != after[0] or before[2] != after[2]:
        raise LoopError
    given, now = set(map(id, before[1])), set(map(id, after[1]))
    for old, new in zip(before[1], after[1], strict=True):
        if old is not new and id(new) in given:
            raise LoopError
    for x, content in zip(before[1], contents, strict=True):
        if id(x) not in now and not all(map(operator.is_, content, _content(x))):
            raise LoopError


def _content(x: Any) -> list[Any]:
    return [x._value] if isinstance(x, Variable) else [v for _, v in children(x)]


def _trace(f: Any, args: Any, checked: Any = _steady) -> None:
    """Runs what JAX would trace only, for its errors; what it writes is taken back."""
    f, first = _unbound(f)
    with contextlib.suppress(_Undone), _inside((first, args)):
        with checked((first, args)):
            f(*first, *args)
        raise _Undone


def _outline(roots: Any) -> tuple[Any, list[Any], list[Any], list[Any]]:
    """The structure, the objects in it, the forms of values, and arrays in tuples."""
    walk = Walk(roots)
    kinds = (Variable, Module, list, dict, State)
    every = [x for _, x in walk.every]
    objects = [x for x in every if isinstance(x, kinds) or dataclasses.is_dataclass(x)]
    values = [x.value for x in walk.leaves]
    numbers_ = (Arr, np.ndarray, np.generic, numbers.Number)
    forms = [_form(x) if isinstance(x, numbers_) else None for x in values]
    raw = [x for x in walk.leaves if x.var is None]
    fixed = [x.value for x in raw if isinstance(x.holder, _VALUES)]
    return walk.graphdef(), objects, forms, fixed


def cond(pred: Any, true_fun: Any, false_fun: Any, *operands: Any) -> Any:
    return _choice((true_fun, false_fun), 0 if bool(lift(pred).val) else 1, operands)


def switch(index: Any, branches: Any, *operands: Any) -> Any:
    at = min(max(int(lift(index).val), 0), len(branches) - 1)
    return _choice(branches, at, operands)


def _choice(branches: Any, at: int, operands: Any) -> Any:
    for branch in branches:
        _trace(branch, operands)
    return _call(branches[at], operands, {})


def fori_loop(lower: int, upper: int, body: Any, init: Any) -> Any:
    with _inside(init):
        value = init
        for i in range(lower, upper):
            with _step(init):
                value = body(Arr(np.int32(i)), value)
    return _released(value, _traces.now)


def while_loop(condition: Any, body: Any, init: Any) -> Any:
    _trace(body, (init,), _step)
    every = [x.value for x in Walk(tuple(_roots(init))).leaves]
    if any(map(_has_dots, (*every, *_arrays(init)))):
        raise Left  # JAX refuses it where the derivative is asked for
    with _inside(init):
        value = init
        if not bool(lift(condition(value)).val):
            raise Left  # what a step would replace is new even so, as in Flax
        while bool(lift(condition(value)).val):
            value = body(value)
    return _released(value, _traces.now)


def scan(f: Any, *, length: int) -> Any:
    """``f(carry, x) -> (carry, y)``, with modules in the carry."""

    def wrapper(carry: Any, xs: Any) -> Any:
        with _inside(carry):
            ys = []
            for i in range(length):
                leaves = Walk(tuple(_roots(carry))).leaves
                keys = [x.var for x in leaves if x.kind and is_key(x.value)]
                arrays = [x for x in leaves if x.kind and isinstance(x.value, Arr)]
                shapes = [x.value.val.shape for x in arrays]
                carry, y = f(carry, xs[i])
                if not all(is_key(x._value) for x in keys):
                    raise LoopError
                if [np.shape(lift(x.value).val) for x in arrays] != shapes:
                    raise LoopError
                ys.append(y)
        return _released(carry, _traces.now), stack(ys)

    return wrapper


def vmap(f: Any, in_axes: Any) -> Any:
    """A module of axis None or 0, and an array of axis 0."""

    def wrapper(m: Any, xs: Any) -> Any:
        if in_axes[0] is None:
            if any(isinstance(x.value, str) for x in Walk(m).leaves):
                raise Left  # JAX looks at no value that is not mapped
            with _inside(m):
                ys = [f(m, xs[i]) for i in range(len(xs.val))]
            return stack(ys)
        return _lanes(f, m, xs)

    return wrapper


def _lanes(f: Any, m: Any, xs: Any) -> Any:
    n = len(xs.val)
    with _inside(m):
        walk = Walk(m)
        whole = [lift(x.value) for x in walk.leaves]
        copies = [m, *(mapped(m) for _ in range(n - 1))]
        ys, ends, begun = [], [], [[w[i] for w in whole] for i in range(n)]
        for i, c in enumerate(copies):
            inner = Walk(c)
            for leaf, value in zip(inner.leaves, begun[i], strict=True):
                leaf.put(value)
            ys.append(f(c, xs[i]))
            ends.append(Walk(c))
        # What no lane wrote is as it was, to the object.
        kept = {id(x): w for x, w in zip(begun[0], whole, strict=True)}
        for k, leaf in enumerate(ends[0].leaves):
            values = [end.leaves[k].value for end in ends]
            own = id(values[0])
            leaf.put(kept[own] if own in kept else stack(values))
    return stack(ys)


def grad(f: Any, wrt: Any = Param) -> Any:
    return lambda *args: value_and_grad(f, wrt)(*args)[1]


def value_and_grad(f: Any, wrt: Any = Param) -> Any:
    """By the leaves of the first argument that ``wrt`` takes."""

    def wrapper(m: Any, *args: Any) -> Any:
        if not isinstance(m, (Module, Variable)):
            return _of_array(f, m, args)
        with _inside((m, args), compiled=False):
            walk = Walk(m)
            parts, _ = _divided(walk, (wrt,))
            chosen = [walk.leaves[i] for i in parts[0]]
            if not chosen:
                raise FilterError
            if any(_has_dots(x.value) for x in walk.leaves):
                raise Left  # a derivative of a derivative
            sizes = [lift(x.value).val.size for x in chosen]
            form = [
                (x.path, x.kind, dict(_meta(x)), lift(x.value).shape) for x in chosen
            ]
            begun = [_with_dots(x, sizes, k) for k, x in enumerate(chosen)]
            value = lift(f(m, *args))
            after = Walk(tuple(_roots((m, args))))
            for leaf in after.leaves:
                if isinstance(leaf.value, Arr) and leaf.writable:
                    old = begun_of(begun, leaf.value)
                    if old is not None:
                        leaf.put(old)
                    elif _has_dots(leaf.value):
                        leaf.put(Arr(leaf.value.val))
        return Arr(value.val), State.of(_gradients(form, sizes, value))

    return wrapper


def begun_of(begun: list[Any], value: Arr) -> Any:
    """The array that one with derivatives took the place of, if it was not written."""
    return next((old for old, new in begun if new is value), None)


def _with_dots(leaf: Leaf, sizes: list[int], k: int) -> tuple[Any, Arr]:
    old = leaf.value
    val, start = lift(old).val, sum(sizes[:k])
    dot = np.zeros((sum(sizes), val.size), np.float32)
    dot[start : start + sizes[k]] = np.eye(sizes[k])
    new = Arr(val, dot.reshape(sum(sizes), *val.shape))
    leaf.put(new)
    return old, new


def _gradients(form: list[Any], sizes: list[int], value: Arr) -> Iterator[Any]:
    start = 0
    for (path, kind, meta, shape), size in zip(form, sizes, strict=True):
        dot = np.zeros(size) if value.dot is None else value.dot[start : start + size]
        result = Arr(dot.reshape(shape).astype(np.float32))
        yield path, result if kind is None else make(kind, result, meta)
        start += size


def _of_array(f: Any, x: Any, args: Any) -> Any:
    raise Left


# ------------------------------------------------------- as programs see it
slots = True
modules = (Module,)
kinds = (Variable,)


def attributes(x: Any) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in x.__dict__.items() if k != "_length"]


def metadata(variable: Any) -> dict[str, Any]:
    return variable._meta


def to_numpy(x: Any) -> np.ndarray:
    return x.val if isinstance(x, Arr) else np.asarray(x)


def state_items(s: State) -> list[tuple[Any, Any]]:
    return s.flat()


def behind_view(s: State) -> list[Any]:
    return []


def array(tracked: list[Any]) -> Any:
    """A function that makes a new array and notes it."""

    def arr(value: Any) -> Arr:
        made = Arr(np.asarray(value, np.float32))
        tracked.append(weakref.ref(made))
        return made

    return arr


names = types.SimpleNamespace(
    **{
        name: globals()[name]
        for name in (
            "state split merge update pop clone variables graphdef data static State "
            "List Dict Rngs Optimizer Not Under All jit grad value_and_grad cond "
            "switch fori_loop while_loop remat mapped iter_graph scan vmap"
        ).split()
    }
)
