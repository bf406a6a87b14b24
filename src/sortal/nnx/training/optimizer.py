"""Optimizers, by NNX's module name."""

from sortal.nnx.optimizer import *  # noqa: F403
