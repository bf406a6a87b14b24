"""A whole training run equals the same run in Flax NNX and in plain JAX, to the bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx

import sortal
from sortal import nnx
from sortal.demo import digits
from swapped import LIBRARIES, load

STEPS = 12
PEERS = pytest.mark.parametrize("name", ["float32", "bfloat16"])


def build(nnx: Any, dtype: Any) -> Any:
    """Conv, BatchNorm, Dropout and a counter, written once for both libraries."""

    class Count(nnx.Variable):
        pass

    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            options = {"dtype": dtype, "rngs": rngs}
            self.conv = nnx.Conv(1, 4, kernel_size=(3, 3), **options)
            self.norm = nnx.BatchNorm(4, **options)
            self.dropout = nnx.Dropout(0.3, rngs=rngs)
            self.head = nnx.Linear(4 * 4 * 4, 5, **options)
            self.count = Count(jnp.array(0))

        def __call__(self, x: Any) -> Any:
            self.count[...] += 1
            x = nnx.relu(self.norm(self.conv(x)))
            x = nnx.max_pool(x, (2, 2), (2, 2))
            return self.head(self.dropout(x.reshape(len(x), -1)))

    return Net(nnx.Rngs(0, dropout=1))


def batches() -> list[tuple[jax.Array, jax.Array]]:
    rng = np.random.default_rng(0)
    return [
        (
            jnp.asarray(rng.normal(size=(6, 8, 8, 1)), jnp.float32),
            jnp.asarray(rng.integers(0, 5, size=6)),
        )
        for _ in range(STEPS)
    ]


def cross_entropy(logits: Any, y: Any) -> Any:
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(nnx: Any, dtype: Any) -> tuple[list[float], dict[str, np.ndarray]]:
    model = build(nnx, dtype)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(x), y))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, x, y)) for x, y in batches()]
    final: dict[str, np.ndarray] = {}
    for name, root in (("model", model), ("optimizer", optimizer)):
        for path, leaf in nnx.to_flat_state(nnx.state(root)):
            value = leaf[...]
            if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
                value = jax.random.key_data(value)
            key = ".".join(map(str, path))
            final[f"{name}.{key}"] = np.asarray(value.astype(jnp.float32))
    return losses, final


@PEERS
def test_training_equals_flax_nnx_bit_for_bit(name):
    """Losses of every step and every leaf at the end equal those of Flax NNX."""
    losses, final = train(nnx, jnp.dtype(name))
    flax_losses, flax_final = train(flax_nnx, jnp.dtype(name))
    assert losses == flax_losses
    assert final.keys() == flax_final.keys()
    for key, value in final.items():
        np.testing.assert_array_equal(value, flax_final[key], err_msg=key)
    assert len(set(losses)) == STEPS


def test_training_equals_plain_jax_bit_for_bit():
    """The same network as functions of dicts, written by hand, gives equal losses."""
    model = build(nnx, jnp.float32)
    params = {
        path: leaf.value
        for path, leaf in nnx.to_flat_state(sortal.state(model, sortal.Param))
    }
    stats = {"mean": model.norm.mean.value, "var": model.norm.var.value}
    key = model.dropout.rngs.key.value
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    opt_state = tx.init(params)

    def forward(params: Any, stats: Any, key: Any, x: Any) -> Any:
        kernel, bias = params["conv", "kernel"], params["conv", "bias"]
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x + bias.reshape(1, 1, 1, -1)
        squared = jax.lax.square(x)  # before the mean: gradients add up in this order
        mean, square = x.mean((0, 1, 2)), squared.mean((0, 1, 2))
        var = jnp.maximum(0.0, square - jax.lax.square(mean))
        stats = {
            "mean": 0.99 * stats["mean"] + (1 - 0.99) * mean,
            "var": 0.99 * stats["var"] + (1 - 0.99) * var,
        }
        factor = jax.lax.rsqrt(var.reshape(1, 1, 1, -1) + 1e-5)
        factor = factor * params["norm", "scale"].reshape(1, 1, 1, -1)
        x = (x - mean.reshape(1, 1, 1, -1)) * factor
        x = jax.nn.relu(x + params["norm", "bias"].reshape(1, 1, 1, -1))
        window = (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        x = x.reshape(len(x), -1)
        keep = jax.random.bernoulli(key, 0.7, x.shape)
        x = jax.lax.select(keep, x / 0.7, jnp.zeros_like(x))
        x = jax.lax.dot_general(x, params["head", "kernel"], (((1,), (0,)), ((), ())))
        return x + params["head", "bias"].reshape(1, -1), stats

    @jax.jit
    def step(params: Any, stats: Any, opt_state: Any, key: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, new = forward(params, stats, key, x)
            return cross_entropy(logits, y), new

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return value, optax.apply_updates(params, updates), stats, opt_state

    losses = []
    for i, (x, y) in enumerate(batches()):
        at = jax.random.fold_in(key, i)
        value, params, stats, opt_state = step(params, stats, opt_state, at, x, y)
        losses.append(float(value))
    assert train(nnx, jnp.float32)[0] == losses


def test_the_first_twenty_losses_of_the_digits_are_those_of_flax_to_the_last_bit():
    data = digits.load_digits(0)
    losses = []
    for library in LIBRARIES:
        module = load(digits.__file__, library, f"digits_{library}")
        objects = module.build(0, 20)
        objects[0].train()
        drawn = digits.batches(data, 64, np.random.default_rng(0))
        steps = [module.train_step(*objects, *next(drawn)) for _ in range(20)]
        objects[0].eval()
        guesses = module.predict(objects[0], data.held_out_images)
        losses.append([*map(float, steps), *np.asarray(guesses)])
    assert losses[0] == losses[1]
