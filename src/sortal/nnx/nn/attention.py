"""sortal.nn.attention and MultiHeadAttention, by NNX's module name."""

from sortal.nn.attention import *  # noqa: F403
from sortal.nn.multihead import MultiHeadAttention as MultiHeadAttention
