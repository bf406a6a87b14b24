"""The processes of one program, and how they agree on a save or a restore."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax

from sortal._engine.jax_compat import outside_traces
from sortal.distributed.meeting import exchange, messenger
from sortal.errors import CheckpointError, DistributedError, TraceError

_calls = itertools.count()


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
        self._name = f"checkpoint/{next(_calls)}"
        # Found now, for a save that runs beside the program may outlive it.
        self._client: Any = None
        if self.count > 1:
            try:
                self._client = messenger(self.count)
            except DistributedError as e:
                raise CheckpointError(str(e)) from None

    @property
    def leads(self) -> bool:
        """Whether this is the leading process."""
        return self.index == 0

    def decide(self, round: str, mine: Any, fault: str = "") -> list[Any]:
        """Exchanges a JSON value, or a fault, with all processes; returns their values.

        ``round`` names the exchange; each has another name. A fault of one process, or
        no answer within ten minutes, raises a CheckpointError in every process.
        """
        key, text = f"{self._name}/{round}", json.dumps([mine, fault])
        try:
            texts = exchange(key, text, self._matter, client=self._client)
        except DistributedError as e:
            raise CheckpointError(str(e)) from e
        answers = list(map(json.loads, texts))
        faults = [
            f"process {i}: {text}" if self.count > 1 else text
            for i, (_, text) in enumerate(answers)
            if text
        ]
        if faults:
            raise CheckpointError("\n".join(faults))
        return [x for x, _ in answers]
