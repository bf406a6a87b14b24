"""sortal.nn.linear, by NNX's module name."""

from sortal.nn.linear import *  # noqa: F403
