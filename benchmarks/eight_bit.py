"""What 8 bits cost and save: errors of latents per chunk, the judge's score, and bytes of the compiled programs.

  JAX_PLATFORMS=cpu python -m benchmarks.eight_bit                 # quality: digits and the goldens' small model
  JAX_PLATFORMS=cpu python -m benchmarks.eight_bit --memory=h100   # bytes of a chunk of Wan2.1-1.3B (needs jax[cuda12])

Errors are relative (L2), against the same network without 8 bits in float32, noise and prompts the same. "free": every
chunk goes on from its own video, so that errors add up and, in the end, show another video. "led": the chunk goes on
from the reference's latents, and has its own error alone. "products" means that activations are quantized, too, as on
devices that multiply 8-bit numbers; on others weights alone are.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import pathlib
import platform
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax import rollout as ro
from sf_jax.evaluation import judge as judging
from sf_jax.evaluation import metrics
from sf_jax.inference import programs
from sf_jax.inference.load import load_pipeline
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.quantization import products_error
from sf_jax.models import wan
from sf_jax.models.eight_bit import LAYERS
from sf_jax.models.slots import unstack_layers
from sf_jax.weights import eight_bit

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "A"
SHORT, LONG = 21, 84  # latent frames
LED = LONG - 3
OUTLIERS = (1, 10, 30, 100)
FULL = (60, 104, 16)  # latents of 480x832


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to save bits: "bfloat16" for all numbers, or weights, products and cache of 8 bits."""

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


def golden_pipeline() -> VideoPipeline:
    """The goldens' student, whose weights are random, without window as in the official code."""
    from tests.goldens.folder import Folder

    folder = Folder(GOLDENS)
    model, params = folder.load("generator")
    rollout = ro.RolloutConfig(steps=tuple(folder.config["denoising_steps"]), context_noise="none")
    pipe = VideoPipeline(None, model, params, rollout)
    size = {"height": folder.config["latent_height"], "width": folder.config["latent_width"]}
    return pipe.with_sampling(**size, frames=LONG)


def changed(pipe: VideoPipeline, variant: Variant) -> tuple[VideoPipeline, str]:
    """The pipeline with fewer bits, and the figures of its gate."""
    config, params, figures = pipe.transformer.config, pipe.params, "| | "
    if variant.dtype is not None:
        config = dataclasses.replace(config, dtype=variant.dtype)
        params = jax.tree.map(lambda a: a.astype(variant.dtype), params)
    if variant.quantize is not None:
        quantizer = eight_bit.Quantizer(variant.quantize, variant.products)
        params = eight_bit.quantize_params(params, quantizer)
        products = f"{products_error(config, params):.4f}" if variant.products else ""
        figures = f"{quantizer.report().error:.4f} | {products} | "
    transformer = wan.WanTransformer(config)
    changes = {"transformer": transformer, "params": params, "cache_dtype": variant.cache}
    return dataclasses.replace(pipe, **changes), figures


def errors(ours: np.ndarray, reference: np.ndarray, chunk: int) -> np.ndarray:
    """Relative error of each chunk, over all videos together."""
    parts = [np.s_[:, i : i + chunk] for i in range(0, ours.shape[1], chunk)]
    return np.array([np.linalg.norm(ours[p] - reference[p]) / np.linalg.norm(reference[p]) for p in parts])


def led_error(pipe: VideoPipeline, reference: VideoPipeline, prompts, latents: np.ndarray) -> float:
    """Relative error of the last chunk behind the reference's latents."""
    options = {"output": "latent", "frames": LONG, "initial": latents[:, :LED]}
    ours, theirs = (each(prompts, **options)[:, LED:] for each in (pipe, reference))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def outliers(pipe: VideoPipeline, prompts) -> None:
    """Prints what outliers do to a network's first chunk: weights of an input channel, and a channel of activations."""
    print("\n| outlier | 8 bit | weights | products | first chunk |\n|---|---|---|---|---|")
    for kind, factor, name in itertools.product(("weights", "activations"), OUTLIERS, eight_bit.GATE):
        flat = flatten_dict(pipe.params)
        if kind == "weights":
            places = [("blocks", *layer.split("."), "kernel") for layer in LAYERS]
            flat |= {place: flat[place].at[:, 5].multiply(factor) for place in places}
        else:
            flat["blocks", "modulation"] = flat["blocks", "modulation"].at[:, :, 1, 7].add(factor - 1)
        wide = dataclasses.replace(pipe, params=unflatten_dict(flat))
        narrow, figures = changed(wide, Variant("", quantize=name, products=True))
        error = errors(*(each(prompts, output="latent", frames=3) for each in (narrow, wide)), 3)[0]
        print(f"| {kind} x {factor} | {name} | {figures}{error:.4f} |", flush=True)


