"""Rules: what may be said of a leaf for each pipeline, and how it prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sortal._engine.statics import is_hashable
from sortal.errors import PolicyError, listing


class _UnsetType:
    """The type of ``UNSET``."""

    def __repr__(self) -> str:
        return "-"

    def __reduce__(self) -> str:
        return "UNSET"


UNSET: Any = _UnsetType()
"""Stands where a Rule gives no answer."""


# ------------------------------------------------------------------ what may be said
class Column(NamedTuple):
    """What answers a column takes, in code and in words, and one to show."""

    fits: Callable[[Any], bool]
    due: str
    example: str


def _is_axis(x: Any) -> bool:
    return not isinstance(x, (bool, float, str))


def _is_reduction(x: Any) -> bool:
    return x is None or callable(x) or _among("mean", "sum", "max", "min")(x)


def _is_spec(x: Any) -> bool:
    known = (jax.sharding.PartitionSpec, jax.sharding.Sharding)
    return x is None or isinstance(x, known)


def _is_transformation(x: Any) -> bool:
    # A factory that nobody called, such as `optax.adam` itself, has neither.
    parts = (getattr(x, "init", None), getattr(x, "update", None))
    return x is None or (all(map(callable, parts)) and not isinstance(x, type))


def _is_dtype(x: Any) -> bool:
    try:
        jnp.dtype(jnp.float32 if x is None else x)
    except TypeError:
        return False
    return True


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
        _is_spec, "a PartitionSpec, a Sharding or None", "PartitionSpec('data')"
    ),
    "role": Column(lambda x: isinstance(x, str) and bool(x), "a word", "'carry'"),
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
    "dtype": Column(_is_dtype, "a dtype such as jnp.bfloat16, or None", "jnp.float32"),
}


def fault(name: str, answer: Any) -> str:
    """What is wrong with an answer.

    Args:
      name: the column.
      answer: what was given there.

    Returns:
      The answer and what is due; empty where nothing is wrong.

    Example:
      >>> fault("reduce", "avarage")[:32], fault("reduce", "mean")
      ("reduce='avarage', where 'mean', ", '')
    """
    column = COLUMNS[name]
    if not column.fits(answer):
        return f"{name}={answer!r:.80}, where {column.due} is due"
    if not is_hashable(answer):
        return f"{name}={answer!r:.80}, which cannot be hashed"
    return ""


@dataclass(frozen=True, kw_only=True, repr=False)
class Rule:
    """What becomes of some leaves in each pipeline; what is not given is not answered.

    Args:
      axis: the axis that ``vmap`` or ``scan`` maps over: an int, None for what all
        replicas share, or in ``scan`` also ``Carry``.
      reduce: what becomes of a leaf of axis None that replicas write with different
        values: ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, or a function from the
        values, stacked along axis 0, to one. None refuses such a write.
      spec: a ``PartitionSpec`` or ``Sharding``; None leaves it to JAX.
      role: a word for what the leaf is in a loop.
      checkpoint: ``"keep"``, ``"drop"``, or ``"keep-last"`` for the newest one only.
      donate: whether the buffer may be given away to a compiled function.
      optimizer: the optax transformation that trains the leaf, or None for frozen.
      trainable: False freezes the leaf whatever its optimizer.
      dtype: the dtype that the leaf should have; None leaves it as it is.

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
    role: Any = UNSET
    checkpoint: Any = UNSET
    donate: Any = UNSET
    optimizer: Any = UNSET
    trainable: Any = UNSET
    dtype: Any = UNSET

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
        given = (f"{name}={written(name, answer)}" for name, answer in self.given())
        return f"Rule({', '.join(given)})"


# -------------------------------------------------------------------- answers as text
def written(name: str, answer: Any) -> str:
    """An answer as it was written, or nearly.

    Args:
      name: the column.
      answer: what is said there.

    Returns:
      The text.

    Example:
      >>> written("spec", jax.sharding.PartitionSpec(None, "model"))
      "P(None, 'model')"
    """
    if isinstance(answer, jax.sharding.PartitionSpec):
        return f"P({', '.join(map(repr, answer))})"
    if isinstance(answer, jax.sharding.NamedSharding):
        return f"NamedSharding({written(name, answer.spec)})"
    if answer is None or answer is UNSET:
        return repr(answer)
    if name == "optimizer":
        return long_name(answer)
    if name == "dtype":
        return jnp.dtype(answer).name
    if callable(answer):
        return getattr(answer, "__qualname__", repr(answer))
    return repr(answer)


# Of optax's, round every transformation of a chain; its name tells nobody anything.
_WRAPPER = "with_extra_args_support"


def short_name(tx: Any) -> str:
    """What made an optax transformation, as far as it shows.

    Args:
      tx: the transformation. It does not know its own name: ``optax.adamw`` returns
        what ``optax.chain`` made.

    Returns:
      The name of the function or class.

    Example:
      >>> import optax
      >>> short_name(optax.adamw(1e-3)), short_name(optax.set_to_zero())
      ('chain', 'set_to_zero')
    """
    return _factory(tx.update) or type(tx).__name__


def _factory(update: Any) -> str:
    return getattr(update, "__qualname__", "").partition(".")[0]


def long_name(tx: Any) -> str:
    """The name with those of the transformations inside, such as a chain's.

    Args:
      tx: an optax transformation.

    Returns:
      The names, nested as the transformations are.

    Example:
      >>> import optax
      >>> long_name(optax.chain(optax.set_to_zero(), optax.scale(0.1)))
      'chain(set_to_zero, scale)'
    """
    return _made_of(tx.update) or type(tx).__name__


def _made_of(update: Any, depth: int = 4) -> str:
    name = _factory(update)
    # Transformations are closures and keep no other trace of what they are made of.
    cells = getattr(update, "__closure__", None) or ()
    inside = [u for cell in cells for u in _updates(cell)] if depth else []
    parts = [text for u in inside if (text := _made_of(u, depth - 1))]
    if name == _WRAPPER and len(parts) == 1:
        return parts[0]
    return f"{name}({', '.join(parts)})" if parts else name


def _updates(cell: Any) -> list[Any]:
    try:
        held = cell.cell_contents
    except ValueError:  # not filled yet
        return []
    items = held if isinstance(held, tuple) and not _updates_by(held) else (held,)
    return [f for x in items if (f := _updates_by(x)) is not None]


def _updates_by(x: Any) -> Any:
    """The update function that ``x`` is or has; None where it is something else."""
    if hasattr(x, "init") and callable(getattr(x, "update", None)):
        return x.update
    return x if callable(x) and "update" in getattr(x, "__name__", "") else None
