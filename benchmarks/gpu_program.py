"""What an H100 moves for one chunk of Wan2.1-1.3B, by the compiled program, on a machine without a GPU.

  python -m venv gpu && gpu/bin/pip install -e . "jax[cuda12]"
  JAX_PLATFORMS=cpu gpu/bin/python -m benchmarks.gpu_program                 # as `load_pipeline` runs on GPUs
  JAX_PLATFORMS=cpu gpu/bin/python -m benchmarks.gpu_program --scan_layers   # one block, scanned over the layers
  JAX_PLATFORMS=cpu gpu/bin/python -m benchmarks.gpu_program --window=15 --sink=3

One chunk of 3 latent frames of 480x832 in bfloat16, four denoising steps and the clean pass; without --window the cache
has room for 21 frames. Bytes are what the instructions in the loop over the calls read and write, per layer and call.
"""

import argparse
import math
import re
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax import rollout as ro
from sf_jax.inference import programs
from sf_jax.models import wan

# XLA's GpuTargetConfigProto; the figures are those of xla/backends/gpu/target_config/specs.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
FRAMES, CHUNK = 21, 3
SIZE = (60, 104, 16)
WIDTHS = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1}
CALLS = 5


def compile_chunk(rollout: ro.RolloutConfig, scan_layers: bool) -> jax.stages.Compiled:
    """Compiles `programs.next_chunk` for an H100."""
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", target_config=H100, topology="1x1x1"
    )
    mesh = Mesh(np.asarray(topology.devices).reshape(1), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        config = wan.wan_1_3b(dtype="bfloat16", remat="none", attention="cudnn", scan_layers=scan_layers)
        model = wan.WanTransformer(config)

        def shape(*sizes, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)

        def on_gpu(tree, wide=jnp.bfloat16):
            return jax.tree.map(lambda a: shape(*a.shape, dtype=wide if a.dtype == jnp.float32 else a.dtype), tree)

        params = on_gpu(wan.param_shapes(config))
        prompt = shape(1, config.text_len, config.text_dim, dtype=jnp.bfloat16)
        text = on_gpu(jax.eval_shape(lambda p, t: programs.encode_text(model, p, t), params, prompt))
        cache = on_gpu(jax.eval_shape(lambda: ro.empty_cache(model, rollout, 1, FRAMES, *SIZE[:2])))
        key, number = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
        source, place = (key, shape(1, dtype=jnp.int32), number), (number, number, jax.ShapeDtypeStruct((), bool))
        arguments = (model, rollout, None, (CHUNK, *SIZE), params, text, cache, source, place)
        return programs.next_chunk.lower(*arguments).compile()


def traffic(hlo: str) -> tuple[Counter, int]:
    """Bytes that the body of the loop with attention reads and writes, by kind, and how many layers it has."""
    bodies = re.findall(r"^(?:ENTRY )?%[\w.\-]+ .*?\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL)
    body = next(body for body in bodies if "__cudnn$fmha" in body)
    types, kinds, attentions = {}, Counter(), 0
    for name, result, operation, rest in re.findall(
        r"^\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", body, re.MULTILINE
    ):
        types[name] = result
        if operation in ("parameter", "get-tuple-element", "tuple", "bitcast", "constant") or operation.endswith(
            "-done"
        ):
            continue
        written = _bytes(result)
        read = [_bytes(types.get(operand, "")) for operand in re.findall(r"%([\w.\-]+)", rest.split(")")[0])]
        attention = "__cudnn$fmha" in rest
        attentions += attention
        if "update_slice" in name or "update-slice" in name:  # the array that is updated stays where it is
            kinds["own keys and values"] += 2 * (sum(read) - max(read))
        elif operation == "fusion-start" or name.startswith("dynamic-slice"):
            parts = [_bytes(part) for part in re.findall(r"\w+\[[\d,]*\]", result)]
            kinds["slices of stacks"] += 2 * min(part for part in parts if part > 1000)
        elif "concatenate" in name and written > 5e7:
            kinds["copies of the cache"] += 2 * written
        else:
            kind = "attention" if attention else "products" if "dot" in name else "element by element"
            whole = (
                kind != "element by element"
            )  # others may read a part of an array: at most four times what they write
            kinds[kind] += written + sum(count if whole else min(count, 4 * written) for count in read)
    return kinds, attentions // 2  # each layer attends to the frames and to the prompt


def _bytes(text: str) -> int:
    """Bytes of all arrays in a type."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", text)
    return sum(WIDTHS.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in arrays)


def main() -> None:
    """Prints the program's memory and traffic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan_layers", action="store_true", help="scan one block over stacked layers")
    parser.add_argument("--window", type=int, default=None, help="latent frames; relative positions")
    parser.add_argument("--sink", type=int, default=0, help="latent frames")
    args = parser.parse_args()
    positions = "absolute" if args.window is None else "relative"
    rollout = ro.RolloutConfig(window=args.window, sink=args.sink, positions=positions)
    began = time.perf_counter()
    program = compile_chunk(rollout, args.scan_layers)
    seconds, memory = time.perf_counter() - began, program.memory_analysis()
    kinds, layers = traffic(program.as_text())
    print(f"JAX {jax.__version__}, H100, {'scanned' if args.scan_layers else 'apart'}; compiled in {seconds:.0f} s")
    arguments, temporary = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
    print(f"arguments {arguments:.2f} GiB, temporary {temporary:.2f} GiB")
    for kind, count in kinds.most_common():
        print(f"{kind:22} {count / layers / 1e6:7.0f} MB a layer and call")
    calls = CALLS * wan.wan_1_3b().num_layers
    other = sum(count for kind, count in kinds.items() if kind not in ("attention", "products"))
    total, other = (count / layers * calls / 1e9 for count in (sum(kinds.values()), other))
    print(f"{total:.0f} GB a chunk, {other:.0f} of them outside products and attention")


if __name__ == "__main__":
    main()
