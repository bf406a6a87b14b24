"""sortal.nn.initializers, by NNX's module name."""

from sortal.nn.initializers import *  # noqa: F403
