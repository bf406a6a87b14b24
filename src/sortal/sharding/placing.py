"""Models on a mesh: specs by kind, checked before anything moves, and then kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from sortal._engine.jax_compat import outside_traces
from sortal._engine.leaves import Slot, store_all
from sortal._engine.plan import Plan, bind
from sortal._engine.state import State, snapshot
from sortal._engine.statics import PLACEMENT
from sortal._engine.variable import check_writable, describe
from sortal.errors import ShardingError, TraceError, listing
from sortal.policy.policy import Policy
from sortal.policy.rule import format_answer
from sortal.sharding.mesh_axes import in_mapped, put, put_apart, use_eager_sharding
from sortal.sharding.resolution import (
    UNRULED,
    Resolved,
    at_full_rank,
    check_specs,
    refuse_fixed,
    resolve,
)
from sortal.transforms.compile import eval_shape

M = TypeVar("M")


class OnMesh(NamedTuple):
    """A model's plan and values, with the spec of each leaf on a mesh."""

    plan: Plan
    values: Sequence[Any]
    found: list[Resolved]
    mesh: Any

    def shardings(self) -> list[NamedSharding]:
        """The sharding of each leaf."""
        return [NamedSharding(self.mesh, spec) for spec, _ in self.found]


def on_mesh(model: Any, mesh: Any, policy: Any, rules: Any) -> OnMesh:
    """The specs of a model on a mesh, checked.

    Args:
      model: a Module, State, or container of Modules and Variables.
      mesh: the mesh; that of ``jax.set_mesh`` if None.
      policy: a Policy, or a mapping of filter to Rule, or None.
      rules: pairs of a name of an axis and a mesh axis.

    Returns:
      An OnMesh.

    Raises:
      ShardingError: there is no mesh, or specs do not fit; all are listed.
      PolicyError: a kind or a Variable has an answer that is no spec.
    """
    mesh = _given_mesh(mesh)
    plan = bind(model)
    schema, values = plan.graphdef.schema, plan.values()
    found = resolve(schema, values, policy, mesh, plan.view, rules)
    check_specs(schema, values, [spec for spec, _ in found], mesh)
    return OnMesh(plan, values, found, mesh)


def _given_mesh(mesh: Any) -> Any:
    """The mesh, or that of ``jax.set_mesh``: with its devices, outside of traces."""
    if mesh is None and outside_traces():
        mesh = jax.sharding.get_mesh()
    if mesh is None or (isinstance(mesh, Mesh) and mesh.empty):
        mesh = jax.sharding.get_abstract_mesh()
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise ShardingError(
            f"a mesh is a jax.sharding.Mesh; found {describe(mesh)}. Write "
            "shard(model, mesh, policy)."
        )
    if mesh.empty:
        raise ShardingError(
            "there is no mesh; pass mesh=, or call it within jax.set_mesh(mesh)."
        )
    return mesh


def _given_devices(mesh: Any) -> Mesh:
    """A mesh of devices; refuses one that has none."""
    mesh = _given_mesh(mesh)
    if isinstance(mesh, AbstractMesh):
        raise ShardingError(
            f"an AbstractMesh has no devices to put a model on; found {mesh}. Pass the "
            "jax.sharding.Mesh; inside of a compiled function write constrain(model, "
            "policy)."
        )
    return mesh


