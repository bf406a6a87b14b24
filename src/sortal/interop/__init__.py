"""Other libraries' objects and files: objects taken as they are, files converted."""

from sortal.interop import flax as flax