def quality(name: str, pipe: VideoPipeline, prompts, judged: int) -> None:
    """Prints the table of one model; `judged` digits are judged, where there are any."""
    reference = pipe(prompts, output="latent", frames=LONG)
    chunk = pipe.rollout.chunk
    ends = (1, SHORT // chunk, LONG // chunk)
    head = ["8 bit", "weights", "products", *(f"free, chunk {i}" for i in ends)]
    head += [*(f"free, mean of {frames}" for frames in (SHORT, LONG)), f"led, chunk {ends[2]}"]
    head += [f"joint of {LONG}"] if judged else []
    print(f"\n{name}\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    if judged:
        judge, (texts, _, targets) = judging.load(), metrics.choose_prompts(judged)
        print(f"| none (float32) |{' |' * (len(head) - 2)} {joint(pipe, judge, texts, targets):.3f} |", flush=True)
    for variant in VARIANTS:
        ours, figures = changed(pipe, variant)
        each = errors(ours(prompts, output="latent", frames=LONG), reference, chunk)
        row = [each[i - 1] for i in ends] + [each[: ends[1]].mean(), each.mean()]
        row += [led_error(ours, pipe, prompts, reference)]
        row = [f"{x:.4f}" for x in row]
        row += [f"{joint(ours, judge, texts, targets):.3f}"] if judged else []
        print(f"| {variant.title} | {figures}{' | '.join(row)} |", flush=True)


def joint(pipe: VideoPipeline, judge, texts: list[str], targets: metrics.Targets) -> float:
    """The share of windows in which the judge sees the digit and the direction that were asked for."""
    starts = range(0, len(texts), 64)
    videos = np.concatenate([pipe(texts[i : i + 64], frames=LONG, first_index=i) for i in starts])
    return float(metrics.correctness(judge(videos), targets)["joint"].mean())


def compile_chunk(variant: Variant, scan_layers: bool, layers: int) -> jax.stages.Compiled:
    """Compiles `programs.next_chunk` of Wan2.1-1.3B for an H100: 3 latent frames of 480x832, a cache of 21."""
    from benchmarks.gpu_program import H100

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", target_config=H100, topology="1x1x1"
    )
    mesh = Mesh(np.asarray(topology.devices).reshape(1), ("data",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())

    def placed(tree, wide=None):
        def leaf(a):
            return jax.ShapeDtypeStruct(a.shape, wide if wide and a.dtype == jnp.float32 else a.dtype, sharding=whole)

        return jax.tree.map(leaf, tree)

    config = wan.wan_1_3b(dtype="bfloat16", remat="none", attention="cudnn", num_layers=layers)
    stacked = placed(wan.param_shapes(config), jnp.bfloat16)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(
            functools.partial(eight_bit.quantized_shapes, variant.quantize, variant.products), stacked
        )
        if not scan_layers:
            config, params = dataclasses.replace(config, scan_layers=False), jax.eval_shape(unstack_layers, params)
        model, rollout, params = wan.WanTransformer(config), ro.RolloutConfig(), placed(params)
        prompt = placed(jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.bfloat16))
        text = placed(jax.eval_shape(lambda p, t: programs.encode_text(model, p, t), params, prompt))
        make = functools.partial(ro.empty_cache, model, rollout, 1, SHORT, *FULL[:2], dtype=variant.cache)
        key, number = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.int32)
        source = (key, placed(jax.ShapeDtypeStruct((1,), jnp.int32)), number)
        place = (number, number, jax.ShapeDtypeStruct((), bool))
        size = (rollout.chunk, *FULL)
        arguments = (model, rollout, None, size, params, text, placed(jax.eval_shape(make)), source, place)
        return programs.next_chunk.lower(*arguments).compile()


def memory(scan_layers: bool, layers: int) -> None:
    """Prints the bytes of a chunk's program for each variant."""
    print(f"\nWan2.1-1.3B, {layers} layers {'scanned' if scan_layers else 'apart'}, one chunk on an H100")
    print("| 8 bit | arguments, GiB | temporary, GiB | products of 8-bit numbers |\n|---|---|---|---|")
    for variant in VARIANTS:
        program = compile_chunk(variant, scan_layers, layers)
        memory, text = program.memory_analysis(), program.as_text()
        sizes = (f"{count / 2**30:.2f}" for count in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
        print(f"| {variant.title} | {' | '.join(sizes)} | {eight_bit_products(text)} |", flush=True)


def eight_bit_products(hlo: str) -> int:
    """How many products of a program have two 8-bit operands."""
    types, count = {}, 0
    for line in hlo.splitlines():
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        types[name] = rest.partition("[")[0]
        if " dot(" in rest:
            operands = rest.partition(" dot(")[2].partition(")")[0].split(", ")
            count += all(types.get(operand) in ("s8", "f8e4m3fn") for operand in operands)
    return count


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=["h100"], help="bytes of the compiled programs, instead of quality")
    parser.add_argument("--layers", type=int, default=30, help="of the compiled network")
    parser.add_argument("--scan_layers", action="store_true", help="one block scanned over stacked layers")
    parser.add_argument("--judged", type=int, default=64, help="videos of digits that are judged")
    args = parser.parse_args()
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = f"JAX {jax.__version__}, Python {platform.python_version()}, qwix {importlib.metadata.version('qwix')}"
    print(f"{versions}, commit {head.stdout.strip()}, {jax.devices()[0].device_kind}")
    if args.memory:
        memory(args.scan_layers, args.layers)
        return
    prompts = metrics.choose_prompts(160)[0][::10]
    pipe = load_pipeline()
    outliers(pipe, prompts)
    quality("Moving digits, the shipped student", pipe, prompts, args.judged)
    pipe = golden_pipeline()
    config = pipe.transformer.config
    embeddings = np.asarray(jax.random.normal(jax.random.key(3), (4, config.text_len, config.text_dim)))
    quality("The goldens' student (random weights)", pipe, embeddings, 0)


if __name__ == "__main__":
    main()