def specs(
    model: Any, policy: Any = None, *, mesh: Mesh | None = None, rules: Any = ()
) -> State:
    """The partition spec of each leaf.

    Metadata of the Variable (``spec``, or the names of axes in ``out_sharding``) comes
    first, then the first row of the Policy that takes the leaf, then the option
    ``spec`` of the kind, then where ``shard`` put it; all else is replicated, ``P()``.
    Optimizer state has the spec of its parameter, unless a row takes it that does not
    take the parameter.

    Args:
      model: a Module, real or abstract, a State, or a container of these.
      policy: a Policy, or a mapping of filter to Rule.
      mesh: the mesh, where specs depend on it.
      rules: pairs of a name of an axis and a mesh axis, beside those of
        ``logical_axis_rules``.

    Returns:
      A State with a ``PartitionSpec`` in the place of each value.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: a spec is a function of the mesh, and there is none.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> import sortal
      >>> model = sortal.Linear(2, 4, rngs=sortal.Rngs(0))
      >>> policy = {sortal.At("kernel"): sortal.Rule(spec=P(None, "model"))}
      >>> sortal.specs(model, policy)["kernel"].value == P(None, "model")
      True
    """
    plan = bind(model)
    schema, values = plan.graphdef.schema, plan.values()
    found = resolve(schema, values, policy, mesh, plan.view, rules)
    return snapshot(schema, [spec for spec, _ in found])


def named_shardings(
    model: Any, mesh: Mesh | None = None, policy: Any = None, *, rules: Any = ()
) -> State:
    """The sharding of each leaf on a mesh, checked.

    Args:
      model: a Module, real or abstract, a State, or a container of these.
      mesh: the mesh; that of ``jax.set_mesh`` if absent.
      policy: a Policy, or a mapping of filter to Rule.
      rules: as of ``specs``.

    Returns:
      A State with a ``NamedSharding`` in the place of each value.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: there is no mesh, or specs do not fit; all are listed.

    Example:
      >>> import jax
      >>> import sortal
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> model = sortal.Linear(2, 4, rngs=sortal.Rngs(0))
      >>> list(sortal.named_shardings(model, mesh)["kernel"].value.spec)
      []
    """
    found = on_mesh(model, mesh, policy, rules)
    return snapshot(found.plan.graphdef.schema, found.shardings())


def shard(
    model: M, mesh: Mesh | None = None, policy: Any = None, *, rules: Any = ()
) -> M:
    """Puts a model on a mesh, in place: all of it, or nothing.

    Each Variable keeps its sharding in its metadata, so that compiled functions which
    write it return it with the same. Shard a model and its optimizer in one call, as
    ``shard((model, optimizer), mesh, policy)``.

    Args:
      model: a Module, or a container of Modules and Variables.
      mesh: the mesh; that of ``jax.set_mesh`` if absent.
      policy: a Policy, or a mapping of filter to Rule; see ``specs`` for the order.
      rules: as of ``specs``.

    Returns:
      The model.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: there is no mesh, specs do not fit their leaves or the mesh, raw
        arrays cannot be written, or rows of the Policy have specs and none takes a
        leaf; all are listed and nothing is moved.
      TraceError: it is called inside a transform.

    Example:
      >>> import jax
      >>> from jax.sharding import PartitionSpec as P
      >>> import sortal
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> model = sortal.Linear(2, 4, rngs=sortal.Rngs(0))
      >>> rule = sortal.Rule(spec=P(None, "data"))
      >>> _ = sortal.shard(model, mesh, {sortal.At("kernel"): rule})
      >>> list(model.kernel.sharding.spec)
      [None, 'data']
    """
    if not outside_traces():
        raise TraceError(
            "shard inside a transform has no arrays yet to put on devices. Write "
            "constrain(model, policy, mesh=mesh) there, or shard(model, mesh, policy) "
            "before the call; a model is built on a mesh by init_sharded(fn, mesh, "
            "policy)."
        )
    found = on_mesh(model, _given_devices(mesh), policy, rules)
    _check_takes(found, policy)
    _check_places(found.plan)
    shardings = found.shardings()
    _store(found.plan, _placed(found.values, shardings), shardings)
    return model


