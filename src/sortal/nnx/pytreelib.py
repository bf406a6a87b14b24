"""Pytree and its marks, by NNX's module name."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import jax

from sortal._engine.marks import data as data
from sortal._engine.marks import static as static
from sortal._engine.nodes import LEAF, handler_of, is_root, register_node
from sortal.errors import ArgumentError
from sortal.functional import graphdef
from sortal.module import Pytree as Pytree
from sortal.module import dataclass as dataclass
from sortal.nnx.annotated import DATA, STATIC

_A = TypeVar("_A")

Data = Annotated[_A, DATA]
"""An annotation in a class body: the attribute is data in all instances."""
Static = Annotated[_A, STATIC]
"""An annotation in a class body: the attribute is static in all instances."""


class Object(Pytree, pytree=False):
    """A Pytree that is no JAX pytree: transforms of ``nnx`` take it, JAX does not.

    Example:
      >>> from sortal import nnx
      >>> class Counter(nnx.Object):
      ...     def __init__(self):
      ...         self.n = nnx.Variable(0)
      >>> nnx.state(Counter()).paths()
      (('n',),)
    """

    def __init_subclass__(cls, **options: Any):
        if options.get("pytree"):
            raise ArgumentError(
                f"class {cls.__name__}: an Object is no JAX pytree, but pytree=True "
                "asks for one. Derive the class from Pytree."
            )
        super().__init_subclass__(**{"pytree": False, **options})


def register_data_type(type_: Any, /) -> Any:
    """Has objects of a type be leaves wherever they are, as arrays are.

    Args:
      type_: the type.

    Returns:
      The type.

    Example:
      >>> import dataclasses
      >>> import jax
      >>> from sortal import nnx
      >>> @nnx.register_data_type
      ... @dataclasses.dataclass(frozen=True)
      ... class Mine:
      ...     value: int
      >>> class Holder(nnx.Pytree):
      ...     def __init__(self):
      ...         self.a, self.b = Mine(42), "hello"
      >>> jax.tree.leaves(Holder())
      [Mine(value=42)]
    """
    leaf: Any = LEAF
    register_node(type_, leaf)
    return type_


def is_data(value: Any, /) -> bool:
    """Whether NNX makes a value data by itself when it is assigned to an attribute.

    Those are arrays, Variables, Modules and other Pytrees, and what
    ``register_data_type`` was called for. Sortal also finds them in lists and dicts.

    Args:
      value: anything.

    Returns:
      True or False.

    Example:
      >>> from sortal import nnx
      >>> nnx.is_data(nnx.Param(1)), nnx.is_data(42), nnx.is_data([nnx.Param(1)])
      (True, False, False)
    """
    return handler_of(value) is LEAF or is_root(value)


def has_data(value: Any, /) -> list[Any]:
    """What in a pytree ``is_data`` takes.

    Args:
      value: a pytree.

    Returns:
      The list of it.

    Example:
      >>> from sortal import nnx
      >>> [type(x).__name__ for x in nnx.has_data({"a": nnx.Param(1), "b": 2})]
      ['Param']
    """
    return [x for x in jax.tree.leaves(value, is_leaf=is_data) if is_data(x)]


def check_pytree(pytree: Any) -> None:
    """Refuses a Pytree that has attributes which can be neither data nor static.

    Args:
      pytree: a Pytree.

    Raises:
      ArgumentError: it is no Pytree.
      StructureError: a static value cannot be hashed, or hides Variables.

    Example:
      >>> from sortal import nnx
      >>> nnx.check_pytree(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    """
    if not isinstance(pytree, Pytree):
        raise ArgumentError(
            f"check_pytree takes a Pytree; found a {type(pytree).__name__}."
        )
    graphdef(pytree)
