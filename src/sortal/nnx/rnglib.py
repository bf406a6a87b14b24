"""Random streams, where NNX code looks for them."""

from sortal._engine.variable import RngCount as RngCount
from sortal._engine.variable import RngKey as RngKey
from sortal._engine.variable import RngState as RngState
from sortal.random import Rngs as Rngs
from sortal.random import RngStream as RngStream
from sortal.random import fork_rngs as fork_rngs
from sortal.random import reseed as reseed
from sortal.random import restore_rngs as restore_rngs
from sortal.random import split_rngs as split_rngs
