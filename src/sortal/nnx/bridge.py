"""Flax Linen modules in models and models in Linen, by NNX's module name."""

from typing import Any

from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal.interop import linen
from sortal.interop.linen import ToNNX as ToNNX
from sortal.interop.linen import lazy_init as lazy_init
from sortal.interop.linen import to_linen_class as to_linen_class
from sortal.nnx.keywords import ignoring

to_linen = ignoring("abstract_init")(linen.to_linen)


def __getattr__(name: str) -> Any:
    if name == "ToLinen":  # a Linen class, so Flax is imported when it is asked for
        return linen.linen_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
