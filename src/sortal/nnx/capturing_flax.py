"""What modules of Flax in a captured model sow, in the records that Flax has for it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from sortal._engine.foreign import ancestry, same_kind
from sortal._engine.paths import Path

_RECORDS = "__captures__"


def kind_of_flax(kind: Any) -> Any:
    """The kind of Flax that counts as one with a kind, or the kind itself."""
    pairs = [k for k in ancestry(kind) if k is not kind and same_kind(k, kind)]
    ours = kind.__module__.partition(".")[0] == "sortal"
    return pairs[0] if pairs and ours else kind


@contextlib.contextmanager
def recording(
    modules: Sequence[tuple[Path, Any]],
    given: Sequence[tuple[Path, Any]],
    recorded: dict[type, dict[Path, Any]],
) -> Iterator[None]:
    """Has modules of Flax record kinds; afterwards ``recorded`` has them by path.

    Args:
      modules: the modules with their paths.
      given: what has been sown before, by path.
      recorded: for each kind what was recorded.

    Yields:
      Nothing.
    """
    before = [getattr(m, _RECORDS, None) for _, m in modules]
    for path, m in modules:
        made = []
        for kind in recorded:
            mine = [(p[-1], x) for p, x in given if p[:-1] == path]
            start = {n: x.get_value() for n, x in mine if same_kind(type(x), kind)}
            made.append(kind_of_flax(kind)(start))
        setattr(m, _RECORDS, _data(tuple(made)))
    try:
        yield
    finally:
        for (path, m), old in zip(modules, before, strict=True):
            for kind, box in zip(recorded, getattr(m, _RECORDS, ()), strict=False):
                for name, value in box.get_value().items():
                    recorded[kind][(*path, name)] = kind(value)
            if old is not None:
                setattr(m, _RECORDS, _data(old))
            elif hasattr(m, _RECORDS):
                delattr(m, _RECORDS)


def _data(x: Any) -> Any:
    return sys.modules["flax.nnx.pytreelib"].data(x)
