"""Compiles the programs of `sf_jax.generate` in advance, so that its first start compiles nothing.

    python -m sf_jax.warm
    python -m sf_jax.warm --model=Wan2.1-T2V-1.3B --checkpoint=self_forcing_dmd.pt --window=21

The flags are those of `sf_jax.generate`. Programs depend on the sizes, the chunks and the window, the steps, the number
of videos, and on whether there is an image, a video or a schedule, but not on the prompt or the seed. Wan's weights are
not read, only their names, shapes and types. docs/launching.md says where compiled programs are kept.
"""

import time

import jax
from absl import flags
from tqdm import tqdm

from sf_jax import command, compilation, generate
from sf_jax.inference import batch
from sf_jax.inference.executables import executables

PROMPT = "a 3 moving left"  # for Wan, any prompt would do
_DONE = "{desc}: {elapsed}{postfix}"


def main() -> None:
    """Command line: see the module's docstring.

    Raises:
      ValueError: if no cache is enabled or `compile_only` is given, or as `sf_jax.generate` does.
    """
    if flags.FLAGS.compile_only is not None:
        raise ValueError("compile_only is given: warm compiles for the devices of this machine; give it to generate")
    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache:
        raise ValueError(
            f"no folder for compiled programs: set {compilation.VARIABLE} to one that can be written, and unset "
            "JAX_ENABLE_COMPILATION_CACHE"
        )
    began = time.perf_counter()
    with tqdm(desc="compiling", bar_format=_DONE, disable=None) as bar:
        for done in batch.compile_programs(generate.job(PROMPT), executables()):
            bar.set_postfix_str(f"{done} is ready")
    print(f"compiled in {time.perf_counter() - began:.1f} s; kept in {folder}")


if __name__ == "__main__":
    command.run(main, groups={name: names for name, names in generate.GROUPS.items() if name != "Instead of a video"})
