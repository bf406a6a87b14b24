"""EMA: an exponential moving average of the leaves of a model that a filter takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Never, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sortal._engine.leaves import store_all
from sortal._engine.marks import static
from sortal._engine.paths import Path
from sortal._engine.plan import bind
from sortal._engine.promotion import mixing, wide
from sortal._engine.schema import Kind, Schema, path_hints
from sortal._engine.state import State, snapshot
from sortal._engine.variable import describe, value_of
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, FilterError, UpdateError, listing
from sortal.filters import Dtyped, Filter, to_filter
from sortal.module import Pytree
from sortal.training.fitting import dtype

M = TypeVar("M")


class EMA(Pytree):
    """A moving average of a model's leaves: ``ema = decay * ema + (1 - decay) * x``.

    ``params`` is a State of Variables of the model's kinds and dtypes at the model's
    paths. It begins as a copy of the model's values in new buffers, so that the model
    and the average can be donated separately. Of leaves in a dtype narrower than
    float32, the average itself is kept in float32, in a second State ``wide`` (None
    where there are no such leaves), and ``params`` holds it rounded.

    Args:
      model: a Module, a container of Modules and Variables, or a State.
      decay: the share of the old average that is kept, from 0 to 1.
      only: which leaves to track: Variables of floating or complex dtype; all of them
        if absent, so that keys, counts and other integers are the model's own.

    Raises:
      ArgumentError: ``decay`` is not from 0 to 1.
      FilterError: ``only`` takes nothing, or leaves that have no average; all listed.
        Without it, a raw array of such a dtype is refused too.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> class Scale(nnx.Module):
      ...     def __init__(self):
      ...         self.w = nnx.Param(jnp.zeros(2))
      >>> model = Scale()
      >>> ema = nnx.EMA(model, decay=0.75, only=nnx.Param)
      >>> model.w.value = jnp.ones(2)
      >>> ema.update(model)
      >>> ema.apply_to(model).w.value.tolist()
      [0.25, 0.25]
    """

    params: State
    wide: State | None

    def __init__(self, model: Any, decay: Any, *, only: Any = ..., **_unknown: Never):
        refuse_unknown("EMA", _unknown)
        if not _is_share(decay):
            raise ArgumentError(
                f"decay={decay!r} is not a share from 0 to 1. Write decay=0.999 to "
                "keep all but a thousandth of the old average at each step."
            )
        only = tuple(only) if isinstance(only, list) else only
        only = _Averaged() if only is ... else only
        found = _tracked_leaves(model, only)
        _check_averages(model, found, only)
        self.decay = decay
        self.filter = static(only)
        values = [jax.tree.map(jnp.copy, v) for v in found.values_list()]
        self.params = snapshot(found.schema, values)
        wide = [jax.tree.map(_widened, v) for v in values]
        at = [
            i
            for i, (a, b) in enumerate(zip(values, wide, strict=True))
            if jax.tree.map(dtype, a) != jax.tree.map(dtype, b)
        ]
        picked = found.schema.pick(at)
        self.wide = snapshot(picked, [wide[i] for i in at]) if at else None

    def update(self, model: Any) -> None:
        """Moves the average towards the model's values.

        Args:
          model: the model, or a State or nested dict of its leaves.

        Raises:
          UpdateError: the leaves that the filter takes are not those tracked, or have
            another shape; all are listed and nothing is changed.
          TraceError: the average belongs to another trace than the current one.
        """
        found = _tracked_leaves(model, self.filter)
        schema = self.params.schema
        _check_paths(schema, found.schema, wider=True)
        given, at = bind(self.params).leaves, found.schema.index
        olds, values = given.values(), found.values_list()
        news = [values[at[path]] for path in schema.paths]
        _check_shapes(schema, olds, news)
        parts, means = [given], list(olds)
        if self.wide is not None:
            parts.append(bind(self.wide).leaves)
            where = [schema.index[path] for path in self.wide.schema.paths]
            for i, mean in zip(where, parts[1].values(), strict=True):
                means[i] = mean
        decay = self.decay

        @mixing
        def average(old: Any, new: Any) -> Any:
            mean = decay * old + (1.0 - decay) * jnp.asarray(new, old.dtype)
            return mean if mean.dtype == old.dtype else mean.astype(old.dtype)

        means = [jax.tree.map(average, a, b) for a, b in zip(means, news, strict=True)]
        out = [jax.tree.map(_rounded, a, b) for a, b in zip(means, olds, strict=True)]
        if self.wide is not None:
            out += [means[i] for i in where]
        store_all(parts, out)

    def apply_to(self, model: M) -> M:
        """A new model with the average in the place of the tracked leaves.

        The new model shares the average's Variables, and so follows later updates. All
        other leaves are new Variables with the values that ``model`` has now; they
        share its buffers.

        Args:
          model: a model of the structure that is tracked; left as it is.

        Returns:
          The new model.

        Raises:
          UpdateError: ``model`` lacks tracked leaves, or has them in other shapes; all
            are listed.
        """
        plan, kept = bind(model), bind(self.params)
        graphdef, schema = plan.graphdef, self.params.schema
        _check_paths(schema, graphdef.schema, wider=False)
        where = [graphdef.schema.index[path] for path in schema.paths]
        values = plan.leaves.snapshot()
        _check_shapes(schema, kept.values(), [values[i] for i in where])
        leaves = graphdef.build_leaves(values)
        for i, variable in zip(where, kept.view(), strict=True):
            leaves[i] = variable
        return graphdef.build(leaves)[0]


class _Averaged(Filter):
    """Takes what has an average, if it is in a Variable."""

    structural = False

    def test(self, path: Path, kind: Kind, metadata: Mapping, leaf: Any) -> bool:
        return any(map(_is_inexact, jax.tree.leaves(value_of(leaf))))

    def __repr__(self) -> str:
        return repr(Dtyped(jnp.inexact))


def _is_share(decay: Any) -> bool:
    if isinstance(decay, Tracer):
        return True
    number = isinstance(decay, (int, float, np.generic, np.ndarray, jax.Array))
    return number and not np.ndim(decay) and 0 <= float(decay) <= 1


def _tracked_leaves(model: Any, only: Any) -> State:
    if isinstance(model, State):
        return model.filter(only)
    _, [(schema, leaves)] = bind(model).pick((only,))
    return snapshot(schema, leaves.snapshot())


def _check_averages(model: Any, found: State, only: Any) -> None:
    schema = found.schema
    if not len(schema):
        whole = _tracked_leaves(model, ...).schema
        raise FilterError(
            f"only={to_filter(only)!r} takes no leaf of the model, so there is nothing "
            "to average. Write a kind that the model has, such as only=Param."
            + path_hints(whole, (to_filter(only),))
        )
    bad = [
        f"{schema.describe(i)}: {describe(value)}"
        for i, value in enumerate(found.values_list())
        if schema.kinds[i] is None
        or not all(_is_inexact(x) for x in jax.tree.leaves(value))
    ]
    if bad:
        raise FilterError(
            f"only={to_filter(only)!r} takes leaves that are no Variables, or neither "
            f"floating nor complex, and so have no average:\n{listing(bad)}\n"
            "Narrow it, as in only=Param."
        )


def _is_inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(dtype(x), jnp.inexact))


def _widened(x: Any) -> Any:
    return jnp.asarray(x, wide(dtype(x)))


def _rounded(mean: Any, old: Any) -> Any:
    return mean if mean.dtype == dtype(old) else mean.astype(dtype(old))


def _check_paths(tracked: Schema, found: Schema, *, wider: bool) -> None:
    if found.paths == tracked.paths:
        return
    rows = [
        f"missing: {tracked.describe(i)}"
        for i, path in enumerate(tracked.paths)
        if path not in found.index
    ]
    if wider:
        rows += [
            f"not tracked: {found.describe(i)}"
            for i, path in enumerate(found.paths)
            if path not in tracked.index
        ]
    if rows:
        raise UpdateError(
            f"the model's leaves are not those that the EMA tracks:\n{listing(rows)}\n"
            "Pass the model that the EMA was made from, or make a new EMA."
        )


def _check_shapes(schema: Schema, olds: list[Any], news: list[Any]) -> None:
    rows = [
        f"{schema.describe(i)} is {describe(old)}, found {describe(new)}"
        for i, (old, new) in enumerate(zip(olds, news, strict=True))
        if jax.tree.map(jnp.shape, old) != jax.tree.map(jnp.shape, new)
    ]
    if rows:
        raise UpdateError(
            "the model's leaves have other shapes than those that the EMA tracks:\n"
            f"{listing(rows)}\nMake a new EMA after changing a shape."
        )
