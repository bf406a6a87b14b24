"""The processes of one program, and how they agree on a save or restore."""

from __future__ import annotations

import itertools
import json
from typing import Any

import jax

from sortal._engine.jax_compat import coordinator, outside_traces
from sortal.errors import CheckpointError, TraceError

_calls = itertools.count()
_MILLISECONDS = 600_000


def not_in_a_trace(verb: str) -> None:
    """Refuses to work inside a transform, where it would be done once, on compiling.

    Args:
      verb: what is not to be done there.

    Raises:
      TraceError: a transform is being traced.
    """
    if not outside_traces():
        raise TraceError(
            f"{verb} inside a transform would run once, when it is traced, and not "
            "when the compiled function is called. Call it outside."
        )


class Group:
    """All processes of this program, for one decision that they must agree on.

    Every process makes its Groups in the same order. Process 0 leads: it alone writes
    what there is one of. Where there is one process, it agrees with itself.

    Args:
      matter: what it is about, for messages.

    Raises:
      CheckpointError: there are several processes and no way for them to talk.
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
        """Whether this process does what only one may do."""
        return self.index == 0

    def decide(self, round: str, mine: Any, fault: str = "") -> list[Any]:
        """Sends a value to the other processes, and receives theirs.

        Args:
          round: a name for this exchange, other than those before.
          mine: what this process says; JSON.
          fault: what went wrong here; empty if nothing did.

        Returns:
          What each process reported, in order.

        Raises:
          CheckpointError: something went wrong in one of the processes, or one did
            not answer within ten minutes; every process gets this error.
        """
        reports = [[mine, fault]]
        if self._client is not None:
            self._client.key_value_set(
                f"{self._name}/{round}/{self.index}", json.dumps([mine, fault])
            )
            reports = [json.loads(self._hear(round, i)) for i in range(self.count)]
        faults = [
            f"process {i}: {text}" if self.count > 1 else text
            for i, (_, text) in enumerate(reports)
            if text
        ]
        if faults:
            raise CheckpointError("\n".join(faults))
        return [x for x, _ in reports]

    def _hear(self, round: str, index: int) -> str:
        key = f"{self._name}/{round}/{index}"
        try:
            return self._client.blocking_key_value_get(key, _MILLISECONDS)
        except Exception as e:
            raise CheckpointError(
                f"process {index} did not answer about {self._matter}; it may be dead, "
                f"or not have asked for the same: {e}"
            ) from e
