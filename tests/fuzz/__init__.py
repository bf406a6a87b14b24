"""Random programs, run three ways; ``python -m tests.fuzz --help``."""
