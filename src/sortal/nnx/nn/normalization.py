"""Normalisation of activations and weights, by NNX's module name."""

from sortal.nn.normalization import *  # noqa: F403
from sortal.nn.reparameterization import SpectralNorm as SpectralNorm
from sortal.nn.reparameterization import WeightNorm as WeightNorm