def _placed(values: Sequence[Any], shardings: list[NamedSharding]) -> list[Any]:
    """The values where they belong; what lies there already is not copied.

    Across processes JAX places NumPy's arrays, and refuses those that differ between
    processes. It refuses keys, though, and what it makes of a process's own array
    cannot be read where each process has one device.
    """
    given = list(values)
    if all(s.is_fully_addressable for s in shardings):
        stays = [_lies_at(x, s) for x, s in zip(given, shardings, strict=True)]
        return put_apart(given, shardings, stays)
    placed = jax.device_put(jax.tree.map(_on_host, given), shardings)
    return jax.tree.map(_as_keys, placed, given)


def _lies_at(x: Any, sharding: NamedSharding) -> bool:
    return isinstance(x, jax.Array) and x.committed and x.sharding == sharding


def _on_host(x: Any) -> Any:
    words = jax.random.key_data(x) if _is_key(x) else x
    whole = getattr(words, "is_fully_addressable", True)
    return np.asarray(words) if whole else words


def _as_keys(x: Any, like: Any) -> Any:
    if not _is_key(like):
        return x
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _check_takes(found: OnMesh, policy: Any) -> None:
    """Refuses a Policy by which every leaf would stay or go to every device."""
    rows = Policy({} if policy is None else policy).all_answers("spec")
    schema = found.plan.graphdef.schema
    if rows and len(schema) and {by for _, by in found.found} <= {UNRULED, "placement"}:
        raise ShardingError(
            f"no row of the Policy takes any of the {len(schema)} leaves:\n"
            + listing(map(schema.describe, range(len(schema))))
            + "\nMend its filters; shard(model, mesh) puts all on every device."
        )


def _check_places(plan: Plan) -> None:
    leaves = enumerate(plan.leaves)
    stuck = [i for i, x in leaves if type(x) is Slot and not x.writable]
    refuse_fixed(plan.graphdef.schema, stuck)
    check_writable(plan.leaves)


def _store(plan: Plan, values: Sequence[Any], shardings: Sequence[Any]) -> None:
    """Writes values, and into the metadata of Variables where they are to stay."""
    store_all([plan.leaves], values)
    metadata = plan.graphdef.schema.metadata
    found = map(at_full_rank, shardings, values)
    for leaf, old, sharding in zip(plan.leaves, metadata, found, strict=True):
        if type(leaf) is not Slot and old.get(PLACEMENT) != sharding:
            leaf.set_metadata({**old, PLACEMENT: sharding})


def constrain(
    model: M, policy: Any = None, *, mesh: Mesh | None = None, rules: Any = ()
) -> M:
    """Constrains the leaves of a model to their specs, inside of a compiled function.

    Args:
      model: a Module, or a container of Modules and Variables.
      policy: a Policy, or a mapping of filter to Rule; see ``specs`` for the order.
      mesh: the mesh; that of ``jax.set_mesh`` if absent.
      rules: as of ``specs``.

    Returns:
      The model.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: there is no mesh, specs do not fit, or inside of a map they may
        speak of whole arrays; all are listed.
      TraceError: the model belongs to another trace than the current one.

    Example:
      >>> import jax
      >>> from jax.sharding import PartitionSpec as P
      >>> import sortal
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> policy = {sortal.Param: sortal.Rule(spec=P("data"))}
      >>> @sortal.jit
      ... def double(w):
      ...     w[...] *= 2
      ...     sortal.constrain(w, policy, mesh=mesh)
      >>> w = sortal.Param(jax.numpy.ones(2))
      >>> double(w)
      >>> w.value.tolist()
      [2.0, 2.0]
    """
    found = on_mesh(model, mesh, policy, rules)
    _check_places(found.plan)
    if in_mapped():
        _check_rows(found)
    pairs = zip(found.values, found.shardings(), strict=True)
    store_all(
        [found.plan.leaves],
        [jax.tree.map(lambda x, s=sharding: put(x, s), v) for v, sharding in pairs],
    )
    return model


