"""Flax Linen modules in models and models in Linen, by NNX's module name."""

from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal.interop import linen
from sortal.interop.linen import ToNNX as ToNNX
from sortal.interop.linen import lazy_init as lazy_init
from sortal.nnx.keywords import ignoring

to_linen = ignoring("abstract_init")(linen.to_linen)
