"""sortal launch: several processes, one output, one exit code, and nothing left."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import time

import pytest

from sortal.distributed import launch as launching
from sortal.distributed.launch import End, culprit
from sortal.inspect import cli

# A program that says when it runs and can be told what to do by what it is given.
SLEEPER = """
import os, signal, subprocess, sys, time
rank = os.environ["SORTAL_PROCESS_ID"]
child = subprocess.Popen(["sleep", "300"])
print("running", os.getpid(), child.pid, flush=True)
time.sleep(300)
"""


def gone(pid):
    """Whether a process has ended, or is about to: it may be a zombie of nobody yet."""
    for _ in range(500):
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)],  # noqa: S607 - whichever ps there is
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.02)
    return False


def test_each_process_has_its_variables_and_each_line_its_number(launch):
    text = """
import os, sys
print("out", *sys.argv[1:], sorted(k for k in os.environ if "SORTAL_P" in k))
sys.stderr.write(os.environ["SORTAL_PROCESS_ID"] + os.environ["SORTAL_NUM_PROCESSES"])
sys.stdout.write("10%\\r20%\\rno end")
for name in ("JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS", "XLA_FLAGS"):
    sys.stderr.write(" " + os.environ.get(name, "none"))
address = os.environ["JAX_COORDINATOR_ADDRESS"]
assert address.startswith("127.0.0.1:"), address
assert os.environ["JAX_COORDINATOR_BIND_ADDRESS"] == address
"""
    done = launch(text, "--json", "-n", "7", "-h", n=2, devices=3).end()
    assert done.code == 0, done.err
    for rank in "01":
        assert f"[{rank}] out --json -n 7 -h ['SORTAL_PROCESS_ID']" in done.out
        mine = [line for line in done.out if line.startswith(f"[{rank}] ")]
        assert mine[1:] == [f"[{rank}] {x}" for x in ("10%", "20%", "no end")]
    assert "[0] 02 3 0,1,2" in done.err
    assert "[1] 12 3 3,4,5" in done.err


def test_the_exit_code_is_that_of_the_process_that_failed_first(launch):
    text = """
import os, sys, time
if os.environ["SORTAL_PROCESS_ID"] == "1":
    sys.exit(7)
time.sleep(0.5)
sys.exit(75)
"""
    done = launch(text, n=3).end()
    assert done.code == 7
    assert "sortal launch: process 1 ended with exit code 7.\n" in done.err


def test_a_process_that_a_signal_ends_ends_the_others_and_what_they_started(launch):
    run = launch(SLEEPER, n=2)
    pids = [int(x) for _ in range(2) for x in run.until("running").split()[2:]]
    os.kill(pids[0], signal.SIGKILL)
    done = run.end()
    assert done.code == 128 + signal.SIGKILL
    assert "was ended by SIGKILL; the others are ended." in done.err
    assert all(map(gone, pids))


def test_nothing_is_left_when_the_launcher_itself_is_killed(launch):
    run = launch(SLEEPER, n=2)
    pids = [int(x) for _ in range(2) for x in run.until("running").split()[2:]]
    run.process.kill()
    run.process.wait(30)
    assert all(map(gone, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_every_process(launch, number):
    text = """
import os, signal, sys, time
def handler(number, frame):
    print("got", number, flush=True)
    if number != signal.SIGUSR1:
        sys.exit(0)
for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(n, handler)
print("running", flush=True)
while True:
    time.sleep(300)
"""
    run = launch(text, n=2)
    for _ in range(2):
        run.until("running")
    run.process.send_signal(signal.SIGUSR1)
    for _ in range(2):
        run.until(f"got {signal.SIGUSR1:d}")
    run.process.send_signal(number)
    done = run.end()
    assert sorted(done.out) == [f"[{i}] got {number:d}" for i in range(2)]
    assert done.code == 128 + number


def test_under_nohup_the_end_of_a_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launching._handled(lambda number: None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_what_does_not_end(launch):
    text = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("running", flush=True)
time.sleep(300)
"""
    run = launch(text, n=1)
    run.until("running")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGINT)
    assert run.end(20).code == 130


def test_who_is_to_blame():
    aborted, killed = End(0, -signal.SIGABRT), End(2, -signal.SIGKILL)
    assert culprit([End(0, 0), End(1, 0)], ()) is None
    assert culprit([End(1, 75), killed], ()) == killed
    assert culprit([aborted, End(1, 3)], ()) == End(1, 3)
    assert culprit([End(1, 75)], ()) == End(1, 75)
    assert str(culprit([aborted], (4,))) == "process 4 was stopped and not continued"
    assert str(killed) == "process 2 was ended by SIGKILL"


def test_what_the_command_says_when_it_is_asked_wrongly(capsys):
    for arguments, told in (
        ([], "which program? Write: sortal launch -n 4 train.py"),
        (["-n", "0", "x.py"], "must be 1 or more, found 0"),
        (["-n", "two", "x.py"], "must be 1 or more, found two"),
        (["--devices", "-1", "x.py"], "must be 1 or more, found -1"),
        (["-n", "2", "absent.py"], "there is no program 'absent.py'"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["launch", *arguments])
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["launch", "--help"])
    assert "usage: sortal launch [-n N]" in capsys.readouterr().out


def copied(*written):
    """What is written for output that comes in these pieces."""
    left = list(written)
    source, target = io.BytesIO(), io.TextIOWrapper(io.BytesIO())
    source.read1 = lambda size: left.pop(0) if left else b""
    launching._copy_lines(source, target, b"[0] ")
    return target.buffer.getvalue()


def test_each_line_of_output_has_one_number():
    found = copied(b"a\r\nb\nc", b"d\n\ne")
    assert found == b"[0] a\r\n[0] b\n[0] cd\n[0] \n[0] e\n"
    assert copied(b"10%\r", b"20%\r") == b"[0] 10%\r[0] 20%\r"


def test_a_long_line_is_searched_once_for_its_end(monkeypatch):
    searched, split = [], launching.re.split

    def counted(pattern, data):
        searched.append(len(data))
        return split(pattern, data)

    monkeypatch.setattr(launching.re, "split", counted)
    assert copied(*[b"x" * 1000] * 100, b"\n") == b"[0] " + b"x" * 100_000 + b"\n"
    assert sum(searched) == 100_001


def test_the_first_process_alone_draws_bars_in_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.setattr(launching.sys.stderr, "isatty", lambda: True)
    first, second = launching._environments(2, None)
    assert (first["TTY_COMPATIBLE"], first["COLUMNS"]) == ("1", "76")
    assert "TTY_COMPATIBLE" not in second


def test_a_flag_of_xla_that_says_otherwise_is_taken_out(monkeypatch):
    flags = "--a=1 --xla_force_host_platform_device_count=8 --b"
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert launching._environments(1, None)[0]["XLA_FLAGS"] == flags
    assert launching._environments(1, 2)[0]["XLA_FLAGS"].split() == ["--a=1", "--b"]
