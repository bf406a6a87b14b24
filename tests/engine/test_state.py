"""State: flat inside, nested outside; views, algebra, pytree, copies, traces."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from orbax.checkpoint import v1

import sortal
from sortal._engine.paths import order, show
from sortal._engine.state import FlatState, State, as_state, snapshot
from sortal.errors import (
    ArgumentError,
    FilterError,
    MergeError,
    PathAttributeError,
    PathError,
    TraceError,
)
from strategies import (
    KEYS,
    Box,
    LoRA,
    filters,
    flat_leaves,
    jax_arrays,
    models,
    states,
    variables,
)

Param = sortal.Param


def small() -> State:
    return State(
        {
            "layers": {
                0: {"bias": Param(jnp.zeros(2)), "kernel": Param(jnp.ones((2, 2)))},
                1: {"mean": sortal.BatchStat(jnp.zeros(1), tag="a")},
            },
            "table": jnp.arange(3),
        }
    )


def value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, sortal.Variable) else leaf


def nested(flat: dict[Any, Any]) -> dict[Any, Any]:
    """Nested dicts of a flat mapping, by hand."""
    out: dict[Any, Any] = {}
    for path, leaf in flat.items():
        at = out
        for key in path[:-1]:
            at = at.setdefault(key, {})
        at[path[-1]] = leaf
    return out


def sorted_paths(paths: Any) -> list[Any]:
    return sorted(paths, key=lambda p: tuple(map(order, p)))


# -------------------------------------------------------------- construction
@given(flat_leaves())
def test_a_state_is_the_same_from_flat_paths_and_from_nested_mappings(flat):
    state = State.from_flat_path(flat)
    assert State(nested(flat)) == state
    assert State.from_flat_path(list(flat.items())) == state
    assert State(list(nested(flat).items())) == state
    assert as_state(nested(flat)) == state
    assert as_state(state) is state
    assert list(state.paths()) == sorted_paths(flat)
    assert all(value(state.flat_state().leaves[i]) is value(flat[p])
               for i, p in enumerate(state.paths()))  # fmt: skip


@given(states())
def test_to_and_from_flat_state_is_a_round_trip(state):
    flat = state.flat_state()
    assert State.from_flat_path(flat) == state
    assert flat.to_nested_state() == state
    assert as_state(flat) == state
    assert flat.paths == state.paths()
    assert list(dict(flat)) == list(state.paths())


def test_a_mapping_may_have_any_attributes():
    """A table of a database, for one, has a schema."""

    class Table(dict):
        schema = "users"

    assert State({"a": Table(b=1)}).paths() == (("a", "b"),)
    assert State(Table(b=1)).paths() == (("b",),)


def test_what_is_no_state_is_refused_by_its_type():
    with pytest.raises(ArgumentError, match="nested dict of leaves, found a list"):
        as_state([1])


@pytest.mark.parametrize(
    "flat",
    [
        [(("a",), 1), (("a", "b"), 2)],
        [(("a", "b", "c"), 1), (("a",), 2)],
    ],
)
def test_a_path_through_a_leaf_is_refused(flat):
    with pytest.raises(PathError, match=r"cannot run through a leaf; found:\n  a\.b"):
        State.from_flat_path(flat)


def test_two_leaves_at_one_path_are_refused_and_all_such_paths_listed():
    """The later one would win without a word."""
    flat = [(("a", 0), 1), (("b",), 2), (("a", 0), 3), (("b",), 4)]
    with pytest.raises(PathError, match=r"one leaf only; given twice:\n  a\.0\n  b"):
        State.from_flat_path(flat)


def test_an_empty_state_is_empty():
    assert len(State()) == 0
    assert State().paths() == ()
    assert repr(State()) == "State()"
    assert State() == State({})
    assert jax.tree.leaves(State()) == []


# ------------------------------------------------------------- nested reading
@given(states())
def test_nested_reading_reaches_every_leaf_by_items_and_by_attributes(state):
    for path, leaf in state.flat_state():
        at = by_attribute = state
        for key in path:
            at = at[key]
            named = isinstance(key, str) and key.isidentifier()
            by_attribute = getattr(by_attribute, key) if named else by_attribute[key]
        assert at is leaf
        assert by_attribute is leaf


@given(states())
def test_a_state_and_its_views_are_mappings_by_level(state):
    expected = nested(dict(state.flat_state()))

    def compare(found: Any, plain: dict[Any, Any]) -> None:
        assert list(found) == sorted(plain, key=order)
        assert len(found) == len(plain)
        assert dict(found.items()).keys() == plain.keys()
        for key, inner in plain.items():
            assert key in found
            if isinstance(inner, dict):
                compare(found[key], inner)
            else:
                assert found[key] is inner
                assert found.get(key) is inner

    compare(state, expected)
    assert "absent" not in state


def test_a_missing_key_is_an_error_that_lists_what_there_is():
    state = small()
    with pytest.raises(
        PathError, match="no 'lyers' in this State; it has 'layers', 'table'"
    ):
        state["lyers"]
    with pytest.raises(PathAttributeError, match=r"no 'kernle' .* 'bias', 'kernel'"):
        _ = state.layers[0].kernle
    with pytest.raises(PathError, match="no 7 in this State; it has 0, 1"):
        state["layers"][7]
    with pytest.raises(PathError, match="no 'x' in this State; it has nothing"):
        State()["x"]
    with pytest.raises(PathError, match="no 'x'"):
        del state["x"]
    with pytest.raises(PathError, match="no 'x'"):
        state.pop("x")
    with pytest.raises(KeyError):
        State().popitem()
    assert state.get("x", 5) == 5
    assert not hasattr(state, "lyers")
    assert not hasattr(state, "__fspath__")


def test_a_leaf_is_a_variable_of_its_kind_the_same_at_each_reading():
    state = sortal.state(Box(w=LoRA(jnp.ones(2), tag="a"), x=jnp.ones(1)))
    leaf = state["w"]
    assert type(leaf) is LoRA
    assert leaf.tag == "a"
    assert state.w is leaf
    assert isinstance(state["x"], jax.Array)


def test_reading_and_writing_a_leaf_never_touches_the_model():
    model = Box(w=Param(jnp.ones(2)), n=Param(np.ones(2)))
    state = sortal.state(model)
    state.w[...] = 5.0
    state.w.set_metadata(tag="mine")
    state.n.value[0] = 7
    assert model.w.value.tolist() == [1, 1]
    assert model.n.value.tolist() == [1, 1]
    assert not model.w.has_metadata("tag")
    assert state.schema.metadata[1] == {"tag": "mine"} or state["w"].tag == "mine"


# ------------------------------------------------------------------- writing
def test_a_bare_value_keeps_the_kind_and_a_variable_brings_its_own():
    state = small()
    state["layers"][0]["kernel"] = jnp.zeros((2, 2))
    assert type(state.layers[0].kernel) is Param
    assert state.layers[0].kernel.value.sum() == 0
    state.layers[0].kernel = sortal.Cache(jnp.ones(1), tag="c")
    assert type(state.layers[0].kernel) is sortal.Cache
    assert state.layers[0].kernel.tag == "c"
    new = Param(jnp.ones(3))
    state.layers[0].bias = new
    assert state.layers[0].bias is new
    state.table = jnp.zeros(1)
    assert state.table.shape == (1,)
    state.table = Param(1)
    assert type(state.table) is Param


def test_new_leaves_and_parts_may_be_added_anywhere():
    state = small()
    state["layers"][0]["scale"] = Param(1)
    state["new"] = {"deep": {"er": 5, "w": Param(2)}}
    state.layers.extra = jnp.ones(1)
    assert state.paths() == (
        ("layers", 0, "bias"), ("layers", 0, "kernel"), ("layers", 0, "scale"),
        ("layers", 1, "mean"), ("layers", "extra"),
        ("new", "deep", "er"), ("new", "deep", "w"), ("table",),
    )  # fmt: skip
    assert state.new.deep.er == 5


def test_views_write_through_and_follow():
    state = small()
    view = state["layers"]
    inner = view[0]
    inner["kernel"] = jnp.full((2, 2), 7.0)
    assert state.layers[0].kernel.value[0, 0] == 7
    state.layers[0].bias = jnp.ones(2)
    assert inner.bias.value.tolist() == [1, 1]
    del view[1]
    assert state.paths() == (
        ("layers", 0, "bias"), ("layers", 0, "kernel"), ("table",)
    )  # fmt: skip
    state["layers"][0] = {"only": Param(3)}
    assert list(inner) == ["only"]
    assert inner.values_list() == [3]
    assert inner.schema.paths == (("only",),)


@given(states(), st.sampled_from(KEYS))
def test_assigning_a_part_to_itself_changes_nothing(state, key):
    before = copy.copy(state)
    if key in state:
        state[key] = state[key]
    assert state == before


@given(states(), st.sampled_from(KEYS), flat_leaves())
def test_assigning_replaces_all_below_the_key(state, key, flat):
    new = nested(flat)
    expected = {p: value(x) for p, x in state.flat_state() if p[0] != key}
    expected |= {(key, *p): value(x) for p, x in flat.items()}
    state[key] = new
    assert list(state.paths()) == sorted_paths(expected)
    for path, leaf in state.flat_state():
        assert value(leaf) is expected[path]


def test_a_leaf_may_take_the_place_of_a_part_and_the_other_way_round():
    state = small()
    state["layers"] = Param(1)
    state["table"] = {"a": 1}
    assert state.paths() == (("layers",), ("table", "a"))


def test_a_refused_write_changes_nothing():
    """The two paths of one assignment clash with each other."""
    state = small()
    before = copy.copy(state)

    class Twice(dict):
        def items(self):
            return [(0, 1), (0, {"x": 2})]

    with pytest.raises(PathError, match=r"through a leaf; found:\n  layers\.0\.x"):
        state["layers"] = Twice(a=1)
    assert state == before


@given(states())
def test_deleting_popping_and_clearing_do_as_dicts_do(state):
    plain = nested({p: value(x) for p, x in state.flat_state()})
    first = copy.copy(state)
    for key in list(state):
        del first[key]
        del plain[key]
        assert list(first) == sorted(plain, key=order)
    second = copy.copy(state)
    parts = {key: second.pop(key) for key in list(second)}
    assert len(second) == 0
    assert State(parts) == state
    third = copy.copy(state)
    assert State(dict(third.popitem() for _ in range(len(third)))) == state
    fourth = copy.copy(state)
    fourth.clear()
    assert fourth == State()
    assert fourth.pop("absent", None) is None


def test_a_popped_part_stays_what_it_was():
    state = small()
    part = state.pop("layers")
    assert part.paths() == ((0, "bias"), (0, "kernel"), (1, "mean"))
    assert part[1].mean.tag == "a"
    assert state.paths() == (("table",),)


def test_update_from_mappings_works_level_by_level():
    state = small()
    state.update({"table": jnp.zeros(1)}, other=Param(1))
    state["layers"].update({1: {"var": Param(2)}})
    assert state.paths()[2:] == (("layers", 1, "var"), ("other",), ("table",))
    assert state.setdefault("other", 3).value == 1


def test_metadata_edited_on_a_leaf_is_the_states():
    state = sortal.state(Box(w=Param(1), v=Param(2)))
    view, copied = state, copy.copy(state)
    state.w.set_metadata(tag="a")
    assert state.filter("a").paths() == (("w",),)
    assert view.schema.metadata[1]["tag"] == "a"
    assert copied.filter("a").paths() == ()
    part = State({"x": {"w": Param(1)}})["x"]
    part.w.set_metadata(tag="a")
    assert part.filter("a").paths() == (("w",),)


# ----------------------------------------------------------------- with Flax
class OurNet(sortal.Module):
    def __init__(self):
        self.kernel = Param(jnp.ones((2, 3)))
        self.layers = [OurLayer(i) for i in range(11)]


class OurLayer(sortal.Module):
    def __init__(self, i):
        self.w = Param(jnp.full(2, float(i)))
        self.mean = sortal.BatchStat(jnp.full(1, float(i)))


class FlaxNet(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((2, 3)))
        self.layers = nnx.List([FlaxLayer(i) for i in range(11)])


class FlaxLayer(nnx.Module):
    def __init__(self, i):
        self.w = nnx.Param(jnp.full(2, float(i)))
        self.mean = nnx.BatchStat(jnp.full(1, float(i)))


def test_paths_order_and_values_are_those_of_flax():
    ours, theirs = sortal.state(OurNet()), nnx.state(FlaxNet())
    mine, flax = list(ours.flat_state()), list(nnx.to_flat_state(theirs))
    assert [p for p, _ in mine] == [p for p, _ in flax]
    assert all(
        (a[...] == b[...]).all() for (_, a), (_, b) in zip(mine, flax, strict=True)
    )
    a, b = ours.to_pure_dict(), nnx.to_pure_dict(theirs)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert list(ours["layers"]) == list(theirs["layers"])


def is_variable(x: Any) -> bool:
    return isinstance(x, (sortal.Variable, nnx.Variable))


@pytest.mark.parametrize("is_leaf", [None, is_variable])
def test_key_paths_are_those_of_flax(is_leaf):
    """Orbax, optax's masks and users' maps read them."""
    ours, theirs = (
        jax.tree_util.tree_flatten_with_path(state, is_leaf=is_leaf)[0]
        for state in (sortal.state(OurNet()), nnx.state(FlaxNet()))
    )
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    assert jax.tree_util.keystr(ours[2][0][:3]) == "['layers'][0]['w']"


def decays(path: Any, x: Any) -> bool:
    return path[-2].key == "w"


def group(path: Any, x: Any) -> str:
    return "moves" if path[0].key == "layers" and path[1].key > 4 else "stays"


def stepped(tx: optax.GradientTransformation, params: Any) -> list[Any]:
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert type(new) is type(params)
    return jax.tree.leaves(new)


def in_form(form: str, choose: Any, params: Any) -> Any:
    """A mask or labels as a function, or as a State made beforehand."""
    if form == "function":
        return lambda tree: jax.tree_util.tree_map_with_path(choose, tree)
    if form == "of Variables":
        return jax.tree_util.tree_map_with_path(choose, params)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: choose((*path, None), x), params, is_leaf=is_variable
    )


@pytest.mark.parametrize("form", ["function", "of Variables", "of bare values"])
def test_masks_and_labels_of_optax_do_what_they_do_with_flax(form):
    found = []
    for params in (sortal.state(OurNet()), nnx.state(FlaxNet())):
        mask, labels = in_form(form, decays, params), in_form(form, group, params)
        groups = {"moves": optax.sgd(1.0), "stays": optax.set_to_zero()}
        found.append(
            stepped(optax.masked(optax.sgd(1.0), mask), params)
            + stepped(optax.adamw(0.5, weight_decay=0.5, mask=mask), params)
            + stepped(optax.multi_transform(groups, labels), params)
        )
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_orbax_saves_a_state_and_restores_it_into_one(tmp_path):
    state = sortal.state(OurNet())
    empty = jax.tree.map(jnp.zeros_like, state)
    assert empty != state
    with orbax.checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "old", state)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "old", empty)
        theirs = saver.restore(tmp_path / "old", nnx.state(FlaxNet()))
    assert type(found) is State
    assert found == state
    same = zip(jax.tree.leaves(theirs), jax.tree.leaves(state), strict=True)
    assert all((a == b).all() for a, b in same)
    v1.save(tmp_path / "new", state)
    assert v1.load(tmp_path / "new", empty) == state


def test_a_mask_may_answer_for_a_whole_part_as_with_flax():
    """A leaf in the place of a part is a prefix of it, for JAX and for optax."""
    for params, made in (
        (sortal.state(OurNet()), State),
        (nnx.state(FlaxNet()), nnx.State),
    ):
        mask = made({"kernel": False, "layers": True})
        counted = jax.tree.map(
            lambda m, part: m * len(jax.tree.leaves(part)), mask, params
        )
        assert dict(counted) == {"kernel": 0, "layers": 22}


def test_a_map_that_puts_a_leaf_in_the_place_of_a_part_gives_a_smaller_state():
    state = small()
    cut = jax.tree.map(lambda x: 0, state, is_leaf=lambda x: isinstance(x, dict))
    assert cut.paths() == (("layers",), ("table",))


def test_keys_that_python_cannot_sort_keep_the_order_of_paths():
    leaves = {(key,): i for i, key in enumerate((2, 10, "10", "a", (0, "x"), (0, 1)))}
    state = State.from_flat_path({("t", *p): x for p, x in leaves.items()} | leaves)
    assert state.values_list() == [0, 1, 2, 3, *range(6), 4, 5]
    assert jax.tree.leaves(state) == state.values_list()
    keys = [path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    assert keys == [p[-1] for p in state.paths()]
    assert jax.tree.map(lambda x: x + 1, state).values_list()[4:6] == [1, 2]


# --------------------------------------------------------------------- algebra
@given(flat_leaves(), flat_leaves())
def test_union_takes_the_later_and_difference_removes_paths(a, b):
    x, y = State.from_flat_path(a), State.from_flat_path(b)
    minus = {p: leaf for p, leaf in a.items() if p not in b}
    assert x - y == State.from_flat_path(minus)
    assert x - nested(b) == x - y
    assert x - State() == x
    assert x - x == State()
    merged = {**a, **b}
    clash = any(p != q and q == p[: len(q)] for p in merged for q in merged)
    if clash:
        with pytest.raises(PathError, match="cannot run through a leaf"):
            State.merge(x, y)
    else:
        assert x | y == State.from_flat_path(merged)
        assert State.merge(x, nested(b)) == x | y
        assert (x - y) | y == x | y
    assert x | State() == x
    assert State() | x == x


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a | State({"other": 1}),
        lambda a: State() | a,
        lambda a: a - State(),
        lambda a: State.merge(a),
        lambda a: State.merge({"table": 1}, a),
        lambda a: a.map(lambda path, leaf: leaf),
        lambda a: State({"q": a})["q"],
        lambda a: State({"q": a["layers"]}).q.__class__({"layers": a["layers"]}),
        lambda a: State(a),
        lambda a: a.filter(...),
        lambda a: a.split(...),
        lambda a: copy.copy(a),
    ],
)
def test_what_is_made_of_a_state_has_variables_of_its_own(make):
    state = small()
    state.layers[0].bias.value = np.zeros(2)
    before, held = copy.deepcopy(state), state.leaves()
    made = make(state)
    made["layers"][0]["kernel"][...] = 5
    made["layers"][0]["bias"].value[0] = 5
    made["layers"][1]["mean"].set_metadata(tag="other")
    assert state == before
    assert all(a is b for a, b in zip(state.leaves(), held, strict=True))


def test_a_state_put_into_another_is_copied_and_a_variable_is_kept():
    state, other, variable = small(), State(), Param(jnp.ones(1))
    other["part"], other["leaf"] = state["layers"], variable
    other.part[0].kernel[...] = 5
    assert state == small()
    assert other["leaf"] is variable


def test_algebra_with_what_is_no_state_is_refused():
    with pytest.raises(ArgumentError, match="found a int"):
        small() | 1
    with pytest.raises(ArgumentError, match="found a list"):
        small() - [1]


@given(states(), st.lists(filters, min_size=1, max_size=3))
def test_split_then_merge_is_the_original(state, chosen):
    try:
        parts = state.split(*chosen, ...)
    except FilterError:
        return
    assert State.merge(*parts) == state
    assert sum(len(p.paths()) for p in parts) == len(state.paths())
    some = state.filter(*chosen)
    assert (some if len(chosen) > 1 else (some,)) == parts[:-1]


@given(states(), filters)
def test_filter_takes_what_the_filter_says(state, chosen):
    expected = {p: x for p, x in state.flat_state() if chosen(p, x)}
    assert state.filter(chosen) == State.from_flat_path(expected)
    assert state - state.filter(chosen) == state.filter(~chosen)


def test_split_lists_what_is_left_over():
    with pytest.raises(
        FilterError, match=r"leave 2 leaves over:\n  layers\.1\.mean \(B"
    ):
        small().split(Param)
    params, rest = small().split(Param, ...)
    assert len(params.paths()) == 2
    assert small().split(...) == small()
    assert rest.paths() == (("layers", 1, "mean"), ("table",))


def test_views_are_filtered_split_and_mapped_by_paths_from_there():
    view = small()["layers"]
    assert view.filter(sortal.BatchStat).paths() == ((1, "mean"),)
    assert view.filter(sortal.Under("0")).paths() == ((0, "bias"), (0, "kernel"))
    assert view.map(lambda path, leaf: len(path)).values_list() == [2, 2, 2]


@given(states())
def test_map_gives_path_and_leaf_and_takes_any_leaf(state):
    seen = []

    def see(path: Any, leaf: Any) -> Any:
        seen.append(path)
        return leaf

    assert state.map(see) == state
    assert tuple(seen) == state.paths()
    shown = state.map(lambda path, leaf: show(path))
    assert shown.values_list() == list(map(show, state.paths()))
    assert set(shown.schema.kinds) <= {None}


# -------------------------------------------------------------------- equality
@given(states(), states())
def test_states_are_equal_where_paths_kinds_metadata_and_values_are(a, b):
    assert a == copy.copy(a)
    same = a.schema is b.schema and all(
        x.shape == y.shape and x.dtype == y.dtype and bool((x == y).all())
        for x, y in zip(a.values_list(), b.values_list(), strict=True)
    )
    assert (a == b) == same
    assert (a != b) != same


def test_states_differ_in_each_single_thing():
    base = State({"w": Param(jnp.zeros(2))})
    others = [
        State({"v": Param(jnp.zeros(2))}),
        State({"w": LoRA(jnp.zeros(2))}),
        State({"w": Param(jnp.zeros(2), tag="a")}),
        State({"w": Param(jnp.zeros(3))}),
        State({"w": Param(jnp.zeros((2, 1)))}),
        State({"w": Param(jnp.zeros(2, jnp.int32))}),
        State({"w": Param(jnp.ones(2))}),
        State({"w": Param([jnp.zeros(2)])}),
        State({"w": jnp.zeros(2)}),
        State({"x": {"w": Param(jnp.zeros(2))}}),
    ]
    assert all(base != other for other in others)
    assert State({"x": {"w": Param(jnp.zeros(2))}})["x"] == base
    assert base != {"w": jnp.zeros(2)}
    assert State({"n": Param(1)}) != State({"n": Param(True)})
    key = State({"k": Param(jax.random.key(0))})
    assert key == State({"k": Param(jax.random.key(0))})
    assert key != State({"k": Param(jax.random.key(1))})


def test_a_state_cannot_be_hashed():
    with pytest.raises(TypeError, match="unhashable"):
        hash(small())


def test_a_state_prints_paths_kinds_and_shapes():
    assert repr(small()) == (
        "State(\n"
        "  layers.0.bias: Param(float32[2])\n"
        "  layers.0.kernel: Param(float32[2,2])\n"
        "  layers.1.mean: BatchStat(float32[1])\n"
        "  table: int32[3]\n"
        ")"
    )
    assert repr(small().layers[1]) == "State(\n  mean: BatchStat(float32[1])\n)"


# ------------------------------------------------------------------ pure dicts
@given(states())
def test_to_pure_dict_then_replace_is_a_round_trip(state):
    pure = state.to_pure_dict()
    other = copy.deepcopy(state)
    for path, _ in other.flat_state():
        other._write({path: jnp.full(1, 99.0)}, set())
    assert other != state or not state.paths()
    other.replace_by_pure_dict(pure)
    assert other == state


@given(states())
def test_pure_dicts_with_integers_as_strings_are_understood(state):
    def text(x: Any) -> Any:
        return {str(k): text(v) for k, v in x.items()} if isinstance(x, dict) else x

    names = [tuple(map(str, p)) for p in state.paths()]
    if len(set(names)) < len(names):
        return  # both 0 and "0" are there
    other = copy.deepcopy(state)
    other.replace_by_pure_dict(text(state.to_pure_dict()))
    assert other == state


def test_a_variable_of_nested_dicts_is_replaced_whole():
    state = State({"p": {0: Param({"a": jnp.ones(2), "b": {"c": jnp.ones(1)}})}})
    other = copy.deepcopy(state)
    other.p[0].value = {}
    other.replace_by_pure_dict(state.to_pure_dict())
    assert other == state
    with pytest.raises(PathError, match=r"  table\.a\n"):
        small().replace_by_pure_dict({"table": {"a": 1}})


def test_functions_may_extract_and_replace():
    state = small()
    assert state.to_pure_dict(type)["layers"][0]["bias"] is Param
    assert state.to_pure_dict(type)["table"] is type(jnp.ones(1))
    state.replace_by_pure_dict(
        {"layers": {0: {"bias": 5.0}}}, lambda old, new: old.replace(old[...] + new)
    )
    assert state.layers[0].bias.value.tolist() == [5, 5]
    assert type(state.layers[0].bias) is Param


def test_unknown_paths_of_a_pure_dict_are_all_listed_and_nothing_is_replaced():
    state = small()
    with pytest.raises(PathError) as caught:
        state.replace_by_pure_dict({"table": 1, "tabel": 2, "layers": {0: {"b": 3}}})
    assert str(caught.value) == (
        "replace_by_pure_dict was given paths that this State does not have:\n"
        "  tabel\n  layers.0.b\nIt has:\n"
        "  layers.0.bias\n  layers.0.kernel\n  layers.1.mean\n  table"
    )
    assert state == small()


# ---------------------------------------------------------------- as a pytree
@given(states())
def test_flatten_then_unflatten_is_a_round_trip(state):
    leaves, treedef = jax.tree.flatten(state)
    assert treedef.unflatten(leaves) == state
    assert all(a is value(b) for a, b in zip(leaves, state.leaves(), strict=True))
    assert jax.tree.structure(copy.copy(state)) == treedef
    assert jax.tree.map(lambda x: x, state) == state


@given(states())
def test_key_paths_print_as_subscripts(state):
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda x: isinstance(x, sortal.Variable)
    )
    printed = [jax.tree_util.keystr(path) for path, _ in pairs]
    assert printed == ["".join(f"[{k!r}]" for k in p) for p in state.paths()]


@given(states(variables()))
def test_a_map_over_whole_variables_works_as_nnx_code_has_it(state):
    seen = []
    bare = jax.tree.map(
        lambda v: (seen.append(v), v.value)[1], state, is_leaf=is_variable
    )
    assert all(map(is_variable, seen))
    assert set(bare.schema.kinds) <= {None}
    assert bare.paths() == state.paths()
    cached = jax.tree.map(lambda v: sortal.Cache(v.value), state, is_leaf=is_variable)
    assert set(cached.schema.kinds) <= {sortal.Cache}
    same = jax.tree.map(lambda v: v.replace(v.value), state, is_leaf=is_variable)
    assert same == state


def test_a_lone_leaf_and_a_leaf_named_none_are_two_trees():
    lone, named = State.from_flat_path({(): 1.0}), State({None: 2.0})
    assert jax.tree.structure(lone) != jax.tree.structure(named)
    kept = jax.jit(lambda s: s)
    assert [kept(s).paths() for s in (lone, named)] == [((),), ((None,),)]
    assert kept(lone).values_list() == [1.0]


@given(states(variables()))
def test_a_state_of_bare_values_is_a_prefix_of_the_state_it_is_about(state):
    """Masks and labels for optax are built like that."""
    labels = state.map(lambda path, leaf: "label")
    joined = jax.tree.map(lambda label, v: label, labels, state,
                          is_leaf=lambda x: isinstance(x, str))  # fmt: skip
    assert jax.tree.leaves(joined) == ["label"] * len(state.paths())


@pytest.mark.parametrize(
    "other",
    [
        State({"w": Param(jnp.ones(2)), "v": Param(jnp.ones(2))}),
        State({"v": Param(jnp.ones(2))}),
        State({"w": LoRA(jnp.ones(2))}),
        State({"w": Param(jnp.ones(2), tag="a")}),
    ],
)
def test_states_of_other_paths_kinds_or_metadata_are_other_trees(other):
    base = State({"w": Param(jnp.ones(2))})
    assert jax.tree.structure(base) != jax.tree.structure(other)
    with pytest.raises(
        ValueError, match=r"(?i)mismatch|metadata|structure|custom node"
    ):
        jax.tree.map(jnp.add, base, other)


def test_states_go_through_jit_grad_and_vmap():
    state = State({"a": {"w": Param(jnp.array([1.0, 2.0]))}, "x": jnp.ones(2)})
    doubled = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))(state)
    assert doubled == jax.tree.map(lambda x: 2 * x, state)
    gradient = jax.grad(lambda s: (s.a.w[...] ** 2).sum() + s["x"].sum())(state)
    assert type(gradient.a.w) is Param
    assert gradient.a.w.value.tolist() == [2, 4]
    assert jax.vmap(lambda s: s.a.w * s.x)(state).tolist() == [1, 2]
    traced = []
    f = jax.jit(lambda s: (traced.append(1), s.a.w[...])[1])
    f(state)
    f(copy.deepcopy(state))
    f(doubled)
    assert len(traced) == 1


def test_views_go_through_jax_as_states_of_their_own():
    view = small()["layers"]
    out = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s))(view)
    assert type(out) is State
    assert out.paths() == view.paths()
    assert jax.tree.structure(view) == jax.tree.structure(out)
    assert jax.tree.map(lambda a, b: a - b, out, view)[0].bias.value.tolist() == [1, 1]


@given(states())
def test_a_flat_state_is_a_pytree_of_its_leaves(state):
    flat = state.flat_state()
    leaves, treedef = jax.tree.flatten(flat)
    assert State.from_flat_path(treedef.unflatten(leaves)) == state
    assert leaves == jax.tree.leaves(state)


def test_a_flat_state_has_the_key_paths_of_flax():
    ours, theirs = (
        jax.tree_util.tree_flatten_with_path(flat)[0]
        for flat in (
            sortal.state(OurNet()).flat_state(),
            nnx.to_flat_state(nnx.state(FlaxNet())),
        )
    )
    assert [path for path, _ in ours] == [path for path, _ in theirs]


# --------------------------------------------------------- copies and pickles
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_share_a_variable_with_what_else_is_copied(copied):
    state = sortal.State({"a": Param(jnp.ones(2)), "b": jnp.zeros(1)})
    both = copied([state["a"], state])
    assert both[0] is both[1]["a"]
    assert both[0] is not state["a"]
    assert both[1] == state


@given(states())
def test_states_survive_pickle_and_both_copies(state):
    for other in (
        pickle.loads(pickle.dumps(state)),
        copy.copy(state),
        copy.deepcopy(state),
    ):
        assert type(other) is State
        assert other == state
        assert other.schema is state.schema
    flat = pickle.loads(pickle.dumps(state.flat_state()))
    assert type(flat) is FlatState
    assert flat.to_nested_state() == state


def test_views_survive_pickle_and_both_copies_as_states():
    view = small()["layers"]
    for other in (
        pickle.loads(pickle.dumps(view)),
        copy.copy(view),
        copy.deepcopy(view),
    ):
        assert type(other) is State
        assert other == view
        other[0].bias[...] = 9
    assert view[0].bias.value.tolist() == [0, 0]


def test_copies_are_written_to_apart():
    state = small()
    for other in (copy.copy(state), copy.deepcopy(state)):
        other.layers[0].bias[...] = 5
        other.table = jnp.zeros(1)
        other["new"] = 1
        del other["layers"][1]
    assert state == small()


def test_a_deep_copy_owns_its_numpy_arrays():
    array = np.zeros(2)
    state = State({"w": Param(array), "x": array, "t": Param({"a": array})})
    other = copy.deepcopy(state)
    array[0] = 9
    assert other.w.value[0] == other.x[0] == other.t.value["a"][0] == 0


# -------------------------------------------------------------------- traces
def test_a_state_read_inside_a_trace_is_written_outside_as_before():
    """Variables made at the first reading belong to the State's own trace."""
    state = sortal.state(Box(w=Param(jnp.ones(2)), v=Param(jnp.ones(2))))
    out = jax.jit(lambda x: x * state.w + state.leaves()[0])(jnp.ones(2))
    assert out.tolist() == [2, 2]
    state.w = jnp.zeros(2)
    state.v[...] = 3
    assert state.values_list()[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    "write",
    [
        lambda s, x: s.__setitem__("w", x),
        lambda s, x: s["w"].set_value(x),
        lambda s, x: s.__setitem__("table", x),
        lambda s, x: s.__setitem__("new", x),
        lambda s, x: s.__setitem__("w", sortal.Cache(x)),
        lambda s, x: s["part"].__setitem__("a", Param(x)),
        lambda s, x: s.__delitem__("w"),
        lambda s, x: s.pop("part"),
        lambda s, x: s.update(table=x),
        lambda s, x: s.replace_by_pure_dict({"table": x}),
    ],
)
def test_a_write_to_an_outer_state_inside_a_trace_is_refused(write):
    """The tracer would stay in it, or the update be lost."""
    model = Box(w=Param(jnp.ones(2)), table=jnp.ones(2), part={"a": Param(jnp.ones(2))})
    state = sortal.state(model)
    with pytest.raises(TraceError, match=r"'?(State|Param)'? from .*(w|ta|new|part)"):
        jax.jit(lambda x: (write(state, x), x)[1])(jnp.ones(2))
    assert state == sortal.state(model)


