"""What an Optimizer was made for: the shapes and dtypes of parameters and state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from sortal._engine.paths import Path
from sortal._engine.schema import Schema
from sortal._engine.state import State
from sortal._engine.variable import describe, is_variable
from sortal.errors import OptimizerError, listing
from sortal.sharding.mesh_axes import declared_sharding, put
from sortal.sharding.resolution import at_placement

ANEW = (
    "Make a new Optimizer after changing the model, or pass the model that this one "
    "was made for."
)


def check_arguments(model: Any, grads: Any) -> None:
    """Refuses a State as the model, and no gradients or a loss beside them."""
    if isinstance(model, State):
        raise OptimizerError(
            "update(model, grads) was given a State as the model. Write "
            "optimizer.update(model, grads), with the live model first."
        )
    pair = type(grads) is tuple and not isinstance(model, (tuple, list))
    if grads is None or pair:
        found = "None" if grads is None else f"a tuple of {len(grads)}"
        raise OptimizerError(
            f"update needs the gradients; found {found}. Write "
            "loss, grads = value_and_grad(f)(model), and then "
            "optimizer.update(model, grads)."
        )


def dtypes(value: Any) -> tuple[Any, ...]:
    """The dtypes of the arrays in a value."""
    return tuple(map(dtype, jax.tree.leaves(value)))


def dtype(x: Any) -> Any:
    """The dtype of an array or number."""
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def same_shape(p: Any, g: Any) -> bool:
    """Whether two values have one structure and shapes."""
    try:
        return p.shape == g.shape
    except AttributeError:
        pass  # numbers, and small pytrees of arrays
    if jax.tree.structure(p) != jax.tree.structure(g):
        return False
    pairs = zip(jax.tree.leaves(p), jax.tree.leaves(g), strict=True)
    return all(jnp.shape(a) == jnp.shape(b) for a, b in pairs)


def is_gradient(p: Any, g: Any) -> bool:
    """Whether a value can be a gradient: of the same shape, and real if that is."""
    return same_shape(p, g) and not any(
        jnp.iscomplexobj(b) and not jnp.iscomplexobj(a)
        for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(g), strict=True)
    )


def check_dtypes(params: State, made_for: tuple[Any, ...]) -> None:
    """Refuses parameters of other dtypes than at the start."""
    rows = [
        f"{params.schema.describe(i)} is {describe(p)}, was {', '.join(map(str, was))}"
        for i, (p, was) in enumerate(zip(params.values_list(), made_for, strict=True))
        if dtypes(p) != was
    ]
    if rows:
        raise OptimizerError(
            "the model's trainable leaves have other dtypes than when the optimizer "
            f"was made:\n{listing(rows)}\n{ANEW}"
        )


def odd_shapes(params: State, opt_state: Any) -> dict[tuple[int, Path], str]:
    """The leaves of optax's State at a parameter's path that have another shape.

    They are known by their places. What optax makes in the parameter's shape it keeps
    so; but shapes themselves differ inside ``vmap`` and ``shard_map`` from those at the
    start.
    """
    values, index = params.values_list(), params.schema.index
    found = {}
    parts, _ = jtu.tree_flatten_with_path(opt_state, is_leaf=is_leaf)
    for n, (keys, part) in enumerate(parts):
        if not isinstance(part, State):
            continue
        for path, kept in zip(part.schema.paths, part.values_list(), strict=True):
            at = index.get(path)
            if at is not None and not same_shape(values[at], kept):
                found[n, path] = (
                    f"{params.schema.describe(at)} is {describe(values[at])}, its "
                    f"state in opt_state{jtu.keystr(keys)} is {describe(kept)}"
                )
    return found


def check_shapes(params: State, opt_state: Any, odd: frozenset[Any]) -> None:
    """Refuses parameters whose state no longer has their shape."""
    rows = [row for at, row in odd_shapes(params, opt_state).items() if at not in odd]
    if rows:
        raise OptimizerError(
            "the model's trainable leaves have other shapes than when the optimizer "
            f"was made:\n{listing(rows)}\n{ANEW}"
        )


def check_updates(schema: Schema, values: list[Any], updates: list[Any]) -> None:
    """Refuses updates of other shapes than their parameters."""
    bad = [
        f"{schema.describe(i)} is {describe(p)}, its update {describe(u)}"
        for i, (p, u) in enumerate(zip(values, updates, strict=True))
        if not same_shape(p, u)
    ]
    if bad:
        raise OptimizerError(
            "updates must have the shapes of their parameters; the transformation "
            f"made:\n{listing(bad)}\nNothing was changed."
        )


def is_leaf(x: Any) -> bool:
    """Whether optax's state is stored whole here: a State or a Variable."""
    return isinstance(x, State) or is_variable(x)


def check_paths(what: str, found: Schema, expected: Schema, advice: str) -> None:
    """Refuses leaves at other paths than those expected."""
    if found.paths == expected.paths or found.index.keys() == expected.index.keys():
        return
    rows = [
        f"missing: {expected.describe(i)}"
        for i, path in enumerate(expected.paths)
        if path not in found.index
    ]
    rows += [
        f"unknown: {found.describe(i)}"
        for i, path in enumerate(found.paths)
        if path not in expected.index
    ]
    raise OptimizerError(
        f"{what} are not those that the optimizer trains; found:\n{listing(rows)}\n"
        f"{advice}"
    )


def is_array(x: Any) -> bool:
    """Whether it is an array or a number."""
    return isinstance(x, (bool, int, float, complex)) or hasattr(x, "dtype")


def placed_like(value: Any, metadata: Any, of_parameter: Any) -> Any:
    """A new value where its metadata says, which may not be with its parameter."""
    own = "optimizer_sharding" in of_parameter and declared_sharding(None, metadata)
    return put(value, own) if own else at_placement(value, metadata)
