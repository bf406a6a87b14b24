"""Checkpoints: the steps of one training, which to keep, and which is the best."""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Mapping
from typing import Any, Self

from sortal.checkpoint import files
from sortal.checkpoint.manifest import Manifest
from sortal.checkpoint.pending import Saving, settle
from sortal.checkpoint.restoring import Restored, find_step, restore
from sortal.checkpoint.saving import begin
from sortal.errors import (
    ArgumentError,
    CheckpointError,
    NoCheckpointError,
    SaveError,
    listing,
)
from sortal.policy.policy import Policy


class Checkpoints:
    """The steps of one training run in one directory.

    Its first save locks the directory; other writers are refused until ``close``, the
    end of a ``with`` block, or the end of the process. Reading is always possible.

    Args:
      directory: where the steps are, a path or an address such as
        ``s3://bucket/key``; it is made if need be.
      keep: how many of the steps saved last stay; None for all. Steps that cannot be
        read, or that no ``Checkpoints`` saved, do not count and are never deleted.
      keep_every: steps that are multiples of this are never deleted.
      best: the name of a metric; the step that is best by it stays too.
      mode: ``"max"`` if more of the metric is better, else ``"min"``.
      policy: a Policy, whose column ``checkpoint`` says what is saved.

    Raises:
      ArgumentError: ``keep``, ``keep_every``, ``best`` or ``mode`` has another value,
        or the directory is neither a path nor an address of an object store.

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
        if mode not in ("max", "min"):
            bad.append(f"mode={mode!r}")
        if best is not None and type(best) is not str:
            bad.append(f"best={best!r:.60}")
        if bad:
            raise ArgumentError(
                "keep and keep_every are numbers from 1 on, or None, mode is 'max' or "
                f"'min', and best the name of a metric; found {', '.join(bad)}."
            )
        self.directory = files.located(directory)
        self._keep, self._keep_every = keep, keep_every
        self._best, self._mode, self._policy = best, mode, policy
        self._lock: Any = None
        self._metrics: dict[str, Mapping[str, float]] = {}

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
          SaveError: as ``save``; ``metrics`` lacks what ``best`` asks for, or has
            something that is no number.
          WriterError: another writer is at work in the directory.
        """
        number = files.step_number(step)
        found = _numbers(metrics or {})
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

    def _take_lock(self) -> contextlib.AbstractContextManager[Any]:
        if self._lock is None or not self._lock.holds:
            self._lock = files.on(self.directory).Lock(self.directory)
            # A manager that is dropped must release the lock.
            weakref.finalize(self, self._lock.release)
        return contextlib.nullcontext(self._lock)  # held beyond the end of a save

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

    def _delete_old(self, saved: Manifest) -> None:
        """Deletes what need not stay, of the steps that managers saved.

        Only whole steps count as kept, and one that cannot be read is not deleted.
        """
        if self._keep is None:
            return
        self._metrics[saved.folder] = saved.metrics
        older = [step for step in files.by_age(self.directory) if step.kept]
        found, left = list(older), self._keep
        while older and left:
            step = older.pop()
            left -= step.number == saved.step or files.is_whole(self.directory, step)
        every = self._keep_every
        older = [x for x in older if every is None or x.number % every]
        if older and self._best is not None:
            best = self._ranked(found)
            whole = (x for x in best if files.is_whole(self.directory, x))
            stays = next(whole, None)
            older = [x for x in older if x != stays]
        for step in older:
            if self._metrics_of(step) is not None:
                files.forget(self.directory, step.number)

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
    def restore(
        self, root: Any, /, *, step: int | str = "latest", **how: Any
    ) -> Restored:
        """Reads a step into a live model, as the function ``restore`` does.

        Args:
          root: what was given to ``save``.
          step: a number; ``"latest"``, the step saved last; or ``"best"``, an older
            step perhaps, which has no ``keep-last`` leaves: give ``partial=True``.
          **how: the other arguments of ``restore``.

        Returns:
          What was restored.

        Raises:
          NoCheckpointError: there is no such step.
          DamagedError: a file is damaged, missing, or not what was written.
          RestoreError: the checkpoint does not fit the model.
        """
        settle(self.directory)
        how.setdefault("policy", self._policy)
        number = self._find(step) if step == "best" else step
        while True:
            try:
                return restore(self.directory, root, step=number, **how)
            except NoCheckpointError:  # deleted just now, if there is a better one
                if step != "best" or (now := self._find(step)) == number:
                    raise
                number = now

    def steps(self) -> tuple[int, ...]:
        """The numbers of all committed steps, in rising order."""
        return tuple(files.steps(self.directory))

    def latest(self) -> int | None:
        """The number of the step saved last; None where there is none."""
        found = files.by_age(self.directory)
        return found[-1].number if found else None

    def best(self) -> int | None:
        """The number of the best step; None where no step has the metric."""
        found = self._ranked(files.by_age(self.directory))
        return found[0].number if found else None

    def _find(self, step: int | str) -> int:
        if step != "best":
            return find_step(self.directory, step)
        found = self.best()
        if found is None and self._best is None:
            raise NoCheckpointError(
                "no step is best, for this Checkpoints has no metric to tell by: give "
                "it the name of one, as in Checkpoints(directory, best='accuracy')."
            )
        if found is None:
            raise NoCheckpointError(
                f"no step in {self.directory} has the metric {self._best!r}."
            )
        return found

    def _ranked(self, steps: list[files.Step]) -> list[files.Step]:
        """The steps that have the metric, best first; of equal ones the higher."""
        name, sign = self._best or "", 1 if self._mode == "max" else -1
        scores = [
            (sign * metrics.get(name, math.nan), step.number, step)
            for step in steps
            if (metrics := self._metrics_of(step)) is not None
        ]
        scores = [x for x in scores if not math.isnan(x[0])]
        return [step for *_, step in sorted(scores, reverse=True)]

    def _metrics_of(self, step: files.Step) -> Mapping[str, float] | None:
        """The metrics of a step; None where its manifest cannot be read.

        They are kept by the name of its folder, which only one save has and whose
        metrics never change.
        """
        if step.folder not in self._metrics:
            try:
                body = files.glance(self.directory, step.number)
            except CheckpointError:
                return None
            if body["folder"] != step.folder:  # replaced meanwhile
                return body["metrics"]
            self._metrics[step.folder] = body["metrics"]
        return self._metrics[step.folder]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    faults: list[str] = []
    if not isinstance(metrics, Mapping):
        faults, metrics = [f"{metrics!r:.60}"], {}
    for name, x in metrics.items():
        try:
            found[name] = float(x)
        except (TypeError, ValueError, OverflowError):
            faults.append(f"{name}: {x!r:.60}")
            continue
        if type(name) is not str or isinstance(x, str):
            faults.append(f"{name!r}: {x!r:.60}")
    if faults:
        raise SaveError(
            "metrics are numbers by name, as in metrics={'loss': 0.5}; found:\n"
            f"{listing(faults)}"
        )
    return found
