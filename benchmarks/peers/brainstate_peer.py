"""BrainState: functions reach their states by closure, and a compiled call finds them.

It has no optimizer of its own, and so Adam's state is held in states here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brainstate as bst
import jax
import jax.numpy as jnp
import optax

from benchmarks import workload as w
from benchmarks.peers.models import define, make

LABEL = "brainstate"


class Param(bst.ParamState):
    """A state that is trained; ``[...]`` reads and writes it."""

    def __getitem__(self, index: Any) -> Any:
        return self.value

    def __setitem__(self, index: Any, value: Any) -> None:
        self.value = value


class BatchStat(bst.BatchState):
    """A running statistic, the same way."""

    __getitem__, __setitem__ = Param.__getitem__, Param.__setitem__


MODELS = define(bst.nn.Module, Param, BatchStat, list)


class Adam(bst.nn.Module):
    """Adam's state, each array in a state of its own, and how it is used."""

    def __init__(self, model: Any):
        super().__init__()
        self.tx = optax.adam(1e-3)
        self.params = model.states(bst.ParamState)
        values = {path: state.value for path, state in self.params.items()}
        held, self.structure = jax.tree.flatten(self.tx.init(values))
        self.step = bst.LongTermState(jnp.array(0, jnp.uint32))
        self.moments = [bst.LongTermState(x) for x in held]

    def update(self, grads: Any) -> None:
        """Applies one step of gradients to the model."""
        values = {path: state.value for path, state in self.params.items()}
        held = jax.tree.unflatten(self.structure, [s.value for s in self.moments])
        updates, held = self.tx.update(grads, held, values)
        for path, value in optax.apply_updates(values, updates).items():
            self.params[path].value = value
        for state, value in zip(self.moments, jax.tree.leaves(held), strict=True):
            state.value = value
        self.step.value = self.step.value + 1

    @property
    def held(self) -> list[Any]:
        """The states beside the model's."""
        return [self.step, *self.moments]


def build(shape: w.Shape) -> tuple[Any, ...]:
    """The roots: the model, and its optimizer where the shape has one."""
    model = make(MODELS, shape)
    return (model,) if isinstance(shape, w.Cells) else (model, Adam(model))


def operations(shape: w.Shape, wanted: tuple[str, ...]) -> w.Operations:
    """Calls for each row that is wanted."""
    roots = build(shape)
    model = roots[0]
    states = [*model.states().values(), *(s for adam in roots[1:] for s in adam.held)]
    graph = bst.graph
    definition, params, rest = graph.treefy_split(model, bst.ParamState, ...)
    everything = graph.treefy_states(model)
    doubled = jax.tree.map(lambda x: x * 2, params)
    one_of = w.alternate(params, doubled)
    other = MODELS.Cell()

    def edited() -> Any:
        other.features = one_of() is params
        return graph.treefy_states(model, bst.ParamState)

    def again() -> Any:
        merged = graph.treefy_merge(definition, params, rest)
        return graph.treefy_split(merged, bst.ParamState, ...)

    calls: dict[str, Callable[[], Any]] = {
        w.STATE: lambda: graph.treefy_states(model),
        w.PARAMS: lambda: graph.treefy_states(model, bst.ParamState),
        w.PARAMS_LEAVES: lambda: jax.tree.leaves(
            graph.treefy_states(model, bst.ParamState)
        ),
        w.EDITED: edited,
        w.SPLIT: lambda: graph.treefy_split(model, bst.ParamState, ...),
        w.MERGE: lambda: graph.treefy_merge(definition, params, rest),
        w.AGAIN: again,
        w.UPDATE: lambda: graph.update_states(model, one_of()),
        w.STATE_LEAVES: lambda: jax.tree.leaves(params),
        w.STATE_MAP: lambda: jax.tree.map(w.same, everything),
        w.NOOP: _noop(states),
        w.STEP: _step(states),
    }
    return {row: {LABEL: calls[row]} for row in wanted if row in calls}


def _noop(states: list[Any]) -> Callable[[], Any]:
    @bst.transform.jit
    def noop() -> None:
        for state in states:
            state.value  # noqa: B018 - what is read is passed into the program

    return noop


def _step(states: list[Any]) -> Callable[[], Any]:
    @bst.transform.jit
    def step() -> None:
        for state in states:
            state.value = state.value + 1

    def call() -> Any:
        step()
        return states[-1].value.block_until_ready()

    return call


def _compiled(model: Any, adam: Any) -> Any:
    """The training step, a new function at each call."""

    @bst.transform.jit
    def step(x: Any, y: Any) -> Any:
        def loss_of() -> Any:
            return ((model(x) - y) ** 2).mean()

        grads, loss = bst.transform.grad(loss_of, adam.params, return_value=True)()
        adam.update(grads)
        return loss

    return step


def training(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """A whole training step; the call returns the loss."""
    step, batch = _compiled(*build(shape)), w.batch(shape.width)
    return {LABEL: lambda: step(*batch).block_until_ready()}


def lowering(shape: w.Shape) -> dict[str, Callable[[], Any]]:
    """The same step, written anew, traced and lowered."""
    roots, batch = build(shape), w.batch(shape.width)
    return {LABEL: lambda: _compiled(*roots).lower(*batch)}
