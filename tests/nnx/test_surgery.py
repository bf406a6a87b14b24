"""Names for taking models apart and putting them together, as with Flax."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from tests.nnx.test_names import same

from sortal import nnx
from sortal.errors import (
    ArgumentError,
    FilterError,
    MergeError,
    RngError,
    StructureError,
    UnsupportedError,
)

X = jnp.arange(4.0).reshape(2, 2)


def block(nnx: Any) -> Any:
    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(2, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.drop(self.norm(self.linear(x)))

    return Block(nnx.Rngs(0))


def mapped(nnx: Any) -> Any:
    """nnx.map over paths and Variables."""
    model = block(nnx)
    seen = []

    def halve(path: Any, v: Any) -> Any:
        seen.append(path)
        return v.replace(v / 2) if path[-1] == "kernel" else v

    new = nnx.map(halve, model)
    return (
        sorted(map(str, seen)),
        new.linear.kernel[...],
        model.linear.kernel[...],
        new.linear.kernel is model.linear.kernel,
        nnx.map(lambda path, v: v.replace(v + 1), nnx.Param(jnp.array(1.0)))[...],
    )


def visited(nnx: Any) -> Any:
    """recursive_map in order, and what it puts in the place of modules."""
    model = block(nnx)
    order = []

    def swap(path: Any, x: Any) -> Any:
        if isinstance(x, nnx.Module):
            order.append((path, type(x).__name__))
        return x.kernel if isinstance(x, nnx.Linear) else x

    new = nnx.recursive_map(swap, {"a": [model]}, graph=True)
    return (
        order,
        new["a"][0].linear is model.linear.kernel,
        new["a"][0].norm is model.norm,
        new["a"][0].norm.mean is model.norm.mean,
        type(model.linear).__name__,
    )


def doubles(nnx: Any) -> Any:
    """find_duplicates of Variables and of modules, and with a filter."""

    class Shared(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Param(jnp.array(1.0))
            self.b = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
            self.c = self.a
            self.d = self.b
            self.e = self.b.kernel

    model = Shared()
    return (
        sorted(nnx.find_duplicates(model)),
        nnx.find_duplicates(model, only=nnx.Module),
        nnx.find_duplicates(model.b),
    )


def packed(nnx: Any) -> Any:
    """unpack, mapped by JAX and merged again."""
    model = block(nnx)
    params, rest = nnx.unpack(model, nnx.Param, ...)
    params = jax.tree.map(lambda x: 2 * x, params)
    new = nnx.merge(params, rest)
    whole = nnx.unpack(model)
    return (
        new.linear.kernel[...],
        whole["linear"]["kernel"][...],
        "linear" in whole,
        sorted(whole),
        isinstance(params, nnx.GraphState),
        jax.jit(lambda s: nnx.merge(s).linear(X))(whole),
    )


def flattened(nnx: Any) -> Any:
    """flatten and unflatten share Variables or copy them."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    graphdef, leaves = nnx.flatten(model)
    again = nnx.unflatten(graphdef, leaves)
    copy = nnx.unflatten(graphdef, leaves, copy_variables=True)
    _, values = nnx.flatten(model, with_paths=False)
    return (
        [path for path, _ in leaves],
        again.kernel is model.kernel,
        copy.kernel is model.kernel,
        copy.kernel[...],
        len(values),
        nnx.unflatten(graphdef, values).bias[...],
    )


def called(nnx: Any) -> Any:
    """call and GraphDef.apply, with attributes and items."""

    class Counter(nnx.Module):
        def __init__(self) -> None:
            self.n = nnx.Variable(jnp.array(0))

        def step(self, k: Any) -> Any:
            self.n[...] += k
            return self.n[...] * 2

        def __call__(self) -> Any:
            return self.step(1)

    pair = nnx.split({"a": Counter(), "b": Counter()})

    @jax.jit
    def run(pair: Any) -> Any:
        return nnx.call(pair)["b"].step(3)

    first, pair = run(pair)
    second, pair = run(pair)
    both = nnx.merge(*pair)
    graphdef, state = nnx.split(Counter())
    out, (graphdef, state) = graphdef.apply(state)()
    return first, second, both["a"].n[...], both["b"].n[...], out, state["n"][...]


