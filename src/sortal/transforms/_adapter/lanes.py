"""Outputs for which JAX must know axes, specs or shardings before the call.

Which leaves a function writes is known only once it has run. So there is one list of
outputs, a lane, for each answer there is, and each value that the function wrote or
made leaves it in the lane of its leaf. Where each went is returned beside them, as part
of the output's structure: JAX gives it back at each later call of a compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu

from sortal.transforms._adapter.effects import Effects, Result


class Sent(NamedTuple):
    """A value on its way out: its lane, and what is done to its arrays outside."""

    answer: Any
    value: Any
    after: Callable[[Any], Any] | None = None


class Places:
    """Where each value went, as an output of JAX's without arrays."""

    __slots__ = ("effects", "places")

    def __init__(self, effects: Effects, places: list[tuple[int, int, Any]]):
        self.effects, self.places = effects, places


jtu.register_pytree_node(Places, lambda x: ((), x), lambda places, _: places)


class Lanes:
    """The lanes of one function.

    Args:
      answers: all that a leaf may have, repeated as it may be.
    """

    def __init__(self, answers: Iterable[Any]):
        self.answers = tuple(dict.fromkeys(answers))

    def sort(self, result: Result, sent: Iterable[Sent]) -> tuple[Any, Any, Places]:
        """What a function returns to JAX; for use inside its trace.

        Args:
          result: what ``run`` returned.
          sent: its written values and then those of new leaves, in order.

        Returns:
          The output, a list of values for each answer, and the Places.
        """
        lists: list[list[Any]] = [[] for _ in self.answers]
        places = []
        for answer, value, after in sent:
            lane = self.answers.index(answer)
            places.append((lane, len(lists[lane]), after))
            lists[lane].append(value)
        return result.out, lists, Places(result.effects, places)


def unsorted(out: Any, lists: list[list[Any]], found: Places) -> Result:
    """The Result, with its values in their order again; the inverse of ``Lanes.sort``.

    Args:
      out: the output.
      lists: the values of each lane.
      found: where each went.

    Returns:
      The Result.
    """
    values = []
    for lane, at, after in found.places:
        value = lists[lane][at]
        values.append(value if after is None else jax.tree.map(after, value))
    n = len(found.effects.written)
    return Result(found.effects, (out, values[:n], values[n:]))
