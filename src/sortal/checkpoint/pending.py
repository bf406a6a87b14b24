"""Saves in progress: waits for them, and raises their failures."""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from sortal.errors import SaveError

_known: list[Saving] = []
_changes = threading.Lock()


class Saving:
    """A save, in progress or done: what ``save`` returns.

    Args:
      directory: where to.
      step: which step.
      work: does the rest of the saving.

    Attributes:
      directory: where the steps are.
      step: the step saved.

    Example:
      >>> import tempfile
      >>> import sortal as nnx
      >>> saving = nnx.save(tempfile.mkdtemp(), nnx.Rngs(0), step=1, wait=False)
      >>> saving.wait().step
      1
    """

    def __init__(self, directory: Path, step: int, work: Callable[[], None]):
        self.directory, self.step = directory, step
        self._work, self._failure = work, None
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Path:
        """The folder of the step."""
        return self.directory / str(self.step)

    @property
    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Saving:
        """Waits for the end.

        Returns:
          This object.

        Raises:
          SaveError: the save failed.
        """
        if self._thread is not None:
            self._thread.join()
        with _changes:
            if self in _known:
                _known.remove(self)
        if self._failure is not None:
            raise self._failure
        return self

    def run(self) -> Saving:
        """Does the work now."""
        self._work()
        return self

    def start(self) -> Saving:
        """Begins to do the work in a thread.

        The interpreter waits for it before it ends.
        """
        thread = threading.Thread(target=self._guarded, name="sortal save")
        with _changes:
            if not _known:
                atexit.unregister(_tell)
                atexit.register(_tell)
            # First start it, for another thread may join it once it is in `_known`.
            thread.start()
            self._thread = thread
            _known.append(self)
        return self

    def _guarded(self) -> None:
        try:
            self._work()
        except BaseException as e:  # noqa: BLE001 - raised by the next call
            failure = SaveError(
                f"the save of step {self.step} to {self.directory}, which ran beside "
                f"the program, failed: {e}"
            )
            failure.__cause__ = e
            self._failure = failure

    def __repr__(self) -> str:
        state = "under way" if not self.done else "failed" if self._failure else "done"
        return f"Saving({str(self.path)!r}, {state})"


def settle(directory: Path | None = None) -> None:
    """Raises the failure of an earlier save, if no call has raised it before.

    It waits for saves to ``directory``; other saves count only if they have ended.
    """
    with _changes:
        mine = [s for s in _known if s.done or s.directory == directory]
    for saving in mine:
        saving.wait()


def _tell() -> None:
    with _changes:
        left = list(_known)
    for saving in left:
        try:
            saving.wait()
        except SaveError as e:
            sys.stderr.write(f"sortal: {e}\n")
