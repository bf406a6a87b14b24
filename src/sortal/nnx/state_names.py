"""Names that only NNX code uses of a State and its flat form.

The functions of this package return the classes of ``sortal``, so the import of
``sortal.nnx`` adds the names to them.
"""

from __future__ import annotations

from typing import Any

from sortal._engine.state import FlatState, State


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

    @staticmethod
    def merge(*flat_states: Any) -> FlatState:
        """One FlatState of all pairs; where two have the same path the later wins.

        Args:
          *flat_states: FlatStates, or pairs of path and leaf.

        Returns:
          The new FlatState.
        """
        pairs = dict(pair for flat in flat_states for pair in flat)
        return FlatState(pairs.items(), sort=True)

    @classmethod
    def from_sorted_keys_values(cls: Any, keys: Any, values: Any) -> FlatState:
        """The FlatState of paths and leaves that are in order.

        Args:
          keys: the paths.
          values: as many leaves.

        Returns:
          The FlatState.
        """
        return cls(zip(keys, values, strict=True))


class StateNames:
    """The attribute of a State that only NNX code uses."""

    __slots__ = ()

    @property
    def raw_mapping(self: Any) -> dict:
        """Nested dicts of the leaves."""
        return {
            k: x.raw_mapping if isinstance(x, State) else x for k, x in self.items()
        }


for _kind, _names in ((FlatState, FlatNames), (State, StateNames)):
    for _name, _member in vars(_names).items():
        if not _name.startswith("_"):
            setattr(_kind, _name, _member)
