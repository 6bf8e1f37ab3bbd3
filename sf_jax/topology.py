"""TPUs that are not there, for compiling ahead of time: libtpu's compiler runs on any machine.

`pip install "sf_jax[aot]"`; no TPU is needed.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

# libtpu asks a metadata server about the machine it is on unless it is told
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, from the vendor's documentation.

    Attributes:
      memory: bytes of HBM.
      flops: dense bfloat16 operations a second.
      bandwidth: bytes a second of HBM.
      links: bytes a second that a chip sends over all its links to others of the slice.
    """

    memory: int
    flops: float
    bandwidth: float
    links: float


CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1228e9, 300e9),
    "v5e": Chip(16 * 2**30, 197e12, 819e9, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9, 400e9),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5p:4x4x4".

    Raises:
      ValueError: if its generation is not known.
    """
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise ValueError(f"topology is {topology!r}: it must be one of {', '.join(CHIPS)}, then :SHAPE, as v5p:4x4x4")
    return CHIPS[name]


def tpu_devices(topology: str) -> Sequence[jax.Device]:
    """The chips of a TPU slice such as "v5p:2x2x1".

    Raises:
      ValueError: if libtpu is missing or does not know the topology.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of libtpu, which raises whatever it likes
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"topology {topology} cannot be had ({reason}): pip install 'sf_jax[aot]'") from error
