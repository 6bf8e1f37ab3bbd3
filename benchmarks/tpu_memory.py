"""Memory per TPU chip of full-size generation, from libtpu's compiler; no TPU is needed.

  JAX_PLATFORMS=cpu python -m benchmarks.tpu_memory --topology=v5p:2x2x1 --topology=v6e:2x2

Wan2.1-T2V-1.3B, 480x832, 21 latent frames (81 frames), 4 steps, chunks of 3, a video per chip, bfloat16, the whole
cache (no window). Together is what a chip holds while the program runs; the arguments of the others stay beside it.
The decoder takes a compiler minutes; JAX_OPTIMIZATION_LEVEL=O1 JAX_MEMORY_FITTING_LEVEL=O1 makes that seconds.
"""

import argparse

from sf_jax import rollout as ro
from sf_jax.inference import ahead
from sf_jax.inference.sampling import Sampling
from sf_jax.models.vae import WanVae, param_shapes, wan_vae
from sf_jax.models.wan import wan_1_3b
from sf_jax.topology import chip_of


def measure(topology: str, only=ahead.PROGRAMS) -> list[ahead.Compiled]:
    """Compiles the programs for a topology."""
    config = wan_1_3b(dtype="bfloat16", attention="splash", remat="none")
    rollout = ro.RolloutConfig(context_noise="none")
    vae = wan_vae(dtype="bfloat16")
    return ahead.compile_generation(
        config, rollout, WanVae(vae), param_shapes(vae), Sampling(), ahead.tpu_mesh(topology), only
    )


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", action="append", default=None)
    print("| topology | HBM, GiB | program | arguments, GiB | temporary, GiB | together, GiB | compiled in, s |")
    print("|---|---|---|---|---|---|---|")
    for topology in parser.parse_args().topology or ["v5p:2x2x1", "v6e:2x2"]:
        for row in measure(topology):
            sizes = " | ".join(f"{size / 2**30:.2f}" for size in (row.arguments, row.temporary, row.memory))
            hbm = chip_of(topology).memory / 2**30
            print(f"| {topology} | {hbm:.0f} | {row.program} | {sizes} | {row.seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
