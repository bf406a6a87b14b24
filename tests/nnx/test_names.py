"""NNX code with one import changed: names, arguments, and programs to the bit."""

from __future__ import annotations

import inspect
import operator
import types
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from flax import nnx as flax_nnx

from sortal import nnx
from sortal._engine.annotations import HOOKS

# What open-source models call, most used first: by three or more of 27 repositories,
# and then by two.
NAMES = """
    Rngs Module Linear Param state split jit update initializers merge Embed
    Variable value_and_grad Conv List Dropout relu eval_shape Optimizer LayerNorm
    State gelu initializers.normal data silu Sequential MultiHeadAttention sigmoid
    initializers.zeros tanh with_partitioning Dict vmap initializers.lecun_normal
    scan avg_pool remat Carry grad to_flat_state initializers.ones GraphDef
    to_pure_dict RMSNorm BatchNorm GroupNorm initializers.zeros_init split_rngs
    display softmax Intermediate ModelAndOptimizer nn initializers.ones_init
    get_named_sharding iter_graph graph swish initializers.xavier_uniform pop Einsum
    metrics bridge MultiMetric leaky_relu ConvTranspose VariableState BatchStat
    metrics.Average graphdef LoRAParam Cache StateAxes get_partition_spec optimizer
    optimizer.OptState All bridge.ToNNX merge_state max_pool clone DiffState rnglib
    rnglib.Rngs nn.linear initializers.constant glu RngState RngKey statelib
    filterlib GraphState statelib.State variables replace_by_pure_dict traversals
    log_softmax from_flat_state Pytree traversals.flatten_mapping
    initializers.glorot_uniform cond nn.dtypes metrics.Accuracy graph.iter_graph
    State.from_flat_path elu cached_partial nn.initializers Initializer

    initializers.uniform PARTITION_NAME dot_product_attention nn.normalization
    filterlib.Not module LinearGeneral module.Module LoRA State.merge dataclass Not
    static split_state filter_state Metric traversals.unflatten_mapping
    filterlib.Filter capture nn.attention TrainState tracers make_attention_mask
    LSTMCell graph.NodeDef initializers.truncated_normal graph.GraphDef
    bridge.to_linen initializers.Initializer Any softplus Module.__init__ GRUCell
    register_variable_name log_sigmoid

    PathContains OfType Nothing RngCount RngStream iter_modules iter_children view
    with_metadata VariableMetadata variable_type_from_name variable_name_from_type
    variablelib.variable_type_from_name variablelib.Variable statelib.filter_state
    statelib.merge_state spmd.get_var_pspec get_abstract_model use_eager_sharding
    filterlib.OfType filterlib.PathContains tracers.TraceState optimizer.Optimizer
    tracers.current_jax_trace metrics.MetricState bridge.lazy_init as_abstract
    jit_partial using_eager_sharding fori_loop while_loop switch custom_vjp shard_map
    logical_axis_rules graph.split graph.merge graph.state graph.update graph.clone
    traversals.flatten_to_sequence filterlib.to_predicate rnglib.split_rngs
    nn.linear.Linear nn.linear.LinearGeneral nn.linear.Conv nn.linear.ConvTranspose
    nn.linear.Embed nn.linear.Einsum nn.linear.default_embed_init
    nn.linear.default_kernel_init nn.normalization.RMSNorm nn.activations.gelu
""".split()
# Layers that are being written. A name that is there is compared like any other.
# What Flax's signature has and ours has not, by name and argument, and why.
DIFFERENT = {
    ("State", "_copy"): "private",
    ("statelib.State", "_copy"): "private",
    ("merge_state", "cls"): "there is one class of States",
    ("statelib.merge_state", "cls"): "there is one class of States",
    ("from_flat_state", "cls"): "there is one class of States",
    ("as_abstract", "graph"): "by name",
    ("eval_shape", "f"): "by position, for f may have an argument of that name",
    ("filterlib.to_predicate", "filter"): "by position, as real code gives it",
    ("VariableMetadata", "metadata"): "by keyword, for there are no hooks before it",
    **{("VariableMetadata", hook): "hooks are refused" for hook in HOOKS},
    ("GraphState", "_graphdef"): "by position, for it is private",
    ("GraphState", "_state"): "likewise",
}
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_PLACE = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


def find(nnx: Any, name: str) -> Any:
    return operator.attrgetter(name)(nnx)


