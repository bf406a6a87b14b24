"""split_inputs and merge_inputs: models through a transform of JAX, in two parts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from sortal._engine.state import State
from sortal.nnx.contexts import merge_context, split_context, update_context
from sortal.transforms._adapter.tracing import has_roots

_TAG = "split_merge_inputs"


@dataclass(frozen=True)
class _Part:
    """What several trees were split to: the structure of all, the State of one."""

    state: State
    graphdef: Any
    place: Any


jax.tree_util.register_dataclass(_Part, ["state"], ["graphdef", "place"])


def _is_part(x: Any) -> bool:
    return isinstance(x, _Part)


def _divided(graphdef: Any, state: State, places: list[Any]) -> list[_Part]:
    flat = {place: {} for place in places}
    for path, leaf in state.flat_state():
        place = next(p for p in places if path[: len(p)] == p)
        flat[place][path[len(place) :]] = leaf
    parts = ((State.from_flat_path(flat[place]), place) for place in places)
    return [_Part(part, graphdef, place) for part, place in parts]


def _whole(parts: list[_Part]) -> tuple[Any, State]:
    flat = {(*p.place, *k): x for p in parts for k, x in p.state.flat_state()}
    return parts[0].graphdef, State.from_flat_path(flat)


def split_inputs(f: Any = None, *, ctxtag: str = _TAG) -> Callable[..., Any]:
    """Lets a function of pytrees, such as ``jax.jit(merge_inputs(f))``, take models.

    The transforms of ``nnx`` do that by themselves.

    Args:
      f: what the transform gave; a decorator is returned without it.
      ctxtag: a name that ``merge_inputs`` is given too.

    Returns:
      The function; what it changes in models is in them afterwards.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sortal.nnx.general import merge_inputs, split_inputs
      >>> from sortal import nnx
      >>> @split_inputs
      ... @jax.jit
      ... @merge_inputs
      ... def clear(model):
      ...     model.kernel[...] *= 0
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> clear(model)
      >>> float(model.kernel.sum())
      0.0
    """
    if f is None:
        return functools.partial(split_inputs, ctxtag=ctxtag)

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        at = [i for i, x in enumerate(args) if has_roots(x)]
        if not at:
            return f(*args)[1]
        with update_context(ctxtag):
            with split_context(ctxtag) as ctx:
                graphdef, state = ctx.split(tuple(args[i] for i in at))
            given = list(args)
            parts = _divided(graphdef, state, [(n,) for n in range(len(at))])
            for i, part in zip(at, parts, strict=True):
                given[i] = part
            changed, out = f(*given)
            parts = [x for x in (*changed, out) if _is_part(x)]
            with merge_context(ctxtag, inner=False) as ctx:
                _, returned = ctx.merge(*_whole(parts))
        return returned if _is_part(out) else out

    return call


def merge_inputs(f: Any = None, *, ctxtag: str = _TAG) -> Callable[..., Any]:
    """The inner part of ``split_inputs``: what is transformed.

    Args:
      f: a function that takes models; a decorator is returned without it.
      ctxtag: the name that ``split_inputs`` is given.

    Returns:
      A function of what ``split_inputs`` passes; it returns a tuple with an entry for
      each argument, None where that is no model, and then what ``f`` returned.
      ``out_axes`` and the like are for this pair.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from sortal.nnx.general import merge_inputs, split_inputs
      >>> from sortal import nnx
      >>> axes, forward = (None, 0), merge_inputs(lambda model, x: model(x))
      >>> mapped = split_inputs(jax.vmap(forward, in_axes=axes, out_axes=(axes, 0)))
      >>> mapped(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), jnp.ones((5, 2))).shape
      (5, 3)
    """
    if f is None:
        return functools.partial(merge_inputs, ctxtag=ctxtag)

    @functools.wraps(f)
    def call(*args: Any) -> Any:
        at = [i for i, x in enumerate(args) if _is_part(x)]
        given = list(args)
        models: tuple[Any, ...] = ()
        if at:
            with merge_context(ctxtag, inner=True) as ctx:
                models = ctx.merge(*_whole([args[i] for i in at]))
        for i, model in zip(at, models, strict=True):
            given[i] = model
        out = f(*given)
        changed: list[Any] = [None] * len(args)
        made = has_roots(out)
        if at:
            with split_context(ctxtag) as ctx:
                graphdef, state = ctx.split((models, out if made else None))
            places = [(0, n) for n in range(len(at))]
            parts = _divided(graphdef, state, [*places, (1,)])
            for i, part in zip(at, parts, strict=False):
                changed[i] = part
            out = parts[-1] if made else out
        return tuple(changed), out

    return call
