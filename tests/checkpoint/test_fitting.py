"""Which leaf goes where, and that all which does not fit is said at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sortal as nnx
from models import Net, portrait, untouched
from sortal._engine.plan import bind
from sortal.checkpoint.fitting import (
    ANY_KIND,
    Candidate,
    Fit,
    Options,
    fit,
    translate,
)
from sortal.checkpoint.values import Plain, describe
from sortal.errors import RestoreError


def fitted(
    root: Any, given: dict[Any, Any], tied: Any = (), /, **options: Any
) -> tuple[dict[Any, Any], Fit]:
    """What ``fit`` pairs: path -> value given, and the Fit.

    ``given`` maps paths to (kind, value), or to a value of any kind.
    """
    candidates = []
    for path, x in given.items():
        kind, value = x if type(x) is tuple else (ANY_KIND, x)
        path = path if type(path) is tuple else (path,)
        candidates.append(Candidate(path, kind, describe(value, [])))
    plan = bind(root)
    found = fit(plan, candidates, tied, Options(**options), "here")
    paths = plan.graphdef.schema.paths
    return {paths[p.at]: p.stored for p in found.pairs}, found


def refused(root: Any, given: dict[Any, Any], tied: Any = (), /, **options: Any) -> str:
    with untouched(root), pytest.raises(RestoreError) as caught:
        fitted(root, given, tied, **options)
    return str(caught.value)


# -------------------------------------------------------------------------- matching
def test_leaves_are_paired_by_path_not_by_order():
    root = {"a": nnx.Param(1), "b": {"c": nnx.Cache(2)}, "l": [nnx.Param(3)]}
    given = {("l", 0): (nnx.Param, 30), ("b", "c"): (nnx.Cache, 20), "a": 10}
    pairs, found = fitted(root, given)
    assert pairs == {("a",): Plain(10), ("b", "c"): Plain(20), ("l", 0): Plain(30)}
    assert (found.filled, found.kept) == ({}, [])


def test_a_number_and_its_text_are_two_keys():
    root = {0: nnx.Param(1), "0": nnx.Param(2)}
    pairs, _ = fitted(root, {"0": 20, 0: 10})
    assert pairs == {(0,): Plain(10), ("0",): Plain(20)}
    text = refused({0: nnx.Param(1)}, {"0": 1})
    assert "missing: 0 (Param), int" in text
    assert "unknown: ['0'], int" in text


def test_odd_keys_are_met_by_their_text():
    root = {(1, 2): nnx.Param(1)}
    pairs, _ = fitted(root, {"<tuple> (1, 2)": 5})
    assert pairs == {((1, 2),): Plain(5)}


def test_keys_of_the_model_that_are_alike_as_text_are_refused():
    """Else one of the two would be left as it was, without a word."""
    root = {(1, 2): nnx.Param(1), "<tuple> (1, 2)": nnx.Param(2)}
    text = refused(root, {"<tuple> (1, 2)": 5})
    assert "one text for several paths: ['<tuple> (1, 2)']" in text


def test_leaves_left_out_by_policy_or_filter_are_no_faults():
    class Dropped(nnx.Variable, checkpoint="drop"):
        pass

    root = {"a": nnx.Param(1), "d": Dropped(2), "c": nnx.Cache(3)}
    every = {"a": (nnx.Param, 9), "d": (Dropped, 9), "c": (nnx.Cache, 9)}
    assert set(fitted(root, every)[0]) == {("a",), ("c",)}
    assert set(fitted(root, every, only=nnx.Param)[0]) == {("a",)}
    # Of what the filter takes, all must be there on both sides.
    text = refused(root, {**every, "p": (nnx.Param, 9)}, only=nnx.Param)
    assert "unknown: p (Param), int" in text
    fitted(root, {**every, "x": (nnx.Cache, 9)}, only=nnx.Param)


def test_every_offence_is_listed_before_anything_is_read():
    """Twenty of each sort: no list is cut short to the first."""
    root = {f"s{i}": nnx.Param(jnp.ones(2)) for i in range(20)}
    root |= {f"d{i}": nnx.Param(jnp.ones(2)) for i in range(20)}
    root |= {f"m{i}": nnx.Param(jnp.ones(2)) for i in range(20)}
    given: dict[Any, Any] = {f"s{i}": np.ones((2, i), "f4") for i in range(20)}
    given |= {f"d{i}": np.ones(2, "i4") for i in range(20)}
    given |= {f"u{i}": np.ones(2, "f4") for i in range(20)}
    text = refused(root, given)
    for i in range(20):
        assert f"shape: s{i} (Param) is float32[2] in the model, float32[2,{i}]" in text
        assert f"dtype: d{i} (Param) is float32[2] in the model, int32[2]" in text
        assert f"missing: m{i} (Param), float32[2]" in text
        assert f"unknown: u{i}, float32[2]" in text


def test_what_is_missing_is_shown_whatever_its_keys():
    """JAX itself could not flatten such a dict."""
    root = {"a": nnx.Param(1), "b": nnx.Cache({1: jnp.ones(2), "1": 2})}
    text = refused(root, {"a": 1})
    assert "missing: b (Cache), dict(1: float32[2], 1: int)" in text
    _, found = fitted(root, {"a": 1}, partial=True)
    assert found.kept == [1]
    root["b"].value = {1: jax.ShapeDtypeStruct((2,), jnp.float32), "1": 2}
    text = refused(root, {"a": 1}, partial=True)
    assert "and the model holds no value to keep" in text


def test_a_value_that_the_model_cannot_have_saved_is_named():
    text = refused({"a": nnx.Param({1, 2})}, {"a": 1})
    assert "type: a (Param) holds a set, {1, 2} in the model" in text


def test_casts_stay_among_numbers_of_a_sort():
    def may(stored: Any, live: Any) -> bool:
        root = {"a": nnx.Param(live)}
        try:
            fitted(root, {"a": stored}, cast=True)
        except RestoreError as e:
            assert "dtype: a" in str(e)  # noqa: PT017 - either way is a claim
            return False
        return True

    half, byte, small = jnp.ones(2, jnp.float16), jnp.ones(2, "i1"), jnp.ones(2, "int4")
    assert may(np.ones(2), half)
    assert may(half, jnp.ones(2, jnp.float8_e5m2))
    assert may(np.ones(2, "u8"), small)
    assert may(np.ones(2, "c16"), jnp.ones(2, "c8"))
    assert not may(half, byte)
    assert not may(byte, half)
    assert not may(half, jnp.ones(2, "c8"))
    assert not may(np.ones(2, "?"), byte)
    assert not may(byte, np.ones(2, "?"))
    keys = jax.random.split(jax.random.key(0))
    assert not may(jnp.ones(2, "u4"), keys)


# --------------------------------------------------------------------------- aliases
def test_what_is_tied_must_be_tied_alike():
    one = nnx.Param(1)
    tied, apart = {"a": one, "b": one}, {"a": nnx.Param(1), "b": nnx.Param(2)}
    both = [(("b",), ("a",))]
    assert set(fitted(tied, {"a": 5}, both)[0]) == {("a",)}
    assert "alias: b is the same as a in the model, shared with no" in refused(
        tied, {"a": 5, "b": 6}
    )
    text = refused(apart, {"a": 5}, both)
    assert "alias: b is shared with nothing in the model, the same as a in" in text
    assert "missing" not in text
    pairs, _ = fitted(apart, {"a": 5}, both, partial=True)
    assert pairs == {("a",): Plain(5), ("b",): Plain(5)}
    # A format that says nothing of sharing may have either.
    assert set(fitted(tied, {"a": 5, "b": 6}, None, partial=True)[0]) == {("a",)}


def test_a_tie_of_what_is_not_restored_does_not_matter():
    one = nnx.Cache(1)
    root = {"a": one, "b": one, "p": nnx.Param(1)}
    pairs, _ = fitted(root, {"p": (nnx.Param, 2)}, only=nnx.Param)
    assert set(pairs) == {("p",)}


def test_a_value_that_cannot_be_written_into_may_be_held_by_a_variable(tmp_path):
    pair = jnp.ones(1), jnp.zeros(1)
    text = refused({"x": pair}, {("x", 0): pair[0], ("x", 1): pair[1]})
    assert "cannot be written: x.0 (unlabelled array) is in a tuple or other" in text
    assert "a Variable that holds the whole value, as in box = Variable(value)" in text
    box = {"x": nnx.Variable(pair)}
    nnx.save(tmp_path, box, step=1)
    box["x"].value = pair[::-1]
    nnx.restore(tmp_path, box)
    assert box["x"].value == pair


# -------------------------------------------------------------------------- renaming
entries = st.one_of(st.sampled_from(["a", "b", "kernel"]), st.integers(0, 12))
paths = st.lists(entries, max_size=5).map(tuple)


@given(paths)
def test_a_pattern_for_all_renames_nothing(path):
    assert translate("**", "**", path) == path
    assert translate("**", "new.**", path) == ("new", *path)
    assert translate("a.**", "**", ("a", *path)) == path


@given(paths, paths)
def test_a_prefix_is_changed_and_back_again(prefix, path):
    old = ".".join(map(str, ("x", *prefix, "**")))
    found = translate(old, "y.z.**", ("x", *prefix, *path))
    assert found == ("y", "z", *path)
    assert translate("y.z.**", old, found) == ("x", *prefix, *path)
    assert translate(old, "y.z.**", ("w", *prefix, *path)) is None


def test_wild_cards_take_what_stands_in_their_place():
    path = ("enc", 3, "attn", "q", "w")
    assert translate("enc.*.**.w", "e.*.**.kernel", path) == (
        "e",
        3,
        "attn",
        "q",
        "kernel",
    )
    assert translate("**.w", "**.kernel", ("w", "w")) == ("w", "kernel")
    assert translate("*.w", "*.kernel", path) is None
    assert translate("l.0.w", "l.10.w", ("l", 0, "w")) == ("l", 10, "w")
    # The model's own keys may look like numbers only as numbers.
    assert translate("a", "1", ("a",)) == (1,)
    for old, new in (("a*", "b*"), ("*.a", "b"), ("*.**", "**.*"), ("***", "***")):
        with pytest.raises(RestoreError, match="must have the same wild cards"):
            translate(old, new, ("a",))


def test_the_first_pattern_that_fits_counts_and_ties_move_along():
    one = nnx.Param(1)
    root = {"n": {"a": one, "b": one}, "m": nnx.Param(2)}
    rename = {"o.**": "n.**", "**": "**"}
    pairs, _ = fitted(
        root,
        {("o", "a"): 5, "m": 6},
        [(("o", "b"), ("o", "a"))],
        rename=rename,
    )
    assert pairs == {("n", "a"): Plain(5), ("m",): Plain(6)}


# ------------------------------------------------------------------------------ fill
def test_fill_is_asked_only_for_what_is_missing():
    asked = []

    def fill(path: Any, kind: Any) -> Any:
        asked.append((path, kind))
        return 7

    root = {"a": nnx.Param(1), "b": nnx.Cache(2)}
    _, found = fitted(root, {"a": 5}, fill=fill)
    assert asked == [(("b",), nnx.Cache)]
    assert found.filled == {1: 7}


def test_what_fill_gives_goes_in_as_it_is_or_not_at_all():
    """No cast is done to it, so none is allowed; and a shape is no value."""
    root = {"a": nnx.Param(1), "b": nnx.Param(jnp.ones(2, jnp.bfloat16))}
    for wrong, words in (
        (jnp.ones(2), "b (Param) is bfloat16[2] in the model, and fill= gives some"),
        (jnp.ones(2), "something of another dtype"),
        (jnp.ones(3, jnp.bfloat16), "something of another shape"),
        (1.0, "something of another type"),
        ({1}, "and fill= gives a set, {1}"),
        (jax.ShapeDtypeStruct((2,), jnp.bfloat16), "gives a shape without values"),
    ):
        text = refused(root, {"a": 5}, cast=True, fill=lambda *_, x=wrong: x)
        assert words in text
    state = nnx.state({"c": nnx.Param(1)})
    assert "missing: b (Param)" in refused(root, {"a": 5}, fill=state)


# ------------------------------------------------------------------ as restore says it
def test_all_differences_are_listed_and_nothing_is_changed(tmp_path):
    class Other(nnx.Variable):
        pass

    tied = nnx.Param(jnp.ones(1))
    nnx.save(
        tmp_path,
        {
            "shape": nnx.Param(jnp.ones(3)),
            "dtype": nnx.Param(jnp.ones(3)),
            "kind": nnx.Param(jnp.ones(3)),
            "unknown": nnx.Param(jnp.ones(3)),
            "type": nnx.Cache(3),
            "nest": nnx.Cache({"a": 1}),
            "key": nnx.Cache(jax.random.key(0)),
            "tied": tied,
            "untied": tied,
        },
        step=0,
    )
    into = {
        "shape": nnx.Param(jnp.zeros((2, 3))),
        "dtype": nnx.Param(jnp.zeros(3, jnp.int32)),
        "kind": Other(jnp.zeros(3)),
        "missing": nnx.Param(jnp.zeros(3)),
        "type": nnx.Cache(3.0),
        "nest": nnx.Cache({"b": 1}),
        "key": nnx.Cache(jax.random.key(0, impl="rbg")),
        "tied": nnx.Param(jnp.zeros(1)),
        "untied": nnx.Param(jnp.zeros(1)),
        "frozen": (jnp.zeros(1),),
    }
    with untouched(into), pytest.raises(RestoreError) as caught:
        nnx.restore(tmp_path, into)
    text = str(caught.value)
    assert f"step 0 of {tmp_path} does not fit the model, which was left as it" in text
    for row in (
        "shape: shape (Param) is float32[2,3] in the model, float32[3] in the checkp",
        "dtype: dtype (Param) is int32[3] in the model, float32[3] in the checkpoint",
        "kind: kind is an Other in the model, a Param in the checkpoint",
        "missing: missing (Param), float32[3]",
        "missing: frozen.0 (unlabelled array), float32[1]",
        "unknown: unknown (Param), float32[3]",
        "type: type (Cache) is float in the model, int in the checkpoint",
        "structure: nest (Cache) is dict(b: int) in the model, dict(a: int) in the",
        "PRNG implementation: key (Cache) is key<rbg>[] in the model, key<threefry",
        "alias: untied is shared with nothing in the model, the same as tied in the",
    ):
        assert row in text, row
    assert "cast=True" in text
    assert "rename=" in text
    assert "kinds=" in text


def test_namesakes_among_kinds_are_told_apart(tmp_path):
    other = type("BatchStat", (nnx.Variable,), {"__module__": "elsewhere"})
    nnx.save(tmp_path, {"x": nnx.BatchStat(jnp.ones(1))}, step=0)
    with pytest.raises(
        RestoreError,
        match=r"is an elsewhere.BatchStat in the model, a sortal.BatchStat",
    ):
        nnx.restore(tmp_path, {"x": other(jnp.ones(1))})


def test_partial_keeps_what_only_one_side_has(tmp_path):
    nnx.save(
        tmp_path, {"a": nnx.Param(jnp.ones(1)), "b": nnx.Param(jnp.ones(1))}, step=0
    )
    into = {"a": nnx.Param(jnp.zeros(1)), "c": nnx.Param(jnp.zeros(1))}
    found = nnx.restore(tmp_path, into, partial=True)
    assert (found.leaves, found.kept) == ((("a",),), (("c",),))
    assert into["a"].value == 1
    assert into["c"].value == 0
    abstract = {
        "a": nnx.Param(jnp.zeros(1)),
        "c": nnx.Param(jax.ShapeDtypeStruct((), int)),
    }
    with pytest.raises(RestoreError, match=r"missing: c .* holds no value to keep"):
        nnx.restore(tmp_path, abstract, partial=True)


def test_partial_restores_shared_weights_into_models_that_do_not_share(tmp_path):
    tied = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    nnx.save(tmp_path, {"a": tied, "b": tied}, step=0)
    into = {k: nnx.Linear(2, 2, rngs=nnx.Rngs(i)) for i, k in enumerate("ab", 1)}
    with pytest.raises(RestoreError, match="b is shared with nothing in the model"):
        nnx.restore(tmp_path, into)
    nnx.restore(tmp_path, into, partial=True)
    assert jnp.array_equal(into["b"].kernel.value, tied.kernel.value)


def test_partial_finds_a_leaf_at_any_of_its_paths():
    """The path that comes first is another one where only one side has it."""
    one = nnx.Param(1)
    stored = {("m", "w"): 5}
    pairs, _ = fitted({"a": one, "m": {"w": one}}, stored, partial=True)
    assert pairs == {("a",): Plain(5)}
    node = {"w": one}
    pairs, _ = fitted({"a": node, "m": node}, stored, partial=True)
    assert pairs == {("a", "w"): Plain(5)}
    both = [(("z",), ("m",))]
    pairs, _ = fitted({"b": node, "z": node}, stored, both, partial=True)
    assert pairs == {("b", "w"): Plain(5)}
    # Through the node x to m, and in m through w to the first leaf.
    ties = [(("m", "w"), ("a",)), (("x",), ("m",))]
    pairs, _ = fitted({"x": {"w": nnx.Param(1)}}, {"a": 5}, ties, partial=True)
    assert pairs == {("x", "w"): Plain(5)}


Graph = list[dict[str, int]]
"""Nodes by number, from the root on: of each, the number behind each of its keys.

