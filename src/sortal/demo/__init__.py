"""The program behind ``sortal demo``; a clone shows it as ``examples/digits.py``."""
