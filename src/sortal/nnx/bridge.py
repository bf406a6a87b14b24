"""Flax Linen modules in models and models in Linen, by NNX's module name."""

from typing import Any

from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal.interop import linen
from sortal.interop.linen import ToNNX as ToNNX
from sortal.interop.linen import lazy_init as lazy_init
from sortal.interop.linen import to_linen_class as to_linen_class
from sortal.nn import initializers as initializers
from sortal.nnx.keywords import ignoring

to_linen = ignoring("abstract_init")(linen.to_linen)


_LINEN_STYLE = (
    "write a sortal Module whose submodules are made in __init__, or keep a flax.linen "
    "module and put it into a model with nnx.bridge.ToNNX"
)
ABSENT = {
    **dict.fromkeys(("Module", "compact", "Scope", "AttrPriority"), _LINEN_STYLE),
    **dict.fromkeys(("current_context", "current_module"), _LINEN_STYLE),
    **dict.fromkeys(("nnx_in_bridge_mdl", "linen_in_bridge_mdl"), _LINEN_STYLE),
    **dict.fromkeys(
        ("Functional", "functional"), "write nnx.split, and nnx.call on what it returns"
    ),
    "NNXMeta": (
        "nnx.bridge.to_linen puts values whose axes have names into "
        "flax.linen.Partitioned, which flax.linen.get_partition_spec reads"
    ),
}
"""Names of Flax's bridge that are not here, and what to write."""


def __getattr__(name: str) -> Any:
    if name == "ToLinen":  # a Linen class, so Flax is imported when it is asked for
        return linen.linen_class()
    if name in ABSENT:
        raise AttributeError(f"nnx.bridge has no {name}: {ABSENT[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
