"""Shared code of the tests that compile for GPUs and TPUs that are not attached."""

import importlib.util

import pytest

from sf_jax.models import wan
from sf_jax.perf.chips import chip_of
from sf_jax.perf.devices import CUDA_PLUGINS

# Heads of the kernels' native width.
WIDE = wan.WanConfig(
    dim=512,
    ffn_dim=512,
    num_heads=4,
    num_layers=1,
    text_dim=64,
    text_len=128,
    freq_dim=64,
    dtype="bfloat16",
)
TARGETS = ("h100:4", "v6e:2x2")
# Names of the fused attention in compiled programs.
KERNELS = {"h100:4": ("__cudnn$fmhaSoftmax",), "v6e:2x2": ("tpu_custom_call", "splash_mha")}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


needs_libtpu = pytest.mark.skipif(not _installed("libtpu"), reason="needs the extra aot (libtpu's compiler)")
needs_cuda = pytest.mark.skipif(
    not any(map(_installed, CUDA_PLUGINS)), reason="needs the extra gpu_aot (the compiler of JAX's CUDA plugin)"
)


def on(target: str, *values):
    """A slow case for a target; skipped if the target's compiler is not installed."""
    compiler = needs_libtpu if chip_of(target).platform == "tpu" else needs_cuda
    return pytest.param(target, *values, marks=(pytest.mark.aot, pytest.mark.slow, compiler))
