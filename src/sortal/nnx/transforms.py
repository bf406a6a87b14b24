"""The transforms, with the keywords that NNX code passes to them."""

from __future__ import annotations

from collections.abc import Mapping

from sortal.nnx import checking
from sortal.nnx import general as general
from sortal.nnx.added import add_members
from sortal.nnx.checking import checkify as checkify
from sortal.nnx.checking import pmap as pmap
from sortal.nnx.checking import transform_metadata as transform_metadata
from sortal.nnx.gradients import by_variables, of_grad, of_value_and_grad
from sortal.nnx.keywords import axes, by_position, ignoring, positions
from sortal.nnx.loops import branches_of, fori_loop_of, scan_of, while_loop_of
from sortal.nnx.pullbacks import custom_vjp as custom_vjp
from sortal.transforms import autodiff, control, derivatives, mapping
from sortal.transforms import compile as compiling
from sortal.transforms import remat as rematerialisation
from sortal.transforms import scan as scanning
from sortal.transforms._adapter.prefixes import Carry as Carry
from sortal.transforms._adapter.prefixes import StateAxes as StateAxes
from sortal.transforms._adapter.prefixes import StateSharding as StateSharding
from sortal.transforms.autodiff import DiffState as DiffState

StateSpecs = StateSharding
for _table in (StateAxes, StateSharding):
    _table.map_prefix = checking.map_prefix  # type: ignore[attr-defined]
add_members(StateAxes, checking.MappingNames)
Mapping.register(StateAxes)  # type: ignore[attr-defined]

_transform = ignoring("graph", "graph_updates")
_derivative = ignoring("graph", "graph_updates", empty=("reduce_axes",))

cond = branches_of(_transform(control.cond))
eval_shape = _transform(compiling.eval_shape)
fori_loop = fori_loop_of(_transform(control.fori_loop))
grad = by_position(
    by_variables(_derivative(autodiff.grad), of_grad), "argnums", positions
)
jit = _transform(compiling.jit)
jvp = _transform(derivatives.jvp)
make_jaxpr = _transform(derivatives.make_jaxpr)
remat = _transform(rematerialisation.remat)
scan = by_position(scan_of(_transform(scanning.scan)), "in_axes", axes)
shard_map = _transform(mapping.shard_map)
switch = branches_of(_transform(control.switch))
value_and_grad = by_position(
    by_variables(_derivative(autodiff.value_and_grad), of_value_and_grad),
    "argnums",
    positions,
)
vjp = _derivative(derivatives.vjp)
vmap = by_position(_transform(mapping.vmap), "in_axes", axes)
while_loop = while_loop_of(_transform(control.while_loop))

checkpoint = remat
