"""Views: modules of other settings around the same Variables."""

from __future__ import annotations

from typing import Any

from sortal.errors import ArgumentError
from sortal.filters import to_filter
from sortal.functional import clone
from sortal.module import iter_modules


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
    new, chosen = clone(node, variables=False), to_filter(only)
    modules = [m for path, m in iter_modules(new) if chosen(path, m)]
    absent = [n for n in kwargs if not any(hasattr(m, n) for m in modules)]
    if absent and raise_if_not_found:
        raise ArgumentError(
            f"no module of {len(modules)} chosen has the attribute "
            f"{', '.join(map(repr, absent))}. Check the spelling and only=, or pass "
            "raise_if_not_found=False."
        )
    for module in modules:
        for name, value in kwargs.items():
            if hasattr(module, name):
                setattr(module, name, value)
    return new
