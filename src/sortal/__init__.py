"""Sortal: say what each array is, once; everything else follows from its kind.

The names below are read from their files when first asked for; ``_late`` says where
they are, and this block says the same to type checkers.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from sortal import _late as _late
from sortal import _nnx_names as _nnx_names
from sortal import interop as interop

__version__ = "0.1.0"

if _TYPE_CHECKING:
    from sortal import checkpoint as checkpoint
    from sortal import decoding as decoding
    from sortal import distributed as distributed
    from sortal import errors as errors
    from sortal import module as module
    from sortal import nn as nn
    from sortal import nnx as nnx
    from sortal import sharding as sharding
    from sortal import transforms as transforms
    from sortal._engine.annotations import PARTITION_NAME as PARTITION_NAME
    from sortal._engine.annotations import with_metadata as with_metadata
    from sortal._engine.annotations import with_partitioning as with_partitioning
    from sortal._engine.graphdef import GraphDef as GraphDef
    from sortal._engine.nodes import register_node as register_node
    from sortal._engine.state import FlatState as FlatState
    from sortal._engine.state import State as State
    from sortal._engine.variable import BatchStat as BatchStat
    from sortal._engine.variable import Cache as Cache
    from sortal._engine.variable import Intermediate as Intermediate
    from sortal._engine.variable import OptArray as OptArray
    from sortal._engine.variable import OptState as OptState
    from sortal._engine.variable import OptVariable as OptVariable
    from sortal._engine.variable import Param as Param
    from sortal._engine.variable import Perturbation as Perturbation
    from sortal._engine.variable import RngCount as RngCount
    from sortal._engine.variable import RngKey as RngKey
    from sortal._engine.variable import RngState as RngState
    from sortal._engine.variable import Variable as Variable
    from sortal.checkpoint.manager import Checkpoints as Checkpoints
    from sortal.checkpoint.pending import Saving as Saving
    from sortal.checkpoint.planning import restore_plan as restore_plan
    from sortal.checkpoint.restoring import Restored as Restored
    from sortal.checkpoint.restoring import load_state as load_state
    from sortal.checkpoint.restoring import restore as restore
    from sortal.checkpoint.saving import save as save
    from sortal.errors import SortalError as SortalError
    from sortal.errors import TraceError as TraceError
    from sortal.filters import All as All
    from sortal.filters import Any_ as Any
    from sortal.filters import At as At
    from sortal.filters import Dtyped as Dtyped
    from sortal.filters import Everything as Everything
    from sortal.filters import Filter as Filter
    from sortal.filters import Not as Not
    from sortal.filters import Nothing as Nothing
    from sortal.filters import OfType as OfType
    from sortal.filters import PathContains as PathContains
    from sortal.filters import PathIn as PathIn
    from sortal.filters import Shaped as Shaped
    from sortal.filters import Under as Under
    from sortal.filters import WithTag as WithTag
    from sortal.filters import to_filter as to_filter
    from sortal.functional import clone as clone
    from sortal.functional import graphdef as graphdef
    from sortal.functional import iter_graph as iter_graph
    from sortal.functional import merge as merge
    from sortal.functional import pop as pop
    from sortal.functional import split as split
    from sortal.functional import state as state
    from sortal.functional import update as update
    from sortal.functional import variables as variables
    from sortal.inspect.display import display as display
    from sortal.inspect.html.picture import show as show
    from sortal.inspect.nans import find_nan as find_nan
    from sortal.inspect.text import explain as explain
    from sortal.inspect.text import tabulate as tabulate
    from sortal.module import Module as Module
    from sortal.module import Pytree as Pytree
    from sortal.module import dataclass as dataclass
    from sortal.module import iter_children as iter_children
    from sortal.module import iter_modules as iter_modules
    from sortal.module import set_attributes as set_attributes
    from sortal.nn import initializers as initializers
    from sortal.nn.activations import PReLU as PReLU
    from sortal.nn.activations import celu as celu
    from sortal.nn.activations import elu as elu
    from sortal.nn.activations import gelu as gelu
    from sortal.nn.activations import glu as glu
    from sortal.nn.activations import hard_sigmoid as hard_sigmoid
    from sortal.nn.activations import hard_silu as hard_silu
    from sortal.nn.activations import hard_swish as hard_swish
    from sortal.nn.activations import hard_tanh as hard_tanh
    from sortal.nn.activations import identity as identity
    from sortal.nn.activations import leaky_relu as leaky_relu
    from sortal.nn.activations import log_sigmoid as log_sigmoid
    from sortal.nn.activations import log_softmax as log_softmax
    from sortal.nn.activations import logsumexp as logsumexp
    from sortal.nn.activations import one_hot as one_hot
    from sortal.nn.activations import relu as relu
    from sortal.nn.activations import relu6 as relu6
    from sortal.nn.activations import selu as selu
    from sortal.nn.activations import sigmoid as sigmoid
    from sortal.nn.activations import silu as silu
    from sortal.nn.activations import soft_sign as soft_sign
    from sortal.nn.activations import softmax as softmax
    from sortal.nn.activations import softplus as softplus
    from sortal.nn.activations import standardize as standardize
    from sortal.nn.activations import swish as swish
    from sortal.nn.activations import tanh as tanh
    from sortal.nn.attention import RoPE as RoPE
    from sortal.nn.attention import combine_masks as combine_masks
    from sortal.nn.attention import dot_product_attention as dot_product_attention
    from sortal.nn.attention import (
        dot_product_attention_weights as dot_product_attention_weights,
    )
    from sortal.nn.attention import (
        dot_product_attention_with_rope as dot_product_attention_with_rope,
    )
    from sortal.nn.attention import make_attention_mask as make_attention_mask
    from sortal.nn.attention import make_causal_mask as make_causal_mask
    from sortal.nn.cache import KVCache as KVCache
    from sortal.nn.cache import check_room as check_room
    from sortal.nn.conv import Conv as Conv
    from sortal.nn.conv import ConvTranspose as ConvTranspose
    from sortal.nn.decoder import DecoderAttention as DecoderAttention
    from sortal.nn.decoder import init_cache as init_cache
    from sortal.nn.decoder import reset_cache as reset_cache
    from sortal.nn.embedding import Embed as Embed
    from sortal.nn.initializers import Initializer as Initializer
    from sortal.nn.linear import Einsum as Einsum
    from sortal.nn.linear import Linear as Linear
    from sortal.nn.linear import LinearGeneral as LinearGeneral
    from sortal.nn.lora import LoRA as LoRA
    from sortal.nn.lora import LoRALinear as LoRALinear
    from sortal.nn.lora import LoRAParam as LoRAParam
    from sortal.nn.multihead import MultiHeadAttention as MultiHeadAttention
    from sortal.nn.normalization import BatchNorm as BatchNorm
    from sortal.nn.normalization import GroupNorm as GroupNorm
    from sortal.nn.normalization import InstanceNorm as InstanceNorm
    from sortal.nn.normalization import LayerNorm as LayerNorm
    from sortal.nn.normalization import RMSNorm as RMSNorm
    from sortal.nn.pooling import avg_pool as avg_pool
    from sortal.nn.pooling import max_pool as max_pool
    from sortal.nn.pooling import min_pool as min_pool
    from sortal.nn.pooling import pool as pool
    from sortal.nn.recurrent import GRUCell as GRUCell
    from sortal.nn.recurrent import LSTMCell as LSTMCell
    from sortal.nn.recurrent import OptimizedLSTMCell as OptimizedLSTMCell
    from sortal.nn.recurrent import RNNCellBase as RNNCellBase
    from sortal.nn.recurrent import SimpleCell as SimpleCell
    from sortal.nn.reparameterization import SpectralNorm as SpectralNorm
    from sortal.nn.reparameterization import WeightNorm as WeightNorm
    from sortal.nn.rnn import RNN as RNN
    from sortal.nn.rnn import Bidirectional as Bidirectional
    from sortal.nn.rnn import flip_sequences as flip_sequences
    from sortal.nn.rope import rotary as rotary
    from sortal.nn.sequential import Sequential as Sequential
    from sortal.nn.stochastic import Dropout as Dropout
    from sortal.policy.policy import Policy as Policy
    from sortal.policy.rule import Rule as Rule
    from sortal.random import Rngs as Rngs
    from sortal.random import RngStream as RngStream
    from sortal.random import fork_rngs as fork_rngs
    from sortal.random import reseed as reseed
    from sortal.random import restore_rngs as restore_rngs
    from sortal.random import split_rngs as split_rngs
    from sortal.sharding.mesh_axes import logical_axis_rules as logical_axis_rules
    from sortal.sharding.mesh_axes import use_eager_sharding as use_eager_sharding
    from sortal.sharding.mesh_axes import using_eager_sharding as using_eager_sharding
    from sortal.sharding.placing import abstract as abstract
    from sortal.sharding.placing import constrain as constrain
    from sortal.sharding.placing import init_sharded as init_sharded
    from sortal.sharding.placing import named_shardings as named_shardings
    from sortal.sharding.placing import shard as shard
    from sortal.sharding.placing import specs as specs
    from sortal.sharding.report import assert_sharded as assert_sharded
    from sortal.sharding.report import sharding_report as sharding_report
    from sortal.sharding.specs import as_abstract as as_abstract
    from sortal.sharding.specs import get_abstract_model as get_abstract_model
    from sortal.sharding.specs import get_named_sharding as get_named_sharding
    from sortal.sharding.specs import get_partition_spec as get_partition_spec
    from sortal.sharding.transfer import Transferred as Transferred
    from sortal.sharding.transfer import transfer as transfer
    from sortal.training import metrics as metrics
    from sortal.training.ema import EMA as EMA
    from sortal.training.metrics import Metric as Metric
    from sortal.training.metrics import MultiMetric as MultiMetric
    from sortal.training.optimizer import Optimizer as Optimizer
    from sortal.training.train_state import TrainState as TrainState
    from sortal.transforms._adapter.prefixes import Carry as Carry
    from sortal.transforms._adapter.prefixes import StateAxes as StateAxes
    from sortal.transforms._adapter.prefixes import StateSharding as StateSharding
    from sortal.transforms.autodiff import DiffState as DiffState
    from sortal.transforms.autodiff import grad as grad
    from sortal.transforms.autodiff import value_and_grad as value_and_grad
    from sortal.transforms.compile import eval_shape as eval_shape
    from sortal.transforms.compile import jit as jit
    from sortal.transforms.control import cond as cond
    from sortal.transforms.control import fori_loop as fori_loop
    from sortal.transforms.control import switch as switch
    from sortal.transforms.control import while_loop as while_loop
    from sortal.transforms.custom import custom_jvp as custom_jvp
    from sortal.transforms.custom import custom_vjp as custom_vjp
    from sortal.transforms.derivatives import jvp as jvp
    from sortal.transforms.derivatives import linearize as linearize
    from sortal.transforms.derivatives import make_jaxpr as make_jaxpr
    from sortal.transforms.derivatives import vjp as vjp
    from sortal.transforms.export import Exported as Exported
    from sortal.transforms.export import export as export
    from sortal.transforms.mapping import shard_map as shard_map
    from sortal.transforms.mapping import vmap as vmap
    from sortal.transforms.remat import remat as remat
    from sortal.transforms.retrace import RetraceWarning as RetraceWarning
    from sortal.transforms.retrace import explain_retrace as explain_retrace
    from sortal.transforms.scan import scan as scan
else:

    def __getattr__(name: str) -> object:
        if name not in _late.TABLE:
            _nnx_names.check_name(name)
        return _late.load(globals(), name, _late.TABLE)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_late.TABLE})
