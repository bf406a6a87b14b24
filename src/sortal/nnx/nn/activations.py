"""sortal.nn.activations, by NNX's module name."""

from sortal.nn.activations import *  # noqa: F403
