"""Modules and walks over them, by NNX's module name."""

from sortal import module
from sortal._engine.graphdef import GraphDef as GraphDef
from sortal.module import Module as Module
from sortal.module import Pytree as Pytree
from sortal.nnx.keywords import ignoring

iter_children = ignoring("graph")(module.iter_children)
iter_modules = ignoring("graph")(module.iter_modules)
