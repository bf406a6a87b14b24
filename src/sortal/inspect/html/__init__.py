"""Pictures of models and files: pages of HTML that fetch nothing."""

from sortal.inspect.html.picture import Picture as Picture
from sortal.inspect.html.picture import show as show
