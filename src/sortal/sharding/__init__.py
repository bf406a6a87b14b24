"""Partition specs by kind, and names for the axes of arrays."""
