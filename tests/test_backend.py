"""XLA flags that commands set for some CPUs."""

import os

import pytest

from sf_jax import backend

INTEL = "vendor_id : GenuineIntel\nflags : fpu avx2 avx512f avx512dq\n"


@pytest.mark.parametrize(
    ("cpu", "version", "environ", "changes"),
    [
        (INTEL, "0.10.2", {}, True),
        (INTEL, "0.12.0.1", {}, True),
        (INTEL, "0.13.0", {}, False),
        (INTEL, "0.10.2", {"XLA_FLAGS": ""}, False),
        (INTEL, "0.10.2", {"JAX_PLATFORMS": "tpu"}, False),
        (INTEL.replace("avx512f", "avx"), "0.10.2", {}, False),
        (INTEL.replace("GenuineIntel", "AuthenticAMD"), "0.10.2", {}, False),
        (None, "0.10.2", {}, False),
    ],
)
def test_flags_are_set_only_where_they_were_measured(cpu, version, environ, changes, monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "_started", lambda: False)
    installed = backend.jaxlib.__version__
    monkeypatch.setattr(backend.jaxlib, "__version__", version)
    environ = {"JAX_PLATFORMS": "cpu"} | environ
    path, before = tmp_path / "cpuinfo", dict(environ)
    if cpu is not None:
        path.write_text(cpu)
    backend.set_cpu_flags(environ, path)
    assert (environ != before) == changes
    if changes and installed == version:
        backend.check_xla_flags(dict(os.environ) | environ)
