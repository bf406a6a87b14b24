"""The engine: what a walk finds, and when a plan is stale."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import pickle
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import sortal
from models import Count, Holder, Linear, Net, objects, portrait
from sortal import nnx
from sortal._engine import plan as graph
from sortal._engine import walk
from sortal.errors import StructureError


@dataclasses.dataclass
class Box:
    """A plain dataclass, known to neither Sortal nor JAX."""

    inner: Any
    size: int = 1


Pair = namedtuple("Pair", "second first")  # noqa: PYI024


def big() -> Holder:
    """A model with every sort of node inside."""
    return Holder(
        layer=Linear(2, 3),
        items=[Linear(2, 2), sortal.Param(jnp.ones(2))],
        table={"b": sortal.Param(jnp.ones(1)), "a": Linear(1, 1)},
        box=Box(sortal.Param(jnp.zeros(2))),
        raw=jnp.arange(3.0),
        rate=0.1,
        deep=Holder(list=[[{"k": sortal.BatchStat(jnp.ones(1))}]]),
    )


def swap(items: list[Any]) -> None:
    items[0], items[1] = items[1], items[0]


def reorder(table: dict[str, Any]) -> None:
    table["b"] = table.pop("b")


EDITS = {
    "a static written": lambda m: setattr(m, "rate", 0.2),
    "an attribute added": lambda m: setattr(m, "more", 1),
    "an attribute of a child": lambda m: setattr(m.layer, "more", sortal.Param(1.0)),
    "an attribute deleted": lambda m: delattr(m, "rate"),
    "a Variable deleted": lambda m: delattr(m.layer, "bias"),
    "a submodule replaced": lambda m: setattr(m, "layer", Holder()),
    "a kind replaced": lambda m: setattr(m.layer, "bias", Count(jnp.zeros(3))),
    "a list grown": lambda m: m.items.append(3),
    "a list shrunk": lambda m: m.items.pop(),
    "a list swapped": lambda m: swap(m.items),
    "a deep list grown": lambda m: m.deep.list[0].append(1),
    "a dict grown": lambda m: m.table.update(c=1),
    "a dict shrunk": lambda m: m.table.pop("a"),
    "a dict reordered": lambda m: reorder(m.table),
    "a deep dict grown": lambda m: m.deep.list[0][0].update(z=1),
    "a dataclass field": lambda m: setattr(m.box, "size", 2),
    "a dataclass child": lambda m: setattr(m.box, "inner", Count(jnp.zeros(2))),
    "vars adds a key": lambda m: vars(m).update(sly=1),
    "vars of a child adds": lambda m: vars(m.layer).update(sly=1),
    "vars drops a key": lambda m: vars(m.layer).pop("bias"),
    "metadata set": lambda m: m.layer.kernel.set_metadata(tag="t"),
    "metadata deep": lambda m: m.deep.list[0][0]["k"].set_metadata(tag="t"),
    "a Variable shared": lambda m: setattr(m.layer, "bias", m.box.inner),
    "a raw array gone": lambda m: setattr(m, "raw", 3),
    "data marked": lambda m: setattr(m, "rate", nnx.data(0.1)),
    "sow": lambda m: m.deep.__class__ and sortal.Module.sow(
        m.layer, sortal.Intermediate, "y", jnp.ones(1)
    ),
    "pop": lambda m: sortal.pop(m.layer, sortal.Param),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_is_noticed_and_described_as_by_a_fresh_walk(edit: Any) -> None:
    model = big()
    before = sortal.graphdef(model)
    assert sortal.graphdef(model) is before
    edit(model)
    after = sortal.graphdef(model)
    assert after is not before
    assert after is walk.Walk(model).graphdef
    live = [x for x in objects(model).values() if isinstance(x, sortal.Variable)]
    planned = [x for x in graph.bind(model).leaves if isinstance(x, sortal.Variable)]
    boxed = model.box.inner
    assert {*map(id, planned)} == {*map(id, live), id(boxed)}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_view_from_a_second_root_notices_the_edit_too(edit: Any) -> None:
    model = big()
    outer = Holder(model=model)
    before = sortal.graphdef(outer)
    sortal.graphdef(model)
    edit(model)
    sortal.graphdef(model)
    assert sortal.graphdef(outer) is not before
    assert sortal.graphdef(outer) is walk.Walk(outer).graphdef


def test_a_replaced_variable_of_the_same_kind_is_in_the_next_state() -> None:
    model = big()
    sortal.state(model)
    model.layer.bias = sortal.Param(jnp.full(3, 7.0))
    assert sortal.state(model)["layer"]["bias"][0] == 7
    model.items[1] = sortal.Param(jnp.full(2, 8.0))
    assert sortal.state(model)["items"][1][0] == 8
    model.box.inner = sortal.Param(jnp.full(2, 9.0))
    assert sortal.state(model)["box"]["inner"][0] == 9


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The roots walked from now on."""
    roots: list[Any] = []
    real = graph.Walk

    def walk(root: Any) -> Any:
        roots.append(root)
        return real(root)

    monkeypatch.setattr(graph, "Walk", walk)
    return roots


