"""The model that every contender builds: its sizes, values and arithmetic.

``Blocks`` is a stack of blocks of a linear layer and a normalization with running
statistics: 50 of them are 152 modules, 1,406 attributes, 300 Variables, of which 200
are Params, and 402 leaves of Adam state. ``Pair`` is two linear layers, 14 leaves with
Adam state. ``Cells`` has any even number of leaves, for measurements of scaling.
Contenders differ in how these are held, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STATE = "state(model)"
PARAMS = "state(model, Param)"
PARAMS_LEAVES = "state(model, Param) and its leaves"
EDITED = "an attribute write elsewhere, then state(model, Param)"
SPLIT = "split(model, Param, ...)"
MERGE = "merge(graphdef, params, rest)"
AGAIN = "merge, then split again"
UPDATE = "update(model, params)"
LEAVES = "jax.tree.leaves(model)"
STATE_LEAVES = "jax.tree.leaves(params)"
STATE_MAP = "jax.tree.map over state(model)"
NOOP = "jitted no-op"
STEP = "jitted step that changes all leaves"
TRAINING = "training step"
SMALL_NOOP = "jitted no-op, two Linears"
SMALL_TRAINING = "training step, two Linears"

VERBS = (
    STATE, PARAMS, PARAMS_LEAVES, EDITED, SPLIT, MERGE, AGAIN, UPDATE, LEAVES,
    STATE_LEAVES, STATE_MAP,
)  # fmt: skip
COMPILED = (NOOP, STEP, TRAINING, SMALL_NOOP, SMALL_TRAINING)

Operations = dict[str, dict[str, Callable[[], Any]]]
"""Row name to contender name to a call that blocks until its result is ready."""

STATICS: Mapping[str, Any] = {
    "axis": -1,
    "dtype": None,
    "epsilon": 1e-5,
    "features": 0,
    "momentum": 0.9,
    "param_dtype": jnp.float32,
    "precision": None,
    "use_bias": True,
    "use_scale": True,
}
"""The settings that a layer of either kind holds beside its Variables."""


@dataclass(frozen=True)
class Blocks:
    """A stack of ``depth`` blocks of width ``width``, with Adam state beside it."""

    depth: int = 50
    width: int = 8

    @property
    def leaves(self) -> int:
        """How many leaves the model and its Adam state have together."""
        return 14 * self.depth + 2


@dataclass(frozen=True)
class Pair:
    """Two linear layers of width ``width``, with Adam state beside them."""

    width: int = 8


@dataclass(frozen=True)
class Cells:
    """``leaves // 2`` layers, each of one Param and one BatchStat; no optimizer."""

    leaves: int = 10


Shape = Blocks | Pair | Cells


def kernel(index: int, width: int) -> jax.Array:
    """The kernel of block ``index``; the same for every contender."""
    rng = np.random.default_rng(index)
    return jnp.asarray(rng.normal(size=(width, width)) / width**0.5, jnp.float32)


def full(width: int, value: float) -> jax.Array:
    """A vector of ``width`` times ``value``, in memory of its own."""
    return jnp.full((width,), value, jnp.float32)


def linear(x: Any, kernel: Any, bias: Any) -> Any:
    """The arithmetic of the linear layer."""
    return x @ kernel + bias


def normalize(x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> tuple[Any, ...]:
    """The arithmetic of the normalization.

    Returns:
      The output, and the new running mean and variance.
    """
    momentum, epsilon = STATICS["momentum"], STATICS["epsilon"]
    now, spread = x.mean(axis=0), x.var(axis=0)
    y = (x - now) * jax.lax.rsqrt(spread + epsilon) * scale + bias
    new_mean = momentum * mean + (1 - momentum) * now
    new_var = momentum * var + (1 - momentum) * spread
    return y, new_mean, new_var


def residual(x: Any, y: Any) -> Any:
    """How a block joins its input and what it made of it."""
    return x + jax.nn.relu(y)


def between(x: Any) -> Any:
    """What stands between the two layers of ``Pair``."""
    return jax.nn.relu(x)


def same(x: Any) -> Any:
    """The identity, to be mapped over trees."""
    return x


def step_with(value_and_grad: Callable[..., Any]) -> Callable[..., Any]:
    """A training step of modules changed in place, a new function at each call.

    Args:
      value_and_grad: the library's own.

    Returns:
      A function of a model, its optimizer, inputs and targets that returns the loss.
    """

    def step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        def loss_of(model: Any) -> Any:
            return ((model(x) - y) ** 2).mean()

        loss, grads = value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    return step


def batch(width: int, size: int = 32) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets of a training step."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(size, width)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(size, width)), jnp.float32)


def alternate(*values: Any) -> Callable[[], Any]:
    """A function that returns the values in turn, so that no call repeats the last."""
    ring = list(values)

    def following() -> Any:
        ring.append(ring.pop(0))
        return ring[-1]

    return following
