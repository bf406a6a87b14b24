"""Other libraries' objects and files."""