def test_train_and_eval_return_to_their_plans_without_a_walk(walks: Any) -> None:
    model = Net()
    training = graph.bind(model)
    model.eval()
    evaluating = graph.bind(model)
    assert len(walks) == 2
    for _ in range(3):
        model.train()
        assert graph.bind(model) is training
        model.eval()
        assert graph.bind(model) is evaluating
    assert len(walks) == 2


def test_what_merge_builds_is_planned_without_a_walk(walks: Any) -> None:
    model = Net()
    model.raw = jnp.ones(2)
    model.parts = [Holder(up=model), (jnp.ones(1), {"k": sortal.Param(1.0)})]
    model.kept = sortal.State({"b": {"x": sortal.Param(1.0)}, "a": jnp.ones(1)})
    definition, leaves = sortal.split(model)
    assert len(walks) == 1
    copied = sortal.merge(definition, leaves)
    assert graph.bind(copied).graphdef is definition
    mapped = jax.tree.map(lambda x: x, copied)
    assert graph.bind(mapped).graphdef is definition
    assert len(walks) == 1
    assert walk.Walk(copied).graphdef is walk.Walk(mapped).graphdef is definition
    copied.raw = 1
    assert graph.bind(copied).graphdef is walk.Walk(copied).graphdef
    assert len(walks) == 2


def test_what_is_built_of_other_types_or_values_is_walked() -> None:
    boxed = Holder(box=Box(sortal.Param(1.0)), part=Leaning(jnp.ones(1), 2.0))
    raw = Holder(raw=jnp.ones(1), w=sortal.Param(jnp.ones(1)))
    for model in (boxed, sortal.clone(boxed), raw):
        named = jax.tree.map(lambda _: "text", model)
        for built in (sortal.clone(model), named):
            assert sortal.graphdef(built) is walk.Walk(built).graphdef


def test_values_may_change_without_a_walk(walks: Any) -> None:
    model = big()
    plan = graph.bind(model)
    model.raw = np.arange(5)
    model.raw = jnp.ones((2, 2))
    model.layer.kernel[...] = 0.0
    model.items[1].value = jnp.ones((3, 3))
    model.rate = model.rate
    assert graph.bind(model) is plan
    assert len(walks) == 1
    np.testing.assert_array_equal(sortal.state(model)["raw"], jnp.ones((2, 2)))


def test_a_raw_array_replaced_inside_containers_keeps_the_plan(walks: Any) -> None:
    model = Holder(items=[jnp.zeros(2)], table={"k": np.zeros(2)})
    plan = graph.bind(model)
    model.items[0] = jnp.ones(2)
    model.table["k"] = np.ones(2)
    assert graph.bind(model) is plan
    assert sortal.state(model)["items"][0][0] == 1
    assert sortal.state(model)["table"]["k"][0] == 1
    assert len(walks) == 1


def test_a_list_of_plain_objects_that_gets_an_array_is_looked_at_again() -> None:
    model = Holder(items=[Holder(), Holder()])
    sortal.state(model)
    for array in (jnp.ones(3), np.ones(3)):
        model.items[1] = array
        assert sortal.state(model).paths() == (("items", 1),)
        model.items[1] = Holder()
        sortal.state(model)
    model.items[1] = sortal.Param(jnp.ones(3))
    assert sortal.state(model, sortal.Param).paths() == (("items", 1),)


def test_an_abstract_leaf_may_stand_in_for_an_array() -> None:
    model = Holder(w=sortal.Param(jax.ShapeDtypeStruct((2,), jnp.float32)), raw=None)
    model.raw = jax.ShapeDtypeStruct((3,), jnp.int32)
    assert [x.shape for x in jax.tree.leaves(model)] == [(3,), (2,)]
    copied = sortal.merge(*sortal.split(model))
    assert copied.w.value == jax.ShapeDtypeStruct((2,), jnp.float32)


