"""Live leaves are read and written at once, each as its library keeps it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal
import sortal.nnx  # whose names of Variables it adds
from models import Linear, portrait
from sortal._engine.handlers import Handler
from sortal._engine.leaves import Foreign, Leaves, Slot, held, identity, own, store_all
from sortal._engine.walk import Walk
from sortal.errors import TraceError

nnx = pytest.importorskip("flax.nnx")


class Mixed(sortal.Module):
    """Leaves of three sorts."""

    def __init__(self) -> None:
        self.a = sortal.Param(jnp.zeros(1))
        self.b = jnp.ones(1)
        self.c = nnx.Param(jnp.full(1, 2.0))
        self.d = nnx.BatchStat(jnp.full(1, 3.0))


PARTS = {
    "ours": [0],
    "raw": [1],
    "theirs": [2, 3],
    "all": [0, 1, 2, 3],
    "none": [],
}


@pytest.mark.parametrize("part", PARTS)
def test_values_are_read_and_written_in_order_whoever_keeps_them(part: str) -> None:
    model, at = Mixed(), PARTS[part]
    leaves = Leaves(Walk(model).leaves[i] for i in at)
    assert [float(x[0]) for x in leaves.values()] == at
    store_all([leaves], [x + 10 for x in leaves.values()])
    now = [model.a.value, model.b, model.c.get_value(), model.d.get_value()]
    expected = [i + 10 if i in at else i for i in range(4)]
    assert [float(x[0]) for x in now] == expected


def test_a_leaf_is_held_as_the_user_sees_it_and_is_one_in_two_walks() -> None:
    model = Mixed()
    first, second = Walk(model).leaves, Walk(model).leaves
    assert [type(x) for x in first] == [sortal.Param, Slot, Foreign, Foreign]
    assert held(first[0]) is model.a
    assert held(first[1]) is model.b
    assert held(first[2]) is model.c
    assert list(map(identity, first)) == list(map(identity, second))
    assert len(set(map(identity, first))) == 4


def test_snapshots_own_their_numpy_arrays() -> None:
    array = np.zeros(2)
    model = sortal.Module()
    model.x = sortal.Variable(array)
    model.y = nnx.Variable(array)
    kept = Leaves(Walk(model).leaves).snapshot()
    array += 1
    assert not np.any(kept)
    same = [jnp.ones(1)]
    assert own(same) is same


def _again(m: Any, x: Any) -> None:
    m.a.__init__(x)


def _uncompiled(m: Any, x: Any) -> None:
    with jax.disable_jit():
        sortal.jit(lambda m: m.a.set_value(x))(m)


def _merged(m: Any, x: Any) -> None:
    m.a = sortal.merge(sortal.graphdef(m), sortal.State({"a": x, "b": x})).a


def _mapped(m: Any, x: Any) -> None:
    m.a = jax.tree.map(lambda _: x, m).a


WRITERS: dict[str, Callable[[Any, Any], Any]] = {
    "set_value": lambda m, x: m.a.set_value(x),
    "value": lambda m, x: setattr(m.a, "value", x),
    "set_raw_value": lambda m, x: m.a.set_raw_value(x),
    "init": lambda m, x: setattr(m, "a", sortal.Param(x)),
    "init again": _again,
    "create_value": lambda m, x: setattr(m, "a", Created(x)),
    "update": lambda m, x: sortal.update(m, sortal.State({"a": x, "b": x})),
    "update one": lambda m, x: sortal.update(m, {"a": x}),
    "merge": _merged,
    "tree.map": _mapped,
    "jit": _uncompiled,
    "deepcopy": lambda m, x: setattr(m, "a", copy.deepcopy(sortal.Param(x))),
    "pickle": lambda m, x: setattr(m, "a", pickle.loads(pickle.dumps(sortal.Param(x)))),
    "from_metadata": lambda m, x: setattr(m, "a", sortal.Param.from_metadata(x, {})),
    "copy_from": lambda m, x: m.a.copy_from(sortal.Param(x)),
    "replace": lambda m, x: setattr(m, "a", m.a.replace(x)),
}


class Created(sortal.Param):
    def create_value(self, value: Any) -> Any:
        return np.asarray(value)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_numpy_array_is_copied_into_snapshots_however_it_was_written(
    writer: str,
) -> None:
    class Two(sortal.Module):
        def __init__(self) -> None:
            self.a = sortal.Param(jnp.zeros(2))
            self.b = sortal.Param(jnp.zeros(2))

    m = Two()
    sortal.state(m)
    WRITERS[writer](m, np.ones(2, np.float32))
    assert type(m.a.get_value()) is np.ndarray
    for _ in range(2):
        snapshot = sortal.state(m)
        m.a.get_value()[0] += 1
        np.testing.assert_array_equal(snapshot["a"], m.a.get_value() - [1, 0])
    np.testing.assert_array_equal(sortal.jit(lambda m: m.a * 2)(m), [6, 2])
    m.a.set_value(jnp.zeros(2))
    np.testing.assert_array_equal(sortal.state(m)["a"], np.zeros(2))


def test_live_objects_of_another_trace_cannot_be_stored_to() -> None:
    model = Linear(1, 1)
    before = portrait(model)

    def leak(x: Any) -> Any:
        store_all([Leaves([model.kernel])], [x])
        return x

    with pytest.raises(TraceError, match=r"kernel \(Param\)"):
        jax.jit(leak)(jnp.ones((1, 1)))
    assert portrait(model) == before


def test_variables_of_another_library_are_not_stored_to_from_a_trace() -> None:
    model = Mixed()
    theirs = Leaves(Walk(model).leaves[2:])

    def leak(x: Any) -> Any:
        store_all([theirs], [x, x])
        return x

    with pytest.raises(TraceError, match=r"\(Param\).*\(BatchStat\)"):
        jax.jit(leak)(jnp.ones(1))
    assert float(model.c.get_value()[0]) == 2


class Bag:
    """Known to the engine by a handler of its own."""

    def __init__(self, *items):
        self.items = list(items)


class BagHandler(Handler):
    def items(self, obj):
        return dict(enumerate(obj.items))

    def fill(self, obj, spec, items):
        obj.items = list(items.values())


@pytest.mark.parametrize(
    "hold",
    [lambda x: sortal.State({"a": {"x": x}}), lambda x: Bag(x)],
    ids=["State", "registered"],
)
def test_raw_arrays_in_a_held_state_or_registered_node_are_written(hold):
    sortal.register_node(Bag, BagHandler())
    model = sortal.Module()
    model.held = hold(jnp.ones(2))

    @sortal.jit
    def double(m):
        sortal.update(m, jax.tree.map(lambda x: 2 * x, sortal.state(m)))

    double(model)
    assert jax.tree.leaves(sortal.state(model))[0].tolist() == [2, 2]
    sortal.update(model, jax.tree.map(lambda x: x + 1, sortal.state(model)))
    assert jax.tree.leaves(sortal.state(model))[0].tolist() == [3, 3]
