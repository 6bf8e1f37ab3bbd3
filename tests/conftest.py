"""One cache of compiled programs for a whole test run, including child processes; models that many tests share."""

import os
import signal
import tempfile

import pytest


def pytest_configure(config):
    """Sets the cache in environment variables, which xdist's workers and the commands under test inherit.

    Also stops ignoring SIGINT, which a shell sets to ignored where it starts pytest in the background; child processes
    inherit this.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("XLA_FLAGS", "")  # commands compile as the tests do, on every CPU
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    config.compiled = tempfile.TemporaryDirectory(prefix="sf_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"


def pytest_unconfigure(config):
    """Removes the cache, in the process that created it."""
    if hasattr(config, "compiled"):
        config.compiled.cleanup()


@pytest.fixture(autouse=True)
def needs_gpu(request):
    """Skips tests marked `gpu` on machines without one."""
    if request.node.get_closest_marker("gpu") is not None:
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def digits():
    """The shipped student."""
    from sf_jax import load_pipeline  # lazy, as JAX reads the cache's folder from the environment

    return load_pipeline()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Wan model folder."""
    from tests.wan_folder import make_folder

    return make_folder(tmp_path_factory.mktemp("models") / "wan")