@pytest.mark.parametrize("make", [Net, big, lambda: sortal.Rngs(0, dropout=1)])
def test_a_dropped_model_is_freed_at_once(make: Any) -> None:
    model = make()
    sortal.split(model)
    jax.tree.leaves(model)
    values = [
        weakref.ref(x) for x in jax.tree.leaves(model) if hasattr(x, "_npy_value")
    ]
    root = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert root() is None
        assert not any(x() is not None for x in values)
    finally:
        gc.enable()


def test_plans_of_an_edited_model_do_not_keep_removed_variables() -> None:
    model = Net()
    sortal.state(model)
    gone = weakref.ref(model.layers[1].kernel)
    model.layers[1] = Linear(4, 2)
    sortal.state(model)
    assert gone() is None


# ------------------------------------------------------------------ graph definitions
def test_equal_models_share_one_graphdef() -> None:
    first, second = sortal.graphdef(Net(0)), sortal.graphdef(Net(5))
    assert first is second
    assert first == second
    assert hash(first) == hash(second)
    assert pickle.loads(pickle.dumps(first)) is first
    assert copy.deepcopy(first) is first


SCALARS = (1, 1.0, True, 0.0, -0.0, 0, False, float("nan"), "1", None, 1j, np.int64(1))


@pytest.mark.parametrize("a", SCALARS, ids=repr)
@pytest.mark.parametrize("b", SCALARS, ids=repr)
@pytest.mark.parametrize("nest", [lambda x: x, lambda x: (x, ("s",))])
def test_statics_differ_where_python_takes_them_as_equal(
    a: Any, b: Any, nest: Any
) -> None:
    first, second = (sortal.graphdef(Holder(x=nest(x))) for x in (a, b))
    assert (first is second) == (repr(a) == repr(b) and type(a) is type(b))


def test_writing_an_equal_static_of_another_type_is_noticed() -> None:
    model = Holder(x=1)
    before = sortal.graphdef(model)
    model.x = True
    assert sortal.graphdef(model) is not before
    assert sortal.merge(*sortal.split(model)).x is True


def test_unhashable_statics_are_refused_by_path_at_first_use_all_listed() -> None:
    class Odd:
        __hash__ = None  # type: ignore[assignment]

    model = Holder(a=Odd(), ok=3, inner=Holder(items=[{1, 2}], b=bytearray(b"x")))
    with pytest.raises(StructureError) as e:
        sortal.state(model)
    text = str(e.value)
    assert "static values must be hashable" in text
    assert "  a: a Odd" in text
    assert "  inner.b: a bytearray" in text
    assert "  inner.items.0: a set" in text
    assert "ok" not in text
    assert "For what has no hash use a tuple or frozenset" in text
    for verb in (sortal.split, sortal.graphdef, jax.tree.leaves, sortal.jit(id)):
        with pytest.raises(StructureError, match=r"inner\.b"):
            verb(model)


def test_an_unhashable_static_inside_a_tuple_is_named_by_its_own_path() -> None:
    with pytest.raises(StructureError, match=r"pair\.1: a set"):
        sortal.graphdef(Holder(pair=(1, {2})))


def _nested(kind: Any, inner: Any, depth: int = 1200) -> Any:
    for _ in range(depth):
        inner = kind([inner])
    return inner


@pytest.mark.parametrize("kind", [list, tuple, frozenset])
def test_a_static_nested_deeper_than_pythons_stack_is_refused_by_its_path(
    kind: Any,
) -> None:
    # From Python 3.12 on a list so deep can be shown, and is refused as any list is.
    why = rf"a: a {kind.__name__}, (nested too deep|\[\[)"
    with pytest.raises(StructureError, match=why):
        sortal.state(Holder(a=nnx.static(_nested(kind, 1))))
    if kind is not list:
        with pytest.raises(StructureError, match=r"a\.b: a .*, nested too deep"):
            sortal.state(Holder(a={"b": _nested(kind, 1)}))


def test_tuples_of_any_depth_may_hold_leaves() -> None:
    param = sortal.Param(1)
    found = sortal.variables(Holder(a=_nested(tuple, param))).flat_state()
    assert found.leaves[0] is param
    assert found.paths == (("a", *[0] * 1200),)


