"""TensorStore in this process: its limits, and why a forked child may not use it."""

from __future__ import annotations

import os
from typing import Any

from sortal.errors import CheckpointError

_users: set[int] = set()
"""The processes that used TensorStore: this one, or one that it was forked from."""


def refuse_fork(error: type[CheckpointError]) -> None:
    """Refuses a process forked from one that used TensorStore, which would abort."""
    if _users and os.getpid() not in _users:
        raise error(
            "this process was forked from one that had used TensorStore, whose threads "
            "do not live on in it. Start processes with the method 'spawn', as in "
            "multiprocessing.get_context('spawn')."
        )


def context(**settings: Any) -> Any:
    """A TensorStore context with these settings."""
    import tensorstore as ts

    _users.add(os.getpid())
    return ts.Context(settings)
