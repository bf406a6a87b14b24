"""Names for kinds, which differ where two classes have one name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sortal._engine import variable as _kinds
from sortal._engine.variable import Variable

Kind = type | None
UNLABELLED = "unlabelled array"

BUILT_IN: dict[str, type] = {
    name: kind
    for name, kind in vars(_kinds).items()
    if isinstance(kind, type) and issubclass(kind, Variable) and kind.__name__ == name
}


def labels(kinds: Iterable[Kind]) -> dict[Kind, str]:
    """A name for each kind, different from all the others.

    Args:
      kinds: classes, or None for unlabelled arrays.

    Returns:
      Kind to name: bare where it is unique, else with its module.

    Example:
      >>> import sortal as nnx
      >>> class BatchStat(nnx.Variable): pass
      >>> sorted(labels([nnx.BatchStat, BatchStat, nnx.Param, None]).values())[1:]
      ['naming.BatchStat', 'sortal.BatchStat', 'unlabelled array']
    """
    kinds = list(dict.fromkeys(kinds))
    found: dict[Kind, str] = {}
    for kind in kinds:
        if kind is None:
            found[kind] = UNLABELLED
            continue
        same = [k for k in kinds if k is not None and k.__name__ == kind.__name__]
        found[kind] = kind.__name__ if len(same) == 1 else _qualified(kind, same)
    return found


def _qualified(kind: type, same: Sequence[type]) -> str:
    for name in (_short_name, full_name):
        if [name(k) for k in same].count(name(kind)) == 1:
            return name(kind)
    return f"{full_name(kind)} #{same.index(kind) + 1}"


def _short_name(kind: type) -> str:
    if kind is BUILT_IN.get(kind.__name__):
        return f"sortal.{kind.__name__}"
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def full_name(kind: type) -> str:
    """A kind with the module that defines it; built-in ones as users write them.

    Args:
      kind: a class.

    Returns:
      The name.

    Example:
      >>> import sortal as nnx
      >>> full_name(nnx.BatchStat)
      'sortal.BatchStat'
    """
    if kind is BUILT_IN.get(kind.__name__):
        return f"sortal.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
