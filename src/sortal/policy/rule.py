"""Rule: what each pipeline does with a leaf."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from sortal._engine.statics import is_hashable
from sortal.errors import PolicyError, listing


class _UnsetType:
    """The type of ``UNSET``."""

    def __repr__(self) -> str:
        return "-"

    def __reduce__(self) -> str:
        return "UNSET"


UNSET: Any = _UnsetType()
"""The value of a column in which a Rule gives no answer."""


# ------------------------------------------------------------- what may be answered
class Column(NamedTuple):
    """Which answers a column takes, as a test and as text, and an example."""

    fits: Callable[[Any], bool]
    expected: str
    example: str


def _is_axis(x: Any) -> bool:
    return not isinstance(x, (bool, float, str))


def _is_reduction(x: Any) -> bool:
    return x is None or callable(x) or _among("mean", "sum", "max", "min")(x)


def _is_spec(x: Any) -> bool:
    known = (jax.sharding.PartitionSpec, jax.sharding.Sharding)
    function = callable(x) and not isinstance(x, type)
    return x is None or isinstance(x, known) or function


def _is_transformation(x: Any) -> bool:
    # `optax.adam` without the call is a mistake; it has neither attribute.
    parts = (getattr(x, "init", None), getattr(x, "update", None))
    return x is None or (all(map(callable, parts)) and not isinstance(x, type))


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool)


def _among(*words: str) -> Callable[[Any], bool]:
    return lambda x: isinstance(x, str) and x in words


COLUMNS: dict[str, Column] = {
    "axis": Column(_is_axis, "an int, None or Carry", "0"),
    "reduce": Column(
        _is_reduction,
        "'mean', 'sum', 'max', 'min', a function of the stacked array, or None",
        "'mean'",
    ),
    "spec": Column(
        _is_spec,
        "a PartitionSpec, a Sharding, a function of (shape, mesh), or None",
        "PartitionSpec('data')",
    ),
    "checkpoint": Column(
        _among("keep", "drop", "keep-last"), "'keep', 'drop' or 'keep-last'", "'keep'"
    ),
    "donate": Column(_is_bool, "True or False", "True"),
    "optimizer": Column(
        _is_transformation,
        "an optax transformation such as optax.adam(1e-3), or None for frozen",
        "optax.adam(1e-3)",
    ),
    "trainable": Column(_is_bool, "True or False", "False"),
}


def fault(name: str, answer: Any) -> str:
    """What is wrong with an answer; empty where nothing is.

    Example:
      >>> fault("reduce", "avarage")[:32], fault("reduce", "mean")
      ("reduce='avarage', where 'mean', ", '')
    """
    column = COLUMNS[name]
    if not column.fits(answer):
        return f"{name}={answer!r:.80}, where {column.expected} is expected"
    if not is_hashable(answer):
        return f"{name}={answer!r:.80}, which cannot be hashed"
    return ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Rule:
    """What each pipeline does with some leaves; a column not given has no answer.

    Args:
      axis: the axis that ``vmap`` or ``scan`` maps over: an int, None for what all
        replicas share, or in ``scan`` also ``Carry``.
      reduce: how the different values that replicas write to a leaf of axis None are
        combined: ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, or a function from the
        values, stacked along axis 0, to one. These are whole values: ``"sum"`` counts
        what the leaf held before once for each replica. None refuses such a write.
      spec: a ``PartitionSpec`` or ``Sharding``, or a function of an array's shape and
        a mesh that returns a ``PartitionSpec``; None leaves it to JAX.
      checkpoint: ``"keep"``, ``"drop"``, or ``"keep-last"`` for the newest one only.
      donate: whether the buffer may be donated to a compiled function.
      optimizer: the optax transformation that trains the leaf, or None for frozen.
      trainable: False freezes the leaf whatever its optimizer.

    Raises:
      PolicyError: a value is none of these, or cannot be hashed; all are listed.

    Example:
      >>> import sortal as nnx
      >>> nnx.Rule(axis=None, reduce="mean")
      Rule(axis=None, reduce='mean')
    """

    axis: Any = UNSET
    reduce: Any = UNSET
    spec: Any = UNSET
    checkpoint: Any = UNSET
    donate: Any = UNSET
    optimizer: Any = UNSET
    trainable: Any = UNSET

    def __post_init__(self) -> None:
        faults = [f for name, answer in self.given() if (f := fault(name, answer))]
        if faults:
            raise PolicyError(
                "a Rule says for each pipeline what it can do; found:\n"
                + listing(faults)
            )

    def given(self) -> Iterator[tuple[str, Any]]:
        """The columns that have an answer, and the answers.

        Returns:
          Pairs of name and answer, in the order of the fields.
        """
        for field in dataclasses.fields(self):
            answer = getattr(self, field.name)
            if answer is not UNSET:
                yield field.name, answer

    def __repr__(self) -> str:
        given = (
            f"{name}={format_answer(name, answer)}" for name, answer in self.given()
        )
        return f"Rule({', '.join(given)})"


# -------------------------------------------------------------------- answers as text
def format_answer(name: str, answer: Any) -> str:
    """An answer as code, where it can be; an optax transformation as its type's name.

    Example:
      >>> format_answer("spec", jax.sharding.PartitionSpec(None, "model"))
      "P(None, 'model')"
    """
    if isinstance(answer, jax.sharding.PartitionSpec):
        return f"P({', '.join(map(repr, answer))})"
    if isinstance(answer, jax.sharding.NamedSharding):
        return f"NamedSharding({format_answer(name, answer.spec)})"
    if name == "optimizer" and answer not in (None, UNSET):
        return f"<{type(answer).__name__}>"
    if callable(answer):
        return getattr(answer, "__qualname__", repr(answer))
    return repr(answer)
