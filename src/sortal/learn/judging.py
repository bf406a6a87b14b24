"""The judge: is an answer right, and if not, which pitfall is it?"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np

from sortal.learn.answer import Answer, Wrong
from sortal.learn.lesson import Lesson

ROUNDS = 2


@dataclass(frozen=True)
class Verdict:
    """What the judge says of an answer; all texts, which may be empty.

    Attributes:
      right: whether the answer is right.
      message: what is not right.
      pitfall: the name of the mistake, if it was recognised.
      case: what the answer was called with.
      expected: the result that was due.
      found: the result.
      error: the learner's lines of the traceback, and the message.
    """

    right: bool
    message: str = ""
    pitfall: str = ""
    case: str = ""
    expected: str = ""
    found: str = ""
    error: str = ""


def judge(
    lesson: Lesson,
    source: str,
    *,
    filename: str = "answer.py",
    seed: int | None = None,
    rounds: int = ROUNDS,
) -> Verdict:
    """Executes an answer in this process, and judges it on random arguments.

    Args:
      lesson: the problem.
      source: the text of the answer.
      filename: its name in tracebacks.
      seed: what the arguments are drawn with; another one at each call if absent.
      rounds: how often it is tried with new arguments.

    Returns:
      The verdict.

    Example:
      >>> from sortal.learn import lessons
      >>> state_filter = lessons()[3]
      >>> judge(state_filter, state_filter.solution).right
      True
      >>> derived = state_filter.solution.replace("(nnx.Variable)", "(nnx.Param)")
      >>> judge(state_filter, derived).pitfall
      '`BatchStat` derived from `Param`'
    """
    check = importlib.import_module(lesson.module).check
    rng = np.random.default_rng(seed)
    answer = None
    try:
        answer = Answer(source, filename)
        for _ in range(rounds):
            check(answer, rng)
    except Wrong as wrong:
        told = wrong
    except (Exception, SystemExit) as e:  # of what the learner's objects do
        if answer is None:
            raise
        told = answer.raised(e)
    else:
        return Verdict(right=True)
    return Verdict(
        right=False,
        message=told.message,
        pitfall=told.pitfall,
        case=told.case,
        expected=told.expected,
        found=told.found,
        error=told.error,
    )
