"""Transforms, performance, intermediates and the optimization cookbook."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def transforms(nnx: Any) -> Any:
    """The transforms, what they carry, and an axis for each kind."""

    class Weights(nnx.Module):
        def __init__(self, kernel: Any, bias: Any, count: Any):
            self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)
            self.count = nnx.Variable(count)

    out: list[Any] = []
    weights = Weights(
        kernel=jax.random.uniform(jax.random.key(0), (10, 2, 3)),
        bias=jnp.zeros((10, 3)),
        count=jnp.arange(10),
    )
    x = jax.random.normal(jax.random.key(1), (10, 2))

    def vector_dot(weights: Any, x: Any) -> Any:
        weights.count[...] += 1
        return x @ weights.kernel + weights.bias

    y = nnx.vmap(vector_dot, in_axes=0, out_axes=0)(weights, x)
    out.append((y, weights.count[...]))

    axes = nnx.StateAxes({nnx.Param: 0, nnx.Variable: None})
    shared = Weights(weights.kernel[...], weights.bias[...], jnp.array(0))
    y = nnx.vmap(vector_dot, in_axes=(axes, 0), out_axes=0)(shared, x)
    out.append((y, shared.count[...]))

    def init_vmap(count: Any) -> Any:
        return Weights(jnp.ones((2, 3)), jnp.zeros((3,)), count)

    made = nnx.vmap(init_vmap, in_axes=0, out_axes=0)(jnp.arange(5))
    out.append((made.kernel.shape, made.count[...]))

    @nnx.jit
    def stepped(weights: Any, x: Any) -> Any:
        def loss(weights: Any) -> Any:
            y = nnx.vmap(vector_dot)(weights, x)
            return (y**2).mean(), y.sum()

        (loss, total), grads = nnx.value_and_grad(loss, has_aux=True)(weights)
        params = nnx.state(weights, nnx.Param)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        nnx.update(weights, params)
        return loss, total

    out.append([stepped(weights, x) for _ in range(2)])
    out.append((weights.count[...], weights.bias[...]))

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(3, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return nnx.relu(self.norm(self.linear(x)))

    @nnx.split_rngs(splits=4)
    @nnx.vmap
    def create(rngs: Any) -> Any:
        return Block(rngs)

    blocks = create(nnx.Rngs(0))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(block: Any, x: Any) -> Any:
        return nnx.remat(lambda b, x: b(x))(block, x)

    out.append((forward(blocks, X), blocks.norm.mean[...]))
    counter = nnx.Variable(jnp.array(0))

    def body(pair: Any) -> Any:
        counter, x = pair
        counter[...] += 1
        return counter, x * 2

    _, last = nnx.while_loop(lambda p: p[0][...] < 3, body, (counter, 1.0))
    out.append((counter[...], last))

    def add(v: Any, by: Any) -> Any:
        v[...] += by
        return v[...] * 1

    chosen = nnx.cond(jnp.array(False), add, lambda v, by: v[...] * 10, counter, 5)
    out.append((chosen, counter[...]))
    out.append(nnx.switch(1, [lambda v: v[...], lambda v: v[...] * 7], counter))
    _, total = nnx.fori_loop(
        0, 3, lambda i, p: (p[0], p[1] + i * p[0][...]), (counter, jnp.array(0))
    )
    out.append(total)
    return out


def performance(nnx: Any) -> Any:
    """A step by nnx.jit, cached_partial, jit_partial, and jax.jit with states."""

    def fresh() -> Any:
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def step(model: Any, optimizer: Any, x: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    out: list[Any] = []
    model, optimizer = fresh()
    jitted = nnx.jit(step)
    out.append([jitted(model, optimizer, X) for _ in range(3)])
    model, optimizer = fresh()
    cached = nnx.cached_partial(nnx.jit(step), model, optimizer)
    out.append([cached(X) for _ in range(3)])
    model, optimizer = fresh()
    graphdef, state = nnx.split((model, optimizer))

    @jax.jit
    def pure(state: Any, x: Any) -> Any:
        model, optimizer = nnx.merge(graphdef, state)
        loss = step(model, optimizer, x)
        return loss, nnx.state((model, optimizer))

    losses = []
    for _ in range(3):
        loss, state = pure(state, X)
        losses.append(loss)
    nnx.update((model, optimizer), state)
    out.append((losses, model.kernel[...]))
    return out


def extracting_intermediates(nnx: Any) -> Any:
    """sow and pop, capture, outputs of methods, perturbations and their gradients."""

    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            self.first = nnx.Linear(3, 4, rngs=rngs)
            self.second = nnx.Linear(4, 1, rngs=rngs)

        def features(self, x: Any) -> Any:
            x = nnx.relu(self.first(x))
            self.sow(nnx.Intermediate, "hidden", x)
            return self.perturb("at", x)

        def __call__(self, x: Any) -> Any:
            return self.second(self.features(x))

    def flat(state: Any) -> Any:
        pairs = nnx.to_flat_state(state)
        return [(path, jax.tree.leaves(leaf)) for path, leaf in pairs]

    out: list[Any] = []
    model = Net(nnx.Rngs(0))
    y, seen = nnx.capture(model, nnx.Intermediate)(X)
    out.append((y, flat(seen)))

    @nnx.jit
    def captured(model: Any, x: Any) -> Any:
        return nnx.capture(model, nnx.Intermediate)(x)

    y, seen = captured(model, X)
    out.append((y, flat(seen)))
    _, perturbations = nnx.capture(model, nnx.Perturbation)(X)

    def loss(model: Any, perturbations: Any) -> Any:
        run = nnx.capture(model, nnx.Intermediate, init=perturbations)
        y, seen = run(X)
        return (y**2).mean(), seen

    by = nnx.grad(loss, argnums=(0, 1), has_aux=True)
    (grads, of_hidden), seen = by(model, perturbations)
    out.append((flat(grads), flat(of_hidden), flat(seen)))
    return out


def optimization_cookbook(nnx: Any) -> Any:
    """Averages, parts of a model, accumulation, rates by parameter, L-BFGS."""

    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.second = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.second(jnp.tanh(self.first(x)))

    def loss_of(model: Any, x: Any) -> Any:
        return ((model(x) - x[:, :1]) ** 2).mean()

    def trained(tx: Any, wrt: Any = nnx.Param, steps: int = 3) -> Any:
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=wrt)

        @nnx.jit
        def step(model: Any, optimizer: Any) -> Any:
            by = nnx.DiffState(0, wrt)
            loss, grads = nnx.value_and_grad(loss_of, argnums=by)(model, X)
            optimizer.update(model, grads)
            return loss

        return [step(model, optimizer) for _ in range(steps)], model

    out: list[Any] = []
    losses, model = trained(optax.adam(1e-2))
    out.append(losses)
    ema = nnx.EMA(model, 0.9)
    model.first.kernel[...] += 1
    ema.update(model)
    out.append(nnx.to_pure_dict(nnx.state(ema.apply_to(model), nnx.Param)))

    losses, model = trained(
        optax.sgd(0.1), nnx.All(nnx.Param, nnx.PathContains("second"))
    )
    out.append((losses, model.first.kernel[...]))
    losses, model = trained(optax.MultiSteps(optax.adam(1e-2), 2), steps=4)
    out.append((losses, model.second.kernel[...]))

    def rates(params: Any) -> Any:
        return nnx.map_state(
            lambda path, _: "slow" if path[0] == "first" else "fast", params
        )

    tx = optax.multi_transform({"slow": optax.sgd(0.01), "fast": optax.sgd(0.1)}, rates)
    losses, model = trained(tx)
    out.append((losses, model.first.kernel[...], model.second.kernel[...]))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 10)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    out.append(trained(clipped)[0])

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.lbfgs(), wrt=nnx.Param)
    graphdef, _ = nnx.split(model, nnx.Param)

    def value_fn(params: Any) -> Any:
        return loss_of(nnx.merge(graphdef, params), X)

    losses = []
    for _ in range(2):
        loss, grads = nnx.value_and_grad(loss_of)(model, X)
        optimizer.update(model, grads, grad=grads, value=loss, value_fn=value_fn)
        losses.append(loss)
    out.append(losses)
    return out
