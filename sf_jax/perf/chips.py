"""The chips that programs can be compiled for: memory, arithmetic, bandwidth and links per chip."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's specifications, from its vendor's data sheet.

    Attributes:
      platform: "tpu" or "gpu", as in JAX.
      memory: bytes available to a program.
      flops: dense bfloat16 operations per second.
      bandwidth: memory bandwidth in bytes per second.
      links: bytes per second sent over all links to other chips of the slice or machine.
      measured: bfloat16 operations per second that large matmuls reach; None if no measurement is known.
      source: source of the figures.
    """

    platform: str
    memory: int
    flops: float
    bandwidth: float
    links: float
    measured: float | None
    source: str

    @property
    def products(self) -> float:
        """Operations per second of large matmuls; without a measurement, the H100's share of the peak."""
        return self.measured or self.flops * ASSUMED_SHARE


# Measurements: https://github.com/stas00/ml-engineering, "Maximum Achievable Matmul FLOPS". There an H100 reaches 794.5
# of 989 TFLOP/s, rounded to 800 here; the H200 has the same processor.
ASSUMED_SHARE = 800 / 989
_TPU = "https://cloud.google.com/tpu/docs/{}"
_NVIDIA = "NVIDIA's data sheet of the {}"
CHIPS = {
    "v4": Chip("tpu", 32 * 2**30, 275e12, 1228e9, 300e9, None, _TPU.format("v4")),
    "v5e": Chip("tpu", 16 * 2**30, 197e12, 819e9, 200e9, None, _TPU.format("v5e")),
    "v5p": Chip("tpu", 95 * 2**30, 459e12, 2765e9, 600e9, None, _TPU.format("v5p")),
    "v6e": Chip("tpu", 32 * 2**30, 918e12, 1640e9, 400e9, None, _TPU.format("v6e")),
    # Memory and bandwidth of GPUs come from XLA's target configurations.
    "a100": Chip("gpu", 85100068864, 312e12, 2039.04e9, 300e9, 271.2e12, _NVIDIA.format("A100 SXM, 80 GB")),
    "h100": Chip("gpu", 84942979072, 989e12, 3352.32e9, 450e9, 800e12, _NVIDIA.format("H100 SXM")),
    "h200": Chip("gpu", 151397597184, 989e12, 4800e9, 450e9, 800e12, _NVIDIA.format("H200 SXM")),
    "b200": Chip("gpu", 191514411008, 2250e12, 7672.32e9, 900e9, 1745e12, _NVIDIA.format("HGX B200")),
    # With float32 accumulation; the links are PCI Express 4.0 x16.
    "rtx4090": Chip("gpu", 25757220864, 165.2e12, 1008e9, 32e9, None, _NVIDIA.format("Ada architecture (white paper)")),
}


def chip_of(target: str) -> Chip:
    """The chip of a target such as "v5p:4x4x4" or "h100:8".

    Raises:
      ValueError: if there is no such chip.
    """
    chip = CHIPS.get(target.split(":")[0])
    if chip is None or ":" not in target:
        tpus, gpus = (", ".join(n for n, c in CHIPS.items() if c.platform == p) for p in ("tpu", "gpu"))
        raise ValueError(
            f"compile_only is {target!r}: it must be one of {tpus}, then :SHAPE, as v5p:4x4x4, or one of {gpus}, "
            "then :COUNT, as h100:1"
        )
    return chip