@pytest.mark.parametrize("kind", [set, frozenset])
def test_state_in_a_set_is_refused_where_it_would_have_no_path(kind: Any) -> None:
    held = kind([sortal.Param(jnp.ones(1)), (Holder(x=1), 2)])
    model = Holder(inner=Holder(a=held, b=(1, held)), c=frozenset([1]))
    with pytest.raises(StructureError) as e:
        sortal.state(model)
    for where in ("inner.a", "inner.b.1"):
        assert (
            f"  {where}: a {kind.__name__} that holds Holder, Param, which have no "
            "path in it; write a tuple" in str(e.value)
        )
    assert "c: " not in str(e.value)
    # Advice for what has no hash would contradict it.
    assert "frozenset," not in str(e.value)


def test_attributes_of_a_list_or_dict_that_copies_would_lose_are_refused() -> None:
    class Named(list):
        pass

    items = Named([1])
    items.note, items.w = "x", Linear(1, 1)
    with pytest.raises(StructureError) as e:
        sortal.state(Holder(a=[items]))
    assert "a.0: a Named with the attributes note, w" in str(e.value)
    assert "derive it from sortal.Module" in str(e.value)


def test_state_hidden_in_an_object_that_is_no_module_is_refused() -> None:
    class Plain:
        def __init__(self) -> None:
            self.w = sortal.Param(jnp.ones(1))
            self.layer = Linear(1, 1)

    with pytest.raises(StructureError) as e:
        sortal.state(Holder(inner=Holder(plain=Plain())))
    text = str(e.value)
    assert "inner.plain: a Plain that is no Module but holds" in text
    assert "w (Param)" in text
    assert "layer (Linear)" in text
    assert "derive it from sortal.Module" in text


def test_the_order_of_dicts_survives_merge() -> None:
    table = {k: sortal.Param(jnp.array(i)) for i, k in enumerate("zaym")}
    model = Holder(table=table, mixed={"b": 1, 2: sortal.Param(jnp.ones(1)), "a": 3})
    made = sortal.merge(*sortal.split(model))
    assert list(made.table) == list("zaym")
    assert list(made.mixed) == ["b", 2, "a"]
    assert [int(v.value) for v in made.table.values()] == [0, 1, 2, 3]
    assert sortal.graphdef(model).schema.paths == (
        ("mixed", 2),
        *(("table", k) for k in "amyz"),
    )


# ------------------------------------------------------------------- sharing, cycles
def test_tied_weights_are_one_leaf_and_stay_tied() -> None:
    model = Net()
    model.tied = model.layers[0].kernel
    assert len(sortal.state(model).paths()) == len(sortal.state(Net()).paths())
    made = sortal.merge(*sortal.split(model))
    assert made.tied is made.layers[0].kernel
    assert made.tied is not model.tied


def test_a_shared_submodule_is_one_object_after_merge() -> None:
    shared = Linear(2, 2)
    made = sortal.clone(Holder(a=shared, b=[shared, {"c": shared}]))
    assert made.a is made.b[0]
    assert made.a is made.b[1]["c"]


def test_a_shared_list_and_dict_are_one_object_after_merge() -> None:
    items: list[Any] = [Linear(1, 1)]
    table = {"k": items}
    made = sortal.clone(Holder(a=items, b=table, c=table))
    assert made.a is made.b["k"]
    assert made.b is made.c


def test_cycles_are_kept() -> None:
    parent = Holder(child=Holder(w=sortal.Param(jnp.ones(2))))
    parent.child.parent = parent
    parent.loop = [parent]
    parent.loop.append(parent.loop)
    made = sortal.clone(parent)
    assert made.child.parent is made
    assert made.loop[0] is made
    assert made.loop[1] is made.loop
    assert sortal.graphdef(made) is sortal.graphdef(parent)
    assert sortal.graphdef(parent) is sortal.graphdef(parent)
    parent.more = 1
    assert sortal.graphdef(parent) is not sortal.graphdef(made)


def test_equal_raw_arrays_that_are_one_object_are_two_leaves() -> None:
    array = jnp.ones(2)
    one = sortal.graphdef(Holder(a=array, b=array))
    assert one is sortal.graphdef(Holder(a=jnp.ones(2), b=jnp.ones(2)))
    assert one.schema.paths == (("a",), ("b",))