def parameters(thing: Any) -> list[inspect.Parameter]:
    """Those of a function, or of a class's constructor without self."""
    if not inspect.isclass(thing):
        return list(inspect.signature(thing).parameters.values())
    return list(inspect.signature(thing.__init__).parameters.values())[1:]


def refused(ours: Any, theirs: Any) -> set[str]:
    """What a call may give to theirs and not to ours, by name or by place."""
    mine, other = parameters(ours), parameters(theirs)
    named = {p.name for p in mine if p.kind in _BY_NAME}
    found = {p.name for p in other if p.kind in _BY_NAME} - named
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in mine):
        found.clear()
    mine_at = [p for p in mine if p.kind in _BY_PLACE]
    other_at = [p for p in other if p.kind in _BY_PLACE]
    if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in mine):
        found |= {p.name for p in other_at[len(mine_at) :]}
    for a, b in zip(mine_at, other_at, strict=False):
        by_name = b.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if by_name and (a.kind is not b.kind or a.name != b.name):
            found.add(b.name)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_real_code_uses_is_there_and_takes_flax_arguments(
    name: str,
) -> None:
    ours = find(nnx, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = find(flax_nnx, name)
    if isinstance(theirs, (types.FunctionType, type)) and name != "Carry":
        excused = {a for n, a in DIFFERENT if n == name}
        assert refused(ours, theirs) <= excused


def test_every_difference_is_one() -> None:
    for name, argument in DIFFERENT:
        assert argument in refused(find(nnx, name), find(flax_nnx, name))


def test_arguments_that_ours_would_refuse_are_seen() -> None:
    def theirs(a: Any, b: Any = 0, *, c: Any = 0) -> None: ...

    def less(a: Any) -> None: ...
    def other(a: Any, x: Any = 0, *, c: Any = 0) -> None: ...
    def hidden(a: Any, /, b: Any = 0, *, c: Any = 0) -> None: ...
    def more(a: Any, b: Any = 0, d: Any = 0, **options: Any) -> None: ...

    assert refused(less, theirs) == {"b", "c"}
    assert refused(other, theirs) == {"b"}
    assert refused(hidden, theirs) == {"a"}
    assert refused(more, theirs) == set()


# Programs: each is run with either library, and what it returns is compared. ----------


def models(nnx: Any) -> Any:
    """A small network with parameters, statistics and random streams, nested."""

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.gelu(self.norm(self.linear(x)))
            self.sow(nnx.Intermediate, "hidden", x)
            return self.dropout(x)

    class Model(nnx.Module):
        def __init__(self, rngs: Any):
            self.layers = nnx.List([Block(rngs) for _ in range(2)])
            self.head = nnx.Linear(3, 2, use_bias=False, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    return Model


X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def mesh(*names: str) -> Any:
    auto = (jax.sharding.AxisType.Auto,) * len(names)
    return jax.make_mesh((1,) * len(names), names, axis_types=auto)


def checkpoint_round_trip(nnx: Any) -> Any:
    """Abstract model, pure dicts, and a model filled from them."""
    make = models(nnx)
    donor = make(nnx.Rngs(7))
    saved = nnx.to_pure_dict(nnx.state(donor, nnx.Param))
    graphdef, params, rest = nnx.split(
        nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...
    )
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), params.to_pure_dict())
    params.replace_by_pure_dict(saved)
    fresh = nnx.state(make(nnx.Rngs(1)), nnx.Not(nnx.Param))
    model = nnx.merge(graphdef, params, fresh)
    del rest
    return shapes, jax.tree.leaves(nnx.to_pure_dict(nnx.state(model))), model(X)


