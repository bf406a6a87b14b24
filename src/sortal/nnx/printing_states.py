"""What ``print`` shows of States; added to the class where NNX code first meets one."""

from __future__ import annotations

from typing import Any

from sortal._engine.paths import show
from sortal._engine.schema import kind_name
from sortal._engine.state import State
from sortal.errors import ArgumentError
from sortal.nnx.printing import STATISTICS, text


def _of_state(state: State, spec: str = "") -> str:
    rows = []
    for path, kind, value in zip(
        state.schema.paths, state.schema.kinds, state.values_list(), strict=True
    ):
        before = f"  {show(path)}: "
        if kind is not None:
            before += f"{kind_name(kind)}("
        end = "" if kind is None else ")"
        rows.append(f"{before}{text(value, before, spec)}{end}")
    return "\n".join(["State(", *rows, ")"]) if rows else "State()"


def _format_state(self: State, spec: str) -> str:
    """``stats`` for the mean and extremes of each array."""
    if spec not in ("", STATISTICS):
        raise ArgumentError(f"a State is formatted as '' or 'stats'; found {spec!r}.")
    return _of_state(self, spec)


_made: Any = State
_made.__str__, _made.__format__ = _of_state, _format_state
