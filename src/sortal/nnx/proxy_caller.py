"""What ``call`` returns, by NNX's module name."""

from sortal.nnx.calls import ApplyCaller as ApplyCaller
