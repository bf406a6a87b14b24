"""Checkpoints: the steps of one training, which to keep, and which is the best."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

from sortal.checkpoint import files
from sortal.checkpoint.pending import Saving, settle
from sortal.checkpoint.restoring import Restored, find_step, restore
from sortal.checkpoint.saving import begin
from sortal.errors import ArgumentError, CheckpointError, NoCheckpointError, SaveError
from sortal.policy.policy import Policy


class Checkpoints:
    """The steps of one training run in one directory.

    Its first save locks the directory; other writers are refused until ``close``, the
    end of a ``with`` block, or the end of the process. Reading is always possible.

    Args:
      directory: where the steps are; it is made if need be.
      keep: how many of the newest steps stay; None for all.
      keep_every: steps that are multiples of this are never deleted.
      best: the name of a metric; the step that is best by it stays too.
      mode: ``"max"`` if more of the metric is better, else ``"min"``.
      policy: a Policy, whose column ``checkpoint`` says what is saved.

    Raises:
      ArgumentError: ``keep``, ``keep_every`` or ``mode`` has another value, or the
        directory is no local path.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> with nnx.Checkpoints(tempfile.mkdtemp(), keep=2, best="accuracy") as kept:
      ...     for step, accuracy in enumerate([0.1, 0.9, 0.2, 0.3]):
      ...         saving = kept.save(model, step=step, metrics={"accuracy": accuracy})
      ...     kept.steps(), kept.restore(model, step="best").step
      ((1, 2, 3), 1)
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_every: int | None = None,
        best: str | None = None,
        mode: str = "max",
        policy: Policy | None = None,
    ):
        counts = {"keep": keep, "keep_every": keep_every}
        bad = [
            f"{name}={n!r}"
            for name, n in counts.items()
            if n is not None and (type(n) is not int or n < 1)
        ]
        if bad or mode not in ("max", "min"):
            raise ArgumentError(
                "keep and keep_every are numbers from 1 on, or None, and mode is "
                f"'max' or 'min'; found {', '.join(bad) or f'mode={mode!r}'}."
            )
        self.directory = files.local(directory)
        self._keep, self._keep_every = keep, keep_every
        self._best, self._mode, self._policy = best, mode, policy
        self._lock: files.Lock | None = None

    # ----------------------------------------------------------------------- writing
    def save(
        self,
        root: Any,
        /,
        *,
        step: int,
        only: Any = None,
        metrics: Mapping[str, float] | None = None,
        metadata: Any = None,
        wait: bool = True,
    ) -> Saving:
        """Saves a step, then deletes those that need not be kept.

        Args:
          root: a Module, or a container of Modules, Variables and arrays.
          step: the number of the step.
          only: a filter; leaves that it does not take are not saved.
          metrics: numbers by name, kept with the step.
          metadata: plain JSON, kept with the step.
          wait: False returns at once and writes in a thread.

        Returns:
          A Saving.

        Raises:
          SaveError: as ``save``; or ``metrics`` lacks what ``best`` asks for.
          WriterError: another writer is at work in the directory.
        """
        number = files.step_number(step)
        found = {name: float(x) for name, x in (metrics or {}).items()}
        if self._best is not None and self._best not in found:
            raise SaveError(
                f"the best step is that of the {self._mode} {self._best!r}, which is "
                f"not among the metrics {sorted(found)}. Write save(..., metrics="
                f"{{{self._best!r}: ...}})."
            )
        return begin(
            self.directory, root, number, only=only, policy=self._policy,
            metadata=metadata, wait=wait, metrics=found, lock=self._take_lock,
            afterwards=self._delete_old,
        )  # fmt: skip

    def _take_lock(self) -> Callable[[], None]:
        if self._lock is None:
            self._lock = files.Lock(self.directory)
            # A manager that is dropped must release the lock.
            weakref.finalize(self, self._lock.release)
        return lambda: None  # the end of one save does not release it

    def delete(self, step: int | str) -> None:
        """Deletes a step.

        Args:
          step: its number, or ``"latest"`` or ``"best"``.

        Raises:
          NoCheckpointError: it is not there.
          WriterError: another writer is at work in the directory.
        """
        settle(self.directory)
        number = self._find(step)
        if number not in files.steps(self.directory):
            raise NoCheckpointError(f"no step {number} in {self.directory}.")
        self._take_lock()
        with files.as_save_error(f"deleting step {number} of {self.directory}"):
            files.forget(self.directory, number)

    def _delete_old(self) -> None:
        if self._keep is None:
            return
        found = files.steps(self.directory)
        stay = set(found[-self._keep :])
        if self._keep_every is not None:
            stay |= {n for n in found if n % self._keep_every == 0}
        if self._best is not None and (best := self._best_of(found)) is not None:
            stay.add(best)
        for number in found:
            if number not in stay:
                files.forget(self.directory, number)

    def close(self) -> None:
        """Waits for saves under way, and lets other writers in.

        Raises:
          SaveError: a save under way failed.
        """
        try:
            settle(self.directory)
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ----------------------------------------------------------------------- reading
    def restore(self, root: Any, /, *, step: int | str = "latest", **how: Any) -> Any:
        """Reads a step into a live model, as the function ``restore`` does.

        Args:
          root: what was given to ``save``.
          step: a number, ``"latest"`` or ``"best"``.
          **how: the other arguments of ``restore``.

        Returns:
          What was restored.

        Raises:
          NoCheckpointError: there is no such step.
          DamagedError: a file is damaged, missing, or not what was written.
          RestoreError: the checkpoint does not fit the model.
        """
        settle(self.directory)
        if step == "best":
            step = self._find(step)
        how.setdefault("policy", self._policy)
        found: Restored = restore(self.directory, root, step=step, **how)
        return found

    def steps(self) -> tuple[int, ...]:
        """The numbers of all committed steps, in rising order."""
        return tuple(files.steps(self.directory))

    def latest(self) -> int | None:
        """The number of the newest step; None where there is none."""
        return next(reversed(self.steps()), None)

    def best(self) -> int | None:
        """The number of the best step; None where no step has the metric."""
        return self._best_of(files.steps(self.directory))

    def _find(self, step: int | str) -> int:
        if step != "best":
            return find_step(self.directory, step)
        found = self.best()
        if found is None:
            raise NoCheckpointError(
                f"no step in {self.directory} has the metric {self._best!r}."
            )
        return found

    def _best_of(self, steps: list[int]) -> int | None:
        scores = [(score, n) for n in steps if (score := self._score(n)) is not None]
        return max(scores)[1] if scores else None

    def _score(self, step: int) -> float | None:
        """The score of a step, higher is better; None where it is unknown."""
        try:
            value = files.read_manifest(self.directory, step).metrics.get(
                self._best or "", math.nan
            )
        except CheckpointError:
            return None
        if math.isnan(value):
            return None
        return value if self._mode == "max" else -value
