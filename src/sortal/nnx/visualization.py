"""Objects shown in a notebook, by NNX's module name."""

from sortal.inspect.display import display as display
