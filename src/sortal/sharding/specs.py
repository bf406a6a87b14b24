"""Partition specs and shardings of models, from the names of their Variables' axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Never

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sortal._engine.annotations import PARTITION_NAME as PARTITION_NAME
from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal._engine.nodes import is_object, is_root
from sortal._engine.schema import Schema
from sortal._engine.variable import Variable, is_variable, make, metadata_of, value_of
from sortal._nnx_names import refuse_unknown
from sortal.functional import merge, split
from sortal.sharding.mesh_axes import declared_sharding
from sortal.sharding.resolution import UNRULED, resolve
from sortal.transforms.compile import eval_shape

_NO_AXES = PartitionSpec()


def get_var_pspec(v: Variable) -> PartitionSpec | None:
    """The partition spec of a Variable's value.

    Args:
      v: the Variable; its metadata ``spec``, the names of axes in its ``out_sharding``
        or the option ``spec`` of its kind say it.

    Returns:
      The spec, of no axes where nothing says it; None where the value is no array.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> w = nnx.Param(jnp.ones(2), sharding=("data",))
      >>> list(nnx.spmd.get_var_pspec(w))
      ['data']
    """
    value = value_of(v)
    schema = Schema.of([()], [type(v)], [metadata_of(v)])
    ((spec, by),) = resolve(schema, [value])
    return _spec_of_raw(value) if by == UNRULED else spec


def get_partition_spec(tree: Any) -> Any:
    """A tree with the partition spec in the place of each value.

    Args:
      tree: a State, a Module, or any pytree of these, Variables and arrays.

    Returns:
      The tree; Variables keep their kinds and metadata. An array of no Variable has
      the spec of no axes.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> w = nnx.Param(jnp.ones((2, 4)), out_sharding=(None, "model"))
      >>> state = nnx.State({"w": w})
      >>> list(nnx.get_partition_spec(state)["w"].value)
      [None, 'model']
    """
    return _map(get_var_pspec, _spec_of_raw, tree)


def _spec_of_raw(x: Any) -> PartitionSpec | None:
    return _NO_AXES if hasattr(x, "shape") else None


def get_named_sharding(tree: Any, mesh: Mesh) -> Any:
    """A tree with the sharding on a mesh in the place of each value.

    Args:
      tree: a State, a Module, or any pytree of these, Variables and arrays.
      mesh: the mesh.

    Returns:
      The tree, as of ``get_partition_spec``, with ``NamedSharding(mesh, spec)``.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
      >>> state = nnx.State({"w": nnx.Param(jnp.ones(2), out_sharding=("data",))})
      >>> list(nnx.get_named_sharding(state, mesh)["w"].value.spec)
      ['data']
    """

    def on_mesh(spec: PartitionSpec | None) -> NamedSharding | None:
        return None if spec is None else NamedSharding(mesh, spec)

    return _map(
        lambda v: on_mesh(get_var_pspec(v)), lambda x: on_mesh(_spec_of_raw(x)), tree
    )


def _map(of: Callable[[Variable], Any], of_raw: Callable[[Any], Any], tree: Any) -> Any:
    """Maps over the Variables and raw leaves of a tree, inside of objects too."""

    def one(x: Any) -> Any:
        if is_variable(x):
            return make(type(x), of(x), metadata_of(x))
        if is_object(x):
            graphdef, state = split(x)
            return merge(graphdef, _map(of, of_raw, state))
        return of_raw(x)

    return jax.tree.map(one, tree, is_leaf=is_root)


def as_abstract(tree: Any, **_unknown: Never) -> Any:
    """A tree of abstract values that have shardings.

    Args:
      tree: a Module or State whose values are ``jax.ShapeDtypeStruct``s, such as
        ``eval_shape`` returns.

    Returns:
      The tree. Where a Variable's metadata or kind says its spec, its value has that
      sharding on the Variable's mesh, or else on that of ``jax.set_mesh``.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
      >>> init = nnx.with_partitioning(nnx.initializers.ones_init(), ("data",), mesh)
      >>> abstract = nnx.eval_shape(
      ...     lambda: nnx.Linear(2, 4, kernel_init=init, rngs=nnx.Rngs(0))
      ... )
      >>> list(nnx.as_abstract(abstract).kernel.value.sharding.spec)
      ['data']
    """
    refuse_unknown("as_abstract", _unknown)

    def with_sharding(v: Variable) -> Any:
        value = value_of(v)
        known = getattr(value, "sharding", None) is not None
        declared = declared_sharding(type(v), metadata_of(v))
        if known or declared is None or not hasattr(value, "dtype"):
            return value
        return _abstract(value, declared)

    return _map(with_sharding, lambda x: x, tree)


def _abstract(value: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)


def get_abstract_model(
    init_fn: Callable[[], Any], mesh: Mesh, **_unknown: Never
) -> tuple[Any, Any]:
    """The GraphDef of a model that is not built, and a State of shapes and shardings.

    Args:
      init_fn: a function of nothing that returns the model.
      mesh: the mesh on which the model is to be.

    Returns:
      ``(graphdef, state)``; the State's values are ``jax.ShapeDtypeStruct``s with the
      sharding on the mesh that follows from the names of their axes.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=auto)
      >>> init = nnx.with_partitioning(nnx.initializers.ones_init(), ("data",))
      >>> make = lambda: nnx.Linear(2, 4, kernel_init=init, rngs=nnx.Rngs(0))
      >>> graphdef, state = nnx.get_abstract_model(make, mesh)
      >>> list(state["kernel"].value.sharding.spec)
      ['data']
    """
    refuse_unknown("get_abstract_model", _unknown)
    with jax.set_mesh(mesh):
        graphdef, state = split(eval_shape(init_fn))
        shardings = get_named_sharding(state, mesh)
    return graphdef, jax.tree.map(_abstract, state, shardings)
