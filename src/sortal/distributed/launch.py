"""The command ``sortal launch``: several processes on this machine, as one program."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from sortal.distributed.failures import ENDED_BY_ANOTHER
from sortal.distributed.starting import COUNT, INDEX

_PATIENCE, _MERCY, _TICK = 25.0, 2.0, 0.02
"""Seconds: for processes to end after one has failed or a signal came; after SIGTERM
where they can do nothing more; and between two looks at them."""

# The leader of the group of all processes. It reads from a pipe that the launcher alone
# can write to; when the launcher is gone, whatever the reason, it ends the group.
_GUARD = f"trap '' HUP INT TERM; read _; kill -TERM 0; sleep {_MERCY:g}; kill -KILL 0"

_FORWARDED = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class End(NamedTuple):
    """How a process ended: a code below 0 is a signal, as in ``subprocess``."""

    rank: int
    code: int
    stopped: bool = False

    def __str__(self) -> str:
        if self.stopped:
            return f"process {self.rank} was stopped and not continued"
        if self.code < 0:
            return f"process {self.rank} was ended by {signal.Signals(-self.code).name}"
        return f"process {self.rank} ended with exit code {self.code}"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Runs a program in several processes; returns the exit code.

    It is that of the process that failed first, 128 + N after signal N, 0 if all went
    well.
    """
    options = _parse(argv, prog)
    command = [sys.executable, *options.program]
    run = _Run(command, _environments(options.processes, options.devices))
    return run.run()


def _parse(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [-n N] [--devices N] PROGRAM.py ... | -m MODULE ...",
        description="Run a Python program in several processes on this machine, as one "
        "program: each calls sortal.distributed.initialize(). Every line of output "
        "has the number of its process before it. When one fails, all are ended.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-n", "--processes", type=_positive, default=2, help="how many (2)")
    add("--devices", type=_positive, help="devices of each process")
    add("-m", dest="module", action="store_true", help="PROGRAM is a module")
    add("program", nargs=argparse.REMAINDER, help="the program and its arguments")
    options = parser.parse_args(argv)
    if not options.program:
        parser.error("which program? Write: sortal launch -n 4 train.py")
    if options.module:
        options.program.insert(0, "-m")
    elif not Path(options.program[0]).exists():
        parser.error(f"there is no program {options.program[0]!r}")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, found {text}")
    return int(text)


