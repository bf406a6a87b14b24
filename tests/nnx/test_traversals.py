"""Nested mappings flattened and back, against Flax on generated mappings."""

from __future__ import annotations

from typing import Any

import pytest
from flax import nnx as flax_nnx
from hypothesis import given
from hypothesis import strategies as st

from sortal.errors import ArgumentError
from sortal.nnx import traversals

theirs = flax_nnx.traversals
NAMES = st.text("abc", min_size=1, max_size=2)
NESTED = st.recursive(
    st.dictionaries(NAMES, st.integers(), max_size=3),
    lambda inner: st.dictionaries(NAMES, inner | st.integers(), max_size=3),
    max_leaves=8,
)


@given(NESTED)
def test_mappings_are_flattened_as_flax_does_and_come_back(nested: Any) -> None:
    assert traversals.flatten_mapping(nested) == theirs.flatten_mapping(nested)
    assert traversals.flatten_to_sequence(nested) == theirs.flatten_to_sequence(nested)
    joined = traversals.flatten_mapping(nested, sep="/", keep_empty_nodes=True)
    other = theirs.flatten_mapping(nested, sep="/", keep_empty_nodes=True)
    assert list(joined) == list(other)
    assert traversals.unflatten_mapping(joined, sep="/") == nested
    pairs = traversals.flatten_mapping(nested, keep_empty_nodes=True).items()
    assert traversals.unflatten_mapping(pairs) == nested


@given(NESTED)
def test_what_is_a_leaf_may_be_decided_by_path(nested: Any) -> None:
    def whole(path: Any, x: Any) -> bool:
        return len(path) == 1

    found = traversals.flatten_mapping(nested, is_leaf=whole)
    assert found == theirs.flatten_mapping(nested, is_leaf=whole)
    assert traversals.flatten_to_sequence(nested, is_leaf=whole) == list(found.items())


def test_an_empty_node_says_what_it_is() -> None:
    assert repr(traversals.empty_node) == "empty_node"


def test_what_cannot_be_flattened_is_refused() -> None:
    with pytest.raises(
        ArgumentError, match="a nested mapping is expected, such as a State "
    ):
        traversals.flatten_mapping([1])  # type: ignore[arg-type]
    with pytest.raises(
        ArgumentError, match="takes a mapping of paths to leaves, or pa"
    ):
        traversals.unflatten_mapping(1)
    with pytest.raises(
        ArgumentError, match=r"sep='/' joins keys .* path \('a', 0\). Le"
    ):
        traversals.flatten_mapping({"a": {0: 1}}, sep="/")
