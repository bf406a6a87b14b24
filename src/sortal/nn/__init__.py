"""Layers, activations, pooling and initialisers under the names of NNX."""

from sortal.nn import activations as activations
from sortal.nn import dtypes as dtypes
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
from sortal.nn.stochastic import Dropout as Dropout
