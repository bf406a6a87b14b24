"""Random streams, by NNX's module name."""

from sortal import random
from sortal._engine.variable import RngCount as RngCount
from sortal._engine.variable import RngKey as RngKey
from sortal._engine.variable import RngState as RngState
from sortal.nnx.keywords import ignoring
from sortal.random import Rngs as Rngs
from sortal.random import RngStream as RngStream
from sortal.random import restore_rngs as restore_rngs

fork_rngs = ignoring("graph", "graph_updates")(random.fork_rngs)
reseed = ignoring("graph")(random.reseed)
split_rngs = ignoring("graph", "graph_updates")(random.split_rngs)
