"""Specs and names inside a map and after it; whole programs are in test_nnx_names."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
from sortal import PARTITION_NAME, Param
from sortal.errors import ArgumentError, ShardingError
from sortal.sharding.presets import LargestAxis

MANY = {PARTITION_NAME: "layers", "notes": "new"}


def variable(nnx: Any, names: Any, **more: Any) -> Any:
    value = jnp.ones((2, 3))
    return nnx.Param(value, out_sharding=names, eager_sharding=False, **more)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("names", [("a", "b"), ("a",), ()])
def test_the_name_is_put_where_flax_puts_it(axis: int, names: Any) -> None:
    def made(nnx: Any) -> Any:
        make = nnx.vmap(
            lambda _: variable(nnx, names, notes=("x", "y")),
            out_axes=axis,
            transform_metadata=MANY,
        )
        found = make(jnp.arange(4)).get_metadata()
        return found.get("out_sharding"), found["notes"]

    assert made(sortal) == made(flax_nnx)


def test_an_axis_counted_from_the_end_is_named_at_its_place() -> None:
    found = sortal.vmap(
        lambda _: variable(sortal, ("a", "b")), out_axes=-1, transform_metadata=MANY
    )(jnp.arange(4))
    assert found.value.shape == (2, 3, 4)
    assert found.get_metadata("out_sharding") == ("a", "b", "layers")


def test_shared_and_passed_in_variables_keep_their_names() -> None:
    old = variable(sortal, ("a", "b"))
    shared, same = sortal.vmap(
        lambda old, _: (variable(sortal, ("a", "b")), old),
        in_axes=(None, 0),
        out_axes=(None, None),
        axis_size=4,
        transform_metadata=MANY,
    )(old, jnp.arange(4))
    assert shared.get_metadata("out_sharding") == ("a", "b")
    assert same is old
    assert old.get_metadata("out_sharding") == ("a", "b")


def test_what_a_constructor_or_step_adds_is_named_too() -> None:
    class Layer(sortal.Module):
        def __init__(self, key: Any):
            self.w = Param(jnp.ones(3), out_sharding=("a",))
            del key

        def __call__(self, x: Any) -> Any:
            self.seen = sortal.Intermediate(x, out_sharding=("a",))
            return x + self.w

    make = sortal.vmap(Layer, transform_metadata=MANY)
    layers = sortal.jit(make)(jax.random.split(jax.random.key(0), 2))
    assert layers.w.get_metadata("out_sharding") == ("layers", "a")
    sortal.scan(
        lambda layer, x: layer(x),
        in_axes=(0, sortal.Carry),
        out_axes=sortal.Carry,
        transform_metadata=MANY,
    )(layers, jnp.ones(3))
    assert layers.seen.get_metadata("out_sharding") == ("layers", "a")
    assert layers.w.get_metadata("out_sharding") == ("layers", "a")


# ------------------------------------------------------------------ specs of parts
AUTO, EXPLICIT = (
    jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    for kind in (AxisType.Auto, AxisType.Explicit)
)
LAYERS = {PARTITION_NAME: "layers"}


class Stat(sortal.Variable, spec=P("a", "b")):
    """A kind with a spec of its own."""


def placed(mesh: Any = AUTO, *spec: Any) -> Param:
    rule = sortal.Rule(spec=P(*spec or ("a", "b")))
    return sortal.shard(Param(jnp.ones((8, 4, 4))), mesh, {Param: rule})


def mapped(how: str, f: Any, w: Any, axis: Any = 0, **options: Any) -> Any:
    if how == "vmap":
        return sortal.vmap(f, in_axes=axis, out_axes=axis, **options)(w)
    return sortal.scan(f, in_axes=axis, out_axes=axis, **options)(w)


@pytest.mark.parametrize("how", ["vmap", "scan"])
@pytest.mark.parametrize(
    ("w", "axis", "part"),
    [
        (lambda: placed(), 0, P("b")),
        (lambda: placed(), 1, P("a")),
        (lambda: placed(), -1, P("a", "b")),
        (lambda: Param(jnp.ones((8, 4)), spec=P("a", "b")), 0, P("b")),
        (lambda: Stat(jnp.ones((8, 4))), 0, P("b")),
    ],
)
def test_a_part_lacks_the_entry_of_the_axis_that_it_is_a_part_along(
    how: str, w: Any, axis: int, part: Any
) -> None:
    seen, w = [], w()
    before = sortal.graphdef(w)

    def look(w: Any) -> None:
        seen.append(spec_of(w))
        w[...] = w * 2

    mapped(how, look, w, axis)
    assert set(seen) == {part}
    assert sortal.graphdef(w) is before
    assert (w.value == 2).all()


def spec_of(w: Any) -> Any:
    return sortal.specs({"w": w})["w"].value


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_constrain_divides_the_dimensions_of_the_part(mesh: Any) -> None:
    """Against jax.vmap of JAX's own constraint; the square part hid the mistake."""
    w = placed(mesh, None, "a")

    @sortal.jit
    def mine(w: Any) -> Any:
        return sortal.vmap(lambda w: sortal.constrain(w, mesh=mesh).value * 1)(w)

    def by_hand(x: Any) -> Any:
        put = jax.lax.with_sharding_constraint
        put = jax.sharding.reshard if mesh is EXPLICIT else put
        return put(x, NamedSharding(mesh, P("a"))) * 1

    expected = jax.jit(jax.vmap(by_hand))(w.value)
    assert mine(w).sharding.is_equivalent_to(expected.sharding, 3)
    assert not expected.sharding.is_fully_replicated


