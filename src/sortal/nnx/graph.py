"""The older name of ``nnx.graphlib``."""

from sortal.nnx.graphlib import GraphDef as GraphDef
from sortal.nnx.graphlib import GraphState as GraphState
from sortal.nnx.graphlib import NodeDef as NodeDef
from sortal.nnx.graphlib import Variable as Variable
from sortal.nnx.graphlib import cached_partial as cached_partial
from sortal.nnx.graphlib import clone as clone
from sortal.nnx.graphlib import graphdef as graphdef
from sortal.nnx.graphlib import iter_graph as iter_graph
from sortal.nnx.graphlib import merge as merge
from sortal.nnx.graphlib import pop as pop
from sortal.nnx.graphlib import split as split
from sortal.nnx.graphlib import state as state
from sortal.nnx.graphlib import update as update
from sortal.nnx.graphlib import variables as variables
