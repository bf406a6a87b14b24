"""Flax NNX's names: `from sortal import nnx` in the place of `from flax import nnx`.

This package has the names that exist for NNX code alone, and functions that take more
keywords for NNX code. Every other name is that of ``sortal``, the same object.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

import sortal as _sortal
from sortal import _late as _late
from sortal import _nnx_names as _names
from sortal.nnx import flax_errors as _flax_errors
from sortal.nnx import old_names as _old_names
from sortal.nnx import state_names as _state_names

if _TYPE_CHECKING:
    from sortal import *  # noqa: F403
    from sortal.nnx import bridge as bridge
    from sortal.nnx import bridge as wrappers
    from sortal.nnx import compat as compat
    from sortal.nnx import filterlib as filterlib
    from sortal.nnx import graph as graph
    from sortal.nnx import graphlib as graphlib
    from sortal.nnx import helpers as helpers
    from sortal.nnx import metrics as metrics
    from sortal.nnx import module as module
    from sortal.nnx import nn as nn
    from sortal.nnx import optimizer as optimizer
    from sortal.nnx import proxy_caller as proxy_caller
    from sortal.nnx import pytreelib as object
    from sortal.nnx import pytreelib as pytreelib
    from sortal.nnx import reprlib as reprlib
    from sortal.nnx import rnglib as rnglib
    from sortal.nnx import spmd as spmd
    from sortal.nnx import statelib as statelib
    from sortal.nnx import summary as summary
    from sortal.nnx import tracers as tracers
    from sortal.nnx import training as training
    from sortal.nnx import transforms as transforms
    from sortal.nnx import traversals as traversals
    from sortal.nnx import variablelib as variablelib
    from sortal.nnx import visualization as visualization
    from sortal.nnx.calls import call as call
    from sortal.nnx.capturing import capture as capture
    from sortal.nnx.checking import checkify as checkify
    from sortal.nnx.checking import pmap as pmap
    from sortal.nnx.checking import transform_metadata as transform_metadata
    from sortal.nnx.containers import Dict as Dict
    from sortal.nnx.containers import List as List
    from sortal.nnx.contexts import MergeContext as MergeContext
    from sortal.nnx.contexts import SplitContext as SplitContext
    from sortal.nnx.contexts import UpdateContext as UpdateContext
    from sortal.nnx.contexts import current_update_context as current_update_context
    from sortal.nnx.contexts import merge_context as merge_context
    from sortal.nnx.contexts import split_context as split_context
    from sortal.nnx.contexts import update_context as update_context
    from sortal.nnx.ema import EMA as EMA
    from sortal.nnx.graphlib import PureState as PureState
    from sortal.nnx.graphlib import State as State
    from sortal.nnx.graphlib import clone as clone
    from sortal.nnx.graphlib import graphdef as graphdef
    from sortal.nnx.graphlib import iter_graph as iter_graph
    from sortal.nnx.graphlib import state as state
    from sortal.nnx.graphlib import variables as variables
    from sortal.nnx.helpers import TrainState as TrainState
    from sortal.nnx.modes import set_graph_mode as set_graph_mode
    from sortal.nnx.modes import set_graph_updates as set_graph_updates
    from sortal.nnx.modes import var_defaults as var_defaults
    from sortal.nnx.module import M as M
    from sortal.nnx.module import iter_children as iter_children
    from sortal.nnx.module import iter_modules as iter_modules
    from sortal.nnx.optimizer import ModelAndOptimizer as ModelAndOptimizer
    from sortal.nnx.optimizer import Optimizer as Optimizer
    from sortal.nnx.packing import GraphState as GraphState
    from sortal.nnx.packing import flatten as flatten
    from sortal.nnx.packing import merge as merge
    from sortal.nnx.packing import split as split
    from sortal.nnx.packing import unflatten as unflatten
    from sortal.nnx.packing import unpack as unpack
    from sortal.nnx.partial import cached_partial as cached_partial
    from sortal.nnx.partial import jit_partial as jit_partial
    from sortal.nnx.pytreelib import Data as Data
    from sortal.nnx.pytreelib import Object as Object
    from sortal.nnx.pytreelib import Static as Static
    from sortal.nnx.pytreelib import check_pytree as check_pytree
    from sortal.nnx.pytreelib import data as data
    from sortal.nnx.pytreelib import has_data as has_data
    from sortal.nnx.pytreelib import is_data as is_data
    from sortal.nnx.pytreelib import register_data_type as register_data_type
    from sortal.nnx.pytreelib import static as static
    from sortal.nnx.rnglib import fork_rngs as fork_rngs
    from sortal.nnx.rnglib import reseed as reseed
    from sortal.nnx.rnglib import split_rngs as split_rngs
    from sortal.nnx.rnglib import with_rngs as with_rngs
    from sortal.nnx.spmd import abstract_with_sharding as abstract_with_sharding
    from sortal.nnx.spmd import as_abstract as as_abstract
    from sortal.nnx.spmd import get_abstract_model as get_abstract_model
    from sortal.nnx.statelib import filter_state as filter_state
    from sortal.nnx.statelib import from_flat_state as from_flat_state
    from sortal.nnx.statelib import map_state as map_state
    from sortal.nnx.statelib import merge_state as merge_state
    from sortal.nnx.statelib import replace_by_pure_dict as replace_by_pure_dict
    from sortal.nnx.statelib import restore_int_paths as restore_int_paths
    from sortal.nnx.statelib import split_state as split_state
    from sortal.nnx.statelib import to_flat_state as to_flat_state
    from sortal.nnx.statelib import to_pure_dict as to_pure_dict
    from sortal.nnx.summary import tabulate as tabulate
    from sortal.nnx.tracers import TraceContextError as TraceContextError
    from sortal.nnx.transforms import StateAxes as StateAxes
    from sortal.nnx.transforms import StateSharding as StateSharding
    from sortal.nnx.transforms import StateSpecs as StateSpecs
    from sortal.nnx.transforms import checkpoint as checkpoint
    from sortal.nnx.transforms import cond as cond
    from sortal.nnx.transforms import custom_vjp as custom_vjp
    from sortal.nnx.transforms import eval_shape as eval_shape
    from sortal.nnx.transforms import fori_loop as fori_loop
    from sortal.nnx.transforms import grad as grad
    from sortal.nnx.transforms import jit as jit
    from sortal.nnx.transforms import jvp as jvp
    from sortal.nnx.transforms import make_jaxpr as make_jaxpr
    from sortal.nnx.transforms import remat as remat
    from sortal.nnx.transforms import scan as scan
    from sortal.nnx.transforms import shard_map as shard_map
    from sortal.nnx.transforms import switch as switch
    from sortal.nnx.transforms import value_and_grad as value_and_grad
    from sortal.nnx.transforms import vjp as vjp
    from sortal.nnx.transforms import vmap as vmap
    from sortal.nnx.transforms import while_loop as while_loop
    from sortal.nnx.trees import NodeStates as NodeStates
    from sortal.nnx.trees import from_tree as from_tree
    from sortal.nnx.trees import prefix as prefix
    from sortal.nnx.trees import to_tree as to_tree
    from sortal.nnx.variablelib import A as A
    from sortal.nnx.variablelib import VariableMetadata as VariableMetadata
    from sortal.nnx.variablelib import VariableState as VariableState
    from sortal.nnx.variablelib import register_variable_name as register_variable_name
    from sortal.nnx.variablelib import (
        variable_name_from_type as variable_name_from_type,
    )
    from sortal.nnx.variablelib import (
        variable_type_from_name as variable_type_from_name,
    )
    from sortal.nnx.views import view as view
    from sortal.nnx.views import view_info as view_info
    from sortal.nnx.views import with_attributes as with_attributes
    from sortal.nnx.walks import as_pure as as_pure
    from sortal.nnx.walks import find_duplicates as find_duplicates
    from sortal.nnx.walks import iter_module_children as iter_module_children
    from sortal.nnx.walks import map as map
    from sortal.nnx.walks import pure as pure
    from sortal.nnx.walks import recursive_map as recursive_map
    from sortal.nnx.walks import set_metadata as set_metadata
    from sortal.nnx.walks import vars_as as vars_as
    from sortal.nnx.walks import with_vars as with_vars

else:

    def __getattr__(name: str) -> object:
        if name in _names.ABSENT:
            raise AttributeError(f"sortal.nnx has no {name}: {_names.ABSENT[name]}.")
        own = name in _names.TABLE or name.startswith("_")
        if not own and hasattr(_sortal, name):
            globals()[name] = getattr(_sortal, name)
            return globals()[name]
        return _late.load(globals(), name, _names.TABLE)

    def __dir__() -> list[str]:
        native = {name for name in dir(_sortal) if not name.startswith("_")}
        return sorted({*globals(), *_names.TABLE, *native})
