"""Variables and kinds, by NNX's module name."""

from typing import TypeVar

from sortal._engine.annotations import VariableMetadata as VariableMetadata
from sortal._engine.annotations import with_metadata as with_metadata
from sortal._engine.kind_names import (
    register_variable_name as register_variable_name,
)
from sortal._engine.kind_names import (
    variable_name_from_type as variable_name_from_type,
)
from sortal._engine.kind_names import (
    variable_type_from_name as variable_type_from_name,
)
from sortal._engine.variable import BatchStat as BatchStat
from sortal._engine.variable import Cache as Cache
from sortal._engine.variable import Intermediate as Intermediate
from sortal._engine.variable import Param as Param
from sortal._engine.variable import Perturbation as Perturbation
from sortal._engine.variable import Variable as Variable
from sortal.nnx.modes import VarDefaults as VarDefaults
from sortal.nnx.modes import var_defaults as var_defaults
from sortal.sharding.mesh_axes import use_eager_sharding as use_eager_sharding
from sortal.sharding.mesh_axes import using_eager_sharding as using_eager_sharding

A = TypeVar("A")
VariableState = Variable