def freeze_and_cast(nnx: Any) -> Any:
    """A fine-tuning step: frozen leaves in bfloat16, gradients by a filter, an EMA."""
    model = models(nnx)(nnx.Rngs(0))
    trainable = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("head")))
    state = nnx.state(model)
    frozen = state.filter(nnx.All(nnx.Param, nnx.PathContains("head")))
    cast = jax.tree.map(
        lambda v: v.replace(v.get_value().astype(jnp.bfloat16)),
        frozen,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    nnx.update(model, cast) if nnx is flax_nnx else nnx.update(
        model, cast, strict=False
    )
    model.train()

    def loss(model: Any, x: Any) -> Any:
        return (model(x) ** 2).mean()

    state_of = nnx.DiffState(0, trainable)
    value, grads = nnx.value_and_grad(loss, argnums=state_of)(model, X)
    params = nnx.state(model, trainable)
    tx = optax.adamw(1e-2)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    ema = jax.tree.map(lambda old, now: 0.9 * old + 0.1 * now, params, new)
    nnx.update(model, new)
    flat = [(path, v.get_value()) for path, v in nnx.to_flat_state(ema)]
    return value, flat, model.head.kernel.dtype


def variable_surgery(nnx: Any) -> Any:
    """Walks, kinds, metadata and copies of Variables."""
    model = models(nnx)(nnx.Rngs(0))
    seen = [
        (path, type(x).__name__)
        for path, x in nnx.graph.iter_graph(model)
        if isinstance(x, (nnx.Variable, nnx.VariableState))
    ]
    modules = [
        path for path, m in nnx.iter_modules(model) if not isinstance(m, nnx.List)
    ]
    kernel = model.head.kernel
    kernel.set_metadata("group", "head")
    copied = kernel.replace(kernel.get_value() * 2, group="copy")
    twin = nnx.Param(jnp.zeros((3, 2)))
    twin.copy_from(copied)
    kernel.set_raw_value(twin.get_raw_value() + 1)
    kernel.set_value(5.0, index=(0, 0))
    flat = nnx.traversals.flatten_mapping(nnx.state(model, nnx.Param))
    back = nnx.traversals.unflatten_mapping(flat)
    is_head = nnx.filterlib.to_predicate(nnx.PathContains("head"))
    return (
        seen,
        modules,
        kernel.type.__name__,
        (copied.get_metadata("group"), twin.get_metadata("group", None)),
        kernel.get_value(),
        kernel.get_value(index=(0, 0)),
        sorted(flat, key=str),
        back["layers"][1]["linear"]["bias"].get_value(),
        [is_head(path, v) for path, v in sorted(flat.items(), key=str)],
        [nnx.variable_name_from_type(k) for k in (nnx.Param, nnx.BatchStat)],
    )


def states_apart_and_together(nnx: Any) -> Any:
    """merge_state, split_state, from_flat_path, and dicts in update."""
    model = models(nnx)(nnx.Rngs(0))
    _, params, rest = nnx.split(model, nnx.Param, ...)
    both = nnx.merge_state(params, rest)
    a, b = nnx.split_state(both, nnx.BatchStat, ...)
    kernels = nnx.State.from_flat_path(
        {
            path: v.replace(v.get_value() + 1)
            for path, v in params.flat_state()
            if path[-1] == "kernel"
        }
    )
    nnx.update(model, kernels)
    nnx.update(model, {"head": {"kernel": nnx.Param(jnp.ones((3, 2)))}})
    nnx.update(model, nnx.from_flat_state(nnx.to_flat_state(a)))
    return (
        [len(jax.tree.leaves(s)) for s in (both, a, b)],
        [path for path, _ in nnx.to_flat_state(both)],
        jax.tree.leaves(nnx.state(model, nnx.Param)),
        len(nnx.filter_state(both, nnx.RngState).flat_state()),
    )


def named_axes(nnx: Any) -> Any:
    """Axis names through a stack of layers, to specs and shardings."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(3, 3, kernel_init=init, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(3), out_sharding=("embed",))

        def __call__(self, x: Any) -> Any:
            return self.linear(x) * self.scale[...]

    on = mesh("layers", "embed", "mlp")
    with jax.set_mesh(on):

        @nnx.split_rngs(splits=2)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
        def create(rngs: Any) -> Any:
            return Block(rngs)

        stack = create(nnx.Rngs(0))

        @nnx.scan(
            in_axes=(0, nnx.Carry),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: "layers"},
        )
        def forward(layer: Any, x: Any) -> Any:
            return layer(x)

        y = forward(stack, X)
        graphdef, abstract = nnx.get_abstract_model(lambda: Block(nnx.Rngs(0)), on)
        single = Block(nnx.Rngs(0))
    del graphdef
    specs = nnx.get_partition_spec(nnx.state(stack))
    shardings = nnx.get_named_sharding(nnx.state(stack), on)
    with nnx.logical_axis_rules((("layers", None), ("mlp", "embed"))):
        ruled = nnx.get_partition_spec(nnx.state(stack))["scale"].get_value()
    return (
        y,
        [tuple(v.get_value()) for _, v in nnx.to_flat_state(specs)],
        [tuple(v.get_value().spec) for _, v in nnx.to_flat_state(shardings)],
        [tuple(v.sharding.spec) for v in jax.tree.leaves(abstract)],
        tuple(ruled),
        stack.scale.get_metadata("out_sharding"),
        tuple(single.linear.kernel.get_value().sharding.spec),
        nnx.get_partition_spec({"x": jnp.ones(2), "n": 1}),
    )


def train_state(nnx: Any) -> Any:
    """A model apart, in a TrainState with a field of its own, under jax.jit."""

    class State(nnx.TrainState):
        average: Any

    graphdef, params = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    state = State.create(graphdef, params=params, tx=optax.adam(1e-2), average=params)

    @jax.jit
    def step(state: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            y, (_, same) = state.apply(params)(x)
            return (y**2).mean(), same

        grads, _ = jax.grad(loss, has_aux=True)(state.params)
        average = jax.tree.map(lambda a, b: (a + b) / 2, state.average, state.params)
        return state.apply_gradients(grads, average=average)

    for _ in range(2):
        state = step(state, X)
    at_average, _ = state.apply("average")(X)
    return state.step, jax.tree.leaves(state.params), at_average


def model_and_optimizer(nnx: Any) -> Any:
    """The old training loop, with metrics, under jit and cached_partial."""
    state = nnx.ModelAndOptimizer(models(nnx)(nnx.Rngs(0)), optax.adam(1e-2))
    metrics = nnx.MultiMetric(
        loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy()
    )

    @nnx.jit
    def step(state: Any, metrics: Any, x: Any, y: Any) -> Any:
        def loss(model: Any) -> Any:
            logits = model(x)
            found = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return found, logits

        (value, logits), grads = nnx.value_and_grad(loss, has_aux=True)(state.model)
        state.update(grads)
        metrics.update(loss=value, logits=logits, labels=y)
        nnx.pop(state.model, nnx.Intermediate)
        return value

    losses = [step(state, metrics, X, jnp.array([0, 1, 0, 1])) for _ in range(2)]
    moments = nnx.state(state, nnx.optimizer.OptState)
    return losses, metrics.compute(), jax.tree.leaves(moments)


def recorded(nnx: Any) -> Any:
    """sow and pop; capture; perturbations and their gradients."""
    model = models(nnx)(nnx.Rngs(0))
    model.eval()
    y, seen = nnx.capture(model, nnx.Intermediate)(X)
    left = [type(x).__name__ for _, x in nnx.iter_graph(model)].count("Intermediate")

    class Perturbed(nnx.Module):
        def __call__(self, x: Any) -> Any:
            return 3 * self.perturb("at", x).sum()

    inner = Perturbed()
    _, zeros = nnx.capture(inner, nnx.Perturbation)(X)
    return (
        y,
        [(path, v.get_value()) for path, v in nnx.to_flat_state(seen)],
        left,
        [(path, v.get_value()) for path, v in nnx.to_flat_state(zeros)],
    )


def views(nnx: Any) -> Any:
    """Modules in another mode around the same Variables, and clones."""
    model = models(nnx)(nnx.Rngs(0))
    frozen = nnx.view(model, deterministic=True, use_running_average=True)
    twin = nnx.clone(model)
    twin.head.kernel[...] = jnp.zeros((3, 2))
    return (
        frozen(X),
        frozen.layers[0].dropout.deterministic,
        model.layers[0].dropout.deterministic,
        model.head.kernel.get_value(),
    )


def cached(nnx: Any) -> Any:
    """cached_partial and jit_partial over a jitted step."""
    model = models(nnx)(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        nnx.pop(model, nnx.Intermediate)
        optimizer.update(model, grads)
        return loss

    once = nnx.cached_partial(nnx.jit(step), model, optimizer)
    return [once(X), once(X)], jax.tree.leaves(nnx.state(model))


def keywords_of_two_modes(nnx: Any) -> Any:
    """graph= and graph_updates=, which change nothing here."""
    model = models(nnx)(nnx.Rngs(0))
    on: dict[str, Any] = {"graph": True, "graph_updates": True}

    @nnx.jit(**on)
    def forward(model: Any, x: Any) -> Any:
        y = nnx.remat(lambda m, x: m(x), **on)(model, x)
        nnx.cond(y.sum() > 0, lambda m: None, lambda m: None, model, **on)
        nnx.pop(model, nnx.Intermediate)
        return y

    graphdef, params, rest = nnx.split(model, nnx.Param, ..., graph=True)
    shapes = nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)), **on)
    return (
        forward(model, X),
        len(nnx.state(model, graph=True).flat_state()),
        nnx.merge(graphdef, params, rest, copy=True).head.kernel.get_value(),
        shapes.kernel.get_value().shape,
        len(list(nnx.iter_graph(nnx.clone(model, graph=True), graph=True))) > 0,
    )


def pytrees(nnx: Any) -> Any:
    """Pytree dataclasses with data and static fields."""

    @nnx.dataclass
    class Point(nnx.Pytree):
        x: Any
        y: Any = nnx.data(default=2.0)
        name: str = nnx.static(default="p")

    doubled = jax.tree.map(lambda x: 2 * x, Point(jnp.array(1.0)))
    return doubled.x, doubled.y, doubled.name


def linen_inside(nnx: Any) -> Any:
    """A Linen network as a Module: initialised, trained on, its statistics kept."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool = True) -> Any:
            x = linen.Dense(4)(x)
            x = linen.BatchNorm(use_running_average=not train)(x)
            return linen.Dropout(0.5, deterministic=not train)(x)

        def twice(self, x: Any) -> Any:
            return self(self(x)[:, :3])

    class Whole(nnx.Module):
        def __init__(self, rngs: Any):
            self.net = nnx.bridge.ToNNX(Net(), rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.head(self.net(x, mutable=["batch_stats"]))

    model = Whole(nnx.Rngs(params=0, dropout=1))
    nnx.bridge.lazy_init(model, X)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, X) for _ in range(2)]
    kinds = [
        (path, type(v).__name__)
        for path, v in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    ]
    out = model.net(X, train=False)
    return losses, kinds, jax.tree.leaves(nnx.state(model, nnx.Param)), out


