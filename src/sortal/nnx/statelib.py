"""NNX's functions of States; most call the State method of the same name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sortal._engine.paths import Path
from sortal._engine.state import FlatState, State, as_state
from sortal.errors import PathError


def to_flat_state(state: Any) -> FlatState:
    """The pairs of path and leaf of a State, in order.

    Args:
      state: a State or nested mapping.

    Returns:
      A FlatState.

    Example:
      >>> from sortal import nnx
      >>> nnx.to_flat_state({"a": {"b": 1}})
      ((('a', 'b'), 1),)
    """
    return as_state(state).flat_state()


def from_flat_state(flat_state: Any) -> State:
    """The State of pairs of path and leaf.

    Args:
      flat_state: a FlatState, a mapping by path, or pairs.

    Returns:
      The State.

    Example:
      >>> from sortal import nnx
      >>> nnx.from_flat_state({("a", 0): 1})["a"][0]
      1
    """
    return State.from_flat_path(flat_state)


def to_pure_dict(state: Any, extract_fn: Callable[[Any], Any] | None = None) -> dict:
    """Nested dicts of the bare values of a State.

    Args:
      state: a State or nested mapping.
      extract_fn: takes a leaf, returns what to put; its value if absent.

    Returns:
      The dict.

    Example:
      >>> from sortal import nnx
      >>> nnx.to_pure_dict(nnx.State({"a": {"b": nnx.Param(1)}}))
      {'a': {'b': 1}}
    """
    return as_state(state).to_pure_dict(extract_fn)


def replace_by_pure_dict(
    state: State,
    pure_dict: Mapping,
    replace_fn: Callable[[Any, Any], Any] | None = None,
) -> None:
    """Replaces values of a State in place; see ``State.replace_by_pure_dict``.

    Args:
      state: the State to change.
      pure_dict: nested dicts of values.
      replace_fn: takes the old leaf and the new value, returns the new leaf.

    Raises:
      PathError: paths that the State does not have; all listed, none replaced.

    Example:
      >>> from sortal import nnx
      >>> state = nnx.State({"w": nnx.Param(1)})
      >>> nnx.replace_by_pure_dict(state, {"w": 2})
      >>> state["w"].value
      2
    """
    state.replace_by_pure_dict(pure_dict, replace_fn)


def restore_int_paths(pure_dict: Mapping) -> dict:
    """Turns keys made of digits back into integers, at every level.

    Args:
      pure_dict: nested dicts, such as a file format gives that has string keys only.

    Returns:
      New nested dicts.

    Raises:
      PathError: two keys would become the same integer.

    Example:
      >>> from sortal import nnx
      >>> nnx.restore_int_paths({"layers": {"0": 1.0}})
      {'layers': {0: 1.0}}
    """

    def key(k: Any) -> Any:
        return int(k) if isinstance(k, str) and k.isascii() and k.isdigit() else k

    restored: dict[Any, Any] = {}
    for k, v in pure_dict.items():
        if key(k) in restored:
            raise PathError(
                f"restore_int_paths: two keys side by side would both be {key(k)}, and "
                f"one of their values lost; the keys are {list(pure_dict)}."
            )
        restored[key(k)] = restore_int_paths(v) if isinstance(v, Mapping) else v
    return restored


def filter_state(state: Any, *filters: Any) -> Any:
    """The leaves of a State that filters take; see ``State.filter``.

    Args:
      state: a State or nested mapping.
      *filters: one or more filters.

    Returns:
      A State, or a tuple with one State for each filter.

    Example:
      >>> from sortal import nnx
      >>> state = nnx.State({"w": nnx.Param(1), "n": nnx.BatchStat(2)})
      >>> nnx.filter_state(state, nnx.Param).paths()
      (('w',),)
    """
    return as_state(state).filter(*filters)


def split_state(state: Any, *filters: Any) -> Any:
    """Divides all leaves of a State among filters; see ``State.split``.

    Args:
      state: a State or nested mapping.
      *filters: one or more filters.

    Returns:
      A State, or a tuple with one State for each filter.

    Example:
      >>> from sortal import nnx
      >>> state = nnx.State({"w": nnx.Param(1), "n": nnx.BatchStat(2)})
      >>> params, rest = nnx.split_state(state, nnx.Param, ...)
      >>> rest.paths()
      (('n',),)
    """
    return as_state(state).split(*filters)


def merge_state(state: Any, /, *states: Any) -> State:
    """One State of all leaves; where two have the same path the later wins.

    Args:
      state: a State or nested mapping.
      *states: more of them.

    Returns:
      The new State.

    Example:
      >>> from sortal import nnx
      >>> nnx.merge_state({"a": 1, "b": 1}, {"b": 2}).to_pure_dict()
      {'a': 1, 'b': 2}
    """
    return State.merge(state, *states)


def map_state(f: Callable[[Path, Any], Any], state: Any) -> State:
    """A State of what ``f`` makes of each path and leaf.

    Args:
      f: takes a path and a Variable or array; returns the new leaf.
      state: a State or nested mapping.

    Returns:
      The new State.

    Example:
      >>> from sortal import nnx
      >>> nnx.map_state(lambda path, x: x + 1, {"a": 1}).to_pure_dict()
      {'a': 2}
    """
    return as_state(state).map(f)


def diff(state: Any, other: Any) -> State:
    """The leaves of a State whose paths another has not.

    Args:
      state: a State or nested mapping.
      other: another.

    Returns:
      The new State.

    Example:
      >>> from sortal import nnx
      >>> nnx.statelib.diff({"a": 1, "b": 2}, {"b": 3}).to_pure_dict()
      {'a': 1}
    """
    return as_state(state) - as_state(other)
