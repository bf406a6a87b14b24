"""Paths: printed, parsed, ordered, matched by globs, and found for live objects."""

from __future__ import annotations

import fnmatch
import pickle
import re

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sortal
from sortal._engine import paths
from sortal.errors import ArgumentError, EntryError
from strategies import KEYS, Box

keys = st.one_of(st.sampled_from(KEYS), st.integers(), st.text(max_size=3))
plain = st.one_of(st.integers(0, 20), st.from_regex(r"[a-z_]\w{0,3}", fullmatch=True))


@given(st.lists(plain, min_size=1, max_size=4).map(tuple))
def test_a_printed_path_of_names_and_indices_parses_back(path):
    assert paths.parse(paths.show(path)) == path
    assert paths.show(path) == ".".join(map(str, path))


@st.composite
def look_alikes(draw):
    """Two paths, of which one may have strings in the place of other keys."""
    a = draw(st.lists(keys, min_size=1, max_size=3))
    b = [draw(st.sampled_from([k, str(k)])) for k in a]
    if draw(st.booleans()):
        b = [".".join(map(str, b))]
    return tuple(a), tuple(b)


@given(look_alikes())
def test_two_paths_print_alike_only_if_they_are_equal(pair):
    """An index and a string of digits are the classic pair that looks alike."""
    a, b = pair
    assert (paths.show(a) == paths.show(b)) == (a == b)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), "<root>"),
        (("layers", 0, "kernel"), "layers.0.kernel"),
        ((0,), "0"),
        (("0",), "['0']"),
        (("layers", "0"), "layers['0']"),
        (("table", "a b"), "table['a b']"),
        (("", "x"), "[''].x"),
        (("table", -1, (1, 2), None, True), "table[-1][(1, 2)][None][True]"),
        (("a", "it's"), 'a["it\'s"]'),
    ],
)
def test_odd_keys_print_in_brackets(path, text):
    assert paths.show(path) == text


@pytest.mark.parametrize("text", ["", ".", "a..b", ".a", "a."])
def test_a_path_text_with_an_empty_entry_is_refused(text):
    with pytest.raises(
        ArgumentError, match="single dots, found " + re.escape(repr(text))
    ):
        paths.parse(text)


@given(st.lists(keys, max_size=8))
def test_keys_of_any_types_have_one_order_integers_first(mixed):
    ordered = sorted(mixed, key=paths.order)
    assert sorted(mixed[1:] + mixed[:1], key=paths.order) == ordered
    ints = [k for k in mixed if isinstance(k, int)]
    assert ordered[: len(ints)] == sorted(ints)
    assert ordered[len(ints) :] == sorted(k for k in mixed if isinstance(k, str))


def test_keys_that_are_neither_integers_nor_strings_come_last():
    odd = [(1, 2), None, 1.5, "z", 7]
    assert sorted(odd, key=paths.order) == [7, "z", None, 1.5, (1, 2)]


def plain_match(pattern: list[str], path: list[str]) -> bool:
    """Globs by the book: translated to one regular expression."""
    text = "".join(f"/{part}" for part in path)
    regex = "".join(
        "(?:/[^/]*)*"
        if p == "**"
        else "/" + fnmatch.translate(p)[4:-3].replace(".*", "[^/]*")
        for p in pattern
    )
    return re.fullmatch(regex, text) is not None


@given(
    st.lists(st.sampled_from(["a", "b", "*", "**", "a*", "0"]), min_size=1, max_size=4),
    st.lists(st.sampled_from(["a", "b", "ab", 0]), max_size=4).map(tuple),
)
def test_globs_match_as_a_regular_expression_does(pattern, path):
    expected = plain_match(pattern, list(map(str, path)))
    assert paths.matches(".".join(pattern), path) == expected


def test_a_glob_with_many_stars_does_not_blow_up():
    """Exponential matching would never end on this one."""
    assert not paths.matches(".".join(["**"] * 20) + ".end", ("a",) * 20)


def test_a_path_key_prints_as_subscripts_and_compares_by_path():
    key = paths.PathKey(("layers", 0, "kernel"))
    assert str(key) == "['layers'][0]['kernel']"
    assert repr(key) == "PathKey(('layers', 0, 'kernel'))"
    assert key == paths.PathKey(("layers", 0, "kernel"))
    assert key != paths.PathKey(("layers", 1, "kernel"))
    assert key != ("layers", 0, "kernel")
    assert len({key, paths.PathKey(key.path)}) == 1
    assert pickle.loads(pickle.dumps(key)) == key


class Held(sortal.Module):
    """Holds things in attributes, lists and dicts."""

    def __init__(self, thing):
        self.layers = [Box(table={"w": thing})]


def test_a_live_object_is_found_at_its_path():
    variable = sortal.Param(jnp.ones(2))
    root = Held(variable)
    assert paths.locate(variable)[0] == ("layers", 0, "table", "w")
    assert root.layers[0].table["w"] is variable


def test_a_live_object_is_found_in_a_tuple_and_in_a_cycle():
    variable = sortal.Param(jnp.ones(2))
    root = Box(pair=(variable,))
    root.me = root
    assert paths.locate(variable)[0][-2:] == ("pair", 0)


def test_an_object_that_nothing_names_has_no_path():
    variables = [sortal.Param(jnp.ones(2))]
    bound = variables[0].set_value
    assert paths.locate(variables[0]) == [None]
    assert bound.__self__ is variables[0]


def test_very_deep_objects_end_the_search():
    """The search gives a part of the path rather than climbing for ever."""
    variable = sortal.Param(jnp.ones(2))
    root = Box(w=variable)
    for _ in range(40):
        root = Box(inner=root)
    (found,) = paths.locate(variable)
    assert found is not None
    assert found[-2:] == ("inner", "w")
    assert len(found) <= 26


def test_a_path_entry_read_as_one_level_says_what_to_write() -> None:
    for name in ("key", "idx", "name"):
        with pytest.raises(
            EntryError,
            match=rf"entry.{name} of a JAX key path is one level's, but "
            r"\['layers'\]\[0\] is one entry for the whole path of a leaf in a Module. "
            r"Write entry.path, which is \('layers', 0\); or map over nnx.state\(",
        ):
            getattr(paths.PathKey(("layers", 0)), name)
    assert not hasattr(paths.PathKey(("layers", 0)), "key")
    with pytest.raises(AttributeError):
        paths.PathKey(("layers", 0)).other  # noqa: B018
