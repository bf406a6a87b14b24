"""Several processes as one program, on JAX's distributed runtime."""

from sortal.distributed.batches import shard_batch as shard_batch
from sortal.distributed.meeting import barrier as barrier
from sortal.distributed.same import assert_same as assert_same
from sortal.distributed.starting import initialize as initialize
