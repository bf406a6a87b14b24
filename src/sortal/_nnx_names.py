"""The names that exist for NNX code alone: the only place where the core lists them.

``sortal.nnx`` finds its names here; ``sortal`` names them in its error messages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sortal._late import contents
from sortal.errors import ArgumentError

TABLE = contents(
    {
        "sortal.nnx": (
            "bridge compat filterlib graph graphlib helpers metrics module nn "
            "optimizer proxy_caller pytreelib reprlib rnglib spmd statelib summary "
            "tracers training transforms traversals variablelib visualization"
        ),
        "sortal.nnx.calls": "call",
        "sortal.nnx.capturing": "capture",
        "sortal.nnx.checking": "checkify pmap transform_metadata",
        "sortal.nnx.containers": "Dict List",
        "sortal.nnx.contexts": (
            "MergeContext SplitContext UpdateContext current_update_context "
            "merge_context split_context update_context"
        ),
        "sortal.nnx.ema": "EMA",
        "sortal.nnx.graphlib": (
            "PureState State clone graphdef iter_graph state variables"
        ),
        "sortal.nnx.helpers": "TrainState",
        "sortal.nnx.modes": "set_graph_mode set_graph_updates var_defaults",
        "sortal.nnx.module": "M iter_children iter_modules",
        "sortal.nnx.optimizer": "ModelAndOptimizer Optimizer",
        "sortal.nnx.packing": "GraphState flatten merge split unflatten unpack",
        "sortal.nnx.partial": "cached_partial jit_partial",
        "sortal.nnx.pytreelib": (
            "Data Object Static check_pytree data has_data is_data "
            "register_data_type static"
        ),
        "sortal.nnx.rnglib": "fork_rngs reseed split_rngs with_rngs",
        "sortal.nnx.spmd": "abstract_with_sharding as_abstract get_abstract_model",
        "sortal.nnx.statelib": (
            "filter_state from_flat_state map_state merge_state "
            "replace_by_pure_dict restore_int_paths split_state to_flat_state "
            "to_pure_dict"
        ),
        "sortal.nnx.summary": "tabulate",
        "sortal.nnx.tracers": "TraceContextError",
        "sortal.nnx.transforms": (
            "StateAxes StateSharding StateSpecs checkpoint cond custom_vjp eval_shape "
            "fori_loop grad jit jvp make_jaxpr remat scan shard_map switch "
            "value_and_grad vjp vmap while_loop"
        ),
        "sortal.nnx.trees": "NodeStates from_tree prefix to_tree",
        "sortal.nnx.variablelib": (
            "A VariableMetadata VariableState register_variable_name "
            "variable_name_from_type variable_type_from_name"
        ),
        "sortal.nnx.views": "view view_info with_attributes",
        "sortal.nnx.walks": (
            "as_pure find_duplicates iter_module_children map pure recursive_map "
            "set_metadata vars_as with_vars"
        ),
    }
)
TABLE["object"] = "sortal.nnx.pytreelib"
TABLE["wrappers"] = "sortal.nnx.bridge"
"""Names of ``sortal.nnx`` that are not those of ``sortal``, and what each is."""

ABSENT = {
    "deprecations": "it is a tool of Flax's own source",
    "extract": (
        "it is the inside of Flax's transforms; nnx.to_tree and nnx.from_tree are its "
        "public functions"
    ),
}
"""Names of Flax that ``sortal.nnx`` does not have, and why."""

KEYWORDS = frozenset({"copy", "graph", "graph_updates"})
"""Keywords that functions of ``sortal.nnx`` take and those of ``sortal`` do not."""


def check_name(name: str) -> None:
    """Raises an error that says where a name of NNX is, if ``name`` is one."""
    if name in TABLE:
        raise AttributeError(
            f"module 'sortal' has no attribute {name!r}, which exists for NNX code. "
            f"Write `from sortal import nnx`, and nnx.{name}."
        )


def refuse_unknown(
    name: str, options: Iterable[str], known: Collection[str] = ()
) -> None:
    """Refuses keywords that the function ``name`` does not have."""
    if not options:
        return
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
