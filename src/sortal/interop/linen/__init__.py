"""Flax Linen modules in Sortal models, and Sortal modules in Linen models."""

from sortal.interop.linen.as_linen import linen_class as linen_class
from sortal.interop.linen.as_linen import to_linen as to_linen
from sortal.interop.linen.as_linen import to_linen_class as to_linen_class
from sortal.interop.linen.as_module import ToNNX as ToNNX
from sortal.interop.linen.as_module import lazy_init as lazy_init
