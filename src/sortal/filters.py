"""Filters: predicates over (path, leaf), written as literals, classes or operators."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin

import jax.numpy as jnp

from sortal._engine import paths
from sortal._engine.foreign import handler_of_kind, is_kind, translated
from sortal._engine.nodes import is_node_class
from sortal._engine.paths import Path
from sortal._engine.variable import Variable, is_variable, metadata_of, value_of
from sortal.errors import ArgumentError, FilterError

Kind = type | None


class Filter:
    """Base of all filters; combine with ``&``, ``|`` and ``~``.

    Subclasses are frozen and hashable, and define ``test``. A filter whose
    ``structural`` is True never looks at the leaf itself, so its answer can be kept
    with the structure.

    Example:
      >>> import sortal as nnx
      >>> nnx.OfType(nnx.Param) & ~nnx.At("head.**")
      All(Param, Not(At('head.**')))
    """

    structural: bool = True

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        """Whether this filter takes the leaf.

        Args:
          path: where the leaf is.
          kind: its class, or None for a raw array.
          metadata: its metadata.
          leaf: the Variable or array itself; None may be given to structural filters.

        Returns:
          True where it takes the leaf.
        """
        raise NotImplementedError

    def covers(self, other: Filter) -> bool:
        """Whether every leaf that ``other`` can take is taken by this one too.

        Args:
          other: another filter.

        Returns:
          True where that follows from the filters alone.
        """
        if isinstance(other, Any_):
            return all(self.covers(part) for part in other.filters)
        if isinstance(other, All):
            return any(self.covers(part) for part in other.filters)
        return self == other

    def __call__(self, path: Path, leaf: Any) -> bool:
        if is_variable(leaf):
            return self.test(path, type(leaf), metadata_of(leaf), leaf)
        return self.test(path, None, {}, leaf)

    def __and__(self, other: Any) -> Filter:
        return All(self, other)

    def __rand__(self, other: Any) -> Filter:
        return All(other, self)

    def __or__(self, other: Any) -> Filter:
        return Any_(self, other)

    def __ror__(self, other: Any) -> Filter:
        return Any_(other, self)

    def __invert__(self) -> Filter:
        return Not(self)


@dataclass(frozen=True, repr=False)
class Everything(Filter):
    """Takes every leaf; written ``...`` or ``True``.

    Example:
      >>> import sortal as nnx
      >>> nnx.Everything()(("kernel",), 1.0)
      True
    """

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return True

    def covers(self, other: Filter) -> bool:
        return True

    def __repr__(self) -> str:
        return "..."


@dataclass(frozen=True, repr=False)
class Nothing(Filter):
    """Takes no leaf; written ``None`` or ``False``.

    Example:
      >>> import sortal as nnx
      >>> nnx.Nothing()(("kernel",), 1.0)
      False
    """

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return False

    def __repr__(self) -> str:
        return "Nothing()"


@dataclass(frozen=True, repr=False)
class OfType(Filter):
    """Takes Variables of a kind and of its subclasses; written as the class itself.

    A class that is no kind, no base of kinds, no type of array and not that of a leaf
    that is there is refused where leaves are chosen.

    Args:
      type: the kind. Two classes of one name are two kinds; but ``sortal.Param`` and
        ``flax.nnx.Param`` take the same, and so do others of one name in the two.

    Example:
      >>> import sortal as nnx
      >>> class LoRAParam(nnx.Param): pass
      >>> nnx.OfType(nnx.Param)(("w",), LoRAParam(1.0))
      True
    """

    type: type

    @property
    def structural(self) -> bool:  # type: ignore[override]
        # Classes such as `jax.Array` take raw arrays by value, not by structure.
        kind = self.type
        return issubclass(kind, Variable) or handler_of_kind(kind) is not None

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        if kind is None:
            return isinstance(leaf, self.type)
        return is_kind(kind, self.type)

    def covers(self, other: Filter) -> bool:
        if isinstance(other, OfType):
            return is_kind(other.type, self.type)
        return super().covers(other)

    def __repr__(self) -> str:
        return self.type.__name__


@dataclass(frozen=True, repr=False)
class WithTag(Filter):
    """Takes Variables whose metadata ``tag`` is this string; written as the string.

    Args:
      tag: the tag, such as the name of a random stream. It is not a path: for that
        use ``At`` or ``Under``.

    Example:
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(params=0, dropout=1)
      >>> nnx.state(rngs, nnx.WithTag("dropout")).paths()
      (('dropout', 'count'), ('dropout', 'key'))
    """

    tag: str

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return metadata.get("tag") == self.tag

    def __repr__(self) -> str:
        return repr(self.tag)


@dataclass(frozen=True, repr=False)
class PathContains(Filter):
    """Takes leaves with this entry somewhere in their path.

    Args:
      key: an attribute name, dict key or index.
      exact: False also takes string entries that merely contain ``key``.

    Example:
      >>> import sortal as nnx
      >>> nnx.PathContains("bias")(("layers", 0, "bias"), 1.0)
      True
    """

    key: Hashable
    exact: bool = True

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        if self.exact:
            return self.key in path
        return any(str(self.key) in str(part) for part in path)

    def __repr__(self) -> str:
        return f"PathContains({self.key!r}{'' if self.exact else ', exact=False'})"


@dataclass(frozen=True, repr=False, init=False)
class PathIn(Filter):
    """Takes the leaves at exactly these paths.

    Args:
      *paths: tuples of entries from the root.

    Raises:
      FilterError: one of them is no tuple.

    Example:
      >>> import sortal as nnx
      >>> nnx.PathIn(("head", "bias"), ("head", "kernel"))(("head", "bias"), 1.0)
      True
    """

    paths: frozenset[Path]

    def __init__(self, *paths: Path):
        wrong = [p for p in paths if not isinstance(p, tuple)]
        if wrong:
            raise FilterError(
                f"PathIn takes paths as tuples, found {wrong[0]!r}. Write "
                "PathIn(('layers', 0, 'kernel')), or At('layers.0.kernel')."
            )
        object.__setattr__(self, "paths", frozenset(paths))

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return path in self.paths

    def __repr__(self) -> str:
        shown = ", ".join(sorted(map(repr, self.paths)))
        return f"PathIn({shown})"


@dataclass(frozen=True, repr=False)
class At(Filter):
    r"""Takes leaves whose whole path fits a glob.

    Args:
      pattern: entries joined by dots; ``*`` is one entry or part of one, ``**`` any
        number of entries. A backslash before a dot, a star or a backslash makes it part
        of a key: ``At(r"table.a\.b")``. Nothing else is special.

    Raises:
      FilterError: the pattern is empty, has an empty entry, or a backslash before
        another character.

    Example:
      >>> import sortal as nnx
      >>> nnx.At("encoder.**.kernel")(("encoder", "layers", 0, "kernel"), 1.0)
      True
    """

    pattern: str

    def __post_init__(self) -> None:
        _check_glob(self, self.pattern)

    def fits(self) -> Callable[[str], bool]:
        """The compiled pattern, a function of a path as text."""
        return paths.glob(self.pattern)

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return self.fits()(paths.joined(path))

    def __repr__(self) -> str:
        return f"At({self.pattern!r})"


@dataclass(frozen=True, repr=False)
class Under(Filter):
    """Takes the leaf at a path and all leaves below it.

    Args:
      prefix: a path such as ``"encoder.layers.0"``, or a glob as in ``At``.

    Raises:
      FilterError: as for ``At``.

    Example:
      >>> import sortal as nnx
      >>> nnx.Under("encoder.0")(("encoder", 0, "kernel"), 1.0)
      True
    """

    prefix: str

    def __post_init__(self) -> None:
        _check_glob(self, self.prefix)

    def fits(self) -> Callable[[str], bool]:
        """The compiled prefix, a function of a path as text."""
        return paths.glob(self.prefix, True)

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return self.fits()(paths.joined(path))

    def covers(self, other: Filter) -> bool:
        if isinstance(other, Under):
            return f"{other.prefix}.".startswith(f"{self.prefix}.")
        return super().covers(other)

    def __repr__(self) -> str:
        return f"Under({self.prefix!r})"


@dataclass(frozen=True, repr=False)
class Shaped(Filter):
    """Takes leaves by the shape of their value.

    Args:
      shape: the exact shape, or None for any.
      ndim: the number of axes, or None for any.

    Raises:
      FilterError: neither is given, or both and they contradict one another.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.Shaped(ndim=2)(("kernel",), nnx.Param(jnp.ones((2, 3))))
      True
    """

    shape: tuple[int, ...] | None = None
    ndim: int | None = field(default=None, kw_only=True)
    structural = False

    def __post_init__(self) -> None:
        if self.shape is None and self.ndim is None:
            raise FilterError("Shaped() needs shape=(...) or ndim=...; found neither.")
        if self.shape is None:
            return
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.ndim not in (None, len(self.shape)):
            raise FilterError(
                f"{self!r} can take nothing: a shape of {len(self.shape)} axes and "
                f"ndim={self.ndim}. Write one of the two."
            )

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        shape = getattr(value_of(leaf), "shape", None)
        if shape is None:
            return False
        fits = self.shape is None or tuple(shape) == self.shape
        return fits and (self.ndim is None or len(shape) == self.ndim)

    def __repr__(self) -> str:
        shape = "" if self.shape is None else repr(self.shape)
        ndim = "" if self.ndim is None else f"ndim={self.ndim}"
        return f"Shaped({', '.join(filter(None, [shape, ndim]))})"


@dataclass(frozen=True, repr=False)
class Dtyped(Filter):
    """Takes leaves by the dtype of their value.

    Args:
      dtype: a dtype, or an abstract one such as ``jnp.floating``.

    Raises:
      FilterError: it is no dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.Dtyped(jnp.floating)(("step",), nnx.Variable(jnp.array(0)))
      False
    """

    dtype: Any
    structural = False

    def __post_init__(self) -> None:
        try:
            jnp.issubdtype(jnp.float32, self.dtype)
        except TypeError:
            raise FilterError(
                f"Dtyped({self.dtype!r}): no such dtype. Write for example "
                "Dtyped(jnp.float32) or Dtyped(jnp.floating)."
            ) from None

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        dtype = getattr(value_of(leaf), "dtype", None)
        return dtype is not None and bool(jnp.issubdtype(dtype, self.dtype))

    def __repr__(self) -> str:
        return f"Dtyped({getattr(self.dtype, '__name__', self.dtype)})"


@dataclass(frozen=True, repr=False, init=False)
class _Combined(Filter):
    filters: tuple[Filter, ...]
    structural: bool = field(compare=False)

    def __init__(self, *filters: Any):
        read = tuple(map(to_filter, filters))
        object.__setattr__(self, "filters", read)
        object.__setattr__(self, "structural", all(f.structural for f in read))

    def __repr__(self) -> str:
        name = type(self).__name__.rstrip("_")
        return f"{name}({', '.join(map(repr, self.filters))})"


class Any_(_Combined):
    """Takes what at least one of its filters takes; written as a tuple or list.

    Args:
      *filters: filters or literals.

    Example:
      >>> import sortal as nnx
      >>> nnx.Any(nnx.Param, "dropout")
      Any(Param, 'dropout')
    """

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return any(f.test(path, kind, metadata, leaf) for f in self.filters)

    def covers(self, other: Filter) -> bool:
        return any(f.covers(other) for f in self.filters) or super().covers(other)


class All(_Combined):
    """Takes what all of its filters take.

    Args:
      *filters: filters or literals.

    Example:
      >>> import sortal as nnx
      >>> nnx.All(nnx.Param, nnx.At("**.kernel"))
      All(Param, At('**.kernel'))
    """

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return all(f.test(path, kind, metadata, leaf) for f in self.filters)

    def covers(self, other: Filter) -> bool:
        return all(f.covers(other) for f in self.filters) or super().covers(other)


class Not(_Combined):
    """Takes what its filter does not take.

    Args:
      filter: a filter or literal.

    Example:
      >>> import sortal as nnx
      >>> nnx.Not(nnx.RngState)(("kernel",), nnx.Param(1.0))
      True
    """

    def __init__(self, filter: Any, /):
        super().__init__(filter)

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return not self.filters[0].test(path, kind, metadata, leaf)

    def covers(self, other: Filter) -> bool:
        if isinstance(other, Not):
            return other.filters[0].covers(self.filters[0])
        return super().covers(other)


@dataclass(frozen=True, repr=False)
class Calls(Filter):
    """Takes the leaves for which a function of (path, leaf) is true; written as it."""

    function: Callable[[Path, Any], Any]
    structural = False

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return bool(self.function(path, leaf))

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def to_filter(literal: Any) -> Filter:
    """Reads a filter literal.

    Args:
      literal: a Filter; a class (its kind and subclasses); a string (a tag); ``...``
        or True (everything); None or False (nothing); a tuple, list or union of
        literals (any of them); or a function of (path, leaf).

    Returns:
      The Filter.

    Raises:
      FilterError: it is none of these.

    Example:
      >>> import sortal as nnx
      >>> nnx.to_filter(nnx.Param | nnx.BatchStat)
      Any(Param, BatchStat)
    """
    if isinstance(literal, Filter):
        return literal
    if isinstance(literal, (tuple, list)):
        return Any_(*literal)
    if literal is Ellipsis or literal is True:
        return Everything()
    if literal is None or literal is False:
        return Nothing()
    if isinstance(literal, type) and not get_origin(literal):
        if issubclass(literal, Filter):
            return _with_no_arguments(literal)
        return OfType(literal)
    if isinstance(literal, str):
        return WithTag(literal)
    if isinstance(literal, types.UnionType) or get_origin(literal) is Union:
        return Any_(*get_args(literal))
    origin = get_origin(literal)
    if isinstance(origin, type):
        return OfType(origin)
    # A Variable is callable if its value is, but a kind was meant.
    if callable(literal) and not is_variable(literal):
        own = translated(literal)
        return Calls(literal) if own is literal else to_filter(own)
    raise FilterError(
        f"{literal!r:.80} ({type(literal).__name__}) is not a filter. Write a kind "
        "such as Param, a tag string, ..., a tuple of filters, At('encoder.**'), or a "
        "function of (path, leaf)."
    )


def leaf_filter(literal: Any) -> Filter:
    """Reads a filter literal that is about leaves; ``to_filter`` may be about modules.

    Args:
      literal: as for ``to_filter``.

    Returns:
      The Filter.

    Raises:
      FilterError: it is no filter, or a class in it is one of objects that hold leaves,
        which can take nothing in any model; all such are named.
    """
    found = to_filter(literal)
    classes = [f.type for f in parts((found,)) if isinstance(f, OfType)]
    bad = [cls.__name__ for cls in classes if is_node_class(cls)]
    if bad:
        raise FilterError(
            f"{', '.join(bad)}: a filter takes leaves, and an object of such a class "
            "holds them, so that no leaf of any model is one. Name a kind such as "
            "Param, or a path such as Under('encoder')."
        )
    return found


def parts(filters: Iterable[Filter]) -> Iterator[Filter]:
    """Filters and all that they are combined from, each before its parts."""
    for f in filters:
        yield f
        yield from parts(getattr(f, "filters", ()))


def _with_no_arguments(cls: type[Filter]) -> Filter:
    try:
        return cls()
    except TypeError:
        raise FilterError(
            f"{cls.__name__} is a class of filters that needs arguments. Write "
            f"{cls.__name__}(...)."
        ) from None


to_predicate = to_filter


def _check_glob(filter: Filter, text: str) -> None:
    try:
        paths.glob(text)
    except ArgumentError as error:
        what = str(error).removeprefix(f"{text!r}: ")
        raise FilterError(f"{type(filter).__name__}({text!r}): {what}") from None
