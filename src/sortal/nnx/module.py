"""Modules and walks over them, by NNX's module name."""

from typing import TypeVar

from sortal import module
from sortal._engine.graphdef import GraphDef as GraphDef
from sortal.module import Module as Module
from sortal.module import Pytree as Pytree
from sortal.nnx.capturing import capture as capture
from sortal.nnx.keywords import ignoring
from sortal.nnx.views import view as view
from sortal.nnx.views import view_info as view_info
from sortal.nnx.views import with_attributes as with_attributes
from sortal.nnx.walks import iter_module_children as iter_module_children

M = TypeVar("M", bound=Module)

iter_children = ignoring("graph")(module.iter_children)
iter_modules = ignoring("graph")(module.iter_modules)