def _check_rows(found: OnMesh) -> None:
    """Refuses specs of wholes for parts; a row of a Policy speaks of what is here."""
    schema = found.plan.graphdef.schema
    bad = [
        f"{schema.describe(i)}: {format_answer('spec', spec)}, by {by}"
        for i, (spec, by) in enumerate(found.found)
        if spec and not by.startswith("row")
    ]
    if bad:
        raise ShardingError(
            "inside of a map these specs may speak of whole arrays, and only parts are "
            f"here:\n{listing(bad)}\nName the axis of the map, as in vmap(f, "
            "transform_metadata={nnx.PARTITION_NAME: 'layers'}), or give the parts "
            "specs by rows of a Policy."
        )


def init_sharded(
    fn: Callable[[], M],
    mesh: Mesh | None = None,
    policy: Any = None,
    *,
    rules: Any = (),
) -> M:
    """Builds a model on a mesh; no device and no host holds an array of it whole.

    ``fn`` is traced for its shapes, and then run as one compiled program whose outputs
    lie where they belong. Arrays that it makes outside of JAX are constants of it.

    Args:
      fn: takes nothing, returns a Module, or a tuple such as a model and its optimizer.
      mesh: the mesh; that of ``jax.set_mesh`` if absent.
      policy: a Policy, or a mapping of filter to Rule; see ``specs`` for the order.
      rules: as of ``specs``.

    Returns:
      What ``fn`` returns.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: specs do not fit their leaves or the mesh; all are listed.

    Example:
      >>> import jax
      >>> from jax.sharding import PartitionSpec as P
      >>> import sortal
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> policy = {sortal.At("kernel"): sortal.Rule(spec=P(None, "data"))}
      >>> make = lambda: sortal.Linear(2, 4, rngs=sortal.Rngs(0))
      >>> list(sortal.init_sharded(make, mesh, policy).kernel.sharding.spec)
      [None, 'data']
    """
    mesh = _given_devices(mesh)
    # What does not fit is refused below by path, and not where it is made.
    with jax.set_mesh(mesh), use_eager_sharding(False):
        model = eval_shape(fn)
        found = on_mesh(model, mesh, policy, rules)
        _check_places(found.plan)
        shardings = found.shardings()
        _store(found.plan, making(fn, shardings)(), shardings)
    return model


def making(fn: Callable[[], Any], shardings: Sequence[NamedSharding]) -> Any:
    """The compiled program that gives the values of what ``fn`` builds, in order."""
    return jax.jit(lambda: bind(fn()).values(), out_shardings=shardings)


def abstract(
    fn: Callable[[], M],
    mesh: Mesh | None = None,
    policy: Any = None,
    *,
    rules: Any = (),
) -> M:
    """Builds a model without arrays: shapes, dtypes and, on a mesh, shardings.

    Args:
      fn: takes nothing, returns a Module, or a tuple of them.
      mesh: the mesh, which may be a ``jax.sharding.AbstractMesh``; without it the
        arrays have no sharding.
      policy: a Policy, or a mapping of filter to Rule; see ``specs`` for the order.
      rules: as of ``specs``.

    Returns:
      What ``fn`` returns, with ``jax.ShapeDtypeStruct`` in the place of arrays.

    Raises:
      ArgumentError: two rules give one name of an axis different mesh axes.
      PolicyError: a kind or a Variable has an answer that is no spec.
      ShardingError: specs do not fit their leaves or the mesh; all are listed.

    Example:
      >>> import sortal
      >>> model = sortal.abstract(lambda: sortal.Linear(2, 4, rngs=sortal.Rngs(0)))
      >>> model.kernel.value
      ShapeDtypeStruct(shape=(2, 4), dtype=float32)
    """
    with use_eager_sharding(False):
        model = eval_shape(fn)
    if mesh is None:
        return model
    found = on_mesh(model, mesh, policy, rules)
    _check_places(found.plan)
    pairs = zip(found.values, found.shardings(), strict=True)
    values = [
        jax.tree.map(
            lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), v
        )
        for v, sharding in pairs
    ]
    store_all([found.plan.leaves], values)
    return model