Numbers are those of later nodes; beyond the last they are leaves.
"""


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    size = draw(st.integers(1, 4))
    return [
        draw(st.dictionaries(st.sampled_from("abc"), st.integers(n + 1, size + 2)))
        for n in range(size)
    ]


def places(graph: Graph) -> tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]:
    """The leaf at each path; the first paths of leaves; other paths, with the first."""
    every: dict[Any, Any] = {}
    first: dict[int, Any] = {}
    again: dict[Any, Any] = {}

    def walk(path: Any, n: int, known: bool) -> None:
        if not known and first.setdefault(n, path) != path:
            known, again[path] = True, first[n]
        if n >= len(graph):
            every[path] = n
            return
        for key in sorted(graph[n]):
            walk((*path, key), graph[n][key], known)

    walk((), 0, False)
    return every, {n: p for n, p in first.items() if n >= len(graph)}, again


@settings(max_examples=300)
@given(graphs(), graphs())
def test_partial_pairs_leaves_that_have_any_path_in_common(mine, theirs):
    here, ours, _ = places(mine)
    there, stored, tied = places(theirs)
    nodes: list[Any] = [{} for _ in mine]
    nodes += [nnx.Param(-1) for _ in range(3 + len(mine))]
    for n, keys in enumerate(mine):
        nodes[n] |= {key: nodes[x] for key, x in keys.items()}
    given_ = {path: n for n, path in stored.items()}
    due = {
        path: {there[p] for p, x in here.items() if x == n and p in there}
        for n, path in ours.items()
    }
    if not any(due.values()):
        return
    pairs, found = fitted(nodes[0], given_, tied.items(), partial=True)
    assert set(pairs) == {path for path, values in due.items() if values}
    assert len(found.kept) == len(due) - len(pairs)
    for path, value in pairs.items():
        assert value.value in due[path]
        assert value.value == there.get(path, value.value)


def test_partial_takes_what_has_the_first_path_before_what_has_another():
    one = nnx.Param(1)
    root = {"a": one, "m": {"w": one}}
    pairs, _ = fitted(root, {("m", "w"): 5, "a": 6}, partial=True)
    assert pairs == {("a",): Plain(6)}
    text = refused(root, {("m", "w"): 5.0}, partial=True)
    assert "type: a (Param) is int in the model, float in the checkpoint" in text


def test_a_model_that_shares_what_the_checkpoint_does_not_is_refused(tmp_path):
    apart = {k: nnx.Param(jnp.ones(1)) for k in "ab"}
    nnx.save(tmp_path, apart, step=0)
    one = nnx.Param(jnp.zeros(1))
    with pytest.raises(RestoreError) as caught:
        nnx.restore(tmp_path, {"a": one, "b": one})
    assert "alias: b is the same as a in the model, shared with nothing" in str(
        caught.value
    )
    assert "unknown" not in str(caught.value)


def test_nothing_in_common_is_refused_even_if_partial(tmp_path):
    nnx.save(tmp_path, {"a": nnx.Param(jnp.ones(1))}, step=0)
    with pytest.raises(RestoreError, match="no leaf in common with the model"):
        nnx.restore(tmp_path, {"b": nnx.Param(jnp.ones(1))}, partial=True)
    other = {"b": nnx.Cache(jnp.ones(1))}
    with pytest.raises(RestoreError, match="no leaf in common with the model"):
        nnx.restore(tmp_path, other, partial=True, only=nnx.Param)
    with pytest.raises(RestoreError, match="no leaf in common with the model"):
        nnx.restore(tmp_path, {}, partial=True)


def test_rename_moves_paths_by_globs(tmp_path):
    nnx.save(tmp_path, {"enc": Net(0), "head": nnx.Param(jnp.ones(1))}, step=0)
    into = {"encoder": {"net": Net(1)}, "head": nnx.Param(jnp.zeros(1))}
    nnx.restore(tmp_path, into, rename={"enc.**": "encoder.net.**"})
    assert portrait(into["encoder"]["net"]) == portrait(Net(0))


def test_a_rename_that_does_nothing_or_cannot_is_refused(tmp_path):
    nnx.save(
        tmp_path, {"a": nnx.Param(jnp.ones(1)), "b": nnx.Param(jnp.ones(1))}, step=0
    )
    into = {"a": nnx.Param(jnp.zeros(1)), "b": nnx.Param(jnp.ones(1))}
    with pytest.raises(RestoreError, match=r"fit no path .*\n  'x': 'a'\nIts paths"):
        nnx.restore(tmp_path, into, rename={"x": "a"})
    with pytest.raises(RestoreError, match="given twice, after renaming: b"):
        nnx.restore(tmp_path, into, rename={"a": "b"})
    with pytest.raises(RestoreError, match="must have the same wild cards"):
        nnx.restore(tmp_path, into, rename={"a.*": "b.**"})
    assert into["a"].value == 0


def test_fill_gives_what_the_checkpoint_lacks(tmp_path):
    nnx.save(tmp_path, {"a": nnx.Param(jnp.ones(1))}, step=0)
    into = {"a": nnx.Param(jnp.zeros(1)), "b": nnx.Cache(jnp.zeros(2))}
    nnx.restore(tmp_path, into, fill=lambda path, kind: jnp.full(2, 7.0))
    assert into["b"].value.tolist() == [7, 7]
    other = nnx.state({"b": nnx.Cache(jnp.full(2, 8.0))})
    found = nnx.restore(tmp_path, into, fill=other)
    assert into["b"].value.tolist() == [8, 8]
    assert found.kept == (("b",),)
    with (
        untouched(into),
        pytest.raises(RestoreError, match="something of another shape"),
    ):
        nnx.restore(tmp_path, into, fill=lambda path, kind: jnp.ones(3))


def test_rename_names_keys_of_digits_and_with_dots(tmp_path):
    """``['0']`` is the key "0", where a bare 0 is an index."""
    odd = {
        "0": jnp.ones(1),
        "a.b": jnp.ones(2),
        "c": {"'": jnp.ones(3), "": jnp.ones(4)},
    }
    plain = {"x": jnp.zeros(1), "y": jnp.zeros(2), "z": [jnp.zeros(3), jnp.zeros(4)]}
    table = {"['0']": "x", "['a.b']": "y", 'c["\'"]': "z.0", "c['']": "z.1"}
    nnx.save(tmp_path / "odd", odd, step=0)
    nnx.restore(tmp_path / "odd", plain, rename=table)
    assert [plain["x"].sum(), plain["y"].sum()] == [1, 2]
    assert [x.sum() for x in plain["z"]] == [3, 4]
    nnx.save(tmp_path / "plain", {**plain, "x": jnp.full(1, 7.0)}, step=0)
    back = {new: old for old, new in table.items()}
    nnx.restore(tmp_path / "plain", odd, rename=back)
    assert odd["0"].sum() == 7


@pytest.mark.parametrize("pattern", ["a..b", ".a", "a.", "['a", "['a'", "a['b']c"])
def test_a_pattern_that_is_none_is_refused(tmp_path, pattern):
    nnx.save(tmp_path, {"a": jnp.ones(1)}, step=0)
    with pytest.raises(
        RestoreError, match="is no pattern of a path: entries are joined"
    ):
        nnx.restore(tmp_path, {"a": jnp.ones(1)}, rename={pattern: "a"})
