"""Nodes: how each type of object is taken apart and put together again."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import pickle
from typing import Any, NamedTuple

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from hypothesis import given

import sortal
from sortal import nnx
from sortal._engine import handlers, nodes
from sortal._engine.nodes import (
    LEAF,
    STATIC,
    Handler,
    Node,
    handler_of,
    is_static_value,
)
from sortal.errors import StructureError, TraceError
from strategies import Box, Cell, Config, Pair, arrays, models, statics

Param = sortal.Param


def rebuilt(model: Any) -> Any:
    return sortal.merge(*sortal.split(model))


def through(value: Any) -> Any:
    """The value as it comes back from ``merge(*split(...))`` in an attribute."""
    return rebuilt(Box(x=value)).x


# ------------------------------------------------------------ classification
@pytest.mark.parametrize(
    "leaf",
    [
        Param(1),
        jnp.ones(2),
        np.ones(2),
        jax.random.key(0),
        jax.ShapeDtypeStruct((2,), jnp.float32),
    ],
)
def test_variables_and_arrays_are_leaves(leaf):
    assert handler_of(leaf) == LEAF
    assert sortal.state(Box(x=leaf)).paths() == (("x",),)


@given(statics)
def test_plain_values_are_static(value):
    handler = handler_of(value)
    assert handler == STATIC or is_static_value(value)
    assert sortal.state(Box(x=value)).paths() == ()


@pytest.mark.parametrize(
    "value", [1, 1.5, "a", None, int, Box, len, jnp.float32, np.float32(1), range(3)]
)
def test_numbers_functions_and_types_are_static(value):
    assert handler_of(value) == STATIC


def test_tracers_are_leaves():
    @jax.jit
    def f(x):
        assert handler_of(x) == LEAF
        return x

    f(jnp.ones(2))


@pytest.mark.parametrize(
    ("value", "static"),
    [
        ((), True),
        ((1, "a", (2.0,)), True),
        ((1, [2]), False),
        ((1, Param(2)), False),
        ((jnp.ones(1),), False),
        (Pair(1, "a"), True),
        (Pair(1, Param(1)), False),
        (Config(1, (2, "a")), True),
        (Config(Config(Param(1))), False),
        (Config([1]), False),
        (Config({1}), False),
        (Cell(1), False),
        ([1], False),
        ({"a": 1}, False),
    ],
)
def test_values_that_hold_statics_only_are_one_static(value, static):
    assert is_static_value(value) is static


def test_a_method_of_a_plain_object_is_static_and_of_a_module_is_a_node():
    model = Box()
    assert not is_static_value(model.train)
    assert handler_of(len) == STATIC


# ---------------------------------------------------------------- round trips
@given(models())
def test_a_model_taken_apart_and_put_together_is_the_same(model):
    """Structure, sharing, cycles, statics and every value."""
    copied = rebuilt(model)
    assert sortal.graphdef(copied) is sortal.graphdef(model)
    assert sortal.state(copied) == sortal.state(model)
    assert type(copied) is type(model)


def test_containers_come_back_with_their_types_and_identity():
    w = Param(jnp.ones(2))
    shared = [w]
    model = Box(a=shared, b=shared, c={"x": shared, 1: (w, Pair(w, [w]))})
    copied = rebuilt(model)
    assert copied.a is copied.b is copied.c["x"]
    assert type(copied.c[1][1]) is Pair
    assert copied.c[1][1].left[0] is copied.c[1][0] is copied.a[0]
    assert copied.a[0] is not w


def test_cycles_through_every_mutable_container_come_back():
    model = Box(items=[], table={}, cell=Cell(None), pair=None)
    model.items.append(model)
    model.table["me"] = model.items
    model.cell.weight = model.cell
    model.pair = (model, model.items)
    copied = rebuilt(model)
    assert copied.items[0] is copied
    assert copied.table["me"] is copied.items
    assert copied.cell.weight is copied.cell
    assert copied.pair[0] is copied
    assert copied.pair[1] is copied.items


@pytest.mark.parametrize(
    "keys", [("b", "a"), ("a", "b"), (2, "a", 1), ((1, 2), None, "x", 0.5)]
)
def test_a_dict_keeps_its_order_while_its_leaves_are_sorted(keys):
    copied = through({k: Param(i) for i, k in enumerate(keys)})
    assert tuple(copied) == keys
    assert [v.value for v in copied.values()] == list(range(len(keys)))
    ints = [k for k in keys if isinstance(k, int)]
    found = sortal.state(Box(x={k: Param(0) for k in keys})).paths()
    assert [p[1] for p in found][: len(ints)] == sorted(ints)


def test_two_orders_of_one_dict_are_two_structures():
    a = sortal.graphdef(Box(x={"a": Param(1), "b": Param(2)}))
    b = sortal.graphdef(Box(x={"b": Param(2), "a": Param(1)}))
    assert a is not b


@pytest.mark.parametrize("key", [1.0, True])
def test_dicts_with_equal_keys_of_other_types_are_told_apart(key):
    one, other = Box(x={1: Param(0)}), Box(x={key: Param(0)})
    assert sortal.graphdef(one) is not sortal.graphdef(other)
    assert type(next(iter(rebuilt(other).x))) is type(key)


def folded(model: Any) -> Any:
    """A number that depends on the order of the attributes."""
    x = jnp.float32(1)
    for name, value in vars(model).items():
        x = x if name.startswith("_") else x * value[...] + 1
    return x


class Plain:
    """Attributes in an order that is not that of their names."""

    def __init__(self, kind: Any = Param):
        self.b = kind(jnp.float32(2))
        self.a = kind(jnp.float32(3))


class Ours(Plain, sortal.Module):
    pass


class Theirs(Plain, flax_nnx.Module):
    def __init__(self):
        super().__init__(flax_nnx.Param)


@pytest.mark.parametrize("cls", [Ours, Theirs])
def test_copies_have_attributes_in_the_order_of_assignment(cls):
    model = cls()
    assert float(folded(model)) == 10
    for copied in (rebuilt(model), sortal.clone(model)):
        assert list(vars(copied))[-2:] == ["b", "a"]
    assert float(sortal.jit(folded)(model)) == 10

    kept = model.b
    del model.b
    model.b = kept
    assert float(folded(model)) == 9
    assert float(sortal.jit(folded)(model)) == 9
    assert float(folded(sortal.clone(model))) == 9


@pytest.mark.parametrize("cls", [Ours, Theirs])
def test_an_order_made_inside_jit_is_that_of_the_live_object(cls):
    @sortal.jit
    def reorder(model):
        kept = model.b
        del model.b
        model.b = kept
        return folded(model)

    model = cls()
    held = model.b
    assert float(reorder(model)) == 9
    assert float(folded(model)) == 9
    assert model.b is held
    assert float(reorder(model)) == 9
    assert list(vars(model))[-2:] == ["a", "b"]


def test_two_orders_of_attributes_are_two_structures_with_leaves_in_one_order():
    a = sortal.graphdef(Box(x=Param(0), y=Param(0)))
    b = sortal.graphdef(Box(y=Param(0), x=Param(0)))
    assert a is not b
    assert a.schema is b.schema


def test_dataclasses_and_partials_keep_the_order_of_their_names():
    @dataclasses.dataclass
    class Pair:
        b: Any
        a: Any

    pair = Pair(Param(1), Param(2))
    pair.z, pair.y = Param(3), 4  # type: ignore[attr-defined]
    assert list(vars(through(pair))) == ["b", "a", "z", "y"]
    names = functools.partial(lambda **named: list(named), b=Param(1), a=Param(2))
    assert through(names)() == ["b", "a"]


def test_a_dataclass_reordered_inside_jit_is_so_outside():
    @dataclasses.dataclass(eq=False)
    class Pair:
        b: Any
        a: Any

    @sortal.jit
    def reorder(model):
        kept = model.pair.b
        del model.pair.b
        model.pair.b = kept

    model = Box(pair=Pair(jnp.float32(2), Param(3)))
    pair = model.pair
    reorder(model)
    assert model.pair is pair
    assert list(vars(pair)) == ["a", "b"]


def test_a_state_of_flax_keeps_its_order():
    state = flax_nnx.State({"b": flax_nnx.Param(1), "a": flax_nnx.Param(2)})
    assert list(sortal.clone(state)) == ["b", "a"]
    assert sortal.state(state).paths() == (("a",), ("b",))


def test_the_order_of_metadata_does_not_depend_on_what_came_before():
    first = Param(1, order_b=2, order_a=1)
    again = Param(1, order_a=1, order_b=2)
    assert list(first.get_metadata()) == list(again.get_metadata())
    assert list(again.get_metadata()) == ["order_a", "order_b"]


def test_special_dicts_and_lists_keep_their_types():
    ordered = through(collections.OrderedDict(b=Param(1), a=2))
    assert type(ordered) is collections.OrderedDict
    assert list(ordered) == ["b", "a"]
    default = through(collections.defaultdict(list, a=[Param(1)]))
    assert type(default) is collections.defaultdict
    assert default.default_factory is list
    assert type(through(nnx.List([Param(1)]))) is nnx.List
    assert type(through(nnx.Dict(a=Param(1)))) is nnx.Dict
    assert through(collections.Counter("aab")) == collections.Counter("aab")


def test_a_list_type_with_an_init_of_its_own_comes_back():
    class Sized(list):
        def __init__(self, size, fill):
            super().__init__([fill] * size)

    class Keyed(dict):
        def __init__(self, required):
            super().__init__(required)

    copied = through(Sized(2, 5))
    assert type(copied) is Sized
    assert copied == [5, 5]
    assert type(through(Keyed({"a": Param(1)}))) is Keyed


@pytest.mark.parametrize("base", [list, dict])
def test_containers_with_attributes_are_refused(base):
    """They would be dropped by the first transform: Variables and all."""
    items = type("Items", (base,), {})()
    items.scale = Param(jnp.ones(2))
    with pytest.raises(
        StructureError, match=r"layers\.0: .* Items .*attributes scale.* sortal\.Module"
    ):
        sortal.state(Box(layers=[items]))


def test_a_tuple_type_with_variables_inside_is_seen_through():
    """Taken for a static, its Variables would never be trained."""

    class Layers(tuple):
        __slots__ = ()

    model = Box(layers=Layers([Param(jnp.ones(2)), Box(w=Param(jnp.ones(1)))]))
    assert sortal.state(model).paths() == (("layers", 0), ("layers", 1, "w"))
    copied = rebuilt(model)
    assert type(copied.layers) is Layers
    assert is_static_value(Layers([1, 2]))
    assert through(Layers([1, "a"])) == Layers([1, "a"])


def test_named_tuples_come_back_with_fields_in_their_own_order():
    copied = through(Pair(Param(1), left=Param(2)))
    assert (copied.right.value, copied.left.value) == (1, 2)
    assert sortal.state(Box(x=copied)).paths() == (("x", "left"), ("x", "right"))


def test_dataclasses_of_every_sort_come_back():
    @dataclasses.dataclass
    class Slotted:
        __slots__ = ("w",)
        w: Any

    @dataclasses.dataclass
    class Late:
        w: Any
        unset: Any = dataclasses.field(init=False)

    frozen = through(Config(Param(1), Param(2)))
    assert (type(frozen), frozen.rate.value) == (Config, 1)
    assert through(Slotted(Param(3))).w.value == 3
    late = Late(Param(4))
    late.extra = Param(5)
    copied = through(late)
    assert (copied.w.value, copied.extra.value) == (4, 5)
    assert not hasattr(copied, "unset")


def test_a_bound_method_binds_to_the_copy():
    model = Box(w=Param(jnp.ones(2)))
    model.call = model.train
    copied = rebuilt(model)
    assert copied.call.__self__ is copied
    assert copied.call.__func__ is Box.train


def scaled(w, x, *, by):
    return w * x * by.w


def test_what_a_partial_holds_is_part_of_the_model():
    """As a constant, it would stay at its first value in compiled functions."""
    w, inner = Param(jnp.array(2.0)), Box(w=Param(jnp.array(3.0)))
    model = Box(w=w, f=functools.partial(scaled, w, by=inner))
    assert sortal.state(model).paths() == (
        ("f", "args", 0),
        ("f", "keywords", "by", "w"),
    )
    call = sortal.jit(lambda m, x: m.f(x))
    assert call(model, 1.0) == 6
    w.value = jnp.array(5.0)
    assert call(model, 1.0) == 15
    copied = rebuilt(model)
    assert copied.f.func is scaled
    assert copied.f.args[0] is copied.w
    assert copied.f.keywords["by"] is not inner
    assert call(copied, 2.0) == 30

    @sortal.jit
    def write(m):
        m.f.args[0].value += 1
        m.f.keywords["by"].w.value += 1

    write(model)
    assert call(model, 1.0) == 24
    assert model.f.args[0] is w


def test_a_partial_of_a_method_calls_the_copy():
    model = Box(w=Param(jnp.ones(2)))
    model.call = functools.partial(model.train, extra=1)
    copied = rebuilt(model)
    assert copied.call.func.__self__ is copied
    assert copied.call.keywords == {"extra": 1}


def test_a_partial_that_holds_no_state_is_one_static():
    for f in (functools.partial(max, 1), functools.partial(sorted, {2}, key=id)):
        assert is_static_value(f)
        assert is_static_value((f, 1))
        assert rebuilt(Box(f=f)).f is f


def test_what_is_put_into_a_list_of_a_partial_is_noticed():
    model = Box(f=functools.partial(max, []))
    assert sortal.state(model).paths() == ()
    model.f.args[0].append(jnp.ones(2))
    assert sortal.state(model).paths() == (("f", "args", 0, 0),)


def test_a_partial_is_edited_by_its_keywords():
    f = functools.partial(scaled, by=Box(w=Param(jnp.ones(()))))
    model = Box(f=f)
    call = sortal.jit(lambda m: m.f(1.0, 1.0))
    assert call(model) == 1
    f.keywords["by"] = Box(w=Param(jnp.array(7.0)))
    assert call(model) == 7
    assert sortal.clone(model).f.keywords["by"].w.value == 7


@given(arrays)
def test_pytrees_registered_with_jax_are_seen_through(x):
    state = optax.adam(0.1).init({"w": jnp.asarray(x, jnp.float32)})
    model = Box(state=state, partial=jax.tree_util.Partial(max, jnp.asarray(x)))
    found = sortal.state(model).paths()
    assert ("state", 0, "mu", "w") in found
    copied = rebuilt(model)
    assert jax.tree.structure(copied.state) == jax.tree.structure(state)
    assert copied.partial.func is max


def test_a_pytree_of_keys_without_names_is_numbered():
    @jax.tree_util.register_pytree_node_class
    class Bag:
        def __init__(self, *items):
            self.items = items

        def tree_flatten(self):
            return self.items, None

        @classmethod
        def tree_unflatten(cls, aux, children):
            return cls(*children)

    model = Box(bag=Bag(Param(1), jnp.ones(2)))
    assert sortal.state(model).paths() == (("bag", 0), ("bag", 1))
    copied = rebuilt(model).bag
    assert copied.items[0].value == 1


# ------------------------------------------------------------- own handlers
def test_a_type_taught_to_the_engine_and_its_subclasses_are_nodes():
    class Cupboard:
        def __init__(self, *items):
            self.items = list(items)

    class Wardrobe(Cupboard):
        pass

    class Shelves(Handler):
        def items(self, obj):
            return dict(enumerate(obj.items))

        def spec(self, obj):
            return len(obj.items)

        def fill(self, obj, spec, items):
            assert spec == len(items)
            obj.items = list(items.values())

    assert handler_of(Cupboard()) == STATIC
    sortal.register_node(Cupboard, Shelves())
    for cls in (Cupboard, Wardrobe):
        found = cls(Param(1), "static", [Param(2)])
        model = Box(a=found, b=found)
        assert sortal.state(model).paths() == (("a", 0), ("a", 2, 0))
        copied = rebuilt(model)
        assert type(copied.a) is cls
        assert copied.a is copied.b
        assert copied.a.items[1] == "static"


def test_a_handler_says_what_it_lacks():
    handler = Handler()
    for call in (
        lambda: handler.items(1),
        lambda: handler.fill(1, None, {}),
        lambda: handler.build(int, None, {}),
    ):
        with pytest.raises(NotImplementedError):
            call()
    assert handler.spec(1) is None


def test_handlers_are_equal_by_what_they_do():
    assert handlers.ListHandler() == handlers.ListHandler()
    assert hash(handlers.ListHandler()) == hash(handlers.ListHandler())
    assert handlers.ListHandler() != handlers.DictHandler()


# --------------------------------------------------------------------- Node
def test_attribute_writes_count_and_arrays_for_arrays_do_not():
    model = Box(x=jnp.ones(2), n=1)

    def moved(edit: Any) -> bool:
        before = model._version
        edit()
        return model._version != before

    assert moved(lambda: setattr(model, "n", 2))
    assert moved(lambda: setattr(model, "new", 2))
    assert moved(lambda: delattr(model, "new"))
    assert moved(lambda: setattr(model, "x", 1.0))
    assert moved(lambda: setattr(model, "x", jnp.ones(3)))
    assert not moved(lambda: setattr(model, "x", jnp.ones(4)))
    assert not moved(lambda: setattr(model, "x", np.ones(4)))


def test_deleting_an_attribute_that_is_not_there_is_pythons_own_error():
    with pytest.raises(AttributeError, match="missing"):
        del Box().missing


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: pickle.loads(cloudpickle.dumps(m)),
    ],
)
def test_copies_and_pickles_have_the_structure_and_plans_of_their_own(duplicate):
    model = Box(w=Param(jnp.ones(2), tag="a"), layers=[Box(n=1)], rate=nnx.data(0.5))
    before = sortal.graphdef(model)
    other = duplicate(model)
    assert sortal.graphdef(other) is before
    assert other._plans is not model._plans
    assert sortal.state(other) == sortal.state(model)
    other.n = 3
    assert sortal.graphdef(model) is before
    assert sortal.graphdef(other) is not before


@given(models())
def test_a_deep_copy_has_the_same_structure(model):
    """Statics compared by identity are not copied: nothing compiles again."""
    other = copy.deepcopy(model)
    assert sortal.graphdef(other) is sortal.graphdef(model)
    assert sortal.state(other) == sortal.state(model)


def test_a_deep_copy_owns_its_variables_and_shares_functions_and_settings():
    class Setting:
        pass

    setting, relu = Setting(), jax.nn.relu
    model = Box(w=Param(np.ones(2)), f=relu, fs=[relu, (relu, setting)], s=setting)
    model.me = model
    other = copy.deepcopy(model)
    assert other.me is other
    assert other.f is relu
    assert other.fs[0] is relu
    assert other.fs[1][1] is setting
    assert other.fs is not model.fs
    assert other.w is not model.w
    assert not np.shares_memory(other.w.value, model.w.value)


def test_a_deep_copy_of_several_models_keeps_what_they_share():
    w = Param(jnp.ones(2))
    a, b = copy.deepcopy([Box(w=w), Box(w=w)])
    assert a.w is b.w
    assert a.w is not w


@pytest.mark.parametrize(
    "edit",
    [
        lambda model, x: setattr(model.inner, "n", x),
        lambda model, x: setattr(model.inner, "new", 1),
        lambda model, x: delattr(model.inner, "n"),
    ],
)
def test_an_attribute_edited_inside_a_foreign_trace_is_refused_with_its_path(edit):
    """A tracer would stay in the live model."""
    model = Box(inner=Box(n=1))
    with pytest.raises(
        TraceError, match=r"^Cannot mutate 'Box' .*: inner\.(n|new) \(of a Box\)"
    ):
        jax.jit(lambda x: (edit(model, x), x)[1])(jnp.ones(2))
    assert vars(model.inner) == {"n": 1}


def test_filling_a_node_again_replaces_all_that_it_holds():
    """How changes made to copies inside a transform reach the live objects."""
    for node in (Box(old=1), [1], {"old": 1}):
        handler = handler_of(node)
        spec = handler.spec({"a": None}) if isinstance(node, dict) else None
        handler.fill(node, spec, {"a": 5})
        assert list(handler.items(node).values()) == [5]
    cell = Cell(1, 2)
    cell.old = 3
    handler_of(cell).fill(cell, None, {"weight": 4, "note": 5})
    assert vars(cell) == {"weight": 4, "note": 5}
    held = Box(x=Box(n=1))
    before = sortal.graphdef(held)
    handler_of(held.x).fill(held.x, None, {"m": 1})
    assert sortal.graphdef(held) is not before


def test_setting_attributes_runs_properties_and_descriptors():
    class Doubled(sortal.Module):
        @property
        def twice(self):
            return 2 * self.n

        @twice.setter
        def twice(self, value):
            self.n = value // 2

    model = Doubled()
    model.twice = 6
    assert model.n == 3
    assert list(vars(model)) == ["n"]


# ------------------------------------------------------------ data and static
def test_marked_data_is_a_leaf_and_marked_statics_are_none():
    model = Box(rate=nnx.data(0.5), size=nnx.static((2, 3)), n=1)
    assert (model.rate, model.size) == (0.5, (2, 3))
    assert sortal.state(model).to_pure_dict() == {"rate": 0.5}
    model.rate = 0.25
    assert sortal.state(model).to_pure_dict() == {"rate": 0.25}
    assert sortal.state(rebuilt(model)).to_pure_dict() == {"rate": 0.25}


def test_marked_containers_are_what_they_would_be_without():
    """NNX code marks lists of layers; plain lists need no mark here."""
    plain = Box(layers=[Param(1)], table={"a": Param(2)})
    marked = Box(layers=nnx.data([Param(1)]), table=nnx.data({"a": Param(2)}))
    assert sortal.state(marked) == sortal.state(plain)


def test_a_mark_may_be_changed():
    model = Box(n=nnx.data(1))
    assert len(sortal.state(model)) == 1
    model.n = nnx.static(1)
    assert len(sortal.state(model)) == 0
    model.n = nnx.data(2)
    assert sortal.state(model).to_pure_dict() == {"n": 2}


def test_a_mark_ends_with_the_attribute():
    model = Box(n=nnx.data(1))
    del model.n
    model.n = 1
    assert sortal.graphdef(model) is sortal.graphdef(Box(n=1))


def test_a_static_array_is_refused_because_it_cannot_be_compared():
    with pytest.raises(StructureError, match=r"a ndarray, to table of a Box"):
        sortal.state(Box(table=nnx.static(np.ones(2))))


def test_fields_of_dataclass_modules_are_marked_in_the_class():
    @sortal.dataclass
    class Schedule(sortal.Module):
        name: str
        rate: float = nnx.data(default=0.1)
        sizes: tuple = nnx.static(default=(1, 2))
        steps: list = nnx.data(default_factory=list)
        note: str = nnx.static(default="n", metadata={"doc": "a note"})

    made = Schedule("a")
    assert sortal.state(made).to_pure_dict() == {"rate": 0.1}
    assert made.steps == []
    assert Schedule("a").steps is not made.steps
    fields = {f.name: f for f in dataclasses.fields(Schedule)}
    assert dict(fields["note"].metadata) == {"doc": "a note", "role": "static"}


def test_statics_that_look_alike_but_hold_modules_are_refused():
    """A plain object with a Variable inside would never be trained."""

    class Plain:
        def __init__(self):
            self.inner = Param(jnp.ones(2))

    with pytest.raises(StructureError, match=r"helper: a Plain .* inner \(Param\)"):
        sortal.state(Box(helper=Plain()))
    sortal.state(Box(helper=functools.partial(max, 1)))


def test_nodes_are_found_by_type_whatever_they_hold():
    class Empty(NamedTuple):
        pass

    assert handler_of(Box()) is handler_of(Box(a=1))
    assert isinstance(handler_of(Box()), nodes.ObjectHandler)
    assert is_static_value(Empty())
    assert isinstance(Box(), Node)


def test_state_hidden_in_a_callable_object_is_refused_too():
    class Plain:
        def __init__(self):
            self.inner = Param(jnp.ones(2))

        def __call__(self, x):
            return x * self.inner

    with pytest.raises(StructureError, match=r"layer: a Plain .* inner \(Param\)"):
        sortal.state(Box(layer=Plain()))
    with pytest.raises(StructureError, match=r"layer: a Plain .* inner \(Param\)"):
        sortal.jit(lambda m, x: m.layer(x))(Box(layer=Plain()), 1.0)
    with pytest.raises(StructureError, match=r"layers.0: a Plain .* inner \(Param\)"):
        sortal.state(Box(layers=(Plain(), 1)))


@pytest.mark.parametrize(
    ("held", "shown"),
    [
        (lambda p: [1, p], "Param in a list"),
        (lambda p: {"a": (p,)}, "Param in a dict"),
        (lambda p: {Box(w=p)}, "Box in a set"),
        (lambda p: Box(w=p).train, "Box in a method"),
        (lambda p: functools.partial(max, p), "Param in a partial"),
    ],
)
def test_state_hidden_in_the_containers_of_an_object_is_refused_too(held, shown):
    """Layers in a list, in a class that should have been a Module."""

    class Plain:
        def __init__(self, inner):
            self.size, self.inner = 3, inner

    class Slotted(Plain):
        __slots__ = ("inner",)

    class OnlySlots:
        __slots__ = ("__inner", "unset")

        def __init__(self, inner):
            self.__inner = inner

    inner = held(Param(jnp.ones(2)))
    for hider in (Plain(inner), Slotted(inner), OnlySlots(inner)):
        with pytest.raises(StructureError, match=rf"helper.0: a .*inner \({shown}\)"):
            sortal.state(Box(helper=(hider,)))
    statics = {"sizes": [1, 2], "names": {"a", "b"}, "call": functools.partial(max, 1)}
    sortal.state(Box(helper=OnlySlots(statics)))


def test_state_hidden_in_a_partial_is_refused_too():
    class Plain:
        def __init__(self):
            self.inner = Param(jnp.ones(2))

    where = r"act.args.0: a Plain .* inner \(Param\)"
    with pytest.raises(StructureError, match=where):
        sortal.state(Box(act=functools.partial(max, Plain())))
    named = functools.partial(max, Param(jnp.ones(2)))
    named.note = "x"
    with pytest.raises(StructureError, match="act: a partial with the attributes note"):
        sortal.state(Box(act=named))


def test_state_hidden_behind_a_bound_method_is_refused_too():
    class Plain:
        def __init__(self):
            self.inner = Param(jnp.ones(2))

        def scale(self, x):
            return x * self.inner

    where = r"{}__self__: a Plain .* inner \(Param\)"
    with pytest.raises(StructureError, match=where.format("act.")):
        sortal.state(Box(act=Plain().scale))
    with pytest.raises(StructureError, match=where.format("acts.0.")):
        sortal.jit(lambda m, x: m.acts[0](x))(Box(acts=(Plain().scale,)), 1.0)


def test_a_mark_set_or_ended_inside_a_trace_is_there_afterwards():
    @sortal.jit
    def mark(model):
        model.rate = nnx.data(0.25)

    model = Box(w=Param(jnp.ones(1)))
    mark(model)
    model.rate = 0.5
    assert sortal.state(model).to_pure_dict()["rate"] == 0.5

    @sortal.jit
    def unmark(model):
        del model.rate

    unmark(model)
    model.rate = 0.5
    assert "rate" not in sortal.state(model)


def test_a_mark_over_that_of_a_field_ends_with_the_attribute():
    @sortal.dataclass
    class Schedule(sortal.Module):
        rate: float = nnx.data(default=0.1)

    model = Schedule()
    model.rate = nnx.static(0.2)
    assert len(sortal.state(model)) == 0
    del model.rate
    model.rate = 0.3
    assert sortal.state(model).to_pure_dict() == {"rate": 0.3}


@pytest.mark.parametrize(
    "value", [(0.1, 0.2), [0.1, 0.2], {"a": 0.1, "b": (0.2,)}], ids=repr
)
def test_numbers_in_a_marked_container_are_leaves(value):
    model = Box(rates=nnx.data(value), w=Param(jnp.ones(1)))
    assert jax.tree.leaves(model)[:2] == [0.1, 0.2]
    assert jax.tree.leaves(sortal.clone(model).rates) == [0.1, 0.2]
    traces = []

    @sortal.jit
    def total(m):
        traces.append(1)
        return sum(jax.tree.leaves(m.rates))

    np.testing.assert_allclose(total(model), 0.3, rtol=1e-6)
    model.rates = jax.tree.map(lambda x: 2 * x, value)
    np.testing.assert_allclose(total(model), 0.6, rtol=1e-6)
    assert len(traces) == 1


def test_numbers_in_a_marked_list_are_written_by_a_transform():
    model = Box(rates=nnx.data([0.1, 0.2]), names=nnx.data(["a", None]))

    @sortal.jit
    def double(m):
        m.rates[0] = 2 * m.rates[0]

    double(model)
    np.testing.assert_allclose(model.rates, [0.2, 0.2], rtol=1e-6)
    assert model.names == ["a", None]


def test_variables_and_modules_in_a_class_are_refused_unless_an_attribute_hides_them():
    class Scaled(sortal.Module):
        scale = sortal.Param(jnp.ones(2))
        inner = sortal.Module()
        table = jnp.arange(3)

    @dataclasses.dataclass
    class Default(sortal.Module):
        scale: sortal.Param = sortal.Param(1.0)  # noqa: RUF009

    with pytest.raises(StructureError) as e:
        sortal.jit(lambda m: m.scale * 2)(Scaled())
    where = "in the class Scaled, where it is part of no model; set it in __init__, as"
    assert str(e.value).splitlines()[1:3] == [
        f"  scale: a Param {where} self.scale = ...",
        f"  inner: a Module {where} self.inner = ...",
    ]
    assert sortal.state(Default()).paths() == (("scale",),)


def test_a_class_with_slots_is_refused_for_nothing_would_find_what_is_in_them():
    with pytest.raises(StructureError, match=r"class Slotted has __slots__, \('w',\)"):

        class Slotted(sortal.Module):
            __slots__ = ("w",)

    with pytest.raises(StructureError, match="class Point has __slots__"):

        @dataclasses.dataclass(slots=True)
        class Point(sortal.Module):
            w: Any