def inside_linen(nnx: Any) -> Any:
    """A Module as a Linen network."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = nnx.bridge.to_linen(nnx.Linear, 3, 4, name="first")(x)
            x = nnx.bridge.to_linen(nnx.BatchNorm, 4, name="norm")(x)
            return linen.Dense(2)(x)

    net = Net()
    y, variables = net.init_with_output(jax.random.key(0), X)
    z, changed = net.apply(variables, X, mutable=["batch_stats"])
    return y, z, jax.tree.leaves(variables), jax.tree.leaves(changed)


def kinds_by_name(nnx: Any) -> Any:
    """Collections and the kinds made for them."""

    @nnx.register_variable_name("tables", overwrite=True)
    class Table(nnx.Variable):
        pass

    made = nnx.variable_type_from_name("my_stats", allow_register=True)
    scale = nnx.with_metadata(nnx.initializers.ones_init(), unit="m")
    layer = nnx.Linear(2, 2, bias_init=scale, rngs=nnx.Rngs(0))
    return (
        nnx.variable_name_from_type(Table),
        made.__name__,
        issubclass(made, nnx.Variable),
        nnx.variablelib.variable_type_from_name("params") is nnx.Param,
        layer.bias.get_metadata("unit"),
    )


PROGRAMS: tuple[Callable[[Any], Any], ...] = (
    checkpoint_round_trip,
    freeze_and_cast,
    variable_surgery,
    states_apart_and_together,
    named_axes,
    train_state,
    model_and_optimizer,
    recorded,
    views,
    cached,
    keywords_of_two_modes,
    pytrees,
    linen_inside,
    inside_linen,
    kinds_by_name,
)


def same(a: Any, b: Any, where: str = "") -> None:
    """Asserts equality: of arrays to the bit, of containers part by part."""
    if isinstance(a, (tuple, list)):
        assert len(a) == len(b), f"{where}: {len(a)} and {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, dict):
        assert set(a) == set(b), where
        for key in a:
            same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, jax.Array):
        assert a.dtype == b.dtype, where
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=where)
    else:
        assert a == b, f"{where}: {a} and {b}"


# Flax warns of names of its own that real code still uses.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_program_gives_what_it_gives_with_flax_to_the_bit(program: Any) -> None:
    same(program(nnx), program(flax_nnx))


def test_the_comparison_sees_one_bit_and_one_entry() -> None:
    with pytest.raises(AssertionError):
        same([jnp.array(1.0)], [jnp.array(1.0) + 2**-23])
    with pytest.raises(AssertionError):
        same({"a": (1, 2)}, {"a": (1,)})
    with pytest.raises(AssertionError):
        same(jnp.ones(2), jnp.ones(2, jnp.bfloat16))


def test_the_protocol_of_recurrent_layers_is_where_flax_has_it() -> None:
    from flax.nnx.nn import recurrent as theirs

    from sortal.nn import recurrent

    assert refused(recurrent.RNNBase.__call__, theirs.RNNBase.__call__) == set()
