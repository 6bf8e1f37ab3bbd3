"""Full-size generation compiled for TPUs that are not there."""

import importlib.util

import pytest

from benchmarks.tpu_memory import measure
from sf_jax.inference import ahead


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the [aot] extra (libtpu's compiler)")
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_a_chunk_of_the_full_size_student_fits_a_chip(topology):
    text, chunk = measure(topology, ahead.PROGRAMS[:2])
    assert text.memory < chunk.memory < ahead.HBM[topology.split(":")[0]]
    assert chunk.arguments > 8 * 2**30  # the parameters and the whole cache are there


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the [aot] extra (libtpu's compiler)")
def test_an_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="topology v9x:2x2 cannot be had"):
        ahead.tpu_mesh("v9x:2x2")
