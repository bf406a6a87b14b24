"""The verbs over live objects, where NNX code looks for them: also ``nnx.graph``."""

from sortal.graphdef import GraphDef as GraphDef
from sortal.state import State
from sortal.surgery import clone as clone
from sortal.surgery import graphdef as graphdef
from sortal.surgery import iter_graph as iter_graph
from sortal.surgery import merge as merge
from sortal.surgery import pop as pop
from sortal.surgery import split as split
from sortal.surgery import state as state
from sortal.surgery import update as update
from sortal.surgery import variables as variables
from sortal.transforms.partial import cached_partial as cached_partial
from sortal.variable import Variable as Variable

GraphState, NodeDef = State, GraphDef
