"""The quality cost of 8 bits: latent errors per chunk, and the judge's score. benchmarks/eight_bit_memory.py has bytes.

  JAX_PLATFORMS=cpu python -m benchmarks.eight_bit   # digits and the goldens' small model

Errors are relative (L2) to the same network in float32 without 8 bits, with the same noise and prompts. "free": every
chunk continues its own video, so errors accumulate until the video is a different one. "led": the chunk continues the
reference's latents and has only its own error. "products" means that activations are also quantized, as on devices with
8-bit matmuls; on others, only weights are.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import pathlib
import platform
import subprocess

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.eight_bit_memory import VARIANTS, Variant
from sf_jax import rollout as ro
from sf_jax.evaluation import judge as judging
from sf_jax.evaluation import metrics
from sf_jax.inference.load import load_pipeline
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.quantization import products_error
from sf_jax.models import wan
from sf_jax.models.eight_bit import LAYERS
from sf_jax.weights import eight_bit

GOLDENS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "goldens" / "A"
SHORT, LONG = 21, 84  # latent frames
LED = LONG - 3
OUTLIERS = (1, 10, 30, 100)


def golden_pipeline() -> VideoPipeline:
    """The goldens' student, which has random weights, without a window as in the official code."""
    from tests.goldens.folder import Folder

    folder = Folder(GOLDENS)
    model, params = folder.load("generator")
    rollout = ro.RolloutConfig(steps=tuple(folder.config["denoising_steps"]), context_noise="none")
    pipe = VideoPipeline(None, model, params, rollout)
    size = {"height": folder.config["latent_height"], "width": folder.config["latent_width"]}
    return pipe.with_sampling(**size, frames=LONG)


def changed(pipe: VideoPipeline, variant: Variant) -> tuple[VideoPipeline, str]:
    """The pipeline with fewer bits, and the figures for its quality gate."""
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
    """Relative error of each chunk over all videos."""
    parts = [np.s_[:, i : i + chunk] for i in range(0, ours.shape[1], chunk)]
    return np.array([np.linalg.norm(ours[p] - reference[p]) / np.linalg.norm(reference[p]) for p in parts])


def led_error(pipe: VideoPipeline, reference: VideoPipeline, prompts, latents: np.ndarray) -> float:
    """Relative error of the last chunk after the reference's latents."""
    options = {"output": "latent", "frames": LONG, "initial": latents[:, :LED]}
    ours, theirs = (each(prompts, **options)[:, LED:] for each in (pipe, reference))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def outliers(pipe: VideoPipeline, prompts) -> None:
    """Prints the effect of outliers on a network's first chunk: in an input channel's weights, or in activations."""
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
    """Prints the table of one model; `judged` is the number of digit videos to judge, or 0."""
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
    """The share of windows in which the judge sees the prompt's digit and direction."""
    starts = range(0, len(texts), 64)
    videos = np.concatenate([pipe(texts[i : i + 64], frames=LONG, first_index=i) for i in starts])
    return float(metrics.correctness(judge(videos), targets)["joint"].mean())


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judged", type=int, default=64, help="videos of digits that are judged")
    args = parser.parse_args()
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = f"JAX {jax.__version__}, Python {platform.python_version()}, qwix {importlib.metadata.version('qwix')}"
    print(f"{versions}, commit {head.stdout.strip()}, {jax.devices()[0].device_kind}")
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
