"""JAX transforms over modules: thin layers over one adapter."""