def test_raw_arrays_are_leaves_wherever_they_hang() -> None:
    model = Holder(
        a=np.ones(2), b=[jnp.ones(1)], c=(jnp.zeros(1), 2), d=Box(np.ones(3))
    )
    paths = [("a",), ("b", 0), ("c", 0), ("d", "inner")]
    assert list(sortal.state(model).paths()) == paths
    assert set(sortal.graphdef(model).schema.kinds) == {None}
    assert portrait(sortal.clone(model)) == portrait(model)


def test_named_tuples_dataclasses_and_registered_types_are_rebuilt() -> None:
    model = Holder(
        pair=Pair(first=sortal.Param(jnp.ones(1)), second=Linear(1, 1)),
        box=Box(Linear(1, 1), 7),
        ordered=OrderedDict(z=sortal.Param(jnp.ones(1)), a=1),
    )
    made = sortal.clone(model)
    assert type(made.pair) is Pair
    assert type(made.pair.second) is Linear
    assert made.pair.first[0] == 1
    assert type(made.box) is Box
    assert made.box.size == 7
    assert list(made.ordered.items())[1] == ("a", 1)


def test_a_bound_method_as_attribute_is_bound_to_the_copy() -> None:
    class Caller(sortal.Module):
        def __init__(self) -> None:
            self.layer = Linear(2, 2)
            self.f = self.layer.__call__
            self.mine = self.call
            self.other = [Linear(2, 2, seed=5).__call__]

        def call(self) -> Any:
            return self

    model = Caller()
    made = sortal.clone(model)
    assert made.f.__self__ is made.layer
    assert made.mine() is made
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(made.other[0](x), model.other[0](x))
    assert made.other[0].__self__ is not model.other[0].__self__
    assert sortal.graphdef(made) is sortal.graphdef(model)


@pytest.mark.parametrize("depth", [500])
def test_deep_nesting_works(depth: int) -> None:
    model = Holder(w=sortal.Param(jnp.ones(1)))
    for i in range(depth):
        model = Holder(inner=model) if i % 2 else Holder(inner=[model])
    (path,) = sortal.state(model).paths()
    assert len(path) == depth + depth // 2 + 1
    made = sortal.merge(*sortal.split(model))
    assert sortal.graphdef(made) is sortal.graphdef(model)
    sortal.jit(lambda m: sortal.update(m, sortal.state(m)))(model)
    (leaf,) = jax.tree.leaves(model)
    assert leaf[0] == 1


# ---------------------------------------------------------------------- copy, pickle
@pytest.mark.parametrize("make", [Net, big, lambda: sortal.Rngs(0, a=1)])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_deep_copies_and_pickles_are_equal_and_apart(make: Any, duplicate: Any) -> None:
    model = make()
    sortal.state(model)
    before = portrait(model)
    made = duplicate(model)
    assert portrait(made) == before
    assert not objects(made).keys() & objects(model).keys()
    assert sortal.graphdef(made) is sortal.graphdef(model)
    for leaf in graph.bind(made).leaves:
        if isinstance(leaf, sortal.Variable):
            leaf.value = jnp.zeros(9)
    assert portrait(model) == before


def test_a_deep_copy_keeps_sharing_and_cycles() -> None:
    model = Holder(a=sortal.Param(jnp.ones(1)))
    model.b, model.me = model.a, model
    made = copy.deepcopy(model)
    assert made.a is made.b
    assert made.me is made
    assert made.a is not model.a


def test_a_shallow_copy_shares_variables_but_has_attributes_and_plans_of_its_own() -> (
    None
):
    model = Net()
    plan = graph.bind(model)
    made = copy.copy(model)
    assert made.norm is model.norm
    made.extra = 1
    assert not hasattr(model, "extra")
    assert graph.bind(model) is plan
    assert sortal.graphdef(made) is not sortal.graphdef(model)


# -------------------------------------------------------------------- the JAX pytree
def test_a_module_is_one_hop_with_key_paths() -> None:
    model = Net()
    pairs, treedef = jax.tree_util.tree_flatten_with_path(model)
    assert [len(path) for path, _ in pairs] == [2] * len(pairs)
    shown = [jax.tree_util.keystr(path) for path, _ in pairs]
    assert shown[:2] == ["['calls'].value", "['layers'][0]['bias'].value"]
    assert treedef.num_nodes == 2 * len(pairs) + 1
    assert jax.tree.structure(model) == jax.tree.structure(Net(3))


