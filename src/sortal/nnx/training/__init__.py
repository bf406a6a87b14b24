"""Training, in files named as NNX names them."""

from sortal.nnx.training import ema as ema
from sortal.nnx.training import metrics as metrics
from sortal.nnx.training import optimizer as optimizer
