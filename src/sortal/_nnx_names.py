"""What exists for NNX code alone, by name: the one place where the core knows of it.

``sortal.nnx`` finds its names here, and ``sortal`` says of them where they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sortal.errors import ArgumentError

TABLE = {
    "A": "sortal.nnx.variablelib",
    "Dict": "sortal.nnx.containers",
    "EMA": "sortal.nnx.ema",
    "GraphState": "sortal.nnx.graphlib",
    "List": "sortal.nnx.containers",
    "ModelAndOptimizer": "sortal.nnx.optimizer",
    "Optimizer": "sortal.nnx.optimizer",
    "StateSpecs": "sortal.nnx.transforms",
    "TraceContextError": "sortal.nnx.tracers",
    "VariableMetadata": "sortal.nnx.variablelib",
    "VariableState": "sortal.nnx.variablelib",
    "as_abstract": "sortal.nnx.spmd",
    "cached_partial": "sortal.nnx.partial",
    "capture": "sortal.nnx.capturing",
    "checkpoint": "sortal.nnx.transforms",
    "clone": "sortal.nnx.graphlib",
    "cond": "sortal.nnx.transforms",
    "custom_vjp": "sortal.nnx.transforms",
    "data": "sortal.nnx.pytreelib",
    "eval_shape": "sortal.nnx.transforms",
    "filter_state": "sortal.nnx.statelib",
    "fori_loop": "sortal.nnx.transforms",
    "fork_rngs": "sortal.nnx.rnglib",
    "from_flat_state": "sortal.nnx.statelib",
    "get_abstract_model": "sortal.nnx.spmd",
    "grad": "sortal.nnx.transforms",
    "graphdef": "sortal.nnx.graphlib",
    "iter_children": "sortal.nnx.module",
    "iter_graph": "sortal.nnx.graphlib",
    "iter_modules": "sortal.nnx.module",
    "jit": "sortal.nnx.transforms",
    "jit_partial": "sortal.nnx.partial",
    "jvp": "sortal.nnx.transforms",
    "make_jaxpr": "sortal.nnx.transforms",
    "map_state": "sortal.nnx.statelib",
    "merge": "sortal.nnx.graphlib",
    "merge_state": "sortal.nnx.statelib",
    "register_variable_name": "sortal.nnx.variablelib",
    "remat": "sortal.nnx.transforms",
    "replace_by_pure_dict": "sortal.nnx.statelib",
    "reseed": "sortal.nnx.rnglib",
    "restore_int_paths": "sortal.nnx.statelib",
    "scan": "sortal.nnx.transforms",
    "shard_map": "sortal.nnx.transforms",
    "split": "sortal.nnx.graphlib",
    "split_rngs": "sortal.nnx.rnglib",
    "split_state": "sortal.nnx.statelib",
    "state": "sortal.nnx.graphlib",
    "static": "sortal.nnx.pytreelib",
    "switch": "sortal.nnx.transforms",
    "to_flat_state": "sortal.nnx.statelib",
    "to_pure_dict": "sortal.nnx.statelib",
    "value_and_grad": "sortal.nnx.transforms",
    "variable_name_from_type": "sortal.nnx.variablelib",
    "variable_type_from_name": "sortal.nnx.variablelib",
    "variables": "sortal.nnx.graphlib",
    "view": "sortal.nnx.views",
    "vjp": "sortal.nnx.transforms",
    "vmap": "sortal.nnx.transforms",
    "while_loop": "sortal.nnx.transforms",
}
"""The file of each name of ``sortal.nnx`` that is not the name of ``sortal`` itself."""

MODULES = {
    "bridge": "sortal.nnx.bridge",
    "filterlib": "sortal.nnx.filterlib",
    "graph": "sortal.nnx.graph",
    "graphlib": "sortal.nnx.graphlib",
    "metrics": "sortal.nnx.metrics",
    "module": "sortal.nnx.module",
    "optimizer": "sortal.nnx.optimizer",
    "pytreelib": "sortal.nnx.pytreelib",
    "rnglib": "sortal.nnx.rnglib",
    "spmd": "sortal.nnx.spmd",
    "statelib": "sortal.nnx.statelib",
    "tracers": "sortal.nnx.tracers",
    "transforms": "sortal.nnx.transforms",
    "traversals": "sortal.nnx.traversals",
    "variablelib": "sortal.nnx.variablelib",
}
"""Modules by the names that they have in ``sortal.nnx``."""

KEYWORDS = frozenset({"copy", "graph", "graph_updates"})
"""Keywords that functions of ``sortal.nnx`` take and those of ``sortal`` do not."""


def check_name(name: str) -> None:
    """Says of a name of NNX, asked of ``sortal``, where it is.

    Args:
      name: a name that ``sortal`` has not.

    Raises:
      AttributeError: it is one of NNX.
    """
    if name in TABLE or name in MODULES:
        raise AttributeError(
            f"module 'sortal' has no attribute {name!r}, which exists for NNX code. "
            f"Write `from sortal import nnx`, and nnx.{name}."
        )


def refuse_unknown(
    name: str, options: Iterable[str], known: Collection[str] = ()
) -> None:
    """Refuses keywords that a function does not have.

    Args:
      name: the function.
      options: the keywords given.
      known: those that it has.

    Raises:
      ArgumentError: some are unknown; all are listed.
    """
    unknown = sorted(set(options) - set(known))
    if not unknown:
        return
    of_nnx = [x for x in unknown if x in KEYWORDS]
    hint = (
        f" For NNX code, which passes {' and '.join(of_nnx)}, write `from sortal "
        f"import nnx`, and nnx.{name}."
    )
    raise ArgumentError(
        f"{name} has no option {', '.join(unknown)}.{hint if of_nnx else ''}"
    )
