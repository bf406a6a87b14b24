"""Programs of other people on `flax.nnx`, which may be `sortal.nnx` by its name.

`python -m tests.nnx.other_programs sortal FILE` puts `sortal.nnx` into the place of
`flax.nnx`, runs each program whose package is installed, and saves its results.
"""

from __future__ import annotations

import importlib
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def put_in_place() -> None:
    """Makes `sortal.nnx` what `from flax import nnx` gives."""
    import flax.nnx

    from sortal import nnx

    sys.modules["flax.nnx"] = flax.nnx = nnx  # type: ignore[assignment]


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def of_interop(name: str) -> Callable[[], Any]:
    """A step of a model that tests/interop has, by the library in its place."""

    def program() -> Any:
        cases = importlib.import_module("tests.interop.test_third_party")
        nnx = importlib.import_module("flax").nnx
        case = getattr(cases, name)()
        optimizer = nnx.Optimizer(case.model, cases.DESCENT, wrt=nnx.Param)
        step = cases.step_of(nnx)
        losses = [step(case.model, optimizer, case.loss, case.inputs) for _ in range(2)]
        out = nnx.jit(case.forward)(case.model, *case.inputs)
        return losses, out, nnx.to_pure_dict(nnx.state(case.model, nnx.Param))

    return program


def mamba3_language_model() -> Any:
    """Two steps of a state-space model whose layers are an nnx.List."""
    from flax import nnx
    from mamba3_jax import modeling  # type: ignore[import-not-found]

    config = modeling.Mamba3Config(
        vocab_size=11, hidden_size=8, state_size=4, head_dim=4, chunk_size=4,
        num_hidden_layers=2,
    )  # fmt: skip
    model = modeling.Mamba3ForCausalLM(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    tokens = jnp.arange(8).reshape(2, 4)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: m(tokens, labels=tokens)["loss"])(
            model
        )
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(2)]
    return losses, nnx.to_pure_dict(nnx.state(model, nnx.Param))


def blaxbird_trainer() -> Any:
    """A trainer of NNX models: optimizer with its model, metrics, hooks, modes."""
    import blaxbird  # type: ignore[import-not-found]
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: Any):
            self.first = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.last = nnx.Linear(8, 1, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))

    def loss(model: Any, batch: Any) -> Any:
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    @nnx.jit
    def train(model: Any, rng_key: Any, batch: Any) -> Any:
        return nnx.value_and_grad(loss)(model, batch)

    @nnx.jit
    def evaluate(model: Any, rng_key: Any, batch: Any) -> Any:
        return loss(model, batch)

    x = normal(16, 3)
    batches = iter([{"x": x + i, "y": x[:, :1]} for i in range(40)])
    seen = []

    def hook(step: int, *, metrics: Any, **_: Any) -> None:
        seen.append((step, dict(metrics)))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.ModelAndOptimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    run = blaxbird.train_fn(
        fns=(train, evaluate), n_steps=6, eval_every_n_steps=3, n_eval_batches=2,
        hooks=[hook],
    )  # fmt: skip
    run(jax.random.key(0), optimizer, batches, batches)
    return seen[-1], nnx.to_pure_dict(nnx.state(model, nnx.Param))


def bijx_flow() -> Any:
    """Samples and densities of a normalizing flow."""
    import bijx  # type: ignore[import-not-found]
    from flax import nnx

    flow = bijx.Transformed(
        bijx.IndependentNormal(event_shape=(2,), rngs=nnx.Rngs(0)),
        bijx.Chain(
            bijx.Scaling(jnp.array([2.0, 3.0])), bijx.Shift(jnp.array([1.0, -1.0]))
        ),
    )
    x, density = flow.sample((5,), rng=jax.random.key(1))
    grads = nnx.grad(lambda f: f.log_density(x).sum())(flow)
    return x, density, flow.log_density(x), jax.tree.leaves(grads)


PROGRAMS: dict[str, Callable[[], Any]] = {
    name: of_interop(name)
    for name in (
        "cax_automaton",
        "jraphx_network",
        "mamba2_language_model",
        "nnx_ppo_actor_critic",
        "synecdoche_hypernetwork",
        "qwix_low_rank",
        "qwix_quantized",
    )
} | {
    f.__name__: f
    for f in (
        mamba3_language_model,
        blaxbird_trainer,
        bijx_flow,
    )
}


def main(library: str, file: str, *only: str) -> None:
    """Runs the programs; one whose package is missing is left out of the file."""
    from _pytest.outcomes import Skipped

    warnings.simplefilter("ignore")
    if library == "sortal":
        put_in_place()
    found: dict[str, Any] = {}
    for name in only or PROGRAMS:
        with jax.default_prng_impl("rbg"):
            try:
                out = PROGRAMS[name]()
            except (Skipped, ImportError):
                continue
            except Exception:  # noqa: BLE001
                traceback.print_exc()
                found[f"{name}:failed"] = np.zeros(0)
                continue
        for i, x in enumerate(jax.tree.leaves(out)):
            found[f"{name}:{i}"] = np.asarray(x)
    np.savez(file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