def test_a_map_that_ends_at_variables_meets_the_live_ones() -> None:
    model = Net()

    def is_variable(x: Any) -> bool:
        return isinstance(x, sortal.Variable)

    found = jax.tree.leaves(model, is_leaf=is_variable)
    assert any(x is model.layers[0].kernel for x in found)
    frozen = jax.tree.map(lambda x: x.replace(tag="a"), model, is_leaf=is_variable)
    assert frozen.layers[0].kernel.tag == "a"
    assert sortal.graphdef(frozen) is sortal.graphdef(copy.deepcopy(frozen))
    named = jax.tree.map(lambda x: type(x).__name__, model, is_leaf=is_variable)
    assert named.layers[0].kernel == "Param"
    one = model.calls
    shared = jax.tree.map(lambda _: one, model, is_leaf=is_variable)
    assert len(sortal.state(shared).paths()) == 1


def test_tree_map_gives_a_new_module_and_leaves_the_old_one_alone() -> None:
    model = Net()
    before = portrait(model)
    doubled = jax.tree.map(lambda x: 2 * x, model)
    np.testing.assert_array_equal(
        doubled.layers[0].kernel.value, 2 * np.asarray(model.layers[0].kernel.value)
    )
    assert portrait(model) == before
    assert type(doubled) is Net


def test_plain_jax_jit_takes_and_returns_modules() -> None:
    model = Net()
    x = jnp.ones((2, 3))
    made, y = jax.jit(lambda m, x: (m, m(x)))(model, x)
    assert int(made.calls.value) == 1
    assert int(model.calls.value) == 0
    np.testing.assert_allclose(y, Net()(x), rtol=1e-6)


def test_a_module_of_abstract_values_can_be_unflattened() -> None:
    model = jax.eval_shape(lambda: Net())
    assert model.layers[0].kernel.value.shape == (3, 4)


# ------------------------------------------------------------------ agrees with Flax
def variety(nnx: Any) -> Any:
    """A model with attributes out of order, long lists, dicts and sharing."""

    class Leaf(nnx.Module):
        def __init__(self, rngs: Any):
            self.z = nnx.Param(rngs.params.normal((2,)))
            self.a = nnx.BatchStat(jnp.zeros(1))

    class Model(nnx.Module):
        def __init__(self, rngs: Any):
            self.zeta = Leaf(rngs)
            self.layers = nnx.List([Leaf(rngs) for _ in range(12)])
            self.Upper = nnx.Param(jnp.ones(1))
            self.heads = nnx.Dict(z=Leaf(rngs), b=nnx.Param(jnp.ones(3)))
            self._hidden = nnx.Cache(jnp.zeros(1))
            self.tied = self.heads["z"].z
            self.raw = jnp.ones(4)
            self.rngs = rngs

    return Model(nnx.Rngs(0, params=1))


def test_leaves_have_the_paths_order_kinds_and_values_of_flax() -> None:
    theirs = flax_nnx.to_flat_state(flax_nnx.state(variety(flax_nnx)))
    ours = nnx.to_flat_state(sortal.state(variety(nnx)))
    assert [p for p, _ in ours] == [p for p, _ in theirs]
    assert [type(v).__name__ for _, v in ours if isinstance(v, sortal.Variable)] == [
        type(v).__name__ for _, v in theirs if isinstance(v, flax_nnx.Variable)
    ]
    for (path, mine), (_, other) in zip(ours, theirs, strict=True):
        mine, other = (
            x[...] if hasattr(x, "get_metadata") else x for x in (mine, other)
        )
        if jnp.issubdtype(mine.dtype, jax.dtypes.prng_key):
            mine, other = jax.random.key_data(mine), jax.random.key_data(other)
        np.testing.assert_array_equal(mine, other, err_msg=str(path))


def test_a_variable_in_an_attribute_marked_static_is_refused() -> None:
    """It would be hidden in the structure, as a constant of compiled functions."""
    model = sortal.Module()
    model.rate, model.pair = nnx.static(3), nnx.static((1, 2))
    vars(model)["rate"] = sortal.Param(jnp.ones(2))  # unseen by the check of writes
    vars(model)["pair"] = (1, sortal.Param(jnp.ones(2)))
    with pytest.raises(StructureError) as refusal:
        sortal.state(model)
    for row in ("pair: a tuple", "rate: a Param"):
        assert f"{row} in an attribute that is marked static" in str(refusal.value)
    model.rate, model.pair = nnx.data(model.rate), nnx.data(model.pair)
    assert sortal.state(model).paths() == (("pair", 0), ("pair", 1), ("rate",))


