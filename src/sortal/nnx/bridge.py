"""Flax Linen modules in Sortal models, and the other way round."""

from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal.interop.linen import to_linen as linen_modules
from sortal.interop.linen.to_nnx import ToNNX as ToNNX
from sortal.interop.linen.to_nnx import lazy_init as lazy_init
from sortal.nnx.keywords import ignoring

to_linen = ignoring("abstract_init")(linen_modules.to_linen)
