"""Basics, key concepts, randomness, filters and surgery."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax


def basics(nnx: Any) -> Any:
    """Modules, state, nesting, surgery, transforms, scan over layers, functions."""

    class Linear(nnx.Module):
        def __init__(self, din: int, dout: int, *, rngs: Any):
            self.w = nnx.Param(rngs.params.uniform((din, dout)))
            self.b = nnx.Param(jnp.zeros((dout,)))
            self.din, self.dout = din, dout

        def __call__(self, x: Any) -> Any:
            return x @ self.w + self.b

    class Count(nnx.Variable):
        pass

    class Counter(nnx.Module):
        def __init__(self) -> None:
            self.count = Count(jnp.array(0))

        def __call__(self) -> None:
            self.count[...] += 1

    class MLP(nnx.Module):
        def __init__(self, din: int, dmid: int, dout: int, *, rngs: Any):
            self.linear1 = Linear(din, dmid, rngs=rngs)
            self.dropout = nnx.Dropout(rate=0.1, rngs=rngs)
            self.bn = nnx.BatchNorm(dmid, rngs=rngs)
            self.linear2 = Linear(dmid, dout, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.gelu(self.dropout(self.bn(self.linear1(x))))
            return self.linear2(x)

    class LoraLinear(nnx.Module):
        def __init__(self, linear: Any, rank: int, rngs: Any):
            self.linear = linear
            self.A = nnx.LoRAParam(rngs.params.normal((linear.din, rank)))
            self.B = nnx.LoRAParam(rngs.params.normal((rank, linear.dout)))

        def __call__(self, x: Any) -> Any:
            return self.linear(x) + x @ self.A @ self.B

    out: list[Any] = []
    linear = Linear(2, 5, rngs=nnx.Rngs(params=0))
    out.append(linear(jnp.ones((1, 2))))
    counter = Counter()
    counter()
    out.append(counter.count[...])
    mlp = MLP(5, 10, 2, rngs=nnx.Rngs(0))
    out.append(mlp(x=jnp.ones((3, 5))))

    rngs = nnx.Rngs(0)
    model = MLP(5, 32, 5, rngs=rngs)
    model.linear1 = LoraLinear(model.linear1, 2, rngs=rngs)
    model.linear2 = LoraLinear(model.linear2, 2, rngs=rngs)
    out.append(model(x=jnp.ones((3, 5))))

    model = MLP(2, 16, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        def loss_fn(model: Any) -> Any:
            return jnp.mean((model(x) - y) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    x = jnp.linspace(0, 1, 16).reshape(8, 2)
    out.append([train_step(model, optimizer, x, x[:, :1]) for _ in range(3)])

    @nnx.vmap(in_axes=0, out_axes=0)
    def create_model(key: Any) -> Any:
        return MLP(10, 32, 10, rngs=nnx.Rngs(key))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(model: Any, x: Any) -> Any:
        return model(x)

    stack = create_model(jax.random.split(jax.random.key(0), 5))
    out.append(forward(stack, jnp.ones((3, 10))))

    class Foo(nnx.Module):
        def __init__(self, rngs: Any):
            self.a = nnx.Param(rngs.params.uniform((1,)))
            self.b = Count(jnp.array(True))

    foo = Foo(nnx.Rngs(0))
    graphdef, state = nnx.split(foo)
    state = jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, state)
    nnx.update(foo, state)
    out.append((foo.a[...], foo.b[...]))
    graphdef, params, counts = nnx.split(foo, nnx.Param, Count)
    params = jax.tree.map(lambda x: x * 2, params)
    merged = nnx.merge(graphdef, params, counts)
    out.append((merged.a[...], merged.b[...]))
    return out


def key_concepts(nnx: Any) -> Any:
    """Modules are pytrees; states; jax.jit by split and merge; nnx.jit by reference."""

    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(2, 3, rngs=rngs)
            self.calls = nnx.Variable(jnp.array(0))
            self.name = "net"

        def __call__(self, x: Any) -> Any:
            self.calls[...] += 1
            return self.linear(x)

    out: list[Any] = []
    model = Net(nnx.Rngs(0))
    doubled = jax.tree.map(lambda x: x * 2, model)
    out.append((doubled.linear.kernel[...], doubled.name, doubled is model))

    graphdef, state = nnx.split(model)

    @jax.jit
    def pure(state: Any, x: Any) -> Any:
        model = nnx.merge(graphdef, state)
        y = model(x)
        return y, nnx.state(model)

    y, state = pure(state, jnp.ones((1, 2)))
    nnx.update(model, state)
    out.append((y, model.calls[...]))

    @nnx.jit
    def by_reference(model: Any, x: Any) -> Any:
        return model(x)

    out.append((by_reference(model, jnp.ones((1, 2))), model.calls[...]))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    out.append([(path, leaf[...].shape) for path, leaf in flat])
    params, rest = nnx.state(model, nnx.Param, ...)
    merged = nnx.merge_state(params, rest)
    out.append(sorted(map(str, nnx.to_pure_dict(merged))))
    out.append(nnx.to_pure_dict(nnx.filter_state(merged, nnx.Param)))
    with_batch = [model, {"x": jnp.ones(3)}]
    out.append(len(jax.tree.leaves(with_batch)))
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    out.append(abstract.linear.kernel.shape)
    return out


def randomness(nnx: Any) -> Any:
    """Streams, defaults, filters of random state, reseeding, splitting, forking."""
    out: list[Any] = []
    rngs = nnx.Rngs(params=0, random=jax.random.key(1))
    out.append((rngs.params.uniform((2,)), rngs.random.normal((2,))))
    out.append(jax.random.key_data(rngs["params"]()))
    rngs = nnx.Rngs(0, params=1)
    out.append([rngs.params.uniform(), rngs.dropout.uniform(), rngs.uniform()])
    out.append(int(rngs.default.count[...]))

    class Model(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(20, 10, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return nnx.relu(self.drop(self.linear(x)))

    model = Model(nnx.Rngs(params=0, dropout=1))
    x = jnp.ones((1, 20))
    y1, y2 = model(x), model(x)
    out.append((y1, y2))
    state = nnx.state(model, nnx.RngState)
    out.append([path for path, _ in nnx.to_flat_state(state)])
    counts = nnx.state(model, nnx.RngCount)
    out.append(jax.tree.leaves(counts))
    nnx.reseed(model, dropout=42)
    out.append(model(x))
    keys = nnx.state(model, "dropout")
    out.append(len(jax.tree.leaves(keys)))

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0, None), out_axes=0)
    def ensemble(rngs: Any, x: Any) -> Any:
        return Model(rngs)(x)

    out.append(ensemble(nnx.Rngs(0), x))
    rngs = nnx.Rngs(0)
    fork = rngs.split(2)
    out.append(jax.random.key_data(fork.default.key[...]))

    class Recurrent(nnx.Module):
        def __init__(self, rngs: Any):
            self.drop = nnx.Dropout(0.5, rngs=rngs, rng_collection="recurrent_dropout")
            self.cell = nnx.GRUCell(2, 2, rngs=rngs)

        def __call__(self, h: Any, x: Any) -> Any:
            return self.cell(self.drop(h), x)

    cell = Recurrent(nnx.Rngs(params=0, recurrent_dropout=1))
    axes = nnx.StateAxes({(nnx.Param, "recurrent_dropout"): None, ...: nnx.Carry})

    @nnx.scan(in_axes=(axes, nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def unroll(cell: Any, h: Any, x: Any) -> Any:
        h, y = cell(h, x)
        return h, y

    out.append(unroll(cell, jnp.ones((1, 2)), jnp.ones((4, 1, 2))))
    return out


def filters(nnx: Any) -> Any:
    """Types, predicates, combinations, tags, paths, and how they are read."""

    class Special(nnx.Param):
        pass

    class Foo(nnx.Module):
        def __init__(self) -> None:
            self.a = nnx.Param(jnp.array(0))
            self.b = nnx.BatchStat(jnp.array(True))
            self.c = Special(jnp.array(2.0))
            self.d = nnx.Dict(e=nnx.Param(jnp.ones(2), tag="marked"))

    def names(state: Any) -> Any:
        return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]

    foo = Foo()
    out: list[Any] = []
    _, params, stats = nnx.split(foo, nnx.Param, nnx.BatchStat)
    out.append((names(params), names(stats)))
    _, params, rest = nnx.split(foo, nnx.Param, ...)
    out.append((names(params), names(rest)))
    out.append(names(nnx.state(foo, lambda path, value: path[-1] == "b")))
    out.append(names(nnx.state(foo, nnx.OfType(Special))))
    out.append(names(nnx.state(foo, nnx.PathContains("d"))))
    out.append(names(nnx.state(foo, nnx.WithTag("marked"))))
    out.append(names(nnx.state(foo, "marked")))
    out.append(names(nnx.state(foo, nnx.All(nnx.Param, nnx.Not(Special)))))
    out.append(names(nnx.state(foo, nnx.Any(Special, nnx.BatchStat))))
    out.append(names(nnx.state(foo, [Special, nnx.BatchStat])))
    out.append(names(nnx.state(foo, nnx.Nothing())))
    out.append(names(nnx.state(foo, nnx.Everything())))
    out.append(names(nnx.state(foo, True)))
    predicate = nnx.filterlib.to_predicate(nnx.Param)
    out.append((predicate(("x",), nnx.Param(1)), predicate(("x",), nnx.Cache(1))))
    grads = nnx.grad(lambda m: m.c[...] * m.d["e"][...].sum(), allow_int=True)(foo)
    out.append(names(grads))
    return out


def surgery(nnx: Any) -> Any:
    """Weights put in, shapes first, parts replaced under jit, shared parameters."""

    class TwoLayers(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear1 = nnx.Linear(4, 4, rngs=rngs)
            self.linear2 = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.linear2(self.linear1(x))

    x = jnp.linspace(0, 1, 8).reshape(2, 4)
    out: list[Any] = []
    simple = TwoLayers(nnx.Rngs(0))
    state = nnx.state(simple)
    abstract = nnx.eval_shape(lambda: TwoLayers(nnx.Rngs(0)))
    out.append(str(type(abstract.linear1.kernel.get_value()).__name__))
    graphdef, abstract_state = nnx.split(abstract)
    restored = nnx.merge(graphdef, jax.tree.map(lambda a, b: b, abstract_state, state))
    out.append(restored(x))

    simple.linear1 = nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(1))
    out.append(simple(x))

    @partial(nnx.jit, donate_argnums=0)
    def partial_init(old_state: Any, rngs: Any) -> Any:
        model = TwoLayers(rngs)
        model.linear1 = nnx.LoRALinear(4, 4, lora_rank=2, rngs=rngs)
        nnx.update(model, old_state)
        return model

    old = nnx.state(TwoLayers(nnx.Rngs(3)))
    old = jax.tree.map(jnp.copy, old)
    made = partial_init(old, nnx.Rngs(4))
    out.append(made(x))

    first = TwoLayers(nnx.Rngs(5))
    first.linear2.kernel = first.linear1.kernel
    graphdef, state = nnx.split(first)
    out.append(len(jax.tree.leaves(state)))
    merged = nnx.merge(graphdef, state)
    merged.linear1.kernel[...] = jnp.eye(4)
    out.append(merged(x))
    pure = nnx.to_pure_dict(nnx.state(simple))
    nnx.replace_by_pure_dict(state_of := nnx.state(simple), pure)
    nnx.update(simple, state_of)
    out.append(simple(x))
    return out
