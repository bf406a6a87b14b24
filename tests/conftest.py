"""What every test shares: the device, and how examples are generated."""

import gc
import os

# Read once, when JAX is imported; an accelerator is asked for by naming it outside.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

# Programs that made what is kept here, with packages that the tests do not need.
collect_ignore_glob = ["data/*"]

# Meshes and replicas need several devices, also where there is one.
jax.config.update("jax_num_cpu_devices", 8)

# The first call of anything compiles, so no example has a typical duration. A failure
# in continuous integration must come back on the next run; at home, new examples.
_SLOW = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, suppress_health_check=_SLOW
)
hypothesis.settings.register_profile(
    "home", deadline=None, max_examples=50, suppress_health_check=_SLOW
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "home")


def pytest_collection_finish():
    """Spares the garbage collector what all tests need until the end."""
    gc.freeze()


@pytest.fixture(scope="module")
def compiled_quickly():
    """Spends no time on fast code, where only which operations are done is tested."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # or later tests would compare bits of programs compiled so
