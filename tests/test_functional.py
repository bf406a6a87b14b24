"""The verbs over live objects: every rule of what they take, refuse and leave alone."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sortal
from models import (
    KINDS,
    Count,
    Holder,
    Linear,
    Net,
    models,
    objects,
    portrait,
    untouched,
)
from sortal import BatchStat, Cache, Param, Variable, nnx
from sortal.errors import (
    FilterError,
    MergeError,
    StructureError,
    TraceError,
    UpdateError,
)

FILTERS = st.lists(st.sampled_from(KINDS), unique=True, max_size=4).map(
    lambda kinds: (*kinds, ...)
)


# ---------------------------------------------------------------------------- laws
@given(models())
def test_merge_undoes_split(model: Any) -> None:
    before = portrait(model)
    made = sortal.merge(*sortal.split(model))
    assert portrait(made) == before
    assert portrait(model) == before
    assert not _mutable(made) & _mutable(model)


def _mutable(model: Any) -> set[int]:
    return {i for i, x in objects(model).items() if not isinstance(x, tuple)}


@given(models(), FILTERS)
def test_merge_undoes_split_by_any_filters_in_any_order(model: Any, fs: Any) -> None:
    graphdef, *states = sortal.split(model, *fs)
    assert portrait(sortal.merge(graphdef, *states)) == portrait(model)
    assert portrait(sortal.merge(graphdef, *states[::-1])) == portrait(model)


@given(models(), FILTERS)
def test_split_gives_each_leaf_to_the_first_filter_that_takes_it(
    model: Any, fs: Any
) -> None:
    _, *states = sortal.split(model, *fs)
    paths = [p for s in states for p in s.paths()]
    assert sorted(map(str, paths)) == sorted(map(str, sortal.state(model).paths()))
    for f, s in zip(fs[:-1], states[:-1], strict=True):
        assert all(type(leaf) is f for leaf in s.leaves())
    assert not any(type(leaf) in fs for leaf in states[-1].leaves())


@given(models())
def test_updating_a_model_with_its_own_state_changes_nothing(model: Any) -> None:
    graphdef = sortal.graphdef(model)
    own = sortal.state(model, Variable)
    with untouched(model):
        sortal.update(model, own)
    assert sortal.graphdef(model) is graphdef


def test_a_variable_is_updated_by_a_variable() -> None:
    weight, label = sortal.Param(jnp.ones(2)), sortal.BatchStat(jnp.zeros(2))
    sortal.update(weight, sortal.Param(jnp.zeros(2)))
    assert weight.sum() == 0
    with pytest.raises(UpdateError, match="is a Param, found a BatchStat"):
        sortal.update(weight, label)


@given(models())
def test_update_carries_a_whole_state_from_one_model_to_its_twin(model: Any) -> None:
    twin = copy.deepcopy(model)
    changed = jax.tree.map(lambda x: x + 1, sortal.state(model, Variable))
    sortal.update(model, changed)
    for path, leaf in sortal.state(twin, Variable).flat_state():
        now = dict(sortal.state(model, Variable).flat_state())[path]
        np.testing.assert_array_equal(now.value, np.asarray(leaf.value) + 1)


@given(models())
def test_clone_is_equal_and_apart(model: Any) -> None:
    for arrays in (False, True):
        made = sortal.clone(model, arrays=arrays)
        assert portrait(made) == portrait(model)
        assert not _mutable(made) & _mutable(model)
        assert sortal.graphdef(made) is sortal.graphdef(model)


# --------------------------------------------------------------------------- state
def test_a_state_is_a_snapshot_in_both_directions() -> None:
    model = Net()
    before = sortal.state(model)
    saved = portrait(dict(before.flat_state()))
    with untouched(model):
        taken = sortal.state(model)
        taken["norm"]["mean"].value = jnp.full(4, 9.0)
        taken["calls"][...] = 3
        taken["layers"][0]["bias"].set_metadata(tag="mine")
        del taken["norm"]
    model.norm.mean[...] = 5.0
    model.calls.set_metadata(tag="live")
    assert portrait(dict(before.flat_state())) == saved


def test_numpy_values_are_copied_into_and_out_of_states() -> None:
    raw, boxed = np.zeros(2), np.zeros(2)
    model = Holder(raw=raw, boxed=Param(boxed))
    taken = sortal.state(model)
    raw[0] = boxed[0] = 1
    assert taken["raw"][0] == 0
    assert taken["boxed"].value[0] == 0
    graphdef, split = sortal.split(model)
    made = sortal.merge(graphdef, split)
    split["boxed"].value[1] = 7
    raw[1] = boxed[1] = 5
    np.testing.assert_array_equal(made.raw, [1, 0])
    np.testing.assert_array_equal(made.boxed.value, [1, 0])
    new = {"boxed": np.full(2, 3.0)}
    sortal.update(model, new)
    new["boxed"][:] = 4
    np.testing.assert_array_equal(model.boxed.value, [3, 3])


def test_state_by_several_filters_gives_one_state_each_and_drops_the_rest() -> None:
    params, counts = sortal.state(Net(), Param, Count)
    assert counts.paths() == (("calls",),)
    assert len(params.paths()) == 5
    assert sortal.state(Net(), Cache).paths() == ()


@pytest.mark.parametrize("filters", [(Variable, Param), (..., Param), (Param, Param)])
@pytest.mark.parametrize("verb", [sortal.state, sortal.split, sortal.pop])
def test_a_filter_that_an_earlier_one_swallows_is_refused(
    verb: Any, filters: Any
) -> None:
    model = Net()
    with untouched(model), pytest.raises(FilterError, match="can take nothing") as e:
        verb(model, *filters)
    assert "filter 2, Param" in str(e.value)
    assert "filter 1, " in str(e.value)


def test_the_roots_may_be_containers_variables_and_arrays() -> None:
    model = Net()
    both = sortal.state({"b": model, "a": [Param(jnp.ones(1)), jnp.zeros(2)]})
    assert both.paths()[:3] == (("a", 0), ("a", 1), ("b", "calls"))
    assert sortal.state(model.calls).paths() == ((),)
    made = sortal.merge(*sortal.split([model, model.norm]))
    assert made[0].norm is made[1]
    assert sortal.clone(model.calls).value == 0
    array = lambda path, leaf: not isinstance(leaf, Variable)  # noqa: E731
    assert sortal.state({"x": jnp.ones(1), "m": model}, array).paths() == (("x",),)


@pytest.mark.parametrize("nothing", [None, False, (), [], sortal.Any()])
@pytest.mark.parametrize("first", [Param, ..., None, ()])
def test_a_filter_that_asks_for_nothing_gives_an_empty_state(
    first: Any, nothing: Any
) -> None:
    taken, none = sortal.state(Linear(1, 1), first, nothing)
    assert len(taken.paths()) == (2 if first else 0)
    assert none.paths() == ()


class Pair:
    """A pytree whose two keys read the same."""

    def __init__(self, a: Any, b: Any):
        self.a, self.b = a, b


jax.tree_util.register_pytree_with_keys(
    Pair,
    lambda pair: (
        ((jax.tree_util.DictKey("x"), pair.a), (jax.tree_util.GetAttrKey("x"), pair.b)),
        None,
    ),
    lambda _, children: Pair(*children),
)


def test_two_keys_of_a_pytree_that_read_the_same_keep_both_leaves() -> None:
    model = Holder(pair=Pair(Param(jnp.zeros(1)), Param(jnp.ones(1))))
    assert sortal.state(model).paths() == (("pair", 0), ("pair", 1))
    copied = sortal.clone(model)
    assert (copied.pair.a[0], copied.pair.b[0]) == (0, 1)


# --------------------------------------------------------------------------- split
def test_split_lists_every_leaf_left_over_and_proposes_the_rest() -> None:
    model = Net()
    with untouched(model), pytest.raises(FilterError) as e:
        sortal.split(model, Param)
    text = str(e.value)
    assert "Non-exhaustive filters: Param leave 2 leaves over" in text
    assert "calls (Count)" in text
    assert "norm.mean (BatchStat)" in text
    assert "or ... as the last one" in text


def test_split_hints_that_a_string_is_a_tag() -> None:
    with pytest.raises(FilterError, match=r"read as a tag; for the path write Under"):
        sortal.split(Net(), "norm")


def test_a_filter_over_values_is_asked_anew_each_time() -> None:
    model = Linear(1, 1)
    zero = lambda path, leaf: not leaf.value.any()  # noqa: E731
    assert sortal.state(model, zero).paths() == (("bias",),)
    model.bias[...] = 1.0
    assert sortal.state(model, zero).paths() == ()


# --------------------------------------------------------------------------- merge
def test_merge_lists_missing_doubled_unknown_and_miskinded_leaves() -> None:
    graphdef, params, rest = sortal.split(Net(), Param, ...)
    norm = {"norm": {"mean": Cache(jnp.zeros(4)), "typo": Param(jnp.ones(1))}}
    doubled = {"norm": {"scale": Param(jnp.ones(4))}}
    with pytest.raises(MergeError) as e:
        sortal.merge(graphdef, params, norm, doubled)
    text = str(e.value)
    assert "merge needs each of the 7 leaves of the GraphDef exactly once" in text
    assert "missing: calls (Count)" in text
    assert "unknown: norm.typo (Param), in state 2" in text
    assert "given twice: norm.scale (Param), again in 3" in text
    assert "wrong kind: norm.mean is a BatchStat, found a Cache" in text
    assert "missing=another_state" in text
    with pytest.raises(MergeError, match=r"missing: norm\.mean"):
        sortal.merge(graphdef, params)
    assert int(sortal.merge(graphdef, rest, params).calls.value) == 0


def test_merge_fills_what_is_missing_from_a_state_or_a_function() -> None:
    model = Net()
    graphdef, params, rest = sortal.split(model, Param, ...)
    assert portrait(sortal.merge(graphdef, params, missing=rest)) == portrait(model)
    asked = []

    def fill(path: Any, kind: Any) -> Any:
        asked.append((path, kind))
        return jnp.full(4, 2.0)

    made = sortal.merge(graphdef, params, missing=fill)
    assert asked == [(("calls",), Count), (("norm", "mean"), BatchStat)]
    assert type(made.norm.mean) is BatchStat
    assert made.norm.mean[0] == 2
    with pytest.raises(MergeError, match=r"missing: norm.mean \(BatchStat\)"):
        sortal.merge(graphdef, params, missing={"calls": jnp.array(1)})


def test_merge_takes_bare_values_and_metadata_of_the_states() -> None:
    graphdef, params = sortal.split(Linear(1, 1))
    made = sortal.merge(graphdef, params.to_pure_dict())
    assert type(made.kernel) is Param
    params["kernel"].set_metadata(tag="t")
    assert sortal.merge(graphdef, params).kernel.get_metadata("tag") == "t"


# -------------------------------------------------------------------------- update
def bad_updates() -> dict[str, tuple[Any, str]]:
    ok = {"layers": {0: {"bias": jnp.ones(4)}}}
    return {
        "unknown": ({**ok, "nrom": jnp.ones(4)}, "unknown: nrom"),
        "kind": (
            {**ok, "calls": Param(jnp.array(1))},
            "calls is a Count, found a Param",
        ),
        "shape": ({**ok, "calls": jnp.ones(2, int)}, r"wrong shape: calls \(Count\)"),
        "dtype": ({**ok, "calls": jnp.array(1.0)}, r"wrong dtype: calls \(Count\)"),
        "structure": ({**ok, "calls": (1, 2)}, r"wrong structure: calls \(Count\)"),
        "tuple": ({**ok, "pair": {0: jnp.ones(1)}}, "cannot be written: pair.0"),
    }


@pytest.mark.parametrize("why", bad_updates())
def test_an_update_that_does_not_fit_changes_nothing_at_all(why: str) -> None:
    model = Net()
    model.pair = (jnp.zeros(1),)
    given, text = bad_updates()[why]
    with untouched(model), pytest.raises(UpdateError, match=text) as e:
        sortal.update(model, given)
    assert "the model was left as it was" in str(e.value)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("value", [1.0, np.float32(1.0), "x", (1.0,), None])
def test_update_keeps_a_raw_array_an_array(strict: bool, value: Any) -> None:
    """Anything else would be static in its place, and the leaf be gone."""
    model = Holder(x=jnp.array(0.0))
    given = sortal.State.from_flat_path({("x",): value})
    with untouched(model), pytest.raises(UpdateError, match="no array: x") as e:
        sortal.update(model, given, strict=strict)
    assert "is float32[], found" in str(e.value)
    assert "write jnp.asarray" in str(e.value)
    sortal.update(model, {"x": np.ones(3)}, strict=False)
    assert sortal.state(model).paths() == (("x",),)


def test_update_writes_numbers_that_are_marked_as_data() -> None:
    model = Holder(q=nnx.data(0.25))
    sortal.update(model, {"q": 0.5})
    assert model.q == 0.5
    sortal.update(model, {"q": jnp.array(2.0)})
    assert sortal.state(model)["q"] == 2


def test_update_compares_values_that_are_no_arrays() -> None:
    model = Holder(name=Variable("a"), w=Param(jnp.ones(2)))
    sortal.update(model, {"name": "b"})
    assert model.name.value == "b"
    with untouched(model), pytest.raises(UpdateError, match=r"wrong shape: w .* 'abc'"):
        sortal.update(model, {"w": "abc"})
    with untouched(model), pytest.raises(UpdateError, match="wrong dtype: name"):
        sortal.update(model, {"name": 1})


def test_update_lists_every_problem_at_once() -> None:
    model = Linear(2, 3)
    with untouched(model), pytest.raises(UpdateError) as e:
        sortal.update(
            model,
            {
                "kernel": jnp.ones((3, 2)),
                "bias": jnp.ones(3, int),
                "scale": jnp.ones(1),
            },
        )
    text = str(e.value)
    assert "3 of the given leaves" in text
    assert "wrong shape: kernel (Param) is float32[2,3], found float32[3,2]" in text
    assert "wrong dtype: bias (Param) is float32[3], found int32[3]" in text
    assert "unknown: scale" in text


def test_one_leaf_given_twice_to_update_is_refused() -> None:
    model = Linear(1, 1)
    with untouched(model), pytest.raises(UpdateError, match="given twice: bias"):
        sortal.update(model, {"bias": jnp.ones(1)}, {"bias": jnp.zeros(1)})


def test_update_without_strict_relaxes_shape_and_dtype_only() -> None:
    model = Linear(2, 3)
    sortal.update(model, {"kernel": jnp.ones((5, 5), int)}, strict=False)
    assert model.kernel.shape == (5, 5)
    with untouched(model):
        for bad in ({"kernle": jnp.ones(1)}, {"bias": BatchStat(jnp.ones(3))}):
            with pytest.raises(UpdateError):
                sortal.update(model, bad, strict=False)


def test_update_takes_part_of_the_leaves_from_several_states_and_keeps_identity() -> (
    None
):
    model = Net()
    parts = objects(model).keys()
    sortal.update(
        model,
        {"calls": jnp.array(4)},
        sortal.State({"norm": {"mean": BatchStat(jnp.ones(4))}}),
    )
    assert int(model.calls.value) == 4
    assert model.norm.mean[0] == 1
    assert objects(model).keys() == parts


def test_update_writes_raw_arrays_in_modules_lists_and_dicts() -> None:
    model = Holder(raw=np.zeros(2), items=[jnp.zeros(1)], table={"k": jnp.zeros(1)})
    items = model.items
    sortal.update(model, jax.tree.map(lambda x: x + 1, sortal.state(model)))
    assert model.raw[0] == items[0][0] == model.table["k"][0] == 1
    assert model.items is items


def test_update_writes_raw_arrays_in_dataclasses_and_values_that_are_trees() -> None:
    @dataclasses.dataclass
    class Box:
        raw: Any

    m = Holder(box=Box(jnp.zeros(1)), pair=Cache((jnp.zeros(1), 0)))
    sortal.update(m, {"box": {"raw": jnp.ones(1)}, "pair": (jnp.ones(1), 1)})
    assert m.box.raw[0] == 1
    assert m.pair.value[0][0] == 1
    with untouched(m), pytest.raises(UpdateError, match="wrong dtype: pair"):
        sortal.update(m, {"pair": (jnp.ones(1), 1.0)})
    with untouched(m), pytest.raises(UpdateError, match="wrong shape: pair"):
        sortal.update(m, {"pair": (jnp.ones(2), 1)})


def test_update_writes_raw_arrays_in_a_state_that_a_module_holds() -> None:
    held = sortal.State({"a": {"x": jnp.zeros(2)}, "w": Param(jnp.zeros(1))})
    model = Holder(s=held, k=Param(jnp.zeros(1)))
    weight = held["w"]
    sortal.update(model, jax.tree.map(lambda x: x + 1, sortal.state(model)))
    assert model.s is held
    assert held["w"] is weight
    assert (held["a"]["x"][0], weight[0], model.k[0]) == (1, 1, 1)
    sortal.update(model, {"s": {"a": {"x": jnp.full(2, 5.0)}}})
    assert (held["a"]["x"][0], weight[0]) == (5, 1)


def test_pop_takes_leaves_out_of_a_state_that_a_module_holds() -> None:
    m = Holder(s=sortal.State({"a": Cache(jnp.ones(1)), "b": Param(jnp.ones(1))}))
    assert sortal.pop(m, Cache).paths() == (("s", "a"),)
    assert m.s.paths() == (("b",),)


def test_a_tied_weight_is_updated_by_its_own_path_and_seen_by_both() -> None:
    model = Holder(a=Param(jnp.zeros(1)))
    model.b = model.a
    sortal.update(model, {"a": jnp.ones(1)})
    assert model.b[0] == 1
    with pytest.raises(UpdateError, match="unknown: b"):
        sortal.update(model, {"b": jnp.ones(1)})


@pytest.mark.parametrize(
    "write",
    [
        lambda m, x: sortal.update(m, {"bias": x}),
        lambda m, x: sortal.pop(m, Param),
        lambda m, x: m.bias.set_value(x),
    ],
)
def test_a_live_model_of_an_outer_trace_is_refused_and_left_alone(write: Any) -> None:
    model = Linear(1, 1)
    with untouched(model), pytest.raises(TraceError, match=r"bias \(Param\)"):
        jax.jit(lambda x: write(model, x))(jnp.ones(1))


# ----------------------------------------------------------------------------- pop
def test_pop_removes_leaves_everywhere_and_returns_them() -> None:
    model = Net()
    model.norm.sow(sortal.Intermediate, "y", jnp.ones(2))
    model.table = {"keep": Param(jnp.ones(1)), "drop": Cache(jnp.ones(1))}
    drop, seen = sortal.pop(model, Cache, sortal.Intermediate)
    assert drop.paths() == (("table", "drop"),)
    assert seen.paths() == (("norm", "y"),)
    assert not hasattr(model.norm, "y")
    assert list(model.table) == ["keep"]
    assert sortal.state(model, (Cache, sortal.Intermediate)).paths() == ()
    assert sortal.pop(model, Cache).paths() == ()


def test_pop_removes_a_shared_variable_from_all_its_places() -> None:
    shared = Cache(jnp.ones(1))
    model = Holder(a=shared, b=Holder(c=shared), d={"e": shared})
    assert sortal.pop(model, Cache).paths() == (("a",),)
    assert sortal.state(model).paths() == ()
    assert (list(vars(model)), list(vars(model.b)), model.d) == (["b", "d"], [], {})


def test_pop_from_lists_is_refused_and_nothing_is_removed() -> None:
    model = Holder(a=Cache(jnp.ones(1)), items=[Cache(jnp.ones(1))])
    with untouched(model), pytest.raises(StructureError) as e:
        sortal.pop(model, Cache)
    assert "items.0 (Cache), in a list" in str(e.value)
    assert "Nothing was removed." in str(e.value)


def test_pop_without_a_filter_is_refused() -> None:
    with pytest.raises(FilterError, match="pop needs a filter"):
        sortal.pop(Net())


# --------------------------------------------------------- clone, variables, iteration
def test_a_clone_with_arrays_outlives_the_donation_of_the_original() -> None:
    model = Net()
    kept = sortal.clone(model, arrays=True)
    before = portrait(kept)
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(model)
    assert model.layers[0].kernel.value.is_deleted()
    assert portrait(kept) == before


def test_variables_are_the_live_ones() -> None:
    model = Net()
    every = sortal.variables(model)
    assert every["norm"]["mean"] is model.norm.mean
    params, counts = sortal.variables(model, Param, Count)
    assert counts["calls"] is model.calls
    params["layers"][0]["bias"][...] = 1.0
    assert model.layers[0].bias[0] == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda f, s: sortal.jit(f)(s),
        lambda f, s: sortal.remat(f)(s),
        lambda f, s: sortal.vmap(f)(s),
        lambda f, s: sortal.cond(True, f, f, s),
        lambda f, s: sortal.scan(f, in_axes=(0,), out_axes=0)(s),
        lambda f, s: sortal.fori_loop(0, 2, lambda i, s: (f(s), s)[1], s),
        lambda f, s: sortal.grad(lambda s: f(s) or s["w"].sum())(s),
    ],
)
def test_to_transforms_a_state_of_live_variables_is_a_value(call: Any) -> None:
    model = Holder(w=Param(jnp.ones(3)), layers=[Param(jnp.ones(3))])

    def write(state: Any) -> None:
        state["w"][...] = 5.0
        state.layers[0] = jnp.zeros_like(state.layers[0].value)

    call(write, sortal.variables(model))
    assert model.w.value.tolist() == model.layers[0].value.tolist() == [1, 1, 1]
    sortal.jit(lambda variables: [v.set_value(v + 1) for v in variables] and None)(
        sortal.variables(model).leaves()
    )
    assert model.w.value.tolist() == model.layers[0].value.tolist() == [2, 2, 2]


def test_iter_graph_gives_each_object_once_children_first() -> None:
    shared = Linear(1, 1)
    model = Holder(b=[shared], a=shared, raw=jnp.ones(1), size=3)
    found = dict(sortal.iter_graph(model))
    assert list(found) == [("a", "bias"), ("a", "kernel"), ("a",), ("b",), ("raw",), ()]
    assert found[("a",)] is shared
    assert found[()] is model
    assert found[("raw",)] is model.raw


def test_iteration_reaches_any_depth() -> None:
    model = Holder()
    for _ in range(600):
        model = Holder(inner=[model])
    assert sum(1 for _ in sortal.iter_modules(model)) == 601
