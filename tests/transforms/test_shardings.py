"""jit with shardings by kind: placed as said, equal to jax.jit with a tree of them."""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal as nnx
from models import Holder, portrait, untouched
from sortal.errors import AxisError, PolicyError, ShardingError
from sortal.sharding import presets

N = jax.device_count()
MESH = jax.make_mesh((N,), ("d",), axis_types=(AxisType.Auto,))
WHOLE, ROWS = NamedSharding(MESH, P()), NamedSharding(MESH, P("d"))
COLUMNS = NamedSharding(MESH, P(None, "d"))
BY_KIND = nnx.StateSharding({nnx.At("**.kernel"): COLUMNS, ...: WHOLE})


class Net(nnx.Module):
    """A linear layer and a running mean."""

    def __init__(self):
        self.linear = nnx.Linear(3, 2 * N, rngs=nnx.Rngs(0))
        self.mean = nnx.BatchStat(jnp.zeros(2 * N))

    def __call__(self, x):
        y = self.linear(x)
        self.mean[...] = 0.9 * self.mean + 0.1 * y.mean(0)
        return y


def inputs():
    return jax.random.normal(jax.random.key(1), (2 * N, 3))


def by_hand(kernel, bias, mean, x):
    y = x @ kernel + bias
    return y, 0.9 * mean + 0.1 * y.mean(0)


