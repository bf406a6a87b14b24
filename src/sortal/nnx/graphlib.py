"""The verbs over live objects, where NNX code looks for them: also ``nnx.graph``."""

from sortal._engine.graphdef import GraphDef as GraphDef
from sortal._engine.state import State
from sortal._engine.variable import Variable as Variable
from sortal.functional import clone as clone
from sortal.functional import graphdef as graphdef
from sortal.functional import iter_graph as iter_graph
from sortal.functional import merge as merge
from sortal.functional import pop as pop
from sortal.functional import split as split
from sortal.functional import state as state
from sortal.functional import update as update
from sortal.functional import variables as variables
from sortal.nnx.partial import cached_partial as cached_partial

GraphState, NodeDef = State, GraphDef
