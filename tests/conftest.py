"""One cache of compiled programs for all tests of a run, its worker and child processes included."""

import os
import tempfile


def pytest_configure(config):
    """Sets it by environment variables, which xdist's workers and the commands under test inherit."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    config.compiled = tempfile.TemporaryDirectory(prefix="sf_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


def pytest_unconfigure(config):
    """Removes the cache; only the process that made it has it."""
    if hasattr(config, "compiled"):
        config.compiled.cleanup()
