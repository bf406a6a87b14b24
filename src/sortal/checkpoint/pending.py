"""Saves in progress: waits for them, and raises their failures."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from sortal.checkpoint.files import Location
from sortal.distributed.failures import finish_first
from sortal.errors import SaveError

_known: list[Saving] = []
_changes = threading.Lock()
_told = threading.Event()
"""Set once ``_tell``, a handler at exit, was called or will not be."""
if not threading.main_thread().is_alive():
    _told.set()


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

    def __init__(self, directory: Location, step: int, work: Callable[[], None]):
        self.directory, self.step = directory, step
        self._work: Callable[[], None] | None = work
        self._failure: SaveError | None = None
        self._thread: threading.Thread | None = None

    @property
    def path(self) -> Location:
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
        work, self._work = self._work, None  # it holds the arrays
        if work is not None:
            work()
        return self

    def start(self) -> Saving:
        """Begins to do the work in a thread.

        The interpreter waits for it before it ends. When it already ends it starts no
        thread, so that the work is done now.
        """
        if not threading.main_thread().is_alive():
            self._guarded()
            with _changes:
                _known.append(self)
            if _told.is_set():
                _tell()
            return self
        thread = threading.Thread(target=self._guarded, name="sortal save")
        with _changes:
            # First start it, for another thread may join it once it is in `_known`.
            thread.start()
            self._thread = thread
            _known.append(self)
        return self

    def _guarded(self) -> None:
        try:
            self.run()
        except BaseException as e:  # noqa: BLE001 - raised by the next call
            failure = SaveError(
                f"the save of step {self.step} to {self.directory}, which ran beside "
                f"the program, failed: {e}"
            )
            failure.add_note("".join(traceback.format_exception(e)))
            _release(e)
            failure.__cause__ = e
            self._failure = failure

    def __repr__(self) -> str:
        state = "under way" if not self.done else "failed" if self._failure else "done"
        return f"Saving({str(self.path)!r}, {state})"


def settle(directory: Location | None = None) -> None:
    """Raises the failure of an earlier save, if no call has raised it before.

    It waits for saves to ``directory``; other saves count only if they have ended.
    """
    with _changes:
        mine = [s for s in _known if s.done or s.directory == directory]
    for saving in mine:
        saving.wait()


def _finish(seconds: float) -> None:
    """Waits for saves under way, but not for long; their failures stay."""
    with _changes:
        threads = [s._thread for s in _known if s._thread is not None]
    until = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))


def _release(error: BaseException | None) -> None:
    """Drops the tracebacks of an error, for their frames hold the arrays."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _tell() -> None:
    _told.set()
    with _changes:
        left = list(_known)
    failed = False
    for saving in left:
        try:
            saving.wait()
        except SaveError as e:
            failed = True
            sys.stderr.write(f"sortal: {e}\n")
    if failed:
        # The only way to an exit code from here. Handlers that were registered before
        # this module was imported are not called.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


atexit.register(_tell)
finish_first(_finish)
