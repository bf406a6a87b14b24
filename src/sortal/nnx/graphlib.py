"""The verbs over live objects, by NNX's module name."""

from __future__ import annotations

from sortal import functional
from sortal._engine.graphdef import GraphDef as GraphDef
from sortal._engine.state import State
from sortal._engine.variable import Variable as Variable
from sortal.functional import pop as pop
from sortal.functional import update as update
from sortal.nnx.keywords import ignoring
from sortal.nnx.partial import cached_partial as cached_partial

GraphState, NodeDef = State, GraphDef

_verb = ignoring("graph")

clone = _verb(functional.clone)
graphdef = _verb(functional.graphdef)
iter_graph = _verb(functional.iter_graph)
merge = ignoring("copy")(functional.merge)
split = _verb(functional.split)
state = _verb(functional.state)
variables = _verb(functional.variables)
