"""A filter typed in a page takes what it takes in Python, and is refused where it is.

``filters.js`` is run by Node; the oracle is ``eval`` and ``sortal.state``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sortal
import strategies
from page_scripts import Page, needs_node
from sortal._engine import paths
from sortal.errors import FilterError

pytestmark = needs_node


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    opened = Page()
    yield opened
    opened.close()


# What a program that imports these names can write.
NAMES = {
    "sortal": sortal,
    "nnx": sortal,
    "strategies": strategies,
    "jax": jax,
    "jnp": jnp,
    "np": np,
    **{
        n: getattr(sortal, n)
        for n in "Param Variable Cache OptState RngKey RngState".split()
    },
    **{
        n: getattr(sortal, n)
        for n in "All Any At Dtyped Everything Not Nothing OfType PathContains PathIn "
        "Shaped Under WithTag".split()
    },
    "LoRA": strategies.LoRA,
    "Count": strategies.Count,
}


def python(model: Any, text: str) -> list[int] | str:
    """The numbers of the leaves that Python says the filter takes, or its error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = sortal.state(model, eval(text, dict(NAMES)))  # noqa: S307
        except (FilterError, TypeError, AttributeError, SyntaxError) as e:
            return f"{type(e).__name__}: {e}"
    index = {path: n for n, path in enumerate(sortal.state(model).paths())}
    return sorted(index[path] for path in found.paths())


def agree(page: Page, model: Any, text: str) -> None:
    ours, theirs = python(model, text), page.takes(text)
    if isinstance(ours, list) and isinstance(theirs, str):
        # A page knows the kinds that it shows, and those that are built in.
        assert theirs.startswith("there is no kind or filter "), (text, theirs)
        name = theirs.split()[6].removeprefix("strategies.")
        assert name in {"LoRA", "Count", "BatchStat"}
        return
    assert isinstance(ours, str) == isinstance(theirs, str), (text, ours, theirs)
    if isinstance(ours, list):
        assert ours == theirs, text


CLASSES = (
    "Param Variable Cache LoRA Count OptState sortal.BatchStat nnx.BatchStat "
    "strategies.BatchStat nnx.Param strategies.LoRA jax.Array np.ndarray"
).split()
GLOBS = ["**", "*", "a.**", "**.kernel", "layers.*", "0.*", "b*s", "**.a b", r"**.a\.b"]
atoms = st.one_of(
    st.sampled_from(CLASSES),
    st.sampled_from(["...", "True", "False", "None", "()", "[]", "Everything", "7"]),
    st.sampled_from(["'dropout'", '"params"', "'absent'", "Nothing()", "Everything()"]),
    st.sampled_from(GLOBS).map(lambda g: f"At({g!r})"),
    st.sampled_from(["a", "layers", "a.b", "*", "layers.0"]).map("Under('{}')".format),
    st.sampled_from(strategies.KEYS).map(lambda k: f"PathContains({k!r})"),
    st.sampled_from(["a", "e", 1]).map(lambda k: f"PathContains({k!r}, exact=False)"),
    st.sampled_from(["Shaped((2,))", "Shaped(ndim=0)", "Shaped((2, 3), ndim=2)"]),
    st.sampled_from(["Shaped()", "Shaped((2,), ndim=1)", "Shaped([2, 3])", "At('')"]),
    st.sampled_from(["Dtyped(jnp.floating)", "Dtyped('int32')", "Dtyped(np.bool_)"]),
    st.sampled_from(["Dtyped('bfloat16')", "Dtyped('floating')", "At('a..b')", "At"]),
    st.sampled_from(["OfType(Param)", "OfType('x')", "WithTag('params')", "At(Param)"]),
    st.lists(st.sampled_from(strategies.KEYS), max_size=2)
    .map(tuple)
    .map(lambda p: f"PathIn({p!r})"),
)


def combined(inner: Any) -> Any:
    return st.one_of(
        st.tuples(inner, st.sampled_from("&|"), inner).map(" ".join),
        inner.map("~{}".format),
        inner.map("({})".format),
        inner.map("Not({})".format),
        st.tuples(st.sampled_from(["Any", "All", "", ""]), st.lists(inner, max_size=3))
        .map(lambda x: f"{x[0]}({', '.join(x[1])}{',' * (len(x[1]) == 1)})"),
        st.lists(inner, max_size=3).map(lambda x: f"[{', '.join(x)}]"),
        st.lists(inner, min_size=2, max_size=3).map(", ".join),
        inner.map("{} &".format),
    )  # fmt: skip


@given(strategies.models(), st.lists(st.recursive(atoms, combined, max_leaves=6)))
@settings(max_examples=100, deadline=None)
def test_a_page_and_python_agree_about_any_filter_of_any_model(page, model, texts):
    page.open(model)
    for text in texts:
        agree(page, model, text)


ODD = st.text(st.sampled_from("ab.*\\'\"\0\1\n 0é\U0001f600"), max_size=4)


