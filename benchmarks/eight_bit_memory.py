"""Memory savings of 8 bits: bytes of one chunk of Wan2.1-1.3B, compiled for an H100 on a machine without a GPU.

  python -m venv gpu && gpu/bin/pip install -e ".[eight_bit]" "jax[cuda12]"
  JAX_PLATFORMS=cpu gpu/bin/python -m benchmarks.eight_bit_memory --scan_layers           # one block, scanned
  JAX_PLATFORMS=cpu gpu/bin/python -m benchmarks.eight_bit_memory --layers=30             # layers apart, as on GPUs

Three latent frames of 480x832 in bfloat16, a cache of 21.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sf_jax import rollout as ro
from sf_jax.inference import programs
from sf_jax.models import wan
from sf_jax.models.slots import unstack_layers
from sf_jax.parallel.mesh import make_mesh
from sf_jax.perf.devices import devices_of
from sf_jax.perf.traffic import traffic
from sf_jax.weights import eight_bit

FRAMES, SIZE = 21, (60, 104, 16)
CALLS = 5.0  # four denoising steps and the clean pass, which skips most of the last of separate layers
SHARES = {wan.UNLESS_KEYS_ONLY: 1 - 1 / CALLS}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to save bits: bfloat16 everywhere, or 8-bit weights, matmuls and cache."""

    title: str
    dtype: str | None = None
    quantize: str | None = None
    products: bool = False
    cache: str | None = None


VARIANTS = (
    Variant("bfloat16", dtype="bfloat16"),
    Variant("cache int8", cache="int8"),
    Variant("cache fp8", cache="fp8"),
    Variant("int8 weights", quantize="int8"),
    Variant("int8 products", quantize="int8", products=True),
    Variant("int8 products, cache int8", quantize="int8", products=True, cache="int8"),
    Variant("fp8 weights", quantize="fp8"),
    Variant("fp8 products", quantize="fp8", products=True),
    Variant("fp8 products, cache fp8", quantize="fp8", products=True, cache="fp8"),
)


def compile_chunk(variant: Variant, scan_layers: bool, layers: int) -> jax.stages.Compiled:
    """Compiles `programs.next_chunk` of Wan2.1-1.3B for an H100: 3 latent frames of 480x832, a cache of 21."""
    mesh = make_mesh({}, list(devices_of("h100:1")))
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(tree, wide=None):
        def leaf(a):
            return jax.ShapeDtypeStruct(a.shape, wide if wide and a.dtype == jnp.float32 else a.dtype, sharding=whole)

        return jax.tree.map(leaf, tree)

    config = wan.wan_1_3b(dtype="bfloat16", remat="none", attention="cudnn", num_layers=layers)
    with jax.set_mesh(mesh):
        stacked = placed(wan.param_shapes(config), jnp.bfloat16)
        params = jax.eval_shape(
            functools.partial(eight_bit.quantized_shapes, variant.quantize, variant.products), stacked
        )
        if not scan_layers:
            config = dataclasses.replace(config, scan_layers=False)
            params = jax.eval_shape(functools.partial(unstack_layers, fuse=True), params)
        model, rollout, params = wan.WanTransformer(config), ro.RolloutConfig(), placed(params)
        prompt = placed(jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.bfloat16))
        text = placed(jax.eval_shape(lambda p, t: programs.encode_text(model, p, t), params, prompt))
        make = functools.partial(programs.empty_cache, model, rollout, 1, FRAMES, SIZE, variant.cache)
        key, number = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
        source = (key, placed(jax.ShapeDtypeStruct((1,), jnp.int32)), number)
        place = (number, number, jax.ShapeDtypeStruct((), bool))
        size = (rollout.chunk, *SIZE)
        arguments = (model, rollout, None, size, params, text, placed(jax.eval_shape(make)), source, place)
        return programs.next_chunk.lower(*arguments).compile()


def memory(scan_layers: bool, layers: int) -> None:
    """Prints the bytes of a chunk's program for each variant."""
    print(f"\nWan2.1-1.3B, {layers} layers {'scanned' if scan_layers else 'apart'}, one chunk on an H100")
    print("| 8 bit | arguments, GiB | temporary, GiB | GB moved | products of 8-bit numbers |\n|---|---|---|---|---|")
    for variant in VARIANTS:
        program = compile_chunk(variant, scan_layers, layers)
        memory, text = program.memory_analysis(), program.as_text()
        sizes = [f"{count / 2**30:.2f}" for count in (memory.argument_size_in_bytes, memory.temp_size_in_bytes)]
        sizes.append(f"{traffic(text, CALLS, 'largest', shares=SHARES).memory / 1e9:.0f}")
        print(f"| {variant.title} | {' | '.join(sizes)} | {eight_bit_products(text)} |", flush=True)


def eight_bit_products(hlo: str) -> int:
    """The number of matmuls in a program with two 8-bit operands."""
    types, count = {}, 0
    for line in hlo.splitlines():
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        types[name] = rest.partition("[")[0]
        call = " dot(" if " dot(" in rest else " custom-call("
        if call in rest and (call == " dot(" or "__cublas" in rest):
            operands = rest.partition(call)[2].partition(")")[0].split(", ")[:2]
            count += all(types.get(operand) in ("s8", "f8e4m3fn") for operand in operands)
    return count


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="of the compiled network")
    parser.add_argument("--scan_layers", action="store_true", help="one block scanned over stacked layers")
    args = parser.parse_args()
    print(f"JAX {jax.__version__}")
    memory(args.scan_layers, args.layers)


if __name__ == "__main__":
    main()
