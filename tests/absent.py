"""What tests share that compile for GPUs and TPUs that are absent."""

import importlib.util

import pytest

from sf_jax.models import wan
from sf_jax.perf.chips import chip_of
from sf_jax.perf.devices import CUDA_PLUGINS

# heads of the kernels' own width
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
# what compiled programs call the fused attention
KERNELS = {"h100:4": ("__cudnn$fmhaSoftmax",), "v6e:2x2": ("tpu_custom_call", "splash_mha")}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


needs_libtpu = pytest.mark.skipif(not _installed("libtpu"), reason="needs the extra aot (libtpu's compiler)")
needs_cuda = pytest.mark.skipif(
    not any(map(_installed, CUDA_PLUGINS)), reason="needs the extra gpu_aot (the compiler of JAX's CUDA plugin)"
)


def on(target: str, *values):
    """A slow case for devices that can be compiled for where their compiler is installed."""
    compiler = needs_libtpu if chip_of(target).platform == "tpu" else needs_cuda
    return pytest.param(target, *values, marks=(pytest.mark.aot, pytest.mark.slow, compiler))
