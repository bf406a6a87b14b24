"""Names that only NNX code uses of a State and its flat form.

Functions of ``sortal`` return these classes, so the names are added to them: at the
import of ``sortal.nnx``, or when the file that has the classes is imported later.
"""

from __future__ import annotations

import sys
from typing import Any

from sortal._engine.foreign import watch_classes
from sortal.nnx.added import add_members


def _flat(states: Any) -> Any:
    if isinstance(states, tuple):
        return tuple(state.flat_state() for state in states)
    return states.flat_state()


class FlatNames:
    """The methods of a FlatState that only NNX code uses."""

    __slots__ = ()

    def split(self: Any, *filters: Any) -> Any:
        """Divides all pairs among filters; see ``State.split``.

        Args:
          *filters: one or more filters, which together take every leaf.

        Returns:
          A FlatState, or a tuple with one for each filter.

        Raises:
          FilterError: a leaf is left over.
        """
        return _flat(self.to_nested_state().split(*filters))

    def filter(self: Any, *filters: Any) -> Any:
        """The pairs whose leaves filters take; see ``State.filter``.

        Args:
          *filters: one or more filters.

        Returns:
          A FlatState, or a tuple with one for each filter.
        """
        return _flat(self.to_nested_state().filter(*filters))

    @classmethod
    def merge(cls: Any, *flat_states: Any) -> Any:
        """One FlatState of all pairs; where two have the same path the later wins.

        Args:
          *flat_states: FlatStates, or pairs of path and leaf.

        Returns:
          The new FlatState.
        """
        pairs = dict(pair for flat in flat_states for pair in flat)
        return cls(pairs.items(), sort=True)

    @classmethod
    def from_sorted_keys_values(cls: Any, keys: Any, values: Any) -> Any:
        """The FlatState of paths and leaves that are in order.

        Args:
          keys: the paths.
          values: as many leaves.

        Returns:
          The FlatState.
        """
        return cls(zip(keys, values, strict=True))

    def __getitem__(self: Any, index: Any) -> Any:
        """A pair, or the FlatState of a slice."""
        found = tuple.__getitem__(self, index)
        return type(self)(found) if isinstance(index, slice) else found


class StateNames:
    """The attribute of a State that only NNX code uses."""

    __slots__ = ()

    @property
    def raw_mapping(self: Any) -> dict:
        """Nested dicts of the leaves."""
        return {
            k: x.raw_mapping if type(x) is type(self) else x for k, x in self.items()
        }


def _name(cls: Any) -> None:
    home = sys.modules.get("sortal._engine.state")
    for its_name, names in (("FlatState", FlatNames), ("State", StateNames)):
        if cls is getattr(home, its_name, None):
            add_members(cls, names)


watch_classes(_name)
for _class in ("FlatState", "State"):
    _name(getattr(sys.modules.get("sortal._engine.state"), _class, sys))
