"""sortal.nn.dtypes, by NNX's module name."""

from sortal.nn.dtypes import *  # noqa: F403