def bare(nnx: Any) -> Any:
    """as_pure of States and of Variables that hold trees."""
    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    pure = nnx.as_pure(state)
    held = nnx.as_pure({"x": nnx.Variable({"y": jnp.ones(2)})})
    return pure["kernel"], isinstance(pure, nnx.State), held, jax.tree.leaves(pure)


def marked(nnx: Any) -> Any:
    """set_metadata of what a filter takes."""
    model = block(nnx)
    nnx.set_metadata(model, frozen=True, only=nnx.Param)
    nnx.set_metadata(model, group=1)
    return (
        model.linear.kernel.get_metadata("frozen"),
        model.norm.mean.get_metadata("frozen", None),
        model.norm.mean.get_metadata("group"),
    )


def children(nnx: Any) -> Any:
    """iter_module_children lists modules alone, iter_children Variables too."""
    modules = nnx.iter_module_children(block(nnx))
    linear = nnx.iter_children(block(nnx).linear)
    return [(k, type(m).__name__) for k, m in (*modules, *linear)]


def annotated(nnx: Any) -> Any:
    """Data and Static as annotations, is_data, has_data, register_data_type."""

    @nnx.register_data_type
    @dataclasses.dataclass(frozen=True)
    class Mine:
        value: int

    class Holder(nnx.Pytree):
        count: nnx.Data[int]
        name: nnx.Static[str]
        written: "nnx.Data[int]"  # noqa: UP037

        def __init__(self) -> None:
            self.count, self.name, self.written, self.mine = 1, "x", 2, Mine(3)

    @nnx.dataclass
    class Fields(nnx.Pytree):
        a: nnx.Data[int]
        b: int = 4

    return (
        [str(x).split(".")[-1] for x in jax.tree.leaves(Holder())],
        jax.tree.leaves(Fields(1)),
        [
            nnx.is_data(x)
            for x in (
                jnp.array(0),
                nnx.Param(1),
                nnx.Rngs(2),
                block(nnx),
                nnx.List([]),
                Mine(1),
                "hello",
                42,
                [1, jnp.array(1)],
            )
        ],
        [type(x).__name__ for x in nnx.has_data([nnx.Param(1), 2, {"a": nnx.Rngs(0)}])],
        nnx.check_pytree(block(nnx)),
    )


def objects(nnx: Any) -> Any:
    """Object is a Pytree to nnx and a leaf to JAX."""

    class Counter(nnx.Object):
        def __init__(self) -> None:
            self.n = nnx.Variable(jnp.array(1))

    counter = Counter()

    @nnx.jit(graph=True, graph_updates=True)
    def step(counter: Any) -> None:
        counter.n[...] += 1

    step(counter)
    leaves = jax.tree.leaves(counter)
    return counter.n[...], leaves[0] is counter, isinstance(counter, nnx.Pytree)


def settings(text: str) -> list[str]:
    """The names of classes and settings; what is said of each is the library's own."""
    lines = [x.split(":")[0] for x in text.splitlines() if x[:4] != "    "]
    return [line.strip() for line in lines]


def viewed(nnx: Any) -> Any:
    """view by set_view, with_attributes by attributes, and view_info."""

    class Own(nnx.Module):
        def __init__(self) -> None:
            self.mode, self.deterministic = "a", False
            self.drop = nnx.Dropout(0.5)

        def set_view(self, mode: str | None = None) -> None:
            """Used by nnx.view.

            Args:
              mode: what to do,
                and how.
            """
            if mode is not None:
                self.mode = mode

    class Undocumented(nnx.Module):
        def set_view(self, a: int = 1, **kwargs: Any) -> None:
            pass

    model = Own()
    new = nnx.view(model, mode="b", deterministic=True)
    other = nnx.with_attributes(model, only=nnx.Dropout, deterministic=True)
    return (
        (model.mode, new.mode, new.deterministic, new.drop.deterministic),
        (other.deterministic, other.drop.deterministic, model.drop.deterministic),
        settings(nnx.view_info(block(nnx))),
        settings(nnx.view_info(model, only=nnx.Dropout)),
        nnx.view_info(Own()).replace("'", "").split("Own:")[1],
        nnx.view_info(Undocumented()).replace("'", ""),
        settings(nnx.view_info(nnx.MultiHeadAttention(2, 4, 4, rngs=nnx.Rngs(0)))),
    )


