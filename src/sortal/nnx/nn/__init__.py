"""Layers, in files named as NNX names them."""

from sortal.nn import *  # noqa: F403
from sortal.nnx.nn import activations as activations
from sortal.nnx.nn import attention as attention
from sortal.nnx.nn import dtypes as dtypes
from sortal.nnx.nn import initializers as initializers
from sortal.nnx.nn import linear as linear
from sortal.nnx.nn import lora as lora
from sortal.nnx.nn import normalization as normalization
from sortal.nnx.nn import recurrent as recurrent
from sortal.nnx.nn import stochastic as stochastic
