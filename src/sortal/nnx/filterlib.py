"""The filters, by NNX's module name."""

from sortal._engine.paths import Path
from sortal.filters import All as All
from sortal.filters import Any_, to_filter
from sortal.filters import Everything as Everything
from sortal.filters import Filter as Filter
from sortal.filters import Not as Not
from sortal.filters import Nothing as Nothing
from sortal.filters import OfType as OfType
from sortal.filters import PathContains as PathContains
from sortal.filters import PathIn as PathIn
from sortal.filters import WithTag as WithTag

Any, PathParts, to_predicate = Any_, Path, to_filter