def streams(nnx: Any) -> Any:
    """with_rngs: split, broadcast and fork, by filter and as a decorator."""
    rngs = nnx.Rngs(params=0, dropout=1, noise=2)
    new = nnx.with_rngs(
        rngs, split={"params": 4}, broadcast={"noise": 2}, fork="dropout", graph=False
    )
    before = rngs.params.count[...]

    @nnx.with_rngs(split={"params": 3, ...: (2, 2)}, graph=False)
    def shapes(rngs: Any, x: Any) -> Any:
        return rngs.params.key.shape, rngs.noise.key.shape, x

    return (
        [new[n].key[...] for n in ("params", "dropout", "noise")],
        [new[n].count[...] for n in ("params", "dropout", "noise")],
        before,
        shapes(rngs, 5),
        nnx.with_rngs(rngs, split=2, only="noise", graph=False).params.key.shape,
    )


def switches(nnx: Any) -> Any:
    """set_graph_mode and the like, as calls, blocks and decorators."""
    with nnx.set_graph_mode(True), nnx.set_graph_updates(False):
        inside = (
            nnx.set_graph_mode.current_value(),
            nnx.set_graph_updates.current_value(),
        )

    @nnx.set_graph_mode(False)
    def current() -> Any:
        return nnx.set_graph_mode.current_value()

    with nnx.var_defaults(hijax=False):
        defaults = dict(nnx.var_defaults())
    model = nnx.with_vars(block(nnx), hijax=False)
    return inside, current(), defaults, model.linear.kernel[...]


def checked(nnx: Any) -> Any:
    """checkify returns the error, and the module is written."""
    from jax.experimental import checkify

    class Root(nnx.Module):
        def __init__(self, a: float) -> None:
            self.a = nnx.Param(jnp.array(a))
            self.calls = nnx.Variable(jnp.array(0))

    @nnx.jit(graph=True, graph_updates=True)
    def root(m: Any) -> Any:
        m.calls[...] += 1
        return jnp.sqrt(m.a[...])

    good, bad = Root(4.0), Root(-1.0)
    check = nnx.checkify(
        root, errors=checkify.float_checks, graph=True, graph_updates=True
    )
    none, two = check(good)
    error, _ = check(bad)
    return (
        none.get(),
        two,
        "nan generated" in error.get(),
        good.calls[...],
        bad.calls[...],
    )


def prefixed(nnx: Any) -> Any:
    """prefix by a mapping and by a function, as axes of vmap."""
    d = {"a": nnx.Param(jnp.array(2)), "b": nnx.BatchStat(jnp.arange(5))}
    by_kind = nnx.prefix(d, {nnx.Param: None, nnx.BatchStat: 0}, graph=False)
    by_path = nnx.prefix(d, lambda path, x: 0 if "b" in path else None, graph=False)

    def product(d: Any) -> Any:
        return d["a"] * d["b"]

    return (
        by_kind,
        by_path,
        nnx.vmap(product, in_axes=(by_kind,), graph=False)(d),
    )