def _environments(count: int, devices: int | None) -> list[dict[str, str]]:
    """The variables of each process, as ``initialize`` and JAX read them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "PYTHONUNBUFFERED": "1",
        COUNT: str(count),
    }
    if devices is not None:
        common["JAX_NUM_CPU_DEVICES"] = str(devices)
        # JAX refuses both of two ways to say this.
        flags = common.get("XLA_FLAGS", "")
        common["XLA_FLAGS"] = re.sub(
            r"--xla_force_host_platform_device_count=\S*", "", flags
        )
    found = []
    for rank in range(count):
        mine = {**common, INDEX: str(rank)}
        if devices is not None:  # these of the accelerators of this machine
            ids = range(rank * devices, (rank + 1) * devices)
            mine["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, ids))
        if rank == 0 and sys.stderr.isatty():
            # A bar is drawn through a pipe only where rich is told that it ends in a
            # terminal; the number before each line takes some of its width.
            width = shutil.get_terminal_size().columns - len(_prefix(0))
            mine |= {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}
            mine["COLUMNS"] = str(max(width, 1))
        found.append(mine)
    return found


def _prefix(rank: int) -> bytes:
    return f"[{rank}] ".encode()


class _Run:
    """All processes, from their start to the end of the last."""

    def __init__(self, command: list[str], environments: list[dict[str, str]]):
        self._command, self._environments = command, environments
        self._children: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._ends: list[End] = []
        self._stopped: set[int] = set()
        self._signals: list[int] = []

    def run(self) -> int:
        """Starts them, and waits; in any case none is left."""
        guard = subprocess.Popen(  # noqa: S603 - our own text
            ["/bin/sh", "-c", _GUARD], stdin=subprocess.PIPE, process_group=0
        )
        try:
            with _handled(self._signals.append):
                for environment in self._environments:
                    self._start(environment, guard.pid)
                return self._wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guard.pid, signal.SIGKILL)
            for process in (guard, *self._children):
                process.wait()
            until = time.monotonic() + _MERCY
            for reader in self._readers:  # one waits on where something left holds it
                reader.join(max(0, until - time.monotonic()))
            guard.communicate()

    def _start(self, environment: dict[str, str], group: int) -> None:
        child = subprocess.Popen(  # noqa: S603 - what the user asked for
            self._command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=group,
        )
        prefix = _prefix(len(self._children))
        self._children.append(child)
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            reader = threading.Thread(
                target=_copy_lines, args=(source, target, prefix), daemon=True
            )
            reader.start()
            self._readers.append(reader)

    # ----------------------------------------------------------------------- the end
    def _wait(self) -> int:
        until, asked = float("inf"), 0
        while len(self._ends) < len(self._children):
            time.sleep(_TICK)
            for number in self._forward():
                if asked:
                    return 128 + number  # asked twice: at once
                asked, until = number, time.monotonic() + _PATIENCE
            before = len(self._ends)
            self._look()
            failed = [end for end in self._ends[before:] if end.code]
            if until == float("inf") and failed:
                until = time.monotonic() + self._allow(failed)
            if time.monotonic() > until:
                left = ", ".join(str(rank) for rank, _ in self._running())
                self._say("these have not ended, and are killed: " + left)
                break
        if asked:
            return 128 + asked
        if (end := culprit(self._ends, self._stopped)) is None:
            return 0
        self._say(f"{end}.")
        return end.code if end.code >= 0 else 128 - end.code

    def _forward(self) -> Iterator[int]:
        """Sends on what signals came; yields those that ask for the end."""
        while self._signals:
            number = self._signals.pop(0)
            self._send(number)
            if number in _ENDING:
                yield number

    def _send(self, number: int) -> None:
        for _, child in self._running():  # an ended one's number may be another's
            os.kill(child.pid, number)

    def _look(self) -> None:
        """Notes which processes have ended, were stopped, or go on."""
        for rank, child in self._running():
            flags = os.WNOHANG | os.WUNTRACED | os.WCONTINUED
            pid, status = os.waitpid(child.pid, flags)
            if not pid:
                continue
            if os.WIFSTOPPED(status):
                self._stopped.add(rank)
                self._say(f"process {rank} (pid {child.pid}) was stopped.")
            elif os.WIFCONTINUED(status):
                self._stopped.discard(rank)
            else:
                child.returncode = os.waitstatus_to_exitcode(status)
                self._ends.append(End(rank, child.returncode))

    def _allow(self, failed: list[End]) -> float:
        """How long the others have to end, once some have failed.

        A process that an exception ends has told them, and they may have a save to
        finish. One that a signal ended has told nobody, and no save can succeed.
        """
        told = all(end.code > 0 for end in failed)
        self._say(f"{', '.join(map(str, failed))}; the others are ended.")
        if told:
            return _PATIENCE
        self._send(signal.SIGTERM)
        return _MERCY

    def _running(self) -> list[tuple[int, subprocess.Popen[bytes]]]:
        """The processes that have not ended, by rank."""
        ended = {end.rank for end in self._ends}
        return [(r, x) for r, x in enumerate(self._children) if r not in ended]

    def _say(self, text: str) -> None:
        sys.stderr.write(f"sortal launch: {text}\n")
        sys.stderr.flush()


def culprit(ends: Iterable[End], stopped: Iterable[int]) -> End | None:
    """The process because of which all ended; None where all went well.

    One that was stopped and is still there; else the first in time that ended badly on
    its own account: not because of another, and not by JAX, which aborts a process when
    it hears no more from another.
    """
    bad = [end for end in ends if end.code]
    if not bad:
        return None
    for rank in stopped:
        return End(rank, -signal.SIGSTOP, stopped=True)
    own = [e for e in bad if e.code not in (ENDED_BY_ANOTHER, -signal.SIGABRT)]
    return (own or bad)[0]


@contextlib.contextmanager
def _handled(note: Callable[[int], Any]) -> Iterator[None]:
    """A block in which signals are noted, for the loop to send on."""
    before = {}
    for name in _FORWARDED:
        number = getattr(signal, name)
        if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
            continue  # as under nohup
        before[number] = signal.signal(number, lambda n, frame: note(n))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_writing = threading.Lock()


def _copy_lines(source: BinaryIO, target: Any, prefix: bytes) -> None:
    """Copies output line by line; a carriage return, as of a bar, ends a line too."""
    held: list[bytes] = []  # of a line that has not ended, which may be very long
    with source:
        while data := source.read1(1 << 16):  # type: ignore[attr-defined]
            first, *lines = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", data)
            held.append(first)
            if lines:
                *lines, rest = b"".join(held), *lines
                _write(target, b"".join(prefix + line for line in lines))
                held = [rest] if rest else []
    if held:
        _write(target, prefix + b"".join(held) + b"\n")


def _write(target: Any, data: bytes) -> None:
    with _writing, contextlib.suppress(OSError, ValueError):
        raw = getattr(target, "buffer", None)
        if raw is None:
            target.write(data.decode(errors="replace"))
        else:
            raw.write(data)
        target.flush()
