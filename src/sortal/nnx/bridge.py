"""Flax Linen modules in models and models in Linen, by NNX's module name."""

import functools as _functools
import sys
from typing import Any

from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal.interop import linen
from sortal.interop.linen import ToNNX as ToNNX
from sortal.interop.linen import collections as _collections
from sortal.interop.linen import lazy_init as lazy_init
from sortal.nn import initializers as initializers
from sortal.nnx.keywords import ignoring
from sortal.nnx.linen_style import Functional as Functional
from sortal.nnx.linen_style import Module as Module
from sortal.nnx.linen_style import Scope as Scope
from sortal.nnx.linen_style import compact as compact
from sortal.nnx.linen_style import current_context as current_context
from sortal.nnx.linen_style import current_module as current_module
from sortal.nnx.linen_style import functional as functional
from sortal.nnx.linen_style import linen_in_bridge_mdl as linen_in_bridge_mdl
from sortal.nnx.linen_style import nnx_in_bridge_mdl as nnx_in_bridge_mdl


@ignoring("abstract_init")
@_functools.wraps(linen.to_linen)
def to_linen(  # noqa: D103
    nnx_class: Any,
    *args: Any,
    metadata_fn: Any = _collections.boxed_whole,
    name: str | None = None,
    skip_rng: bool = False,
    **kwargs: Any,
) -> Any:
    options = {"metadata_fn": metadata_fn, "name": name, "skip_rng": skip_rng}
    return linen.to_linen(nnx_class, *args, **options, **kwargs)


@_functools.wraps(linen.to_linen_class)
def to_linen_class(  # noqa: D103
    base_nnx_class: Any,
    base_metadata_fn: Any = _collections.boxed_whole,
    base_skip_rng: bool = False,
    **partial_kwargs: Any,
) -> Any:
    options = (base_nnx_class, base_metadata_fn, base_skip_rng)
    return linen.to_linen_class(*options, **partial_kwargs)


ABSENT = {"AttrPriority": "attributes are always taken in the order of their names"}
"""Names of Flax's bridge that are not here, and why."""


def __getattr__(name: str) -> Any:
    # Linen classes, so Flax is imported when they are asked for.
    if name == "ToLinen":
        return linen.linen_class()
    if name == "NNXMeta":
        return _collections.variable_box()
    if name == "wrappers":  # in Flax the file that these names are in
        return sys.modules[__name__]
    if name in ABSENT:
        raise AttributeError(f"nnx.bridge has no {name}: {ABSENT[name]}.")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
