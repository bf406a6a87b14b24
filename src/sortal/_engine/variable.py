"""Variables: mutable boxes for values. The class, called the kind, gives the role."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import jax
import numpy as np

from sortal._engine import paths
from sortal._engine.annotations import HOOKS, VariableMetadata, normalised, refuse_hooks
from sortal._engine.foreign import handler_of_kind, note_class
from sortal._engine.jax_compat import current_trace, register_pytree
from sortal._engine.operators import ArrayOperators, plain, with_item
from sortal._engine.printing import STATISTICS, text
from sortal._engine.stale import READING, is_gone, refuse_gone
from sortal._engine.statics import EMPTY, Metadata, edits, is_hashable
from sortal.errors import (
    TraceError,
    UpdateError,
    VariableAttributeError,
    VariableError,
)
from sortal.sharding.mesh_axes import placed

A = TypeVar("A")
_MISSING: Any = object()
_handler: Callable[[type], Any] = handler_of_kind  # for kinds that have a handler
_OPTIONS = frozenset(
    ("axis", "checkpoint", "donate", "optimizer", "reduce", "spec", "trainable")
)


class Variable(ArrayOperators, Generic[A]):
    """A mutable box for one value, whose class is the value's kind.

    A new kind is one line, ``class BatchStat(Variable): pass``. Class keywords are the
    kind's defaults in the pipelines: ``class BatchStat(Variable, axis=0): pass``.

    Args:
      value: an array of any shape and dtype, or a small pytree of arrays. Kept as it
        is: nothing is converted or copied.
      **metadata: hashable values kept with it, part of the structure. Where
        ``out_sharding`` names its axes and there is a mesh, the value is put there.

    Raises:
      VariableError: the value is itself a Variable or a ``jax.Ref``, or metadata
        cannot be hashed or is a hook.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> class Count(nnx.Variable): pass
      >>> count = Count(jnp.array(0), unit="steps")
      >>> count[...] = count + 1
      >>> int(count.value), count.get_metadata("unit")
      (1, 'steps')
    """

    # The value lives in a list of one item, which is never replaced by another list.
    # So the engine can keep these cells, and read and write them without a call each.
    __slots__ = ("__weakref__", "_cell", "_metadata", "_trace")

    options: ClassVar[Mapping[str, Any]] = types.MappingProxyType({})
    _own_options: ClassVar[Mapping[str, Any]] = options
    # Makes NumPy's operators defer to Variable's, as they do to JAX's arrays.
    __array_priority__ = 100

    def __init__(self, value: A, **metadata: Any):
        if is_variable(value):
            raise VariableError(
                f"{type(self).__name__}(...) was given a {type(value).__name__}; a "
                "Variable holds a plain value. Write "
                f"{type(self).__name__}(variable.value), or share the Variable itself."
            )
        while isinstance(value, VariableMetadata):
            metadata.update(value.metadata)
            value = value.raw_value
        if type(value) is jax.Ref:
            _refuse_ref(type(self))
        frozen = _frozen(type(self), metadata) if metadata else EMPTY
        _set_first_value(self, placed(value, frozen) if metadata else value)
        _init_metadata(self, frozen)
        _init_trace(self, current_trace())

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__()
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise VariableError(
                f"class {cls.__name__}: unknown kind option {', '.join(unknown)}. "
                f"The options are {', '.join(sorted(_OPTIONS))}."
            )
        refuse_hooks(f"class {cls.__name__}", [n for n in HOOKS if n in vars(cls)])
        if "get_value" in vars(cls):
            _read_by_method(cls)
        if "set_value" in vars(cls):
            _write_by_method(cls)
        cls._own_options = options
        merged: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            merged.update(vars(base).get("_own_options", {}))
        cls.options = types.MappingProxyType(merged)
        _register(cls)
        note_class(cls)

    # ------------------------------------------------------------- value
    @property
    def value(self) -> A:
        """The value held."""
        return self._cell[0]

    _value = value

    @value.setter
    def value(self, value: A) -> None:
        self.set_value(value)

    def get_value(self, *, index: Any = _MISSING) -> Any:
        """Returns the value, or a part of it.

        Args:
          index: what to pick, as in ``value[index]``; the whole if absent.

        Returns:
          The value or the part.
        """
        return self._value if index is _MISSING else _item(self._value, index)

    def set_value(self, value: Any, *, index: Any = _MISSING) -> None:
        """Replaces the value, or a part of it.

        Args:
          value: the new value; for a part, anything that ``.at[index].set`` takes.
          index: the part to replace; the whole if absent.

        Raises:
          TraceError: this Variable belongs to another trace than the current one.
          VariableError: the new value is a Variable where a whole value is expected.
        """
        if index is not _MISSING:
            value = with_item(self._value, index, value)
        if is_variable(value):
            raise VariableError(
                f"the value of a {type(self).__name__} cannot be a "
                f"{type(value).__name__}. Write variable.value = other.value."
            )
        self._check_writable()
        write(self, value)

    @property
    def _place(self) -> tuple[Any, paths.Path, str]:
        return self, (), type(self).__name__

    def _check_writable(self) -> None:
        if self._trace is not current_trace():
            raise foreign_write([self._place])

    def __getitem__(self, index: Any) -> Any:
        try:
            return _item(self._value, index)
        except READING as e:
            refuse_gone([self], e)
            raise

    def __setitem__(self, index: Any, new: Any) -> None:
        self._check_writable()
        try:
            value = with_item(self._value, index, new)
        except ValueError as error:
            _refuse_shape(self, index, new, error)
            raise
        write(self, value)

    def replace(self, value: Any = _MISSING, **metadata: Any) -> Variable[Any]:
        """A new Variable of the same kind with another value or more metadata.

        Args:
          value: the new value; the same one if absent.
          **metadata: entries to add or override.

        Returns:
          The new Variable; this one is left alone.
        """
        merged = {**self._metadata, **metadata} if metadata else self._metadata
        new = self._value if value is _MISSING else plain(value)
        return make(type(self), new, _frozen(type(self), merged))

    copy = replace

    # ---------------------------------------------------------- metadata
    def get_metadata(self, name: str | None = None, default: Any = _MISSING) -> Any:
        """Returns one entry of the metadata, or all of it as a new dict.

        Args:
          name: the entry; all if absent.
          default: what to return where the entry is not there.

        Returns:
          The entry's value, or the dict.

        Raises:
          VariableAttributeError: no such entry, and no default.
          VariableError: a default, but no name.
        """
        if name is None:
            if default is not _MISSING:
                raise VariableError(
                    "get_metadata(default=...) without a name returns all entries, and "
                    "never the default. Pass the name."
                )
            return dict(self._metadata)
        if name in self._metadata:
            return self._metadata[name]
        if default is _MISSING:
            raise VariableAttributeError(
                f"{type(self).__name__} has no metadata {name!r}; it has "
                f"{sorted(self._metadata)}. Pass default= to allow for that."
            )
        return default

    def set_metadata(self, *args: Any, **metadata: Any) -> None:
        """Adds or overrides metadata: ``set_metadata(name, value)`` or by keyword.

        One positional argument, a dict, replaces the metadata whole.

        Args:
          *args: a dict, or a name and a value.
          **metadata: entries by keyword.

        Raises:
          TraceError: this Variable belongs to another trace than the current one.
          VariableError: the arguments have another form, or cannot be hashed.
        """
        self._check_writable()
        match args:
            case () if metadata:
                merged = {**self._metadata, **metadata}
            case (dict() as whole,) if not metadata:
                merged = whole
            case (str() as name, value) if not metadata:
                merged = {**self._metadata, name: value}
            case _:
                raise VariableError(
                    "set_metadata takes a dict, or a name and a value, or keywords; "
                    f"found {len(args)} positional and {len(metadata)} keyword ones."
                )
        _init_metadata(self, _frozen(type(self), merged))
        edits.note()

    def has_metadata(self, name: str) -> bool:
        """Whether the metadata has an entry ``name``.

        Args:
          name: the entry.

        Returns:
          True where it has.
        """
        return name in self._metadata

    def del_metadata(self, name: str) -> None:
        """Removes one entry of the metadata.

        Args:
          name: the entry.

        Raises:
          VariableAttributeError: no such entry.
        """
        self.get_metadata(name)
        self.set_metadata({k: v for k, v in self._metadata.items() if k != name})

    # -------------------------------------------------------- attributes
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        value = object.__getattribute__(self, "_cell")[0]
        metadata = object.__getattribute__(self, "_metadata")
        # The value comes first: metadata named `T` must not shadow transposition.
        found = getattr(value, name, _MISSING)
        if found is not _MISSING:
            if callable(found) and is_gone(value) and name != "is_deleted":
                refuse_gone([self])
            return found
        if name in metadata:
            return metadata[name]
        raise VariableAttributeError(
            f"{type(self).__name__} has no attribute {name!r}: neither the Variable, "
            f"nor its metadata {sorted(metadata)}, nor its value {describe(value)}."
        )

    def __setattr__(self, name: str, new: Any) -> None:
        if name == "value":
            self.set_value(new)
        elif isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, new)
        else:
            raise VariableAttributeError(
                f"Cannot set attribute {name} of a {type(self).__name__}. For the "
                "value write variable.value = x or variable[...] = x; for metadata "
                f"write variable.set_metadata({name}=x)."
            )

    def __delattr__(self, name: str) -> None:
        raise VariableAttributeError(
            f"Cannot delete attribute {name} of a {type(self).__name__}. For metadata "
            f"write variable.del_metadata({name!r})."
        )

    def __repr__(self) -> str:
        extra = "".join(f", {k}={v!r}" for k, v in self._metadata.items())
        return f"{type(self).__name__}({describe(self._value)}{extra})"

    def __str__(self) -> str:
        return self._shown("")

    def __format__(self, spec: str) -> str:
        """``stats`` for mean and extremes; else as the value is formatted."""
        if spec and spec != STATISTICS:
            return format(self._value, spec)
        return self._shown(spec)

    def _shown(self, spec: str) -> str:
        name, value = type(self).__name__, self._value
        extra = "".join(f", {k}={v!r}" for k, v in self._metadata.items())
        return f"{name}({text(value, describe(value), f'{name}(', spec)}{extra})"

    def __getstate__(self) -> tuple[Any, Metadata]:
        return (self._value, self._metadata)

    def __setstate__(self, state: tuple[Any, Metadata]) -> None:
        _set_first_value(self, state[0])
        _init_metadata(self, state[1])
        _init_trace(self, current_trace())

    def __deepcopy__(self, memo: dict[int, Any]) -> Variable[A]:
        # JAX arrays never change, so a copy may hold the same one.
        value = jax.tree.map(_own, self._value)
        return make(type(self), value, self._metadata)

    # `==` compares values, as arrays do; identity is what sets and dicts need.
    __hash__ = object.__hash__


_init_cell: Callable[[Variable, Any], None] = Variable.__dict__["_cell"].__set__
_init_metadata: Callable[[Variable, Metadata], None]
_init_metadata = Variable.__dict__["_metadata"].__set__
_init_trace: Callable[[Variable, Any], None] = Variable.__dict__["_trace"].__set__


def _refuse_ref(kind: type) -> NoReturn:
    raise VariableError(
        "Cannot pass a Ref directly into Variable constructor. A Ref is a box of JAX's "
        f"own, and a Variable is one itself. Write {kind.__name__}(ref[...])."
    )


def cell_of(value: Any) -> list[Any]:
    """What the cell of a Variable holds: the value, and one item more for NumPy's.

    So what reads all values at once sees, by the length alone, an array that others
    could write to.
    """
    return [value, None] if value.__class__ is np.ndarray else [value]


def _set_first_value(variable: Variable[Any], value: Any) -> None:
    try:
        write(variable, value)  # `__init__` called again: plans may hold the cell
    except AttributeError:
        _init_cell(variable, cell_of(value))


def write(variable: Variable[Any], value: Any) -> None:
    """Sets a value without a check of the trace that owns the Variable."""
    variable._cell[:] = cell_of(value)


def make(kind: type, value: Any, metadata: Metadata, trace: Any = None) -> Any:
    """Builds a Variable without running the kind's own ``__init__``.

    ``trace`` is the trace that owns it; the current one if absent.
    """
    if not issubclass(kind, Variable):
        return _handler(kind).make(kind, value, metadata)
    variable = object.__new__(kind)
    _init_cell(variable, cell_of(value))
    _init_metadata(variable, metadata)
    _init_trace(variable, current_trace() if trace is None else trace)
    return variable


def make_all(kinds: Any, values: Any, metadata: Any, trace: Any = None) -> list[Any]:
    """Builds many Variables as ``make`` does; a kind of None leaves the bare value."""
    trace, new = current_trace() if trace is None else trace, object.__new__
    made = []
    for kind, value, meta in zip(kinds, values, metadata, strict=True):
        if kind is None:
            made.append(value)
            continue
        if not issubclass(kind, Variable):
            made.append(_handler(kind).make(kind, value, meta))
            continue
        made.append(variable := new(kind))
        _init_cell(variable, cell_of(value))
        _init_metadata(variable, meta)
        _init_trace(variable, trace)
    return made


def is_variable(x: Any) -> bool:
    """Whether ``x`` is a Variable, of Sortal or of another registered library."""
    return isinstance(x, Variable) or handler_of_kind(type(x)) is not None


def value_of(x: Any) -> Any:
    """The bare value of a Variable of any library; anything else as it is."""
    if isinstance(x, Variable):
        return x._value
    handler = handler_of_kind(type(x))
    return x if handler is None else handler.values([x])[0]


def metadata_of(variable: Any) -> Metadata:
    """The interned metadata of a Variable of any library."""
    if isinstance(variable, Variable):
        return variable._metadata
    return Metadata.of(_handler(type(variable)).entries([variable])[0])


def check_writable(objects: Iterable[Any]) -> None:
    """Refuses a write to live objects if another trace owns any of them.

    Each object has a ``_trace`` and a ``_place``, the arguments of ``foreign_write``.
    """
    now = current_trace()
    foreign = [x for x in objects if x._trace is not now]
    if foreign:
        raise foreign_write(x._place for x in foreign)


def _item(value: Any, index: Any) -> Any:
    if index is Ellipsis and not isinstance(value, np.ndarray):
        return value
    return value[index]


def _read_by_method(kind: Any) -> None:
    """Makes every way to read a Variable call the kind's own ``get_value``."""
    kind.value = property(lambda self: self.get_value(), Variable.value.fset)
    kind.__getitem__ = lambda self, index: self.get_value(index=index)


