"""Partition specs and shardings of models, by NNX's module name."""

from sortal._engine.annotations import PARTITION_NAME as PARTITION_NAME
from sortal._engine.annotations import with_partitioning as with_partitioning
from sortal.nnx.keywords import ignoring
from sortal.sharding import specs
from sortal.sharding.specs import get_named_sharding as get_named_sharding
from sortal.sharding.specs import get_partition_spec as get_partition_spec
from sortal.sharding.specs import get_var_pspec as get_var_pspec

as_abstract = ignoring("graph")(specs.as_abstract)
get_abstract_model = ignoring("graph")(specs.get_abstract_model)
