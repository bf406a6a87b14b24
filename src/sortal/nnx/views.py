"""Views: modules with other settings that hold the same Variables."""

from __future__ import annotations

from typing import Any

from sortal.functional import clone
from sortal.module import set_where_present


def view(
    node: Any,
    /,
    *,
    only: Any = ...,
    raise_if_not_found: bool = True,
    graph: bool | None = None,
    **kwargs: Any,
) -> Any:
    """New modules with other settings that share the Variables of the old ones.

    Args:
      node: a Module.
      only: which modules get the settings; a module class takes its instances.
      raise_if_not_found: whether a setting that no module has is an error.
      graph: ignored; for NNX compatibility.
      **kwargs: names of attributes and their values, set where a module has them.

    Returns:
      The new module; what is written to its Variables is written to the old one's.

    Raises:
      ArgumentError: no module chosen has one of the attributes.

    Example:
      >>> from sortal import nnx
      >>> model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
      >>> frozen = nnx.view(model, use_running_average=True)
      >>> model.use_running_average, frozen.use_running_average
      (False, True)
      >>> frozen.mean is model.mean
      True
    """
    new = clone(node, variables=False)
    set_where_present(new, only, kwargs, raise_if_not_found)
    return new
