"""Names for kinds, which differ where two classes have one name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Kind = type | None


def labels(kinds: Iterable[Kind]) -> dict[Kind, str]:
    """A name for each kind: bare where it is unique, else with the module.

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
            found[kind] = "unlabelled array"
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
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"


def full_name(kind: type) -> str:
    """The name of a kind with its module, which is ``sortal`` for built-in kinds.

    Example:
      >>> import sortal as nnx
      >>> full_name(nnx.BatchStat)
      'sortal.BatchStat'
    """
    return f"{kind.__module__}.{kind.__qualname__}"
