"""What a pipeline runs on the devices, as jitted functions: one compilation per shape, caches donated."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sf_jax import rollout as ro
from sf_jax.diffusion import solvers
from sf_jax.diffusion.solvers import guided
from sf_jax.inference.decoders import Decoder, Encoder, by_columns
from sf_jax.many_step import guided_chunk
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.partition import constrain
from sf_jax.models.patch_codec import to_float, to_uint8
from sf_jax.models.wan import WanTransformer, bidirectional_layout

# For GPUs; other compilers take no notice. Products by cuBLASLt, which adds bias and residual and applies GELU to what
# it computes: XLA's own kernels write the product, which is then read again. Products of one factor are not joined, as
# XLA would copy their weights in every call. Read in the compiled program: docs/wan.md.
COMPILER_OPTIONS = {
    "xla_gpu_enable_cublaslt": True,
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}


@functools.partial(jax.jit, static_argnums=0)
def encode_text(model: WanTransformer, params: dict, text: jax.Array):
    """Cross-attention keys and values of prompt embeddings [B, S, text_dim]."""
    return model.apply({"params": params}, text, method="encode_text")


@jax.jit
def encode_pixels(encoder: Encoder, pixels: jax.Array) -> jax.Array:
    """Latents of uint8 pixels."""
    return encoder.encode(to_float(pixels))


@functools.partial(jax.jit, donate_argnums=1)
def decode(decoder: Decoder, cache: Any, latents: jax.Array) -> tuple[Any, jax.Array]:
    """The decoder's new cache, and the pixels, uint8, of the next latent frame [B, 1, H, W, C]."""
    cache, pixels = decoder.decode_chunk(cache, by_columns(latents))
    return by_columns(cache), to_uint8(pixels)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def empty_decoder_cache(decoder: Decoder, batch: int, height: int, width: int) -> Any:
    """The decoder's cache before a video's first frame, made on its devices."""
    return by_columns(decoder.init_cache(batch, height, width))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(model: WanTransformer, config: ro.RolloutConfig, batch: int, frames: int, size: tuple) -> KVCache:
    """A cache for `frames` latent frames of `size` (H, W, C), made on its devices."""
    return in_place(ro.empty_cache(model, config, batch, frames, *size[:2]))


def in_place(cache: KVCache) -> KVCache:
    """Keeps a cache where it is: no call gives it back in other places than it was given."""
    k, v = jax.tree.map(lambda a: constrain(a, None, "batch", None, "heads", None), (cache.k, cache.v))
    return cache.replace(k=k, v=v, frames=constrain(cache.frames, None))


def by_video(tree: Any) -> Any:
    """Arrays [B, ...] whose videos are spread over the devices, and nothing else."""
    return jax.tree.map(lambda a: constrain(a, "batch", *[None] * (a.ndim - 1)), tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6, compiler_options=COMPILER_OPTIONS)
def next_chunk(model, config, many, size, params, text, cache, source, place):
    """Generates the next chunk.

    Args:
      model: the transformer.
      config: chunks and steps.
      many: (solver, guidance) of many steps; None for the few steps of a student.
      size: (n, H, W, C) of the chunk.
      params: the transformer's parameters.
      text: from `encode_text`; with many steps, each prompt is followed by its negative prompt.
      cache: keys and values of the frames before.
      source: (key, examples int32 [B], number), what the noise is drawn from: the key of a chunk's initial noise is
        folded with the number, which must not be one of those of `rollout.key_draw`; None is the first behind them.
      place: (first latent frame, index of the chunk, whether no chunk follows); may be traced.

    Returns:
      The new cache and the latents [B, n, H, W, C].
    """
    (start, chunk, last), (key, examples, number) = place, source
    timesteps, count = config.timesteps_of(start)
    number = 2 * count if number is None else number
    noise_key = jax.random.fold_in(jax.random.fold_in(key, number), chunk)
    noise = ro.example_noise(noise_key, examples, (examples.shape[0], *size))
    if many is not None:
        cache, clean = guided_chunk(model, config, params, text, cache, noise, start, *many)
    else:
        draw = ro.key_draw(key, examples)
        now = (start, chunk, count - 1, draw, timesteps, last)
        cache, clean, _ = ro.generate_chunk(model, config, params, text, cache, noise, *now)
    return in_place(cache), by_video(clean)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4, compiler_options=COMPILER_OPTIONS)
def write_initial(model, config, params, text, cache, clean, start):
    """The cache with a chunk of given latents [B, n, H, W, C]."""
    clean = jnp.repeat(clean, text.k.shape[1] // clean.shape[0], axis=0)
    return in_place(ro.write_chunk(model, config, params, text, cache, clean, start)[0])


@functools.partial(jax.jit, static_argnums=2)
def bidirectional_start(key: jax.Array, examples: jax.Array, shape: tuple[int, ...]) -> solvers.SolverState:
    """The state before the first step of whole videos of `shape` [B, F, H, W, C]."""
    return by_video(solvers.start(ro.example_noise(key, examples, shape)))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4, compiler_options=COMPILER_OPTIONS)
def bidirectional_step(model, guidance, params, text, state, row):
    """One guided step of a whole video; `row` is an entry of `solvers.rows`, `text` as in `next_chunk`."""
    layout = bidirectional_layout(state.x.shape[1])

    def flow(x, t):
        t = jnp.full((2 * x.shape[0], 1), t, jnp.float32)
        both = model.apply({"params": params}, jnp.repeat(x, 2, axis=0), t, text, layout)
        return guided(both[::2], both[1::2], guidance)

    return by_video(solvers.step(state, row, flow))
