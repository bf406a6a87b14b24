"""Metrics: running averages and statistics in Variables, usable under ``jit``."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from sortal._engine.leaves import store_all
from sortal._engine.plan import bind
from sortal._engine.promotion import mixing, wide
from sortal._engine.variable import Variable, describe, value_of
from sortal.errors import ArgumentError, listing
from sortal.functional import split
from sortal.module import Pytree


class MetricState(Variable):
    """What a metric has accumulated since its last reset."""


class Metric(Pytree):
    """Base of metrics; a subclass has ``update``, ``compute`` and ``reset``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> class Largest(nnx.Metric):
      ...     def __init__(self):
      ...         self.found = nnx.metrics.MetricState(-jnp.inf)
      ...     def reset(self):
      ...         self.found.value = -jnp.inf
      ...     def update(self, *, values, **_):
      ...         self.found.value = jnp.maximum(self.found.value, values.max())
      ...     def compute(self):
      ...         return self.found.value
      >>> largest = Largest()
      >>> largest.update(values=jnp.array([1.0, 3.0]))
      >>> float(largest.compute())
      3.0
    """

    def __init__(self) -> None:
        if type(self) is Metric:
            raise NotImplementedError(
                "Metric is the base of metrics. Derive a class with __init__, update, "
                "compute and reset."
            )

    def reset(self) -> None:
        """Discards everything accumulated.

        Raises:
          NotImplementedError: the subclass has no ``reset``.
        """
        raise NotImplementedError(_lacks(self, "reset"))

    def update(self, **kwargs: Any) -> None:
        """Adds one batch.

        Args:
          **kwargs: what the metric needs, by keyword.

        Raises:
          NotImplementedError: the subclass has no ``update``.
        """
        raise NotImplementedError(_lacks(self, "update"))

    def compute(self) -> Any:
        """The metric of everything accumulated.

        Returns:
          An array, or a pytree of arrays.

        Raises:
          NotImplementedError: the subclass has no ``compute``.
        """
        raise NotImplementedError(_lacks(self, "compute"))

    def split(self, *filters: Any) -> tuple[Any, ...]:
        """The GraphDef and States of this metric; see ``sortal.split``.

        Args:
          *filters: together they must take every leaf; everything if absent.

        Returns:
          ``(graphdef, state, ...)``.
        """
        return split(self, *filters)


def _lacks(metric: Metric, method: str) -> str:
    return f"{type(metric).__name__} is a Metric and must define {method}()."


class Average(Metric):
    """The average of all values.

    Args:
      argname: the keyword under which ``update`` takes the values.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> loss = nnx.metrics.Average("loss")
      >>> loss.update(loss=jnp.array([1.0, 2.0]))
      >>> loss.update(loss=6.0)
      >>> float(loss.compute())
      3.0
    """

    def __init__(self, argname: str = "values"):
        self.argname = argname
        self.total = MetricState(jnp.array(0, jnp.float32))
        # Weights add up to count + fraction: whole numbers are counted exactly.
        self.count = MetricState(jnp.array(0, jnp.int32))
        self.fraction = MetricState(jnp.array(0, jnp.float32))

    def reset(self) -> None:
        """Discards all values."""
        self.total.value = jnp.array(0, jnp.float32)
        self.count.value = jnp.array(0, jnp.int32)
        self.fraction.value = jnp.array(0, jnp.float32)

    @mixing
    def update(self, mask: jax.Array | None = None, **kwargs: Any) -> None:
        """Adds values.

        Args:
          mask: which values count, or their weights, of a shape that broadcasts to
            theirs; all if absent. A value of weight 0 may be NaN.
          **kwargs: under ``argname`` an array of any shape, or a number; others are
            left for other metrics.

        Raises:
          ArgumentError: the keyword is missing; values or mask are no real numbers; or
            the mask does not broadcast to the values, or comes with a number.
        """
        values = _keyword(self, self.argname, kwargs)
        if isinstance(values, (int, float)):
            if mask is not None:
                raise ArgumentError(
                    f"a mask needs an array under {self.argname!r}; found the number "
                    f"{values!r}. Write jnp.asarray({self.argname}), or leave mask out."
                )
            self.total[...] += float(values)
            self.fraction[...] += _add(self.count, 1)
        elif mask is None:
            self.total[...] += _sum(_floating(values))
            self.fraction[...] += _add(self.count, values.size)
        else:
            weights = _floating(_broadcast(mask, values))
            kept = jnp.where(weights == 0, 0, _floating(values))
            whole = jnp.floor(weights)
            rest = self.fraction.value + (weights - whole).sum()
            more = jnp.floor(rest)
            self.total[...] += _sum(kept * weights)
            whole = jnp.sum(whole.astype(jnp.int32), dtype=jnp.int32)
            lost = _add(self.count, whole + more.astype(jnp.int32))
            self.fraction.value = (rest - more).astype(jnp.float32) + lost

    @mixing
    def compute(self) -> jax.Array:
        """The average.

        Returns:
          A float32 scalar; NaN where there was no value, or more than 2**31 - 1 of them
          since the last reset.
        """
        return self.total.value / (self.count.value + self.fraction.value)


def _add(count: MetricState, more: Any) -> jax.Array:
    """Adds to a count; gives NaN where an int32 cannot hold the sum, else 0."""
    before = count.value
    count.value = before + more
    return jnp.where(count.value < before, jnp.nan, 0.0)


def _floating(values: Any) -> jax.Array:
    """In float32 or wider, in which sums are exact enough."""
    values = jnp.asarray(values)
    return values.astype(wide(values.dtype))


def _sum(values: jax.Array) -> jax.Array:
    """In float32, as metrics keep it, of values that may be wider."""
    return values.sum().astype(jnp.float32)


def _keyword(metric: Metric, name: str, kwargs: dict[str, Any]) -> Any:
    if name not in kwargs:
        found = ", ".join(map(repr, kwargs)) or "nothing"
        raise ArgumentError(
            f"{type(metric).__name__}.update needs the keyword {name!r}; found {found}."
            f" Write update({name}=...)."
        )
    value: Any = value_of(kwargs[name])
    dtype = getattr(value, "dtype", None)
    if not isinstance(value, (int, float)) and dtype is None:
        raise ArgumentError(
            f"{type(metric).__name__}.update takes an array or a number as {name!r}; "
            f"found a {type(value).__name__}. Write {name}=jnp.asarray(...)."
        )
    if dtype is not None and not _is_real(dtype):
        raise ArgumentError(
            f"{type(metric).__name__}.update takes real numbers as {name!r}; found "
            f"{describe(value)}."
        )
    return value


def _is_real(dtype: Any) -> bool:
    numbers = (jnp.bool_, jnp.integer, jnp.floating)
    return any(jnp.issubdtype(dtype, of) for of in numbers)


def _broadcast(mask: Any, values: Any) -> jax.Array:
    try:
        mask = jnp.asarray(mask)
        real = _is_real(mask.dtype)
    except (TypeError, ValueError):
        real = False
    if not real:
        raise ArgumentError(
            f"the mask holds real numbers or booleans; found {describe(mask)}."
        )
    try:
        return jnp.broadcast_to(mask, values.shape)
    except ValueError:
        raise ArgumentError(
            f"the mask, {describe(mask)}, does not broadcast to the values, "
            f"{describe(values)}. Give it their shape."
        ) from None


@jtu.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """What ``Welford`` computes.

    Args:
      mean: the mean; a float32 scalar, as are the others.
      standard_error_of_mean: the standard deviation over the root of the count.
      standard_deviation: of the values as a whole population.
    """

    mean: jax.Array
    standard_error_of_mean: jax.Array
    standard_deviation: jax.Array


class Welford(Metric):
    """Mean and variance of all values, in one numerically stable pass.

    Args:
      argname: the keyword under which ``update`` takes the values.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> loss = nnx.metrics.Welford()
      >>> loss.update(values=jnp.array([1.0, 3.0]))
      >>> float(loss.compute().mean), float(loss.compute().standard_deviation)
      (2.0, 1.0)
    """

    def __init__(self, argname: str = "values"):
        self.argname = argname
        self.count = MetricState(jnp.array(0, jnp.int32))
        self.mean = MetricState(jnp.array(0, jnp.float32))
        self.m2 = MetricState(jnp.array(0, jnp.float32))

    def reset(self) -> None:
        """Discards all values."""
        self.count.value = jnp.array(0, jnp.int32)
        self.mean.value = jnp.array(0, jnp.float32)
        self.m2.value = jnp.array(0, jnp.float32)

    @mixing
    def update(self, **kwargs: Any) -> None:
        """Adds values.

        Args:
          **kwargs: under ``argname`` an array of any shape, or a number; others are
            left for other metrics.

        Raises:
          ArgumentError: the keyword is missing, or there is a mask.
        """
        if kwargs.get("mask") is not None:
            raise ArgumentError(
                "Welford.update takes no mask, and would count the masked values. Pass "
                "values[mask], or in a MultiMetric mask={name: mask} for the others."
            )
        values = _keyword(self, self.argname, kwargs)
        if isinstance(values, (int, float)):
            # Its weak type does not widen the mean.
            count, mean, variance = 1, float(values), 0.0
        else:
            count, array = values.size, _floating(values)
            if count == 0:
                return
            mean, variance = (
                x.astype(jnp.float32) for x in (array.mean(), array.var())
            )
        before = self.count.value
        lost = _add(self.count, count)
        delta = mean - self.mean.value
        self.mean[...] += delta * count / self.count.value + lost
        between = delta * delta * count * before / self.count.value
        self.m2[...] += variance * count + between + lost

    @mixing
    def compute(self) -> Statistics:
        """The statistics of all values.

        Returns:
          A Statistics; its mean is 0, the rest NaN, where there was no value. All are
          NaN where there were more than 2**31 - 1 of them since the last reset.
        """
        deviation = (self.m2.value / self.count.value) ** 0.5
        return Statistics(
            mean=self.mean.value,
            standard_error_of_mean=deviation / self.count.value**0.5,
            standard_deviation=deviation,
        )


class Accuracy(Average):
    """The fraction of predictions that are right.

    Args:
      threshold: for two classes, the logit from which a prediction is positive; None
        for many classes, where the largest logit is the prediction.
      *args: as for ``Average``.
      **kwargs: as for ``Average``.

    Raises:
      ArgumentError: the threshold is not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> accuracy = nnx.metrics.Accuracy()
      >>> logits = jnp.array([[1.0, 0.0], [1.0, 0.0]])
      >>> accuracy.update(logits=logits, labels=jnp.array([0, 1]))
      >>> float(accuracy.compute())
      0.5
    """

    def __init__(self, threshold: float | None = None, *args: Any, **kwargs: Any):
        if isinstance(threshold, bool) or not isinstance(
            threshold, (int, float, type(None))
        ):
            raise ArgumentError(
                "the threshold must be a Python number, or None for many classes; "
                f"found {describe(threshold)}."
            )
        self.threshold = threshold
        super().__init__(*args, **kwargs)

    @mixing
    def update(  # type: ignore[override]
        self, mask: jax.Array | None = None, **kwargs: Any
    ) -> None:
        """Adds one batch.

        Args:
          mask: which labels count, of a shape that broadcasts to theirs; all if absent.
          **kwargs: ``logits``, floating, of the labels' shape plus one axis for the
            classes (none with a threshold), and ``labels``, of an integer dtype;
            others are left for other metrics.

        Raises:
          ArgumentError: a keyword is missing, the shapes do not fit, or the labels are
            no integers.
        """
        given: Any = (
            jnp.asarray(x) if isinstance(x, (int, float)) else x
            for x in (_keyword(self, name, kwargs) for name in ("logits", "labels"))
        )
        logits, labels = given
        classes = logits.shape if self.threshold is not None else logits.shape[:-1]
        many = self.threshold is None
        if labels.shape != classes or (many and logits.ndim == 0):
            more = "one axis, the classes, more than" if many else "the shape of"
            raise ArgumentError(
                f"logits must have {more} the labels; found logits {describe(logits)} "
                f"and labels {describe(labels)}. "
                + (
                    "Pass class numbers, not one-hot rows; for two classes write "
                    "Accuracy(threshold=...)."
                    if many
                    else "For many classes leave the threshold out."
                )
            )
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ArgumentError(
                f"labels must be integers; found {describe(labels)}. Write "
                "labels.astype(int)."
            )
        labels = jnp.asarray(labels).astype(jnp.int32)
        if many:
            right = jnp.asarray(logits).argmax(axis=-1) == labels
        else:
            right = (logits >= self.threshold) == (labels > 0)
        super().update(mask, **{self.argname: right})


class MultiMetric(Metric):
    """Several metrics that are updated, computed and reset together.

    Args:
      **metrics: metrics by name; each becomes an attribute.

    Raises:
      ArgumentError: a name is that of a method, or a value is no Metric.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> metrics = nnx.MultiMetric(
      ...     accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
      ... )
      >>> logits, labels = jnp.array([[1.0, 0.0]]), jnp.array([0])
      >>> metrics.update(logits=logits, labels=labels, loss=0.5)
      >>> {name: float(x) for name, x in metrics.compute().items()}
      {'accuracy': 1.0, 'loss': 0.5}
    """

    def __init__(self, **metrics: Any):
        bad = [
            f"{name}: the name of a method"
            if hasattr(type(self), name)
            else f"{name}: a {type(metric).__name__}, not a Metric"
            for name, metric in metrics.items()
            if hasattr(type(self), name) or not isinstance(metric, Metric)
        ]
        if bad:
            raise ArgumentError(
                f"MultiMetric takes metrics by name; found:\n{listing(bad)}\n"
                "Write MultiMetric(loss=Average('loss'), accuracy=Accuracy())."
            )
        self._metric_names = tuple(metrics)
        for name, metric in metrics.items():
            setattr(self, name, metric)

    def _metrics(self) -> dict[str, Metric]:
        return {name: getattr(self, name) for name in self._metric_names}

    def reset(self) -> None:
        """Resets all metrics."""
        for metric in self._metrics().values():
            metric.reset()

    def update(self, **updates: Any) -> None:
        """Updates all metrics with the same keywords: all of them, or none.

        Args:
          **updates: the keywords; ``mask`` may be one array for all metrics, or a dict
            of metric name to array.

        Raises:
          ArgumentError: a metric refuses its arguments, or a mask has the name of no
            metric; no metric is changed.
        """
        mask = updates.pop("mask", None)
        unknown = set(mask) - set(self._metric_names) if isinstance(mask, dict) else ()
        if unknown:
            raise ArgumentError(
                f"there is no metric for the mask {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(map(repr, self._metric_names))}."
            )
        plan = bind(self)
        before = plan.values()
        try:
            for name, metric in self._metrics().items():
                mine = mask.get(name) if isinstance(mask, dict) else mask
                metric.update(**updates, **({} if mine is None else {"mask": mine}))
        except Exception:
            store_all([plan.leaves], before)
            raise

    def compute(self) -> dict[str, Any]:
        """Computes all metrics.

        Returns:
          A dict of metric name to result.
        """
        return {name: metric.compute() for name, metric in self._metrics().items()}
