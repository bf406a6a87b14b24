"""Views: modules with other settings that hold the same Variables."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from sortal.errors import ArgumentError
from sortal.filters import to_filter
from sortal.functional import clone
from sortal.module import iter_modules, set_attributes


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

    A module class has a method ``set_view`` for the settings that it takes.

    Args:
      node: a Module.
      only: which modules get the settings; a module class takes its instances.
      raise_if_not_found: whether a setting that no module takes is an error.
      graph: ignored; for NNX compatibility.
      **kwargs: names of settings and their values.

    Returns:
      The new module; what is written to its Variables is written to the old one's.

    Raises:
      ArgumentError: no module chosen takes one of the settings.

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
    modules: list[Any] = [m for path, m in iter_modules(new) if chosen(path, m)]
    taken: set[str] = set()
    for module in modules:
        if hasattr(module, "set_view"):
            mine = {k: x for k, x in kwargs.items() if k in _settings(module, kwargs)}
            module.set_view(**mine)
            taken.update(mine)
    unused = [name for name in kwargs if name not in taken]
    if unused and raise_if_not_found:
        raise ArgumentError(
            f"Unused keys found in nnx.view: {unused}. None of {len(modules)} modules "
            "chosen takes them; a module takes what its method set_view has as "
            "arguments. Check the spelling and the filter, write set_view or "
            "nnx.with_attributes, or pass raise_if_not_found=False."
        )
    return new


def _settings(module: Any, names: Collection[str]) -> Collection[str]:
    """The names of the settings that a module takes."""
    parameters = inspect.signature(module.set_view).parameters
    kinds = {p.kind for p in parameters.values()}
    return names if inspect.Parameter.VAR_KEYWORD in kinds else parameters


def with_attributes(
    node: Any,
    /,
    *,
    only: Any = ...,
    raise_if_not_found: bool = True,
    graph: bool | None = None,
    **attributes: Any,
) -> Any:
    """New modules with other attributes that share the Variables of the old ones.

    Args:
      node: a Module.
      only: which modules get the attributes; a module class takes its instances.
      raise_if_not_found: whether an attribute that no module has is an error.
      graph: ignored; for NNX compatibility.
      **attributes: names and values, set where a module has the attribute.

    Returns:
      The new module; what is written to its Variables is written to the old one's.

    Raises:
      ArgumentError: no module chosen has one of the attributes.

    Example:
      >>> from sortal import nnx
      >>> model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> nnx.with_attributes(model, deterministic=True).deterministic
      True
    """
    new = clone(node, variables=False)
    set_attributes(new, only, raise_if_not_found=raise_if_not_found, **attributes)
    return new


def view_info(node: Any, /, *, only: Any = ..., graph: bool | None = None) -> str:
    """What settings ``view`` takes for the modules of a model.

    Args:
      node: a Module.
      only: which modules to list; a module class takes its instances.
      graph: ignored; for NNX compatibility.

    Returns:
      A text with the settings by class.

    Example:
      >>> from sortal import nnx
      >>> print(nnx.view_info(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))
      Dropout:
        deterministic: bool | None = None
          whether to return the input as it is.
    """
    chosen = to_filter(only)
    classes = {type(m) for path, m in iter_modules(node) if chosen(path, m)}
    lines: list[str] = []
    for cls in sorted(classes, key=lambda c: c.__qualname__):
        if hasattr(cls, "set_view"):
            lines += [f"{cls.__qualname__}:", *_told(cls)]
    return "\n".join(lines)


def _told(cls: Any) -> list[str]:
    signature = inspect.signature(cls.set_view)
    told = inspect.getdoc(cls.set_view)
    if told is None:
        return [f"  set_view{signature}"]
    described = _arguments(told)
    lines = []
    for name, p in signature.parameters.items():
        if name in ("self", "args", "kwargs"):
            continue
        default = "" if p.default is p.empty else f" = {p.default}"
        lines += [f"  {name}: {p.annotation}{default}", *described.get(name, ())]
    return lines


def _arguments(doc: str) -> dict[str, list[str]]:
    """The lines about each argument in the Args section of a docstring."""
    section = doc.partition("Args:\n")[2].partition("Returns:\n")[0]
    found: dict[str, list[str]] = {}
    name = ""
    for line in section.rstrip().splitlines():
        if line.startswith("  ") and not line.startswith("    "):
            name, _, text = line.strip().partition(":")
            found[name] = [f"    {text.strip()}"]
        elif name and line.strip():
            found[name].append(line)
    return found
