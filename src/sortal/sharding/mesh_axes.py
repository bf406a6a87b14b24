"""Partition specs from names of array axes, and new arrays put on a mesh."""

from __future__ import annotations

import contextlib
import contextvars
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.sharding import NamedSharding, PartitionSpec

from sortal._engine.jax_compat import ArrayImpl, outside_traces, varying_axes
from sortal._engine.statics import PLACEMENT
from sortal.errors import ArgumentError, ShardingError, listing

Rules = tuple[tuple[str, Any], ...]

# JAX keeps compiled programs by these, since what is traced depends on them.
_rules: Any = jax.make_user_context(())
_rules_seen: Any = jax.make_user_context(())
_mapped: Any = jax.make_user_context(False)
_eager: contextvars.ContextVar[bool] = contextvars.ContextVar("eager", default=True)


@contextlib.contextmanager
def logical_axis_rules(rules: Any) -> Iterator[None]:
    """Maps names of array axes to mesh axes, within a ``with`` block.

    Args:
      rules: pairs of a name and a mesh axis, a tuple of mesh axes, or None.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> names = {"out_sharding": ("embed", "mlp"), "eager_sharding": False}
      >>> kernel = nnx.Param(jnp.ones((2, 4)), **names)
      >>> with nnx.logical_axis_rules([("mlp", "model"), ("embed", None)]):
      ...     list(nnx.spmd.get_var_pspec(kernel))
      [None, 'model']
    """
    with _rules(_pairs(rules)):
        yield


@contextlib.contextmanager
def more_rules(rules: Any) -> Iterator[None]:
    """Adds to the rules in force, within a ``with`` block; two may not disagree."""
    given = _pairs(rules)
    _joined(_rules.value, given)
    with _rules((*_rules.value, *given)):
        yield


def _pairs(rules: Any) -> Rules:
    pairs = ((name, axis) for name, axis, *_ in rules)
    return tuple((n, tuple(x) if isinstance(x, list) else x) for n, x in pairs)


def mapped_over(declared: bool) -> Any:
    """A ``with`` block for functions of parts of leaves, some with specs of the whole.

    Compiled functions that are called in it leave all leaves where they are.
    """
    return _mapped(_mapped.value or declared)


def in_shard_map() -> bool:
    """Whether arrays are the parts that devices have inside of ``jax.shard_map``."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def varying_along(axes: frozenset[Any], x: Any) -> Any:
    """A value inside of shard_map, which may differ along more mesh axes."""
    more = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, more, to="varying") if more else x


def in_mapped() -> bool:
    """Whether specs may speak of arrays of which only parts are here."""
    return _mapped.value


@contextlib.contextmanager
def use_eager_sharding(value: bool, /) -> Iterator[None]:
    """Sets, within a ``with`` block, whether new Variables are put on the mesh.

    Outside of such a block they are put there if their metadata names their axes and
    there is a mesh.

    Args:
      value: whether they are.

    Example:
      >>> import sortal as nnx
      >>> with nnx.use_eager_sharding(False):
      ...     nnx.using_eager_sharding()
      False
    """
    token = _eager.set(bool(value))
    try:
        yield
    finally:
        _eager.reset(token)


def using_eager_sharding() -> bool:
    """Whether new Variables are put on the mesh where their metadata names axes.

    Returns:
      True, except within ``use_eager_sharding(False)``.

    Example:
      >>> import sortal as nnx
      >>> nnx.using_eager_sharding()
      True
    """
    return _eager.get()


def in_force() -> tuple[Any, ...]:
    """The current settings of the ``with`` blocks of this file and of Flax's."""
    return _rules.value, _rules_of_flax(), _eager.get(), _mapped.value


def spec_of(names: Any, rules: Any = ()) -> PartitionSpec:
    """The partition spec for names of axes; a name without a rule is a mesh axis.

    The rules are those given here, of ``logical_axis_rules`` and of Flax.
    """
    spec = names.spec if isinstance(names, NamedSharding) else names
    known = _joined(_rules.value, _rules_of_flax(), tuple(rules or ()))
    return PartitionSpec(*(_on_mesh(name, known) for name in spec))


