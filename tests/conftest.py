"""What every test shares: the device, and how examples are generated."""

import gc
import itertools
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
    gc.set_threshold(50_000, 20, 20)


def _quick(item):
    """Whether a test is content with slow code: an example shows few digits."""
    names = getattr(item, "fixturenames", ())
    return isinstance(item, pytest.DoctestItem) or "compiled_quickly" in names


def pytest_collection_modifyitems(items):
    """Puts what is compiled quickly first: its programs are not those of the rest."""
    items.sort(key=lambda item: not _quick(item))


class _Optimizations:
    """Compiles each test as it asks; a plugin, for examples outside of this folder."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        name, quick = "jax_disable_most_optimizations", _quick(item)
        if jax.config.read(name) == quick:
            return
        jax.config.update(name, quick)
        if not quick:
            jax.clear_caches()  # or bits of programs compiled so would be compared


def pytest_configure(config):
    config.pluginmanager.register(_Optimizations())


_modules = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Spares the collector what JAX has compiled, and searches of it as well."""
    if next(_modules) % 40 == 0:  # or a worker comes to hold gigabytes of programs
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def compiled_quickly():
    """Asks for slow code that is compiled fast, where what is computed is tested.

    Not for tests that compare bits of programs that are compiled differently.
    """
