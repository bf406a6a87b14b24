"""A process that fails ends the others, with a message of what happened where."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from sortal._engine.jax_compat import coordinator, numbered
from sortal.distributed.meeting import exchange, processes
from sortal.errors import DistributedError

FAILED, ENDED_BY_ANOTHER, INTERRUPTED = 1, 75, 130
"""Exit codes of the process that failed, of those that it ends, and after Ctrl-C."""

_ANSWER, _GRACE = 5.0, 10.0
"""Seconds for all to say that they have heard, and for saves under way to end."""
_FAILURE, _HEARD, _LEFT = (f"sortal/failure/{x}" for x in ("first", "heard", "left"))

_work: list[Callable[[float], None]] = []
"""Waits for what is under way and should be finished."""


class Failure(NamedTuple):
    """Which process failed, where and why; all of it plain."""

    process: int
    host: str
    pid: int
    where: str
    why: str
    code: int

    def text(self, count: int) -> str:
        who = f"process {self.process} of {count} (pid {self.pid} on {self.host})"
        place = f" in {self.where}" if self.where else ""
        if self.code == INTERRUPTED:
            return f"{who} was interrupted{place}"
        return f"{who} failed{place}: {self.why}"


def watch(client: Any, shutdown_timeout: float) -> None:
    """Has failures of any process noticed in this one, and its own told to all."""
    watcher = _Watcher(client, shutdown_timeout)
    watcher.start()


class _Watcher:
    """A thread that looks for the message of a failure, now and then.

    It does not wait for it inside of JAX: a program could not end as long as it did.
    """

    def __init__(self, client: Any, shutdown_timeout: float):
        self._client, self._shutdown_timeout = client, shutdown_timeout
        self._index, self._count = numbered()
        # Process 0 answers some hundred questions in a second.
        self._interval = max(0.5, self._count / 500)
        self._at_end = threading.Event()
        self._thread = threading.Thread(
            target=self._listen, name="sortal watch", daemon=True
        )
        self._before = sys.excepthook

    def start(self) -> None:
        self._thread.start()
        sys.excepthook = self._on_exception
        # Before JAX's own, which was registered earlier: at its end a program has
        # nobody left to tell.
        atexit.register(self._on_exit)

    # ------------------------------------------------------------------- in this one
    def _on_exception(self, kind: Any, error: Any, trace: Any) -> None:
        interrupted = issubclass(kind, KeyboardInterrupt)
        if not interrupted:
            self._before(kind, error, trace)
        why = _one_line(kind, error)
        code = INTERRUPTED if interrupted else FAILED
        if self._is_over():
            return
        self._fail(_where(trace), why, code)

    def _on_exit(self) -> None:
        if self._is_over():
            return
        try:
            who = self._index, self._count
            wait = self._shutdown_timeout
            exchange("end", "", "the end of the program", wait, self._client, who)
        except DistributedError as e:
            self._fail("", f"it is at its end, and others are not: {e}", FAILED)
        self._at_end.set()
        self._thread.join(_ANSWER)

    def _is_over(self) -> bool:
        """Whether the program has called ``jax.distributed.shutdown``."""
        return coordinator() is not self._client

    def _fail(self, where: str, why: str, code: int) -> None:
        """Tells all processes, this one too, whose watcher then ends it."""
        pid = os.getpid()
        found = Failure(self._index, socket.gethostname(), pid, where, why, code)
        self._set(_FAILURE, json.dumps(found))  # fails where another was first
        self._thread.join(2 * (_ANSWER + _GRACE))
        # Nothing was heard: process 0, which carries the messages, is gone.
        _say(found.text(self._count))
        _leave(code)

    def _set(self, key: str, text: str) -> None:
        # It is there already, or nobody answers; JAX raises what it likes.
        with contextlib.suppress(Exception):
            self._client.key_value_set(key, text)

    # ------------------------------------------------------------------ in all others
    def _listen(self) -> None:
        while not self._at_end.wait(self._interval) and not self._is_over():
            try:
                found = self._client.key_value_try_get(_FAILURE)
            except Exception as e:  # noqa: BLE001 - JAX raises what it likes
                if "NOT_FOUND" in str(e):
                    continue
                return  # process 0 is gone; JAX says so and ends this process
            self._end(Failure(*json.loads(found)))

    def _end(self, failure: Failure) -> None:
        """Ends this process because one has failed."""
        everyone = set(range(self._count))
        self._set(f"{_HEARD}/{self._index}", "")
        silent = sorted(everyone - self._wait_for(_HEARD, everyone, _ANSWER))
        if not silent:  # a save needs all of them
            for wait in _work:
                wait(_GRACE)
        text = failure.text(self._count)
        if silent:
            text += (
                f"\n{processes(silent)} did not answer: killed, stopped or cut off, "
                "which may be why."
            )
        _say(text, ends=self._index if self._index != failure.process else None)
        self._set(f"{_LEFT}/{self._index}", "")
        if self._index == 0:  # it carries the messages, so it is the last to go
            self._wait_for(_LEFT, everyone - set(silent), _GRACE)
        mine = failure.process == self._index or failure.code == INTERRUPTED
        _leave(failure.code if mine else ENDED_BY_ANOTHER)

    def _wait_for(self, key: str, whom: set[int], seconds: float) -> set[int]:
        found: set[int] = set()
        until = time.monotonic() + seconds
        while not whom <= found and time.monotonic() < until:
            try:
                pairs = self._client.key_value_dir_get(f"{key}/")
            except Exception:  # noqa: BLE001 - JAX raises what it likes
                return found
            found = {int(name.rpartition("/")[2]) for name, _ in pairs}
            time.sleep(0.05)
        return found


def finish_first(wait: Callable[[float], None]) -> None:
    """Has ``wait`` called, with some seconds, before a failure ends this process."""
    _work.append(wait)


def _where(trace: Any) -> str:
    """The innermost place of a traceback that is in nobody's library."""
    frames = list(traceback.walk_tb(trace))
    own = [(frame, line) for frame, line in frames if not _of_a_library(frame)]
    if not (chosen := (own or frames)[-1:]):
        return ""
    frame, line = chosen[0]
    return f"{frame.f_code.co_filename}:{line}, {frame.f_code.co_name}"


def _of_a_library(frame: Any) -> bool:
    module = frame.f_globals.get("__name__", "")
    here = __name__.partition(".")[0]
    return (
        module.partition(".")[0] == here or "site-packages" in frame.f_code.co_filename
    )


def _one_line(kind: type[BaseException], error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{kind.__name__}: {text[:500]}" if text else kind.__name__


def _say(text: str, ends: int | None = None) -> None:
    after = "" if ends is None else f"\nProcess {ends} ends because of it."
    sys.stderr.write(f"sortal: {text}{after}\n")


def _leave(code: int) -> None:
    # Only so does a process end whose main thread waits inside of JAX.
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)
