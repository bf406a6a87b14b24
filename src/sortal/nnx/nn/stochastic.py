"""sortal.nn.stochastic, by NNX's module name."""

from sortal.nn.stochastic import *  # noqa: F403
