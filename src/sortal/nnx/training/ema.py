"""EMA, by NNX's module name."""

from sortal.nnx.ema import EMA as EMA
