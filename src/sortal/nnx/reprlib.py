"""Texts of objects by their attributes, by NNX's module name; without colours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass
class Object:
    """How an object is written: its name, and what goes around its attributes.

    Args:
      type: the class, or its name.
      start: what comes after the name.
      end: what comes last.
      kv_sep: what comes between a name and a value.
      indent: what comes before each attribute.
      empty_repr: what comes in the place of attributes where there are none.
      comment: what comes before the first attribute.
      same_line: whether all is written in one line.
    """

    type: str | type
    start: str = "("
    end: str = ")"
    kv_sep: str = "="
    indent: str = "  "
    empty_repr: str = ""
    comment: str = ""
    same_line: bool = False


@dataclasses.dataclass
class Attr:
    """One attribute of an object.

    Args:
      key: its name.
      value: its value.
      start: what comes before it.
      end: what comes after it.
      use_raw_value: whether the value is text that is written as it is.
      use_raw_key: ignored; for NNX compatibility.
    """

    key: str
    value: Any
    start: str = ""
    end: str = ""
    use_raw_value: bool = False
    use_raw_key: bool = False


class Representable:
    """Base of classes that say in ``__nnx_repr__`` what is written of them.

    Example:
      >>> from sortal import nnx
      >>> class Point(nnx.reprlib.Representable):
      ...     def __nnx_repr__(self):
      ...         yield nnx.reprlib.Object(type(self), same_line=True)
      ...         yield nnx.reprlib.Attr("x", 1)
      >>> Point()
      Point(x=1)
    """

    __slots__ = ()

    def __nnx_repr__(self) -> Iterator[Object | Attr]:
        """One Object, and then an Attr for each attribute."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return get_repr(self)


def get_repr(obj: Representable) -> str:
    """The text of an object.

    Args:
      obj: a Representable.

    Returns:
      The text.

    Raises:
      TypeError: ``obj`` is no Representable, or ``__nnx_repr__`` yields other things.
    """
    if not isinstance(obj, Representable):
        raise TypeError(f"Object {obj!r} is not representable")
    head, *attributes = obj.__nnx_repr__()
    if not isinstance(head, Object):
        raise TypeError(f"First item must be Object, got {type(head).__name__}")
    name = head.type if isinstance(head.type, str) else head.type.__name__
    lines = [_line(head, x) for x in attributes]
    if not lines:
        inside = head.empty_repr
    elif head.same_line:
        inside = ", ".join(lines)
    else:
        inside = head.comment + "\n" + ",\n".join(lines) + "\n"
    return f"{name}{head.start}{inside}{head.end}"


def _line(head: Object, attr: Any) -> str:
    if not isinstance(attr, Attr):
        raise TypeError(f"Item must be Attr, got {type(attr).__name__}")
    value = attr.value if attr.use_raw_value else colorized(attr.value)
    value = value.replace("\n", "\n" + head.indent)
    indent = "" if head.same_line else head.indent
    return f"{indent}{attr.start}{attr.key}{head.kv_sep}{value}{attr.end}"


def colorized(x: Any, /) -> str:
    """The text of a value; classes are written by their name.

    Args:
      x: the value.

    Returns:
      The text.
    """
    return x.__name__ if isinstance(x, type) else repr(x)


class MappingReprMixin(Representable):
    """Writes a mapping by its items."""

    __slots__ = ()

    def __nnx_repr__(self: Any) -> Iterator[Object | Attr]:
        yield Object(type(self), start="({", end="})", kv_sep=": ")
        for key, value in self.items():
            yield Attr(colorized(key), value)


class SequenceReprMixin(Representable):
    """Writes a sequence by its items."""

    __slots__ = ()

    def __nnx_repr__(self: Any) -> Iterator[Object | Attr]:
        yield Object(type(self), start="([", end="])", kv_sep="")
        for value in self:
            yield Attr("", value)


@dataclasses.dataclass(repr=False)
class PrettyMapping(Representable):
    """Any mapping, written by its items.

    Args:
      mapping: the mapping.
    """

    mapping: Mapping[Any, Any]

    def __nnx_repr__(self) -> Iterator[Object | Attr]:
        yield Object(type(self), start="({", end="})", kv_sep=": ")
        for key, value in self.mapping.items():
            yield Attr(colorized(key), value)


@dataclasses.dataclass(repr=False)
class PrettySequence(Representable):
    """Any sequence, written by its items.

    Args:
      sequence: the sequence.
    """

    sequence: Sequence[Any]

    def __nnx_repr__(self) -> Iterator[Object | Attr]:
        yield Object(type(self), start="([", end="])", kv_sep="")
        for value in self.sequence:
            yield Attr("", value)