def test_a_state_made_inside_a_trace_is_written_there():
    @jax.jit
    def f(s, x):
        s["w"] = x
        s["new"] = Param(x)
        inner = State({"a": x})
        inner["b"] = x
        return s, inner

    out, inner = f(State({"w": Param(jnp.ones(2))}), jnp.zeros(2))
    assert out.paths() == (("new",), ("w",))
    out["w"] = jnp.ones(1)
    inner["a"] = jnp.ones(1)


# ---------------------------------------------------- held by a model; engine
@given(models(), states(variables(jax_arrays)))
def test_a_state_in_a_model_is_a_part_of_it(model, state):
    model.held = state
    copied = sortal.merge(*sortal.split(model))
    assert type(copied.held) is State
    assert copied.held == state
    found = sortal.state(model)
    assert [p for p in found.paths() if p[0] == "held"] == [
        ("held", *p) for p in state.paths()
    ]
    before = sortal.graphdef(model)
    model.held["added"] = Param(jnp.ones(1))
    assert sortal.graphdef(model) is not before


def test_a_view_in_a_model_is_copied_as_a_state_of_its_own():
    model = Box(held=small()["layers"])
    copied = sortal.merge(*sortal.split(model))
    assert copied.held == model.held
    copied.held[1].mean[...] = 5
    assert model.held[1].mean.value.tolist() == [0]
    assert copied.held[1].mean.value.tolist() == [5]


