"""Eight replicas of the digits network: shared Params, BatchStats of their own.

One Policy says what each kind does: which are shared by the replicas and which are
not, in ``vmap`` and in ``shard_map``, and what the optimizer trains. The same steps
are then taken in three ways, and the numbers compared: with ``vmap`` on one device,
with ``shard_map`` on eight, and in a Python loop over eight separate networks. All is
done in double precision, so that the order of additions, which the three do not share,
hides no mistake.

    python examples/ensemble.py

It needs scikit-learn, which ships the data.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Eight devices on any machine; must be said before JAX starts.
FLAG = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import sortal as nnx  # noqa: E402
from sortal.demo import digits  # noqa: E402

jax.config.update("jax_enable_x64", val=True)
REPLICAS = 8
APART = nnx.BatchStat | digits.BatchStat | nnx.RngState
"""The kinds of which each replica has its own."""

POLICY = nnx.Policy(
    {
        nnx.Param: nnx.Rule(axis=None, spec=P(), optimizer=optax.sgd(0.1, 0.9)),
        APART: nnx.Rule(axis=0, spec=P("replica")),
        ...: nnx.Rule(axis=None, spec=P()),
    }
)


def build(seed: int) -> tuple[digits.Network, nnx.Optimizer]:
    """The network with eight of each statistic and random stream, and its optimizer."""
    model = digits.Network(nnx.Rngs(seed), width=8)
    reals = nnx.state(model, nnx.Dtyped(jnp.floating))
    nnx.update(model, jax.tree.map(jnp.float64, reals), strict=False)
    nnx.split_rngs(model, splits=REPLICAS)
    stats = nnx.state(model, nnx.BatchStat | digits.BatchStat)
    eight = jax.tree.map(lambda x: jnp.stack([x] * REPLICAS), stats)
    nnx.update(model, eight, strict=False)
    return model, nnx.Optimizer(model, POLICY)


def gradients(
    model: digits.Network, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Any]:
    """The loss of one replica on its images, and the gradient by the Params."""

    def loss_fn(model: digits.Network) -> jax.Array:
        return digits.loss_fn(model, images, labels)[0]

    return nnx.value_and_grad(loss_fn)(model)


each = nnx.vmap(gradients, in_axes=(POLICY, 0, 0))


def ensemble(model: digits.Network, images: jax.Array, labels: jax.Array) -> Any:
    """The losses of all replicas and their mean gradient, on one device."""
    losses, grads = each(model, images, labels)
    return losses, jax.tree.map(lambda g: g.mean(0), grads)


def mesh() -> jax.sharding.Mesh:
    """One device for each replica."""
    return jax.make_mesh((REPLICAS,), ("replica",), axis_types=(AxisType.Auto,))


def on_a_device(model: digits.Network, images: jax.Array, labels: jax.Array) -> Any:
    """What one device does with its share: a stack of one replica."""
    losses, grads = each(model, images, labels)
    # The Params are shared, so JAX has summed their gradient over the devices.
    return losses, jax.tree.map(lambda g: g.sum(0) / REPLICAS, grads)


def sharded() -> Any:
    """As ``ensemble``, with each replica on a device of its own."""
    return nnx.shard_map(
        on_a_device,
        mesh=mesh(),
        in_specs=(POLICY, P("replica"), P("replica")),
        out_specs=(P("replica"), P()),
    )


def stepper(how: Callable[..., Any]) -> Callable[..., jax.Array]:
    """A compiled training step with the replicas' mean gradient."""

    @nnx.jit
    def step(
        model: digits.Network, optimizer: nnx.Optimizer, images: Any, labels: Any
    ) -> jax.Array:
        losses, grads = how(model, images, labels)
        optimizer.update(model, grads)
        return losses

    return step


class Loop:
    """The same in plain Python: eight networks, one after the other."""

    def __init__(self, model: digits.Network):
        mine = nnx.state(model, APART)
        self.networks = [nnx.clone(model) for _ in range(REPLICAS)]
        for i, network in enumerate(self.networks):
            own = jax.tree.map(lambda x, i=i: x[i], mine)
            nnx.update(network, own, strict=False)
        self.one = nnx.jit(gradients)

    def step(
        self, model: digits.Network, optimizer: nnx.Optimizer, images: Any, labels: Any
    ) -> jax.Array:
        """One step; the Params live in ``model``, the statistics in the networks."""
        params = nnx.state(model, nnx.Param)
        found = []
        for network, x, y in zip(self.networks, images, labels, strict=True):
            nnx.update(network, params)
            found.append(self.one(network, x, y))
        losses, grads = jax.tree.map(lambda *xs: jnp.stack(xs), *found)
        optimizer.update(model, jax.tree.map(lambda g: g.mean(0), grads))
        apart = [nnx.state(network, APART) for network in self.networks]
        nnx.update(model, jax.tree.map(lambda *xs: jnp.stack(xs), *apart))
        return losses


def shards(data: digits.Digits, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of 16 images for each replica."""
    rng = np.random.default_rng(0)
    size = 16 * REPLICAS
    done = 0
    while done < steps:
        for images, labels in digits.batches(data, size, rng):
            if done < steps:
                stacked = images.reshape(REPLICAS, -1, *images.shape[1:])
                yield stacked.astype(np.float64), labels.reshape(REPLICAS, -1)
            done += 1


def train(name: str, steps: int, seed: int) -> tuple[np.ndarray, Any]:
    """Trains in one of the three ways; returns all losses and the final state."""
    data = digits.load_digits(seed)
    model, optimizer = build(seed)
    if name == "loop":
        step = Loop(model).step
    elif name == "vmap":
        step = stepper(ensemble)
    else:
        step = stepper(sharded())
        # The Policy's specs also say where the arrays lie.
        for root in (model, optimizer):
            specs = POLICY.column("spec", nnx.graphdef(root).schema, None, P())
            place(root, specs)
    losses = [
        np.asarray(step(model, optimizer, images, labels))
        for images, labels in shards(data, steps)
    ]
    return np.stack(losses), nnx.state(model, nnx.Param | APART)


def place(root: Any, specs: list[Any]) -> None:
    """Puts each leaf where its spec says."""
    grid = mesh()
    for variable, spec in zip(nnx.variables(root).leaves(), specs, strict=True):
        variable.value = jax.device_put(variable.value, NamedSharding(grid, spec))


def main(argv: list[str] | None = None) -> float:
    """Trains in three ways, prints the Policy, returns the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(POLICY.table(build(args.seed)[0]))
    runs = {n: train(n, args.steps, args.seed) for n in ("vmap", "shard_map", "loop")}
    print(f"\n{args.steps} steps, mean loss of eight replicas:")
    for name, (losses, _) in runs.items():
        print(f"  {name:10} {losses[0].mean():.6f} -> {losses[-1].mean():.6f}")
    worst = 0.0
    for name in ("shard_map", "loop"):
        for what, kinds in (("Params", nnx.Param), ("BatchStats", nnx.BatchStat)):
            gap = difference(runs["vmap"][1].filter(kinds), runs[name][1].filter(kinds))
            print(f"  {what} after vmap and {name}: largest difference {gap:.1e}")
            worst = max(worst, gap)
    return worst


def difference(a: Any, b: Any) -> float:
    """The largest difference between two States of the same paths."""
    gaps = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    return float(max(jax.tree.leaves(gaps)))


if __name__ == "__main__":
    sys.exit(main() > 1e-9)  # three ways to the same numbers, or a failure
