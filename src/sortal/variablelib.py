"""Variables and kinds, where NNX code looks for them."""

from sortal.annotations import VariableMetadata as VariableMetadata
from sortal.annotations import with_metadata as with_metadata
from sortal.kind_names import register_variable_name as register_variable_name
from sortal.kind_names import variable_name_from_type as variable_name_from_type
from sortal.kind_names import variable_type_from_name as variable_type_from_name
from sortal.mesh_axes import use_eager_sharding as use_eager_sharding
from sortal.mesh_axes import using_eager_sharding as using_eager_sharding
from sortal.variable import BatchStat as BatchStat
from sortal.variable import Cache as Cache
from sortal.variable import Intermediate as Intermediate
from sortal.variable import Param as Param
from sortal.variable import Perturbation as Perturbation
from sortal.variable import Variable as Variable
from sortal.variable import VariableState as VariableState
