"""``python -m sortal`` is the command ``sortal``."""

import sys

from sortal.inspect.cli import main

if __name__ == "__main__":
    sys.exit(main())
