"""sortal.nn.lora, by NNX's module name."""

from sortal.nn.lora import *  # noqa: F403
