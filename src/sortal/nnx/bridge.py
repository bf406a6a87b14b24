"""Flax Linen modules in Sortal models, and the other way round."""

from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal.interop.linen.to_linen import to_linen as to_linen
from sortal.interop.linen.to_nnx import ToNNX as ToNNX
from sortal.interop.linen.to_nnx import lazy_init as lazy_init
