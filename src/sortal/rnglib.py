"""Random streams, where NNX code looks for them."""

from sortal.rngs import Rngs as Rngs
from sortal.rngs import RngStream as RngStream
from sortal.rngs import fork_rngs as fork_rngs
from sortal.rngs import reseed as reseed
from sortal.rngs import restore_rngs as restore_rngs
from sortal.rngs import split_rngs as split_rngs
from sortal.variable import RngCount as RngCount
from sortal.variable import RngKey as RngKey
from sortal.variable import RngState as RngState