def own_spec(metadata: Mapping[str, Any]) -> Any:
    """What a Variable's own metadata says of its spec; None where it says nothing.

    That is its ``spec``, or else the names of axes in its ``out_sharding``, of which
    those that have a rule become mesh axes.
    """
    declared = metadata.get("spec")
    if declared is not None:
        return declared
    names = metadata.get("out_sharding")
    if not names or isinstance(names, Format):
        return None
    return spec_of(names, metadata.get("sharding_rules") or ())


def declared(kind: Any, metadata: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The mesh and the spec that a leaf is to keep when a compiled function writes it.

    It is where ``shard`` put the leaf, or else what its metadata or kind declares, on
    the mesh of its metadata or of ``jax.set_mesh``; None where there is no such mesh,
    and for parts of leaves, inside of ``mapped_over(True)`` and ``shard_map``. Whether
    the mesh has the spec's axes is not looked at.
    """
    if _mapped.value or in_shard_map():
        return None
    put_there = metadata.get(PLACEMENT)
    if put_there is not None:
        return put_there.mesh, short(put_there.spec)
    spec = own_spec(metadata)
    if spec is None:
        spec = getattr(kind, "options", {}).get("spec")
    mesh: Any = metadata.get("mesh") or getattr(spec, "mesh", None)
    if spec is None or not isinstance(spec, (PartitionSpec, NamedSharding)):
        return None
    if mesh is None:
        mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else (mesh, getattr(spec, "spec", spec))


def declared_sharding(kind: Any, metadata: Mapping[str, Any]) -> NamedSharding | None:
    """The sharding that is made of what a leaf has ``declared``."""
    found = declared(kind, metadata)
    return found and NamedSharding(*found)


def short(spec: Any) -> PartitionSpec:
    """A spec without Nones at its end, which say nothing."""
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def axes_of(spec: PartitionSpec) -> Iterator[tuple[int, str]]:
    """Pairs of dimension and mesh axis."""
    for dimension, entry in enumerate(spec):
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if isinstance(axis, str):
                yield dimension, axis


def spec_fault(
    shape: tuple[int, ...], spec: PartitionSpec, sizes: dict[str, int]
) -> str:
    """Why an array of ``shape`` cannot have ``spec``; empty where it can."""
    axes = list(axes_of(spec))
    unknown = [axis for _, axis in axes if axis not in sizes]
    if unknown:
        return f"the mesh has no axis {', '.join(map(repr, dict.fromkeys(unknown)))}"
    names = [axis for _, axis in axes]
    twice = sorted({axis for axis in names if names.count(axis) > 1})
    if twice:
        return f"the axis {', '.join(map(repr, twice))} stands there twice"
    if len(spec) > len(shape):
        return f"the spec has {len(spec)} entries for {len(shape)} dimensions"
    for dimension, n in enumerate(shape):
        parts = math.prod(sizes[axis] for d, axis in axes if d == dimension)
        if n % parts:
            return f"dimension {dimension}, {n}, cannot be divided by {parts}"
    return ""


def show_sizes(sizes: Mapping[Any, int]) -> str:
    """The axes of a mesh with their sizes, for messages."""
    return ", ".join(f"{axis!r}: {n}" for axis, n in sizes.items())


def put(value: Any, sharding: NamedSharding) -> Any:
    """``value`` with a sharding, inside of a trace or outside."""
    mesh = sharding.mesh
    if mesh.are_all_axes_explicit:
        return jax.sharding.reshard(value, sharding)
    return jax.lax.with_sharding_constraint(value, sharding)


def put_apart(
    values: Sequence[Any], shardings: Sequence[Any], stays: Any = False
) -> list[Any]:
    """Copies of values elsewhere, which share no memory with them.

    An array that shares a buffer is deleted with the one that a call donates; and a
    call on several devices that donates one buffer twice ends the process.

    Args:
      values: arrays, or small pytrees of them.
      shardings: one for each.
      stays: which of them are not copied, for they are there.

    Returns:
      The copies.
    """
    pairs = zip(values, shardings, strict=True)
    apart = [jax.tree.map(lambda x, s=s: _apart(x, s), value) for value, s in pairs]
    return jax.device_put(apart, list(shardings), may_alias=stays)


def _apart(x: Any, sharding: Any) -> Any:
    """A copy where `may_alias` makes none: of what comes to more or fewer devices."""
    if not isinstance(x, ArrayImpl):
        return x
    here, there = x.sharding.device_set, sharding.device_set
    if here == there or here.isdisjoint(there):
        return x
    same = x.sharding.shard_shape(x.shape) == sharding.shard_shape(x.shape)
    return jnp.copy(x) if same else x


def _on_mesh(name: Any, rules: Mapping[str, Any]) -> Any:
    return rules.get(name, name) if isinstance(name, str) else name


def _rules_of_flax() -> Rules:
    # Rules can be set in Flax only after its module was imported.
    of_flax = sys.modules.get("flax.core.spmd")
    return _pairs(of_flax.get_logical_axis_rules()) if of_flax else ()


def unseen_rules() -> Any:
    """A ``with`` block for a call under rules of Flax, which JAX keeps programs by.

    None where they are those of the block around it, such as none at all.
    """
    of_flax = sys.modules.get("flax.core.spmd")
    if of_flax is None:
        return None
    given, seen = of_flax.get_logical_axis_rules(), _rules_seen.value
    if not given and not seen:
        return None
    rules = _pairs(given)
    return None if rules == seen else _rules_seen(rules)


def _joined(*several: Rules) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    bad = []
    for rules in several:
        # Within one list the last rule for a name holds, as in Flax NNX.
        for name, axis in dict(rules).items():
            if joined.setdefault(name, axis) != axis:
                bad.append(f"{name!r}: {joined[name]!r} and {axis!r}")
    if bad:
        raise ArgumentError(
            "two rules give one name of an axis different mesh axes; found:\n"
            f"{listing(bad)}\nGive each name one rule, in logical_axis_rules or in the "
            "metadata sharding_rules."
        )
    return joined


def placed(value: Any, metadata: Mapping[str, Any]) -> Any:
    """A new Variable's value, put on the mesh if its metadata asks for it.

    ``out_sharding`` names the axes and ``sharding_rules`` maps the names to mesh axes.
    ``mesh`` is the mesh; that of ``jax.set_mesh`` if absent. With
    ``eager_sharding=False``, without names or without a mesh the value is returned.
    """
    names = metadata.get("out_sharding")
    eager = metadata.get("eager_sharding")
    if not names or not (_eager.get() if eager is None else eager):
        return value
    if isinstance(names, Format):
        return jax.lax.with_sharding_constraint(value, names)
    mesh: Any = metadata.get("mesh") or getattr(names, "mesh", None)
    if mesh is None and outside_traces():
        mesh = jax.sharding.get_mesh()  # with devices, to which JAX moves any value
    if mesh is None or mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _concrete(value):
        return value
    spec = spec_of(names, metadata.get("sharding_rules"))
    if not (mesh.are_all_axes_explicit or mesh.are_all_axes_auto):
        raise ArgumentError(
            "a Variable can be put on a mesh whose axes are all Explicit or all Auto; "
            f"found {mesh.axis_types}. Pass eager_sharding=False and place it yourself."
        )
    sizes = dict(mesh.shape)
    for x in jax.tree.leaves(value):
        if fault := spec_fault(jnp.shape(x), spec, sizes):
            raise ShardingError(
                f"a new Variable of shape {list(jnp.shape(x))} has the names of axes "
                f"{tuple(getattr(names, 'spec', names))!r}, by which it is to be "
                f"divided over the mesh ({show_sizes(sizes)}) as {spec}, but "
                f"{fault}. Give each name a rule with logical_axis_rules or "
                "sharding_rules=, or the Variable another shape, or eager_sharding="
                "False."
            )
    return put(value, NamedSharding(mesh, spec))


def _concrete(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