DATA = {
    "an array": lambda: jnp.ones(2),
    "a NumPy array": lambda: np.ones(2),
    "a Variable": lambda: sortal.Param(jnp.ones(2)),
    "a Module": lambda: sortal.Linear(1, 1, rngs=sortal.Rngs(0)),
    "a list of Variables": lambda: [1, sortal.Param(jnp.ones(2))],
    "a tuple with a Module": lambda: (1, {"a": sortal.Module()}),
    "a Variable of Flax": lambda: flax_nnx.Param(jnp.ones(2)),
}


class Annotated(sortal.Module):
    rate: nnx.Static[int]

    def __init__(self) -> None:
        self.rate = 3


@nnx.dataclass
class Field(sortal.Module):
    rate: int = nnx.static(default=3)


class Marked(sortal.Module):
    def __init__(self) -> None:
        self.rate = nnx.static(3)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("cls", [Annotated, Field, Marked])
def test_data_is_not_assigned_to_what_was_declared_static(cls: Any, name: str) -> None:
    model, value = cls(), DATA[name]()
    with pytest.raises(StructureError) as refusal:
        model.rate = value
    kind = type(value).__name__
    assert str(refusal.value) == (
        f"cannot assign data, a {kind}, to rate of a {cls.__name__}, which is declared "
        "static and would be no leaf. Take the declaration off, or mark the value "
        "data."
    )
    with pytest.raises(StructureError, match="cannot assign data"):
        model.rate = nnx.static(value)
    assert model.rate == 3
    model.rate = (4, "static")
    assert sortal.state(model).paths() == ()
    model.rate = nnx.data(value)
    assert model.rate is value


def test_containers_that_hold_themselves_may_be_assigned_where_statics_are() -> None:
    """They are refused at first use, as other statics without a hash are."""
    loop: list[Any] = []
    loop.append({"a": loop})
    model = Marked()
    model.rate = loop
    with pytest.raises(StructureError, match="static values must be hashable"):
        sortal.state(model)
    loop[0]["a"] = jnp.ones(2)
    with pytest.raises(StructureError, match="cannot assign data, a list"):
        Marked().rate = loop


def test_a_mark_inside_a_container_is_refused_and_not_lost() -> None:
    """``[nnx.data(x)]`` would else hide the value in the structure."""
    model = sortal.Module()
    model.rates = [nnx.data(0.1)]
    with pytest.raises(StructureError, match=r"rates\.0: a value marked data inside"):
        sortal.state(model)


class Leaning:
    """Registered with JAX; its slope is a setting, and may be changed."""

    def __init__(self, x: Any, slope: float) -> None:
        self.x, self.slope = x, slope


jax.tree_util.register_pytree_node(
    Leaning, lambda x: ((x.x,), x.slope), lambda slope, x: Leaning(*x, slope)
)


# ------------------------------------------------------- exchanges that must be noticed
@pytest.mark.parametrize("hold", [lambda x: x, lambda x: [x], lambda x: {"k": x}])
def test_a_reference_back_to_the_root_is_an_edit(hold: Any) -> None:
    model = Holder(w=sortal.Param(jnp.ones(2)), next=None)
    total = sortal.jit(lambda m: m.w.sum() * (0.0 if m.next is None else 1.0))
    assert total(model) == 0
    model.next = hold(model)
    assert total(model) == 2
    copied = sortal.clone(model)
    assert hold(copied) == copied.next
    model.next = None
    assert total(model) == 0


class Twice(Holder):
    factor = 2


class Thrice(Holder):
    factor = 3


def test_another_class_of_the_root_or_a_child_is_an_edit() -> None:
    model = Twice(child=Twice(w=sortal.Param(jnp.ones(2))))
    total = sortal.jit(lambda m: m.factor * m.child.factor * m.child.w.sum())
    assert total(model) == 8
    model.__class__ = Thrice
    assert total(model) == 12
    assert type(sortal.clone(model)) is Thrice
    model.child.__class__ = Thrice
    assert total(model) == 18
    assert type(sortal.clone(model).child) is Thrice


def test_a_class_changed_inside_a_trace_is_changed_afterwards() -> None:
    model = Twice(child=Twice(w=sortal.Param(jnp.ones(2))))

    @sortal.jit
    def promote(m: Any) -> None:
        m.__class__ = m.child.__class__ = Thrice

    promote(model)
    assert (type(model), type(model.child)) == (Thrice, Thrice)
    assert model.child.w[0] == 1


