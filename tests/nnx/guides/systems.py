"""Checkpoints, shardings by GSPMD, and the bridge to Linen."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


def checkpointing(nnx: Any) -> Any:
    """Orbax saves and restores states and pure dicts, also by an abstract model."""
    ocp = pytest.importorskip("orbax.checkpoint")

    class TwoLayers(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear1 = nnx.Linear(3, 4, rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x: Any) -> Any:
            x = self.linear1(x)
            for block in self.blocks:
                x = block(x)
            return x

    model = TwoLayers(nnx.Rngs(0))
    _, state = nnx.split(model)
    out: list[Any] = [model(X)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(root / "state", state)
            checkpointer.wait_until_finished()
            abstract = nnx.eval_shape(lambda: TwoLayers(nnx.Rngs(0)))
            graphdef, abstract_state = nnx.split(abstract)
            restored = checkpointer.restore(root / "state", abstract_state)
            out.append(nnx.merge(graphdef, restored)(X))

            pure = nnx.to_pure_dict(state)
            checkpointer.save(root / "pure", pure)
            checkpointer.wait_until_finished()
            back = checkpointer.restore(root / "pure")
            nnx.replace_by_pure_dict(abstract_state, nnx.restore_int_paths(back))
            out.append(nnx.merge(graphdef, abstract_state)(X))
    return out


def gspmd(nnx: Any) -> Any:
    """Axes by name, a model made on a mesh, its specs, and training steps there."""

    class Dot(nnx.Module):
        def __init__(self, depth: int, rngs: Any):
            init = nnx.initializers.lecun_normal()
            self.dot1 = nnx.Linear(
                depth,
                depth,
                kernel_init=nnx.with_partitioning(init, (None, "model")),
                use_bias=False,
                rngs=rngs,
            )
            self.w2 = nnx.Param(
                init(rngs.params(), (depth, depth)), out_sharding=("model", None)
            )

        def __call__(self, x: Any) -> Any:
            return jnp.dot(nnx.relu(self.dot1(x)), self.w2[...])

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=auto)
    out: list[Any] = []
    with jax.set_mesh(mesh):

        @nnx.jit
        def create() -> Any:
            model = Dot(4, nnx.Rngs(0))
            state = nnx.state(model)
            specs = nnx.get_partition_spec(state)
            sharded = jax.lax.with_sharding_constraint(state, specs)
            nnx.update(model, sharded)
            return model

        model = create()
        specs = nnx.get_partition_spec(nnx.state(model))
        out.append([tuple(spec) for spec in jax.tree.leaves(specs, is_leaf=is_spec)])
        named = nnx.get_named_sharding(nnx.state(model), mesh)
        out.append([tuple(x.spec) for x in jax.tree.leaves(named, is_leaf=is_named)])
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        batch = jax.device_put(
            jnp.ones((8, 4)), jax.NamedSharding(mesh, jax.P("data", None))
        )

        @nnx.jit
        def step(model: Any, optimizer: Any, x: Any) -> Any:
            loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
            optimizer.update(model, grads)
            return loss

        out.append([step(model, optimizer, batch) for _ in range(2)])
        out.append(tuple(model.w2[...].sharding.spec))
    return out


def is_spec(x: Any) -> bool:
    return isinstance(x, jax.sharding.PartitionSpec)


def is_named(x: Any) -> bool:
    return isinstance(x, jax.NamedSharding)


def bridge(nnx: Any) -> Any:
    """Linen modules in NNX and NNX modules in Linen, lazily, with random keys."""
    import flax.linen as nn

    out: list[Any] = []
    model = nnx.bridge.ToNNX(nn.Dense(features=4), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(model, X)
    out.append((model.kernel.shape, model(X)))

    class Combined(nnx.Module):
        def __init__(self, rngs: Any):
            self.linear = nnx.Linear(3, 4, rngs=rngs)
            self.dense = nnx.bridge.ToNNX(nn.Dense(2), rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.dense(self.linear(x))

    combined = nnx.bridge.lazy_init(Combined(nnx.Rngs(0)), X)
    out.append(combined(X))
    grads = nnx.grad(lambda m: (m(X) ** 2).mean())(combined)
    out.append(nnx.to_pure_dict(grads)["linear"])

    linen = nnx.bridge.to_linen(nnx.Linear, 3, out_features=4)
    variables = linen.init(jax.random.key(0), X)
    out.append(
        (jax.tree.map(jnp.shape, variables["params"]), linen.apply(variables, X))
    )

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))
            return nn.BatchNorm(use_running_average=False)(x)

    rngs = nnx.Rngs(params=0, dropout=1)
    block = nnx.bridge.lazy_init(nnx.bridge.ToNNX(Block(), rngs=rngs), X)
    out.append([block(X, mutable=["batch_stats"]) for _ in range(2)])
    out.append(block.BatchNorm_0["mean"][...])
    return out
