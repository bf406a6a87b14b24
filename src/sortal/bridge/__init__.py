"""Flax Linen modules in Sortal models, and the other way round."""

from sortal.annotations import with_partitioning as with_partitioning
from sortal.bridge.to_linen import to_linen as to_linen
from sortal.bridge.to_nnx import ToNNX as ToNNX
from sortal.bridge.to_nnx import lazy_init as lazy_init