def test_another_class_of_a_list_or_dict_is_an_edit() -> None:
    class Items(list):
        pass

    class Twins(Items):
        pass

    model = Holder(items=Items([sortal.Param(jnp.ones(1))]))
    assert type(sortal.clone(model).items) is Items
    model.items.__class__ = Twins
    assert type(sortal.clone(model).items) is Twins


def test_a_dict_of_attributes_replaced_whole_is_an_edit() -> None:
    model = Holder(w=sortal.Param(jnp.ones(2)))
    total = sortal.jit(lambda m: m.w.sum())
    assert total(model) == 2
    model.__dict__ = {"w": sortal.Param(jnp.zeros(2))}
    assert total(model) == 0
    assert sortal.state(model)["w"][0] == 0
    outer = Holder(child=model)
    assert total(outer.child) == 0
    sortal.state(outer)
    model.__dict__ = {"w": sortal.Param(jnp.full(2, 3.0))}
    assert sortal.state(outer)["child"]["w"][0] == 3


def test_another_default_of_a_dict_is_an_edit() -> None:
    model = Holder(table=defaultdict(list, a=sortal.Param(1.0)))
    assert sortal.clone(model).table.default_factory is list
    model.table.default_factory = dict
    assert sortal.clone(model).table.default_factory is dict


def test_settings_of_a_registered_pytree_are_structure() -> None:
    model = Holder(part=Leaning(jnp.ones(2), 1.0))
    total = sortal.jit(lambda m: m.part.slope * m.part.x.sum())
    assert total(model) == 2
    model.part.slope = 2.0
    assert total(model) == 4


# ------------------------------------------------------------------ what plans hold
def test_a_plan_does_not_keep_a_raw_array_that_was_replaced() -> None:
    model = Holder(x=np.ones(3), items=[np.ones(3)], table={"k": np.ones(3)})
    for holder, key in ((vars(model), "x"), (model.items, 0), (model.table, "k")):
        sortal.state(model)
        gone = weakref.ref(holder[key])
        holder[key] = np.zeros(3)
        sortal.state(model)
        assert gone() is None


def test_older_plans_do_not_keep_what_has_left_the_model() -> None:
    class Big:
        pass

    model = Holder(x=np.ones(3), child=Holder(y=np.ones(2)), act=Big())
    sortal.state(model)
    gone = [weakref.ref(x) for x in (model.x, model.child, model.child.y, model.act)]
    del model.x, model.child, model.act
    sortal.state(model)
    assert not [x() for x in gone if x() is not None]


def test_a_plan_that_comes_back_drops_those_that_keep_what_has_left() -> None:
    model = Holder(w=sortal.Param(jnp.ones(1)))
    sortal.state(model)
    model.child = Holder(y=np.ones(2))
    sortal.state(model)
    gone = [weakref.ref(x) for x in (model.child, model.child.y)]
    del model.child
    sortal.state(model)
    assert not [x() for x in gone if x() is not None]


def test_statics_that_lead_back_to_their_model_do_not_keep_it() -> None:
    class Scaled(sortal.Module):
        def __init__(self) -> None:
            self.scale = sortal.Param(jnp.ones(2))
            self.by_lambda = lambda x: x * self.scale
            self.by_method = self.double
            self.by_partial = functools.partial(self.double)

        def double(self, x: Any) -> Any:
            return 2 * x * self.scale

    def used() -> Any:
        model = Scaled()
        sortal.clone(model)
        sortal.state(model)
        return weakref.ref(model)

    gone = [used() for _ in range(3)]
    gc.collect()
    assert [x() for x in gone] == [None] * 3


def test_a_service_that_builds_thousands_of_models_does_not_grow() -> None:
    class Layer(sortal.Module):
        def __init__(self, i: int) -> None:
            self.i = i
            self.w = sortal.Param(np.ones(1), tag=f"t{i}")
            self.act = lambda x: x + self.i
            self.parts = [Holder(up=self, n=i) for _ in range(2)]

    def serve(i: int) -> None:
        model = Layer(i)
        sortal.update(model, sortal.state(model, sortal.Param))
        sortal.merge(*sortal.split(model))
        model.i = -i
        sortal.clone(model)

    def count(start: int) -> int:
        for i in range(start, start + 1000):
            serve(i)
        gc.collect()
        return len(gc.get_objects())

    count(0)
    before = count(10_000)
    assert count(20_000) < before + 500
