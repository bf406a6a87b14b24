"""The programs behind ``sortal demo`` and ``sortal generate``."""
