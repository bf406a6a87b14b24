"""One program, run three ways, and what they disagree about."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import Any

from . import live, reference
from .world import World, difference

Counter = collections.Counter[str]


@dataclasses.dataclass
class Program:
    """Statements, and what they must do.

    Args:
      label: how to draw it again, ``edits:12``.
      lines: the statements.
      codes: the same, compiled.
      compiled: whether it has transforms in it.
    """

    label: str
    lines: list[str]
    codes: list[Any]
    compiled: bool = False

    def text(self) -> str:
        return "\n".join(self.lines)


class Expected:
    """What the reference says of a program: each statement's error, and the end."""

    def __init__(self, program: Program):
        world = World(reference)
        self.outcomes = [world.run(code) for code in program.codes]
        self.portrait = world.portrait()


# What may ask for something that was kept.
_ASKS = re.compile(r"\bj\d+\(|nnx\.|\.train\(|\.eval\(")


# Calls of what was compiled, and of transforms.
_CALLS = re.compile(
    r"\bj\d+\(|nnx\.(jit|grad|value_and_grad|cond|switch|fori|while|scan|remat|vmap)"
)


def run_live(
    program: Program, expected: Any, *, afresh: bool = False, leaks: bool = True
) -> str:
    """Runs a program with Sortal; what differs from what is expected.

    Args:
      program: the program.
      expected: has ``outcomes`` and ``portrait``.
      afresh: whether all that is kept is thrown away before each statement.
      leaks: whether to look for arrays that should be gone; one thread only can.

    Returns:
      The difference in words; empty where there is none.
    """
    world = World(live)
    try:
        for i, code in enumerate(program.codes):
            if afresh and _ASKS.search(program.lines[i]):
                live.throw_away(world.objects(), world.jitted())
            outcome = world.run(code)
            if outcome != expected.outcomes[i]:
                return (
                    f"statement {i}, {program.lines[i]!r}: {outcome or 'no error'}; "
                    f"expected {expected.outcomes[i] or 'no error'}"
                )
        portrait, seer = world.seen()
        found = difference(portrait, expected.portrait)
        if found:
            return f"at the end: {found} (found | expected)"
        if not leaks or _was_broken_off(program, expected):
            return ""
        pinned = world.pinned(seer)
        if pinned and _asked_again(seer):
            # What goes only when cycles are collected is gone as well.
            live.collect()
            pinned = world.pinned(seer)
        else:
            pinned = 0
        if pinned:
            return f"{pinned} arrays are alive that nothing leads to"
    finally:
        world.forget()
    del portrait, seer
    if world.alive():
        live.collect()
    if world.alive():
        return f"{world.alive()} arrays are alive after all was dropped"
    return ""


def _was_broken_off(program: Program, expected: Any) -> bool:
    """Whether a trace ended in an error: JAX never frees the constants of such."""
    pairs = zip(program.lines, expected.outcomes, strict=True)
    return any(outcome and _CALLS.search(line) for line, outcome in pairs)


def _asked_again(seer: Any) -> bool:
    """Has every module looked at again, for what has left it is let go only then.

    False where that is refused, and so what was kept before is kept on.
    """
    try:
        for x in seer.kept:
            if isinstance(x, live.modules):
                live.names.graphdef(x)
    except Exception:  # noqa: BLE001 - a model that nobody may walk
        return False
    return True


@dataclasses.dataclass
class Failure:
    """A program that differs, and how."""

    program: Program
    kept: str  # as it is
    afresh: str  # with everything thrown away before each statement

    def kind(self) -> tuple[str, str]:
        """What went wrong, apart from where; for each way of running."""
        return _kind(self.kept), _kind(self.afresh)

    def __str__(self) -> str:
        return (
            f"{self.program.label}\n{self.program.text()}\n"
            f"  as it is:     {self.kept or 'agrees'}\n"
            f"  kept nothing: {self.afresh or 'agrees'}"
        )


def _kind(text: str) -> str:
    if text.startswith("statement"):
        return text.rpartition(": ")[2]
    return text.partition(":")[0].lstrip("0123456789 ")


def check(program: Program, expected: Any = None) -> Failure | None:
    """Runs a program three ways.

    Args:
      program: the program.
      expected: what the reference said while it was drawn; run anew if absent.

    Returns:
      The Failure, or None where all three agree.
    """
    if expected is None:
        expected = Expected(program)
    kept = run_live(program, expected)
    afresh = run_live(program, expected, afresh=True)
    return Failure(program, kept, afresh) if kept or afresh else None


def shrink(failure: Failure) -> Failure:
    """The same failure with as few statements as can be found by leaving some out."""
    best = failure
    at = len(best.program.lines) - 1
    while at >= 0:
        program = best.program
        if at < len(program.lines):
            fewer = dataclasses.replace(
                program,
                lines=program.lines[:at] + program.lines[at + 1 :],
                codes=program.codes[:at] + program.codes[at + 1 :],
            )
            try:
                found = check(fewer)
            except reference.Left:
                found = None
            if found is not None and _alike(found, failure):
                best = found
        at -= 1
    return best


def _alike(a: Failure, b: Failure) -> bool:
    return a.kind() == b.kind()