def train(model: Any, optimizer: Any, x: Any) -> None:
    grads = sortal.grad(lambda m: (m(x) ** 2).mean())(model)
    optimizer.update(model, grads)


@pytest.mark.parametrize("mesh", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("how", ["vmap", "scan"])
def test_a_map_called_eagerly_leaves_parameters_where_they_were(
    how: str, mesh: Any
) -> None:
    """ZeRO-1 over an ensemble: its moments are divided, its parameters are not."""
    zero = {
        sortal.OptState: sortal.Rule(spec=LargestAxis("a", 0)),
        ...: sortal.Rule(spec=P()),
    }
    keys = jax.random.split(jax.random.key(0), 2)
    make = sortal.vmap(lambda key: sortal.Linear(8, 8, rngs=sortal.Rngs(key)))
    adam = sortal.vmap(lambda m: sortal.Optimizer(m, optax.adam(1e-2), wrt=Param))
    models = make(keys)
    both = sortal.shard((models, adam(models)), mesh, zero)
    declared = [x.sharding for x in jax.tree.leaves(sortal.state(both))]
    x = jnp.ones((4, 8))
    if how == "vmap":
        sortal.vmap(sortal.jit(train), in_axes=(0, 0, None))(*both, x)
    else:
        step = sortal.jit(train)
        sortal.scan(
            lambda m, o: step(m, o, x), in_axes=(0, 0), out_axes=None, length=2
        )(*both)
    jax.block_until_ready(sortal.state(both).values_list())
    found = [x.sharding for x in jax.tree.leaves(sortal.state(both))]
    for new, old, x in zip(
        found, declared, jax.tree.leaves(sortal.state(both)), strict=True
    ):
        assert new.is_equivalent_to(old, x.ndim), (new, old)


@pytest.mark.parametrize("how", ["vmap", "scan"])
def test_what_comes_out_stacked_is_divided_along_the_axis_as_what_went_in(
    how: str,
) -> None:
    model = sortal.shard(
        sortal.vmap(lambda key: sortal.Linear(4, 4, rngs=sortal.Rngs(key)))(
            jax.random.split(jax.random.key(0), 8)
        ),
        AUTO,
        {sortal.At("kernel"): sortal.Rule(spec=P("a", "b"))},
    )
    made = mapped(how, lambda m: sortal.Optimizer(m, optax.adam(1.0), wrt=Param), model)
    moments = [
        v.value for path, v in sortal.state(made).flat_state() if path[-1] == "kernel"
    ]
    assert len(moments) == 2
    for x in moments:
        assert x.shape == (8, 4, 4)
        assert x.sharding.spec == P("a", "b")


def test_a_new_variable_with_a_spec_comes_out_with_an_entry_more() -> None:
    make = sortal.vmap(lambda x: (Param(x, spec=P("b")), Stat(x, tag="t")), out_axes=1)
    own, of_kind = make(jnp.ones((8, 4, 4)))
    assert spec_of(own) == P("b", None)
    assert spec_of(of_kind) == P("a", None, "b")
    over = sortal.vmap(lambda x: Param(x, spec=P("b")), spmd_axis_name="a")
    with jax.set_mesh(AUTO):
        assert spec_of(over(jnp.ones((8, 4)))) == P("a", "b")


def test_metadata_that_is_changed_inside_gets_its_entry_back() -> None:
    w = placed()

    def change(w: Any) -> None:
        w.set_metadata(spec=P("b"), note="new")

    sortal.vmap(change)(w)
    assert w.get_metadata("note") == "new"
    assert w.get_metadata("spec") == P("a", "b")
    assert w.get_metadata("placement") == NamedSharding(AUTO, P("a", "b", None))


# --------------------------------------------------------------------- names of axes
def names_inside(nnx: Any, how: str, axis: int, names: Any, more: Any) -> Any:
    more_names = {"notes": ("x", "new", "new"), "eager_sharding": False}
    w = nnx.Param(jnp.ones((2, 2, 2)), out_sharding=names, **more_names)
    seen = []

    def look(w: Any, c: Any) -> Any:
        seen.append((w.get_metadata().get("out_sharding"), w.get_metadata()["notes"]))
        w[...] = w[...] * 2
        return c

    if how == "vmap":
        nnx.vmap(look, in_axes=(axis, 0), transform_metadata=more)(w, jnp.ones(2))
    else:
        run = nnx.scan(
            look,
            in_axes=(axis, nnx.Carry),
            out_axes=nnx.Carry,
            transform_metadata=more,
        )
        run(w, jnp.ones(()))
    seen.append((w.get_metadata().get("out_sharding"), w.get_metadata()["notes"]))
    return set(seen)


@pytest.mark.parametrize("more", [{}, LAYERS, {**LAYERS, "notes": "new"}])
@pytest.mark.parametrize(
    ("axis", "names"),
    [(1, ("a", "layers", "b")), (2, ("a", "b", "layers")), (1, None)],
)
@pytest.mark.parametrize("how", ["vmap", "scan"])
def test_the_name_of_the_axis_is_taken_away_where_flax_does(
    how: str, axis: int, names: Any, more: Any
) -> None:
    mine = names_inside(sortal.nnx, how, axis, names, more)
    assert mine == names_inside(flax_nnx, how, axis, names, more)


def test_another_name_at_the_place_of_the_axis_is_refused() -> None:
    model = sortal.Module()
    for name in ("x", "y"):
        setattr(model, name, Param(jnp.ones((2, 2)), out_sharding=(name, "b")))
    with pytest.raises(ArgumentError) as e:
        sortal.vmap(lambda m: None, transform_metadata=LAYERS)(model)
    assert "x (Param): ('x', 'b') has 'x' at axis 0" in str(e.value)
    assert "y (Param): ('y', 'b') has 'y' at axis 0" in str(e.value)
    assert "'layers'" in str(e.value)
    short = Param(jnp.ones((2, 2)), out_sharding=("a",))
    sortal.vmap(lambda w: None, in_axes=1, transform_metadata=LAYERS)(short)


def test_names_of_a_whole_are_not_applied_to_its_parts() -> None:
    w = Param(jnp.ones((8, 4, 4)), out_sharding=("a", "b"), eager_sharding=False)
    double = sortal.jit(lambda w: w.set_value(w[...] * 2))
    with jax.set_mesh(AUTO):
        sortal.vmap(double)(w)
        assert w.value.sharding.spec == P("a", "b")
        with pytest.raises(ShardingError) as e:
            sortal.jit(sortal.vmap(sortal.constrain))(w)
        sortal.vmap(sortal.constrain, transform_metadata={PARTITION_NAME: "a"})(w)
    assert "speak of whole arrays" in str(e.value)
    assert "PARTITION_NAME" in str(e.value)
    np.testing.assert_array_equal(w.value, 2)


# -------------------------------------------------------------------------- States
def stacked(nnx: Any) -> Any:
    class Layers(nnx.Module):
        def __init__(self) -> None:
            names = {"eager_sharding": False}
            self.w = nnx.Param(
                jnp.ones((4, 2, 3)), out_sharding=("layers", "a", "b"), **names
            )
            self.n = nnx.BatchStat(jnp.ones((4, 3)))

    return Layers()


STATES = {
    "of the model": lambda nnx, d, m, s: nnx.state(m),
    "given": lambda nnx, d, m, s: jax.tree.map(lambda x: x + 1, s),
    "split": lambda nnx, d, m, s: nnx.split(m)[1],
    "merged": lambda nnx, d, m, s: nnx.state(nnx.merge(d, s)),
    "new model": lambda nnx, d, m, s: nnx.merge(d, s),
    "new": lambda nnx, d, m, s: nnx.state(
        [nnx.Param(m.w[...], out_sharding=("a", "b"), eager_sharding=False)]
    ),
    "gradient": lambda nnx, d, m, s: nnx.grad(lambda m: m.w[...].sum())(m),
}


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("how", ["vmap", "scan"])
@pytest.mark.parametrize("what", STATES)
def test_states_inside_and_after_a_map_have_the_names_that_flax_gives_them(
    what: str, how: str, axis: int
) -> None:
    def names(nnx: Any) -> Any:
        model, seen = stacked(nnx), []
        definition, state = nnx.split(model)

        def look(m: Any, s: Any) -> Any:
            seen.append(s["w"].get_metadata().get("out_sharding"))
            return STATES[what](nnx, definition, m, s)

        transform = {"vmap": nnx.vmap, "scan": nnx.scan}[how]
        options = {"in_axes": (0, 0), "transform_metadata": LAYERS}
        options["out_axes"] = axis if what == "new" else 0
        out = transform(look, **options)(model, state)
        pairs = jax.tree.leaves(out, is_leaf=lambda x: isinstance(x, nnx.Variable))
        kept = model.w.get_metadata().get("out_sharding")
        return kept, set(seen), [x.get_metadata().get("out_sharding") for x in pairs]

    assert names(sortal.nnx) == names(flax_nnx)


@pytest.mark.parametrize("how", ["vmap", "scan"])
@pytest.mark.parametrize("axis", [0, 1])
def test_states_that_come_out_of_a_map_are_those_of_the_whole(
    how: str, axis: int
) -> None:
    model = sortal.Module()
    model.w = Param(jnp.ones((4, 4, 3)), spec=P("a", "b"), tag="t")
    model.stats = [Stat(jnp.ones((4, 4))), jnp.ones((4, 4))]
    definition, whole = sortal.split(model)
    part = mapped(how, lambda s: s, whole, axis)
    assert part == whole
    assert mapped(how, sortal.state, model, axis) == whole
    assert mapped(how, lambda s: mapped(how, lambda s: s, s), whole, axis) == whole
    made = mapped(how, lambda s: sortal.state(sortal.merge(definition, s)), whole, axis)
    assert sortal.graphdef(sortal.merge(definition, made)) is definition
    by_key = sortal.State({"w": axis, "stats": axis})
    assert mapped(how, lambda s: s, whole, by_key) == whole
    given = mapped(how, sortal.grad(lambda m: m.w.sum()), model, axis)
    assert given.schema is sortal.state(model, Param).schema
    seen: list[Any] = []
    mapped(how, lambda s: seen.append((spec_of(s.w), spec_of(s.stats[0]))), whole, axis)
    assert set(seen) == {(P("b"), P("b")) if axis == 0 else (P("a"), P("a"))}


def test_a_state_that_is_carried_by_a_loop_inside_a_map_keeps_its_specs() -> None:
    model = sortal.Module()
    model.w = Param(jnp.ones((4, 3)), spec=P("a", "b"))
    model.of_kind = Stat(jnp.ones((4, 3)))
    whole = sortal.state(model)

    def loop(m: Any, s: Any) -> Any:
        axes = {"in_axes": (sortal.Carry, sortal.StateAxes({...: None}), 0)}
        carry, first = sortal.scan(lambda c, m, x: (c, c), **axes)(s, m, jnp.ones(2))
        last, _ = sortal.scan(lambda c, m, x: (sortal.state(m), x), **axes)(
            s, m, jnp.ones(2)
        )
        return carry, last, jax.tree.map(lambda x: x[0], first)

    carry, last, first = sortal.vmap(loop)(model, whole)
    assert carry == last == whole
    assert first.w.shape == (4, 3)
    said = sortal.State({"w": Stat(jnp.ones(3), spec=P("a", "b"))})
    assert sortal.scan(lambda c, x: (c, x))(said, jnp.ones(2))[0] == said


def test_answers_for_each_leaf_of_a_state_say_where_its_names_go() -> None:
    model = stacked(sortal)
    axes = sortal.State({"w": 1, "n": None})
    out = sortal.vmap(
        lambda s: s,
        in_axes=sortal.StateAxes({Param: 0, ...: None}),
        out_axes=axes,
        transform_metadata=LAYERS,
    )(sortal.state(model))
    assert out.w.get_metadata("out_sharding") == ("a", "layers", "b")
    assert out.w.value.shape == (2, 4, 3)
    assert out.n.value.shape == (4, 3)


def test_another_name_at_the_place_of_the_axis_of_a_state_is_refused() -> None:
    state = sortal.state(stacked(sortal))
    with pytest.raises(ArgumentError) as e:
        sortal.vmap(lambda s: None, transform_metadata={PARTITION_NAME: "z"})(state)
    assert "w (Param): ('layers', 'a', 'b') has 'layers' at axis 0" in str(e.value)