@given(
    st.lists(st.lists(ODD | st.integers(0, 12), min_size=1, max_size=3), max_size=5),
    st.text(st.sampled_from("ab.*\\ 0é\U0001f600"), max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_a_page_and_python_agree_about_globs_of_odd_keys(page, names, pattern):
    flat = {tuple(name): np.zeros(1) for name in names}
    flat = {p: x for p, x in flat.items() if not any(_below(q, p) for q in flat)}
    state = sortal.State.from_flat_path(flat)
    shown = page.open(state)
    assert [text for text, _ in shown] == [paths.show(p) for p in state.paths()]
    for filter in ("At", "Under"):
        agree(page, state, f"{filter}({pattern!r})")
    for n, (_, glob) in enumerate(shown):  # the glob offered for a leaf takes just it
        found = [] if glob is None else page.takes(glob)
        same = [tuple(map(str, p)) for p in state.paths()]
        assert (glob is None) == ("" in same[n])
        assert glob is None or found == [k for k, p in enumerate(same) if p == same[n]]


def _below(above: tuple[Any, ...], path: tuple[Any, ...]) -> bool:
    return above != path and path[: len(above)] == above


def test_kinds_of_flax_and_of_sortal_are_one_by_either_name(page):
    model = {
        "ours": sortal.Linear(2, 3, rngs=sortal.Rngs(0)),
        "theirs": flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0)),
        "norm": flax_nnx.BatchNorm(3, rngs=flax_nnx.Rngs(0)),
    }
    page.open(model)
    for text in ("Param", "nnx.Param", "Variable", "nnx.BatchStat", "~At('ours.**')"):
        found = page.takes(text)
        assert found
        assert found == python(model, text)


@pytest.mark.parametrize(
    "text",
    [
        "All(Param) | Any(Cache) & At('b')",
        "Any(Cache) & At('b') | All(Param)",
        "~At('a') & Any(Param)",
        "~(At('a') & Any(Param))",
        "~~Any(Param)",
        "Any(Param) & At('a') & At('b')",
        "Param | Cache, At('a')",
        "(Param)",
        "(Param,)",
        "At('a' 'b')",
        r"At(r'a\.b')",
        "At('a\\.b')",
        "sortal.At(pattern='a')",
        "Under(prefix='a',)",
        "PathContains('a', False)",
        "PathContains(exact=False, key='a')",
    ],
)
def test_python_s_precedence_and_literals(page, text):
    model = {
        "a": sortal.Param(1.0),
        "b": sortal.Param(1.0),
        "c": sortal.Cache(1.0),
        "ab": sortal.Cache(1.0),
        "a.b": sortal.Cache(1.0),
    }
    page.open(model)
    assert page.takes(text) == python(model, text)
    assert isinstance(page.takes(text), list)


@pytest.mark.parametrize(
    "pattern",
    "a*b*b a*b*a *a*a* **.a.**.a a.**.b.** **.** * a** ***".split(),
)
def test_globs_with_several_stars(page, pattern):
    names = ("ab", "abb", "aab", "aa", "a", "aba", "b")
    paths_ = [(x,) for x in names] + [(x, y) for x in ("p", "a") for y in names]
    leaves = {p: np.ones(1) for p in paths_ if p != ("a",)}
    state = sortal.State.from_flat_path(leaves)
    page.open(state)
    agree(page, state, f"At({pattern!r})")


def test_filters_of_a_checkpoint_take_what_they_take_of_the_model(page, tmp_path):
    model = {
        "norm": sortal.BatchNorm(2, rngs=sortal.Rngs(0)),
        "lora": [strategies.LoRA(jnp.ones((2, 3)))],
        "rngs": sortal.Rngs(params=0, dropout=1),
        "cache": sortal.Cache({"k": jnp.ones(2), "n": 3}),
        "raw": np.ones(3),
    }
    sortal.save(tmp_path / "steps", model, step=1)
    page.open(str(tmp_path / "steps"))
    for text in (
        "...", "Param", "LoRA", "RngState", "'dropout'", "Shaped(ndim=1)", "Variable",
        "Dtyped(jnp.floating)", "At('**.key') | np.ndarray", "Under('norm')", "Cache",
    ):  # fmt: skip
        assert page.takes(text) == python(model, text), text
        assert page.takes(text), text


def test_a_name_that_two_kinds_have_is_refused_until_it_says_which(page):
    model = [strategies.BatchStat(1.0), sortal.BatchStat(1.0)]
    page.open(model)
    assert page.takes("BatchStat") == (
        "2 kinds are called BatchStat: write strategies.BatchStat or sortal.BatchStat"
    )
    assert page.takes("strategies.BatchStat") == [0]
    assert page.takes("sortal.BatchStat") == [1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("~Param", "~ stands before a filter, and Param is none: write Not(...)"),
        (
            "Param & BatchStat",
            "Python has no & between Param and BatchStat: write All(..., ...)",
        ),
        (
            "Parm",
            "there is no kind or filter Parm here; the kinds here are Param, BatchStat",
        ),
        ("Param &", "the expression is not finished"),
        ("At('**.kernel", "the string '**.kernel has no end"),
        (
            "lambda p, x: True",
            "a function is not read here, for it needs Python",
        ),
        (
            "Param and ...",
            "and gives one of its two sides, not both: write &",
        ),
        (
            "Param[jax.Array]",
            "brackets after a name are not read here: write the kind alone",
        ),
        (
            "At('a..b')",
            (
                "At('a..b'): a path is entries joined by single dots, and a backslash "
                "stands before a dot, a star or a backslash of an entry"
            ),
        ),
        ("At(3)", "At takes a path as a string, found the number 3"),
        ("Shaped()", "Shaped() needs shape=(...) or ndim=..."),
        ("3", "the number 3 is not a filter"),
        ("(" * 20_000, "the expression is nested too deeply"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_answered_with_why(page, text, why):
    page.open(sortal.BatchNorm(2, rngs=sortal.Rngs(0)))
    assert page.takes(text) == why