def test_leaves_and_outputs_lie_where_the_tables_say_and_equal_plain_jax():
    model, x = Net(), inputs()
    kernel, bias = model.linear.kernel.value, model.linear.bias.value
    plain = jax.jit(
        by_hand, in_shardings=(COLUMNS, WHOLE, WHOLE, ROWS), out_shardings=(ROWS, WHOLE)
    )
    expected, mean = plain(kernel, bias, model.mean.value, x)
    call = nnx.jit(lambda m, x: m(x), in_shardings=(BY_KIND, ROWS), out_shardings=ROWS)
    found = call(model, x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(model.mean.value, mean)
    assert found.sharding == ROWS
    assert model.mean.value.sharding == WHOLE  # written: as it came in
    assert model.linear.kernel.value.sharding == COLUMNS  # only read: put there


def test_the_compiled_program_takes_each_leaf_with_its_sharding():
    call = nnx.jit(lambda m, x: m(x), in_shardings=(BY_KIND, ROWS))
    shardings = call.lower(Net(), inputs()).compile().input_shardings[0]
    flat = jax.tree.leaves(shardings)
    assert flat.count(COLUMNS) == 1
    assert flat.count(ROWS) == 1
    assert all(s in (COLUMNS, ROWS) or s.is_fully_replicated for s in flat)


def test_a_training_step_with_donation_equals_the_step_on_one_device():
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    kernel = nnx.Linear(3, 2 * N, rngs=nnx.Rngs(0)).kernel.value
    tx = optax.adam(1e-2)

    def plain(params, state, x):
        def loss_of(params):
            return ((x @ params[0] + params[1]) ** 2).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return loss, optax.apply_updates(params, updates), state

    params = (kernel, jnp.zeros(2 * N))
    state, losses = tx.init(params), []
    for _ in range(3):
        loss, params, state = plain(params, state, inputs())
        losses.append(float(loss))
    model = Net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    sharded = nnx.jit(step, in_shardings=(BY_KIND, BY_KIND, ROWS), donate=nnx.OptState)
    found = [float(sharded(model, optimizer, inputs())) for _ in range(3)]
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    np.testing.assert_allclose(model.linear.kernel.value, params[0], rtol=1e-5)
    assert model.linear.kernel.value.sharding.spec == P(None, "d")


def test_a_model_made_inside_comes_out_sharded_by_kind():
    model = nnx.jit(Net, out_shardings=BY_KIND)()
    assert model.linear.kernel.value.sharding == COLUMNS
    assert model.linear.bias.value.sharding == WHOLE
    # Compiled as one program, the last bit may be rounded differently.
    eager = Net().linear.kernel.value
    np.testing.assert_allclose(model.linear.kernel.value, eager, rtol=1e-6)


def test_filters_that_look_at_values_are_asked_again_for_other_values():
    table = nnx.StateSharding({nnx.Dtyped(jnp.float16): COLUMNS, ...: WHOLE})
    call = nnx.jit(lambda m: m.linear.kernel.sum(), in_shardings=(table,))
    model = Net()
    kernel = model.linear.kernel.value

    def columns():
        given = call.lower(model).compile().input_shardings[0]
        return jax.tree.leaves(given).count(COLUMNS)

    assert columns() == 0
    model.linear.kernel.value = kernel.astype(jnp.float16)
    assert columns() == 1


def test_what_a_call_adds_to_a_module_lies_where_its_kind_says():
    def add(model, x):
        model.seen = nnx.Intermediate(x)

    table = nnx.StateSharding({nnx.Intermediate: ROWS, ...: WHOLE})
    model = Net()
    nnx.jit(add, in_shardings=(table, WHOLE))(model, inputs())
    assert model.seen.value.sharding == ROWS
    np.testing.assert_array_equal(model.seen.value, inputs())


def test_a_policy_and_options_of_kinds_say_where_leaves_lie():
    policy = nnx.Policy(
        {nnx.At("**.kernel"): nnx.Rule(spec=P(None, "d")), ...: nnx.Rule(spec=P())}
    )
    model, x = Net(), inputs()
    with jax.set_mesh(MESH):
        call = nnx.jit(lambda m, x: m(x), in_shardings=(policy, P("d")))
        lowered = call.lower(model, x)
        call(model, x)
    flat = jax.tree.leaves(lowered.compile().input_shardings[0])
    assert [s.spec for s in flat].count(P(None, "d")) == 1
    assert model.mean.value.sharding.is_fully_replicated


def test_static_arguments_are_passed_over():
    call = nnx.jit(
        lambda m, k, x: m(x) * k, static_argnums=1, in_shardings=(BY_KIND, ROWS)
    )
    model = Net()
    np.testing.assert_array_equal(call(model, 2, inputs()), 2 * Net()(inputs()))


def test_another_structure_compiles_anew_and_an_equal_one_does_not():
    traces = []

    def forward(model, x):
        traces.append(1)
        return model(x)

    call = nnx.jit(forward, in_shardings=(BY_KIND, ROWS))
    model = Net()
    for _ in range(2):  # JAX traces again once the mean lies on the mesh
        call(model, inputs())
    before = len(traces)
    call(model, inputs())
    assert len(traces) == before
    model.extra = nnx.Param(jnp.ones(2))
    call(model, inputs())
    assert len(traces) == before + 1


def test_specs_that_follow_from_shapes_are_asked_again_for_other_shapes():
    largest = presets.LargestAxis("d", min_size=1)

    class Kind(nnx.Variable, spec=largest):
        """A kind whose spec depends on the shape."""

    tables = (
        nnx.Policy({...: nnx.Rule(spec=largest)}),
        nnx.StateSharding({...: largest}),
        nnx.StateSharding({}),
    )
    wanted = {(N, 2 * N): P(None, "d"), (2 * N, 1): P("d"), (3, 5): P()}
    for table in tables:
        double = nnx.jit(lambda m: m.set_value(m[...] * 2), in_shardings=table)
        read = nnx.jit(lambda m: m[...].sum(), in_shardings=table)
        for shape, spec in wanted.items():
            for f, times in ((double, 2.0), (read, 1.0)):
                m = Kind(np.ones(shape, "float32"))
                with jax.set_mesh(MESH):
                    f(m)
                np.testing.assert_array_equal(m.value, np.full(shape, times))
                if f is double:
                    assert m.value.sharding.is_equivalent_to(
                        NamedSharding(MESH, spec), 2
                    )


def test_a_state_is_divided_by_specs_that_follow_from_shapes():
    policy = nnx.Policy({...: nnx.Rule(spec=presets.LargestAxis("d", min_size=1))})
    double = nnx.jit(lambda s: jax.tree.map(lambda x: 2 * x, s), in_shardings=policy)
    for shape, spec in {(N, 2 * N): P(None, "d"), (2 * N, 1): P("d")}.items():
        state = nnx.state({"w": nnx.Param(np.ones(shape, "float32"))})
        with jax.set_mesh(MESH):
            found = double(state)["w"].value
        np.testing.assert_array_equal(found, np.full(shape, 2.0))
        assert found.sharding.is_equivalent_to(NamedSharding(MESH, spec), 2)
    rows = nnx.StateSharding({...: ROWS})
    with pytest.raises(ShardingError, match=r"w \(Param\) \[1\]: P\('d'\), but dim"):
        nnx.jit(lambda s: None, in_shardings=rows)(
            nnx.state({"w": nnx.Param(jnp.ones(1))})
        )


def test_fixed_specs_that_do_not_fit_later_shapes_are_refused_by_path():
    f = nnx.jit(lambda m: m["w"][...] * 2, in_shardings=ROWS)
    f({"w": nnx.Param(np.ones(2 * N))})
    with pytest.raises(ShardingError, match=f"but dimension 0, {N + 1}, cannot be"):
        f({"w": nnx.Param(np.ones(N + 1))})


def test_a_leaf_without_an_answer_is_named():
    some = nnx.StateSharding({nnx.Param: WHOLE})
    call = nnx.jit(lambda m, x: m(x), in_shardings=(some, ROWS))
    model = Net()
    before = model.mean.value
    with pytest.raises(PolicyError, match=r"mean \(BatchStat\)"):
        call(model, inputs())
    assert model.mean.value is before


def test_a_table_of_axes_is_refused_where_shardings_are_due():
    call = nnx.jit(lambda m, x: m(x), in_shardings=(nnx.StateAxes({...: 0}), ROWS))
    with pytest.raises(AxisError, match="Use StateSharding"):
        call(Net(), inputs())


def test_answers_by_kind_for_a_plain_array_are_refused():
    call = nnx.jit(lambda m, x: m(x), in_shardings=(BY_KIND, BY_KIND))
    with pytest.raises(AxisError, match=r"stands for .*float32\["):
        call(Net(), inputs())


@pytest.mark.parametrize("how", ["spec", "sharding"])
def test_one_sharding_for_an_object_made_inside_is_that_of_its_leaves(how):
    def make(x):
        return {"made": nnx.Param(x), "pair": [nnx.Linear(3, 3, rngs=nnx.Rngs(0)), x]}

    x = np.ones((2 * N, 3), np.float32)
    rows, whole = (P("d"), P()) if how == "spec" else (ROWS, WHOLE)
    given = {"made": rows, "pair": whole}
    with jax.set_mesh(MESH):
        plain = jax.jit(lambda x: (x, x + 1), out_shardings=(rows, whole))(x)
        found = nnx.jit(make, out_shardings=given)(x)
    assert found["made"].value.sharding == plain[0].sharding == ROWS
    linear, same = found["pair"]
    assert linear.kernel.value.sharding == same.sharding == plain[1].sharding
    with pytest.raises(ShardingError, match=r"bias \(Param\) \[3\]: P\(None, 'd'\)"):
        nnx.jit(make, out_shardings={"made": ROWS, "pair": [COLUMNS, None]})(x)


def test_what_is_added_to_a_model_that_is_returned_lies_where_out_shardings_says():
    def add(model, x):
        model.seen = nnx.Intermediate(x)
        return model

    table = nnx.StateSharding({nnx.At("seen"): ROWS, ...: WHOLE})
    model = nnx.jit(add, out_shardings=table)(Net(), inputs())
    assert model.seen.value.sharding == ROWS
    assert model.linear.kernel.value.sharding == WHOLE


def test_a_model_that_is_returned_lies_where_out_shardings_says_and_not_as_it_came():
    model = nnx.jit(lambda m: m, in_shardings=(WHOLE,), out_shardings=BY_KIND)(Net())
    assert model.linear.kernel.value.sharding == COLUMNS


def test_raw_arrays_that_a_call_takes_out_are_put_nowhere():
    def edit(model):
        del model.gone
        model.linear, model.other = model.other, model.linear

    model = Net()
    model.gone, model.other = jnp.ones(2 * N), (other := jnp.zeros(2 * N))
    nnx.jit(edit, in_shardings=(BY_KIND,))(model)
    assert not hasattr(model, "gone")
    assert model.other.kernel.value.sharding == COLUMNS
    np.testing.assert_array_equal(model.linear, other)


LARGEST = nnx.StateSharding({...: presets.LargestAxis("d", min_size=1)})


@pytest.mark.parametrize("given", [(None, BY_KIND), (BY_KIND, None), (LARGEST,) * 2])
def test_a_variable_that_arguments_share_has_the_sharding_of_any_of_them(given):
    model = Net()
    call = nnx.jit(lambda m, n: m(n.kernel.T), in_shardings=given)
    with jax.set_mesh(MESH):
        call(model, model.linear)
    assert model.linear.kernel.value.sharding == COLUMNS


def test_raw_arrays_in_tuples_are_read_where_they_are_and_returned_nowhere_else():
    model = Net()
    model.pair = pair = (jnp.ones(2 * N), jnp.zeros(2 * N))
    total = nnx.jit(lambda m: m.pair[0].sum(), in_shardings=(WHOLE,))
    assert float(total(model)) == 2 * N
    assert model.linear.kernel.value.sharding == WHOLE
    kernel = model.linear.kernel.value
    with pytest.raises(ShardingError, match=r"pair\.1 \(unlabelled array\)"):
        nnx.jit(lambda m: m, out_shardings=BY_KIND)(model)
    assert model.linear.kernel.value is kernel
    assert model.pair is pair


def test_what_is_only_read_stays_where_a_spec_puts_it_on_the_mesh_of_the_context():
    model = Net()
    table = nnx.StateSharding({nnx.At("**.kernel"): P(None, "d"), ...: P()})
    x = inputs()
    call = nnx.jit(lambda m, x: m(x), in_shardings=(table, P("d")))
    with jax.set_mesh(MESH):
        call(model, x)
        assert model.linear.kernel.value.sharding == COLUMNS
        kernel = model.linear.kernel.value
        call(model, x)
    assert model.linear.kernel.value is kernel


def test_a_model_that_an_outer_function_closes_over_is_read_and_not_moved():
    model, x = Net(), inputs()
    kernel = model.linear.kernel.value
    inner = nnx.jit(lambda m, x: m.linear(x), in_shardings=(BY_KIND, ROWS))
    found = nnx.jit(lambda x: inner(model, x))(x)
    expected = x @ kernel + model.linear.bias.value
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert model.linear.kernel.value is kernel


@pytest.mark.skipif(N == 1, reason="one device divides everything")
@pytest.mark.parametrize("rows", [ROWS, P("d")], ids=["sharding", "spec"])
def test_a_batch_that_the_mesh_cannot_divide_is_refused(rows):
    call = nnx.jit(lambda m, x: m(x), in_shardings=(BY_KIND, rows))
    with jax.set_mesh(MESH), pytest.raises(ShardingError) as found:
        call(Net(), jnp.ones((N + 1, 3)))
    assert str(found.value) == (
        "these arguments cannot be divided as in_shardings says:\n"
        f"  float32[{N + 1},3]: P('d'), but dimension 0, {N + 1}, cannot be divided by "
        f"{N}\nGive them another spec, or another shape, such as a batch that is "
        "padded to a multiple."
    )


@pytest.mark.skipif(N == 1, reason="one device has one place for everything")
def test_arrays_bound_elsewhere_than_in_shardings_are_all_named():
    model = nnx.shard(Net(), MESH)
    x = jax.device_put(inputs(), WHOLE)
    call = nnx.jit(lambda m, x: m(x), in_shardings=(BY_KIND, ROWS))
    with pytest.raises(ShardingError) as found:
        call(model, x)
    rows = str(found.value).split("\n")
    due = "NamedSharding(P()); in_shardings: NamedSharding"
    assert rows[1:-1] == [
        f"  linear.kernel (Param): {due}(P(None, 'd'))",
        f"  float32[{2 * N},3]: {due}(P('d'))",
    ]
    assert model.linear.kernel.value.sharding == WHOLE
    call = nnx.jit(lambda m, x: m + x.sum(), in_shardings=(P("d"), P()))
    mapped = nnx.vmap(lambda m, x: call(m, x), in_axes=(None, 0))
    with jax.set_mesh(MESH), pytest.raises(ValueError, match="passed to jit does not"):
        mapped(model.mean, x[None])


class Drawn:
    """A random call of two models: what it does, and where each leaf is to lie then."""

    kinds = (nnx.Param, nnx.BatchStat)

    def __init__(self, seed):
        self.random = random.Random(seed)  # noqa: S311 - to be drawn again
        self.number = 0
        self.models = [Holder(**{k: self.leaf() for k in "abc"}) for _ in range(2)]
        if self.random.random() < 0.5:
            self.models[1].d = self.models[0].a
        self.given = [self.answer() for _ in self.models]
        self.out, self.returned = self.answer(), self.random.random() < 0.5
        self.x = self.array()

    def array(self):
        self.number += 1
        return np.full((2 * N, 2 * N), self.number, np.float32)

    def leaf(self):
        raw = self.random.random() < 0.3
        x = jnp.asarray(self.array())
        return x if raw else self.random.choice(self.kinds)(x)

    def answer(self):
        one = self.random.choice
        if one((True, False)):
            return one((None, WHOLE, ROWS, COLUMNS))
        rows = {one((nnx.Param, nnx.At("a"), nnx.At("new"))): one((ROWS, COLUMNS))}
        return nnx.StateSharding({**rows, ...: one((None, WHOLE, ROWS))})

    def call(self, x, *models):
        """Writes, takes out or adds some leaves; returns a model, old or new."""
        draw = random.Random(self.number)  # noqa: S311 - as above
        for m in models:
            for name in "abc":
                leaf, how = getattr(m, name), draw.random()
                if how < 0.3 and isinstance(leaf, nnx.Variable):
                    leaf.set_value(leaf.value * 2 + x)
                elif how < 0.6 and not isinstance(leaf, nnx.Variable):
                    delattr(m, name) if how < 0.2 else setattr(m, name, leaf + x)
        if draw.random() < 0.5:
            models[0].new = nnx.Param(x * 3)
        return models[0] if self.returned else Holder(new=nnx.Param(x * 5))


def at(given, name, leaf):
    """What a sharding or a table says of a leaf."""
    if not isinstance(given, nnx.StateSharding):
        return given
    pairs = zip(given.tests, given.answers, strict=True)
    return next((answer for f, answer in pairs if f((name,), leaf)), None)


@pytest.mark.parametrize("seed", range(24))
def test_random_calls_put_each_leaf_where_it_is_said_to_lie(seed):
    drawn, eager = Drawn(seed), Drawn(seed)
    every = [vars(m).items() for m in drawn.models]
    before = [{k: x for k, x in d if isinstance(x, nnx.Variable)} for d in every]
    old = {id(x): x.value for held in before for x in held.values()}
    due, two = {}, False
    for given, held in zip(drawn.given, before, strict=True):
        for name, leaf in held.items():
            mine = at(given, name, leaf)
            two |= None not in (mine, due.get(id(leaf))) and mine != due[id(leaf)]
            due[id(leaf)] = due.get(id(leaf)) or mine
    options = {"in_shardings": (WHOLE, *drawn.given), "out_shardings": drawn.out}
    call = nnx.jit(drawn.call, **options)
    if two:
        with untouched(drawn.models), pytest.raises(AxisError, match="one sharding"):
            call(drawn.x, *drawn.models)
        return
    found = call(drawn.x, *drawn.models)
    eager.call(eager.x, *eager.models)
    assert portrait(drawn.models) == portrait(eager.models)
    for m, held, given in zip(drawn.models, before, drawn.given, strict=True):
        for name, leaf in vars(m).items():
            if not isinstance(leaf, nnx.Variable):
                continue
            by_table = given if isinstance(given, nnx.StateSharding) else None
            wanted = due.get(id(leaf)) if name in held else at(by_table, name, leaf)
            mine = next((k for k, x in vars(found).items() if x is leaf), None)
            wanted = (mine and at(drawn.out, mine, leaf)) or wanted
            assert wanted is None or leaf.value.sharding == wanted, name
            if wanted is None and np.array_equal(leaf.value, old.get(id(leaf), ())):
                assert leaf.value is old[id(leaf)]
    if not drawn.returned and (wanted := at(drawn.out, "new", found.new)):
        assert found.new.value.sharding == wanted
