"""The verbs over live objects, by NNX's module name."""

from __future__ import annotations

from typing import Any

from sortal import functional
from sortal._engine.graphdef import GraphDef as GraphDef
from sortal._engine.handlers import Handler
from sortal._engine.nodes import handler_of, is_root
from sortal._engine.state import FlatState as FlatState
from sortal._engine.state import State as State
from sortal._engine.variable import Variable as Variable
from sortal.functional import pop as pop
from sortal.functional import update as update
from sortal.nnx.calls import ApplyCaller as ApplyCaller
from sortal.nnx.calls import call as call
from sortal.nnx.contexts import MergeContext as MergeContext
from sortal.nnx.contexts import SplitContext as SplitContext
from sortal.nnx.contexts import UpdateContext as UpdateContext
from sortal.nnx.contexts import current_update_context as current_update_context
from sortal.nnx.contexts import merge_context as merge_context
from sortal.nnx.contexts import split_context as split_context
from sortal.nnx.contexts import update_context as update_context
from sortal.nnx.keywords import ignoring
from sortal.nnx.modes import set_graph_mode as set_graph_mode
from sortal.nnx.modes import set_graph_updates as set_graph_updates
from sortal.nnx.module import iter_children as iter_children
from sortal.nnx.packing import GraphState as GraphState
from sortal.nnx.packing import flatten as flatten
from sortal.nnx.packing import merge as merge
from sortal.nnx.packing import split as split
from sortal.nnx.packing import unflatten as unflatten
from sortal.nnx.packing import unpack as unpack
from sortal.nnx.partial import cached_partial as cached_partial
from sortal.nnx.statelib import map_state as map_state
from sortal.nnx.walks import as_pure as as_pure
from sortal.nnx.walks import find_duplicates as find_duplicates
from sortal.nnx.walks import iter_graph as iter_graph
from sortal.nnx.walks import iter_module_children as iter_module_children
from sortal.nnx.walks import map as map
from sortal.nnx.walks import pure as pure
from sortal.nnx.walks import recursive_map as recursive_map
from sortal.nnx.walks import set_metadata as set_metadata
from sortal.nnx.walks import vars_as as vars_as
from sortal.nnx.walks import with_vars as with_vars

NodeDef = GraphDef
PureState = tuple[GraphDef, State]
is_graph_node = is_root
Key = Any

_verb = ignoring("graph")

clone = _verb(functional.clone)
graphdef = _verb(functional.graphdef)
state = _verb(functional.state)
variables = _verb(functional.variables)


def is_node(x: Any) -> bool:
    """Whether an object has children: a module, a container, a pytree.

    Args:
      x: anything.

    Returns:
      True or False; a Variable is a leaf.

    Example:
      >>> from sortal import nnx
      >>> nnx.graph.is_node([1]), nnx.graph.is_node(nnx.Param(1))
      (True, False)
    """
    return isinstance(handler_of(x), Handler)
