"""Modules and walks over them, by NNX's module name."""

from typing import Any, TypeVar

from sortal import module
from sortal._engine.graphdef import GraphDef as GraphDef
from sortal.errors import ArgumentError
from sortal.module import Module as Module
from sortal.module import Pytree as Pytree
from sortal.nnx.capturing import capture as capture
from sortal.nnx.keywords import ignoring
from sortal.nnx.views import view as view
from sortal.nnx.views import view_info as view_info
from sortal.nnx.views import with_attributes as with_attributes
from sortal.nnx.walks import iter_children as iter_children
from sortal.nnx.walks import iter_module_children as iter_module_children

M = TypeVar("M", bound=Module)

iter_modules = ignoring("graph")(module.iter_modules)


def first_from(*args: Any, error_msg: str) -> Any:
    """The first argument that is not None.

    Args:
      *args: the arguments.
      error_msg: what to say where all are None.

    Returns:
      The argument.

    Raises:
      ArgumentError: all are None.

    Example:
      >>> from sortal import nnx
      >>> nnx.module.first_from(None, False, error_msg="no value")
      False
    """
    for x in args:
        if x is not None:
            return x
    raise ArgumentError(error_msg)
