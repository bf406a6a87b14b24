"""What every test shares: the device, and how examples are generated."""

import atexit
import gc
import itertools
import os
import shutil
import tempfile

# Read once, when JAX is imported; an accelerator is asked for by naming it outside.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# At least a quarter of all programs is compiled more than once: by several workers, in
# processes that tests start, for new functions that say the same. JAX knows a program
# by its code, its options and its own version, and need not compile it again. A folder
# that is named outside keeps the programs for the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="sortal-tests-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A program runs once or twice here, so that it costs more to compile than to run, and
# the way that loops are compiled by default takes three times as long as the one before
# it. XLA ignores the first of these names where it is gone, as in jaxlib 0.12.
# Workers are given what the first process has set.
if "new_fusion_emitters" not in (_flags := os.environ.get("XLA_FLAGS", "")):
    _flags += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_cpu_parallel_codegen_split_count=1"

import hypothesis
import jax
import pytest

# Programs that made what is kept here, with packages that the tests do not need.
collect_ignore_glob = ["data/*"]

# Meshes and replicas need several devices, also where there is one.
jax.config.update("jax_num_cpu_devices", 8)

jax.config.update("jax_disable_most_optimizations", True)

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
    gc.set_threshold(50_000, 20, 20)


_modules = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Spares the collector what JAX has compiled, and searches of it as well."""
    if next(_modules) % 40 == 0:  # or a worker comes to hold gigabytes of programs
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()
