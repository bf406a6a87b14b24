"""Metrics, by NNX's module name."""

from sortal.nnx.metrics import *  # noqa: F403
