"""The processes of one program, and how they agree on a save or a restore."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax

from sortal._engine.jax_compat import coordinator, outside_traces
from sortal.errors import CheckpointError, TraceError

_calls = itertools.count()
_MILLISECONDS = 600_000


def not_in_a_trace(verb: str) -> None:
    """Refuses to work inside a transform, where it would run once, at tracing."""
    if not outside_traces():
        raise TraceError(
            f"{verb} inside a transform would run once, when it is traced, and not "
            "when the compiled function is called. Call it outside."
        )


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """A block that makes many objects, all of them kept, and no garbage in cycles.

    The collector would walk over all of them again and again: half of the time of a
    save of 100,000 leaves.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


class Group:
    """All processes of this program, for one operation that they must agree on.

    Every process makes its Groups in the same order. Process 0 leads: it alone writes
    the files that exist once. ``matter`` names the operation in messages.

    Raises:
      CheckpointError: there are several processes, and no coordinator.
    """

    def __init__(self, matter: str):
        self.index, self.count = jax.process_index(), jax.process_count()
        self._matter = matter
        self._name = f"sortal/{next(_calls)}"
        self._client: Any = coordinator() if self.count > 1 else None
        if self.count > 1 and self._client is None:
            raise CheckpointError(
                f"{self.count} processes run this program and cannot agree on a "
                "checkpoint: call jax.distributed.initialize() in each of them first."
            )

    @property
    def leads(self) -> bool:
        """Whether this is the leading process."""
        return self.index == 0

    def decide(self, round: str, mine: Any, fault: str = "") -> list[Any]:
        """Exchanges a JSON value, or a fault, with all processes; returns their values.

        ``round`` names the exchange; each has another name. A fault of one process, or
        no answer within ten minutes, raises a CheckpointError in every process.
        """
        answers = [[mine, fault]]
        if self._client is not None:
            self._client.key_value_set(
                f"{self._name}/{round}/{self.index}", json.dumps([mine, fault])
            )
            answers = [json.loads(self._wait(round, i)) for i in range(self.count)]
        faults = [
            f"process {i}: {text}" if self.count > 1 else text
            for i, (_, text) in enumerate(answers)
            if text
        ]
        if faults:
            raise CheckpointError("\n".join(faults))
        return [x for x, _ in answers]

    def _wait(self, round: str, index: int) -> str:
        key = f"{self._name}/{round}/{index}"
        try:
            return self._client.blocking_key_value_get(key, _MILLISECONDS)
        except Exception as e:
            raise CheckpointError(
                f"process {index} did not answer about {self._matter}; it may be dead, "
                f"or not have asked for the same: {e}"
            ) from e
