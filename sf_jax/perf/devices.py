"""Ahead-of-time compilation targets: TPU slices (libtpu's compiler) and GPUs (the compiler of JAX's CUDA plugin).

`pip install "sf_jax[aot]"` installs the first, `pip install "sf_jax[gpu_aot]"` the second; neither needs a device.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from sf_jax.perf.chips import chip_of

# Without these variables, libtpu asks a metadata server about its machine.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}
GPUS_PER_MACHINE, MAX_GPUS = 8, 1024
CUDA_PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


@dataclasses.dataclass(frozen=True)
class _Gpu:
    """Properties of a GPU that XLA's compiler needs.

    Attributes:
      title: the driver's name for it.
      capability: CUDA compute capability (major, minor).
      extended: whether it has architecture-specific instructions ("a" after the capability).
      cores: streaming multiprocessors.
      units: float32 units per core.
      threads: maximum threads per core.
      shared: bytes of shared memory per core.
      shared_of_block: bytes of shared memory available to one block.
      cache: bytes of L2 cache.
      clock: clock rate in GHz.
    """

    title: str
    capability: tuple[int, int]
    extended: bool
    cores: int
    units: int
    threads: int
    shared: int
    shared_of_block: int
    cache: int
    clock: float


# Source: xla/backends/gpu/target_config/specs of openxla/xla. The RTX 4090 is missing there: NVIDIA's Ada white paper,
# and the limits of capability 8.9 in the CUDA C++ programming guide.
_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), False, 108, 64, 2048, 167936, 166912, 41943040, 1.41),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), True, 132, 128, 2048, 233472, 232448, 52428800, 1.98),
    "h200": _Gpu("NVIDIA H200 141GB HBM3e", (9, 0), True, 132, 128, 2048, 233472, 232448, 52428800, 1.98),
    "b200": _Gpu("NVIDIA B200", (10, 0), True, 148, 128, 2048, 233472, 232448, 132644864, 1.965),
    "rtx4090": _Gpu("NVIDIA GeForce RTX 4090", (8, 9), False, 128, 128, 1536, 102400, 101376, 75497472, 2.52),
}
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: {threads} core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_of_block}
  cuda_compute_capability {{ major: {major} minor: {minor} {extension} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{title}"
"""


def devices_of(target: str) -> Sequence[jax.Device]:
    """The devices of a target: "v5p:2x2x1" is a TPU slice, "h100:8" is a machine with eight GPUs.

    Raises:
      ValueError: if the target does not exist, or its compiler is not installed.
    """
    return _gpus(target) if chip_of(target).platform == "gpu" else _tpus(target)


def gpu_config(name: str) -> str:
    """The target configuration of a GPU in `CHIPS`, in the text format of XLA's GpuTargetConfigProto."""
    gpu, chip = _GPUS[name], chip_of(f"{name}:1")
    major, minor = gpu.capability
    extension = "feature_extension: ACCELERATED_FEATURES" if gpu.extended else ""
    fields = dataclasses.asdict(gpu) | {"major": major, "minor": minor, "extension": extension}
    return _CONFIG.format(bandwidth=round(chip.bandwidth), memory=chip.memory, **fields)


def _gpus(target: str) -> Sequence[jax.Device]:
    name, count = target.split(":", 1)
    number = int(count) if re.fullmatch(r"[0-9]{1,4}", count) else 0
    machines, rest = divmod(number, GPUS_PER_MACHINE)
    if not 1 <= number <= MAX_GPUS or (machines and rest and number > GPUS_PER_MACHINE):
        raise ValueError(
            f"compile_only is {target!r}: {name} must have a number of GPUs, 1 to {GPUS_PER_MACHINE}, or machines of "
            f"{GPUS_PER_MACHINE}, up to {MAX_GPUS}, as {name}:{GPUS_PER_MACHINE}"
        )
    if not any(_installed(plugin) for plugin in CUDA_PLUGINS):
        raise ValueError(
            f"compile_only is {target!r}: JAX's CUDA plugin, whose compiler needs no GPU, is not installed: "
            "pip install 'sf_jax[gpu_aot]', and set JAX_PLATFORMS=cpu where there is no GPU"
        )
    shape = f"1x1x{number}" if number <= GPUS_PER_MACHINE else f"1x{machines}x{GPUS_PER_MACHINE}"
    options = {"target_config": gpu_config(name), "topology": shape}
    return _describe(target, "gpu_aot", platform="cuda", topology_name=shape, **options)


def _tpus(target: str) -> Sequence[jax.Device]:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return _describe(target, "aot", platform="tpu", topology_name=target)


def _describe(target: str, extra: str, **options) -> Sequence[jax.Device]:
    try:
        return topologies.get_topology_desc(**options).devices
    except Exception as error:  # compilers raise exceptions of many types
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"compile_only {target} cannot be had ({reason}): give another shape, or pip install 'sf_jax[{extra}]'"
        ) from error


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