def treed(nnx: Any) -> Any:
    """to_tree and from_tree around a JAX transform."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tree = nnx.to_tree({"model": model, "n": 1})
    doubled = jax.tree.map(lambda x: 2 * x, tree)
    back = nnx.from_tree(doubled)
    return (
        back["model"].kernel[...],
        back["n"],
        isinstance(tree["model"], nnx.NodeStates),
    )


def generic_state(nnx: Any) -> Any:
    """TrainState[...] as a base."""
    import optax

    class State(nnx.TrainState[nnx.Linear]):
        extra: Any

    graphdef, params = nnx.split(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    state = State.create(graphdef, params=params, tx=optax.sgd(0.1), extra=1)
    y, _ = state.apply("params")(X)
    return y, state.extra, state.step


def named(nnx: Any) -> Any:
    """transform_metadata below vmap; add_axis and remove_axis."""
    init = nnx.with_partitioning(nnx.initializers.ones_init(), ("in", "out"))
    inside = []
    with jax.set_mesh(jax.make_mesh((1, 1, 1), ("layers", "in", "out"))):

        @nnx.vmap(graph=False)
        @nnx.transform_metadata(partition="layers", graph=False)
        def create(key: Any) -> Any:
            return nnx.Linear(2, 2, kernel_init=init, rngs=nnx.Rngs(key))

        stack = create(jax.random.split(jax.random.key(0), 3))

        @nnx.vmap(graph=False)
        @nnx.transform_metadata(partition="layers", graph=False)
        def read(m: Any) -> Any:
            inside.append(m.kernel.get_metadata("out_sharding"))
            return m.bias[...]

        read(stack)
    return (
        stack.kernel.get_metadata("out_sharding"),
        inside[0],
        stack.kernel.shape,
    )


def answers(nnx: Any) -> Any:
    """StateAxes.map_prefix."""
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    return (
        axes.map_prefix(("a",), nnx.Param(1)),
        axes.map_prefix(("a",), nnx.BatchStat(1)),
    )


def compatible(nnx: Any) -> Any:
    """nnx.compat has the functions of graph mode."""
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    before = jax.tree.leaves(nnx.compat.split(model)[1])
    same = [model, model]

    @nnx.compat.jit
    def step(models: Any) -> Any:
        models[0].bias[...] += 1
        models[1].added = nnx.Param(jnp.array(2.0))
        return models[0](X)

    y = step(same)
    loss, grads = nnx.compat.value_and_grad(lambda m: m(X).sum())(model)
    return y, model.added[...], loss, jax.tree.leaves(grads), before


PROGRAMS = (
    mapped,
    visited,
    doubles,
    packed,
    flattened,
    called,
    bare,
    marked,
    children,
    annotated,
    objects,
    viewed,
    streams,
    switches,
    checked,
    prefixed,
    treed,
    generic_state,
    named,
    answers,
    compatible,
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_name_gives_what_it_gives_with_flax(program: Any) -> None:
    same(program(nnx), program(flax_nnx))


def test_view_names_the_settings_that_nothing_takes() -> None:
    with pytest.raises(ArgumentError, match=r"\['rate'\]. None of 1 modules"):
        nnx.view(block(nnx), only=nnx.Dropout, rate=1.0)
    assert nnx.view(block(nnx), rate=1.0, raise_if_not_found=False).drop.rate == 0.5
    with pytest.raises(ArgumentError, match=r"\['ratio'\], in 4 modules"):
        nnx.with_attributes(block(nnx), ratio=1.0)


def test_a_circle_is_refused_by_recursive_map() -> None:
    model = block(nnx)
    model.linear.parent = model
    with pytest.raises(
        StructureError, match=r"linear\.parent is the Block that holds it"
    ):
        nnx.recursive_map(lambda path, x: x, model)


def test_tuples_and_shared_objects_are_rebuilt_once() -> None:
    layer = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    calls = []

    def swap(path: Any, x: Any) -> Any:
        calls.append(path)
        return nnx.Dropout(0.1) if isinstance(x, nnx.Linear) else x

    new = nnx.recursive_map(swap, ([layer], (layer, 1)))
    assert type(new) is tuple
    assert isinstance(new[0][0], nnx.Dropout)
    assert new[0][0] is new[1][0]
    assert calls.count((0, 0)) + calls.count((1, 0)) == 1


def test_states_of_two_models_are_not_merged() -> None:
    a = nnx.unpack(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    b = nnx.unpack(nnx.Linear(1, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(
        MergeError, match="GraphState, GraphState of different structur"
    ):
        nnx.merge(a, b)
    with pytest.raises(MergeError, match="found GraphState, State"):
        nnx.merge(a, nnx.state(nnx.Linear(1, 1, rngs=nnx.Rngs(0))))
    with pytest.raises(
        ArgumentError, match="takes a GraphDef and a State; found a dict"
    ):
        nnx.GraphState(a._graphdef, {})


def test_a_stream_that_two_rules_take_is_refused() -> None:
    with pytest.raises(
        RngError, match="the stream params is taken by split and by fork"
    ):
        nnx.with_rngs(nnx.Rngs(params=0), split={"params": 2}, fork="params")


def test_a_leaf_that_no_filter_takes_has_no_prefix() -> None:
    with pytest.raises(FilterError, match=r"takes these leaves:\n  b \(BatchStat\)"):
        nnx.prefix({"b": nnx.BatchStat(1)}, {nnx.Param: 0})


def test_a_prefix_of_a_model_serves_vmap() -> None:
    model = nnx.vmap(lambda key: nnx.Linear(2, 2, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )
    model.bias[...] = model.bias + 1
    model.scale = nnx.Param(jnp.array(2.0))
    axes = nnx.prefix(model, lambda path, x: None if path == ("scale",) else 0)
    out = nnx.vmap(lambda m, x: m(x) * m.scale, in_axes=(axes, None))(model, X)
    expected = jnp.einsum("bi,nio->nbo", X, model.kernel[...]) + model.bias[:, None]
    assert jnp.allclose(out, 2 * expected)


def test_models_that_share_variables_are_no_two_trees() -> None:
    shared = nnx.Param(1)
    with pytest.raises(StructureError, match=r"Write nnx.split\(\(first, second\)\)"):
        nnx.to_tree([shared, shared])


REFUSED = {
    "pmap": lambda: nnx.pmap(abs),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_cannot_work_says_what_to_write(name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{name} is not offered\. .*nnx\.jit"):
        REFUSED[name]()


def test_other_stores_of_values_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="not in a hijax type"):
        nnx.var_defaults(hijax=True)
    with pytest.raises(UnsupportedError, match=r"not in a jax\.Ref"):
        nnx.with_vars(block(nnx), ref=True)
    with pytest.raises(UnsupportedError, match="Variables can always be written"):
        nnx.with_vars(block(nnx), mutable=False)


def test_a_linen_class_of_a_module_class_gives_what_it_gives_with_flax() -> None:
    def program(nnx: Any) -> Any:
        home = getattr(nnx.bridge, "wrappers", nnx.bridge)  # Flax does not export it

        class Dense(home.to_linen_class(nnx.Linear, use_bias=False)):
            pass

        dense = Dense(in_features=2, out_features=3)
        y, variables = dense.init_with_output(jax.random.key(0), X)
        whole = nnx.bridge.ToLinen(nnx.Linear, args=(2, 3))
        z, others = whole.init_with_output(jax.random.key(0), X)
        return y, variables, z, sorted(others["params"]), dense.apply(variables, X)

    same(program(nnx), program(flax_nnx))


def test_a_deep_model_is_walked_without_recursion() -> None:
    deep: Any = nnx.Dict(w=nnx.Param(1))
    for _ in range(2000):
        deep = nnx.Dict(below=deep)
    paths = [len(path) for path, _ in nnx.iter_graph(deep)]
    assert (paths[0], paths[-1], len(paths)) == (2001, 0, 2002)
    assert nnx.find_duplicates(nnx.Dict(a=deep, b=deep)) == [[("a",), ("b",)]]


def test_a_map_that_keeps_variables_puts_what_the_function_returns() -> None:
    def program(nnx: Any) -> Any:
        model, zero = block(nnx), nnx.Param(jnp.zeros(2))
        new = nnx.map(
            lambda p, x: zero if p[-1] == "bias" else x,
            nnx.Dict(a=model, b=model.linear),
            recreate_variables=False,
        )
        return new.a.linear.kernel is model.linear.kernel, new.b is new.a.linear

    same(program(nnx), program(flax_nnx))