def _write_by_method(kind: Any) -> None:
    """Makes a write to a part call the kind's own ``set_value``."""
    kind.__setitem__ = lambda self, at, new: self.set_value(plain(new), index=at)


def _refuse_shape(
    variable: Variable[Any], index: Any, new: Any, cause: Exception
) -> None:
    """Says so where a write failed because the shapes do not broadcast."""
    try:
        part = np.shape(variable._value[index])
        fits = np.broadcast_shapes(part, np.shape(plain(new))) == part
    except ValueError:
        fits = False
    if not fits:
        at = "..." if index is Ellipsis else "index"
        old = f"{type(variable).__name__}({describe(variable._value)})"
        raise UpdateError(
            f"{describe(plain(new))} cannot be written to {old}[{at}], a part of shape "
            f"{list(part)}: a write by index broadcasts, and keeps the shape. Write "
            "variable.value = x to replace the value."
        ) from cause


def describe(value: Any) -> str:
    """A short text for a value: ``float32[3,4]`` for an array, else its repr."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and isinstance(shape, tuple):
        return f"{dtype}[{','.join(map(str, shape))}]"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__}(...)"


def _frozen(kind: type, metadata: Any) -> Metadata:
    if isinstance(metadata, Metadata):
        return metadata
    metadata = normalised(kind.__name__, metadata)
    try:
        return Metadata.of(metadata)
    except TypeError:
        bad = [f"{k}={v!r}" for k, v in metadata.items() if not is_hashable(v)]
        raise VariableError(
            f"{kind.__name__}: metadata must be hashable, found {', '.join(bad)}. "
            "Use a tuple for a list, and keep arrays in Variables of their own."
        ) from None


def foreign_write(places: Iterable[tuple[Any, paths.Path, str]]) -> TraceError:
    """The error for a write from inside a trace to what another trace owns.

    A place is an object, the path from there to what was to be written, and the name
    of that thing's type.
    """
    places = list(places)
    rows = []
    found = paths.locate(*(obj for obj, _, _ in places))
    for above, (_, below, kind) in zip(found, places, strict=True):
        path = (*(above or ()), *below)
        rows.append(f"{paths.show(path) if path else 'an object of its own'} ({kind})")
    kind = places[0][2]
    owner = kind.removeprefix("of a ").removeprefix("in a ")
    what = f"{kind} from a" if owner == kind else f"{owner!r} from"
    return TraceError(
        f"Cannot mutate {what} different trace level: {', '.join(rows)} would be "
        "written from inside a transform that it was not passed to, and the write lost "
        "or a tracer leaked. Pass the object that holds it as an argument of the "
        "transformed function."
    )


def _own(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value


def _register(kind: type) -> None:
    key = jax.tree_util.GetAttrKey("value")

    def flatten(variable: Variable) -> tuple[Any, Metadata]:
        return (variable._value,), variable._metadata

    def flatten_with_keys(variable: Variable) -> tuple[Any, Metadata]:
        return ((key, variable._value),), variable._metadata

    def unflatten(metadata: Metadata, children: Any) -> Any:
        return make(kind, children[0], metadata)

    register_pytree(kind, flatten, flatten_with_keys, unflatten)


_register(Variable)


class Param(Variable[A]):
    """A trainable parameter: what optimizers and gradients touch by default."""


class BatchStat(Variable[A]):
    """Running statistics, such as those of BatchNorm: set by the forward pass."""


class Cache(Variable[A]):
    """Values kept from one call for the next, such as attention keys and values."""


class Intermediate(Variable[A]):
    """A value recorded during a call by ``Module.sow``."""


class Perturbation(Variable[A]):
    """A zero added to an intermediate value, to read that value's gradient."""


class OptState(Variable[A]):
    """A value that an optimizer keeps from one step to the next."""


class OptVariable(OptState[A]):
    """Optimizer state that belongs to one parameter, at that parameter's path."""


class OptArray(OptState[A]):
    """Optimizer state that belongs to no one parameter, such as a step count."""


class RngState(Variable[A]):
    """State of a random stream."""


class RngCount(RngState[A]):
    """How many keys were taken from a random stream."""


class RngKey(RngState[A]):
    """The key that a random stream derives its keys from."""


# Users write `sortal.Param`, and checkpoints store that name. It must not change when
# a class moves to another file.
for _kind in (Variable, *(k for k in list(vars().values()) if isinstance(k, type))):
    if issubclass(_kind, Variable):
        _kind.__module__ = "sortal"