def test_what_is_written_into_a_view_that_a_model_holds_is_written_into_its_state():
    state = State({"part": {"x": jnp.zeros(2), "w": Param(jnp.zeros(1))}})
    model = Box(held=state["part"])
    sortal.update(model, jax.tree.map(lambda x: x + 1, sortal.state(model)))
    sortal.jit(lambda m: m.held.update(x=m.held["x"] + 1, new=Param(m.held["x"])))(
        model
    )
    assert state["part"]["x"].tolist() == [2, 2]
    assert state["part"]["w"].value.tolist() == [1]
    assert state["part"]["new"].value.tolist() == [1, 1]


def test_a_snapshot_keeps_the_given_list():
    state = small()
    made = snapshot(state.schema, state.values_list())
    assert made == state
    assert made.values_list() == state.values_list()


def test_names_of_methods_are_reached_as_items():
    state = State({"map": 1, "paths": 2, "items": 3, "schema": 4})
    assert [state[k] for k in ("map", "paths", "items", "schema")] == [1, 2, 3, 4]
    assert callable(state.map)


def test_a_state_of_a_lone_variable_has_the_empty_path():
    state = sortal.state(Param(1))
    assert state.paths() == ((),)
    assert state.values_list() == [1]
    assert list(state) == []
    assert jax.tree.map(lambda x: x + 1, state).values_list() == [2]
    with pytest.raises(PathError, match="'a'"):
        del state["a"]
    with pytest.raises(PathError, match="a lone leaf has no key"):
        state.to_pure_dict()
    assert copy.deepcopy(state) == state


class _FlaxAdapter(nnx.Param):
    pass


def test_what_is_done_to_a_flax_variable_in_a_state_is_seen_at_once():
    state = sortal.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    graphdef = sortal.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))[0]
    kernel = state["kernel"]
    assert "tag" not in dict(state.schema.metadata[1])
    kernel.set_metadata(tag="x")
    assert state.schema.metadata[1]["tag"] == "x"
    assert sortal.merge(graphdef, state).kernel.get_metadata()["tag"] == "x"
    object.__setattr__(kernel, "__class__", _FlaxAdapter)
    assert state.schema.kinds[1] is _FlaxAdapter
    with pytest.raises(MergeError, match="wrong kind: kernel"):
        sortal.merge(graphdef, state)
