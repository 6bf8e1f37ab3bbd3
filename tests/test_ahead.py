"""Full-size generation compiled for TPUs that are not there."""

import importlib.util

import jax
import pytest

from benchmarks.tpu_memory import measure
from sf_jax.inference import ahead
from sf_jax.topology import CHIPS

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the [aot] extra (libtpu's compiler)"
)


@pytest.fixture
def quick_compilation():
    """Level O0: the full-size decoder compiles in seconds instead of minutes, to the same memory within a percent."""
    names = ("jax_optimization_level", "jax_memory_fitting_level")
    before = {name: getattr(jax.config, name) for name in names}
    for name in names:
        jax.config.update(name, "O0")
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v6e:2x2"])  # the chip with the least memory
def test_full_size_generation_fits_a_chip(topology, quick_compilation):
    text, chunk, *frames = measure(topology)
    hbm = CHIPS[topology.split(":")[0]].memory
    assert text.memory < chunk.memory < hbm
    assert chunk.arguments > 8 * 2**30  # the parameters and the whole cache are there
    for frame in frames:  # the transformer's arguments stay while frames are decoded
        assert 2**30 < frame.memory < hbm - chunk.arguments
    assert len(frames) == 2


@needs_libtpu
def test_an_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="topology v9x:2x2 cannot be had"):
        ahead.tpu_mesh("v9x:2x2")
