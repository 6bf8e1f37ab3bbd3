"""The jitted functions that a pipeline runs: one compilation per shape, with donated caches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.diffusion import solvers
from sf_jax.diffusion.solvers import guided
from sf_jax.inference.decoders import Decoder, Encoder, by_columns
from sf_jax.many_step import guided_chunk
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.partition import constrain
from sf_jax.models.patch_codec import to_float, to_uint8
from sf_jax.models.slot_cache import SlotCache
from sf_jax.models.wan import WanTransformer, bidirectional_layout
from sf_jax.rng import Purpose, key_for

# For GPUs; other compilers ignore them. cuBLASLt fuses bias, residual and GELU into the matmul, while XLA's own kernels
# write its result to memory and read it back. Matmuls that share an input are not merged, as XLA would then copy their
# weights in every call. docs/wan.md has the evidence from the compiled program.
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
def sample_key(seed: jax.Array) -> jax.Array:
    """The key of a pipeline's noise for a uint32 seed."""
    return key_for(seed, 0, Purpose.SAMPLE)


@jax.jit
def latent_frame(latents: jax.Array, index: jax.Array) -> jax.Array:
    """One frame [B, 1, H, W, C] of latents [B, n, H, W, C]."""
    return jax.lax.dynamic_slice_in_dim(latents, index, 1, axis=1)


@jax.jit
def join_frames(parts: list[jax.Array]) -> jax.Array:
    """Concatenates pixels [B, m, h, w, c] along the frames."""
    return jnp.concatenate(parts, axis=1)


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
    """The decoder's cache before a video's first frame, created on its devices."""
    return by_columns(decoder.init_cache(batch, height, width))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def empty_cache(
    model: WanTransformer,
    config: ro.RolloutConfig,
    batch: int,
    frames: int,
    size: tuple,
    dtype: str | None = None,
    many_steps: bool = False,
) -> KVCache | SlotCache:
    """A cache for `frames` latent frames of `size` (H, W, C), created on its devices; see `kv_cache.DTYPES`."""
    if has_slots(model, dtype) and not many_steps:
        return in_place(rollout_cache.empty_slots(model, config, batch, frames, *size[:2]))
    return in_place(rollout_cache.empty_cache(model, config, batch, frames, *size[:2], dtype=dtype))


def has_slots(model: WanTransformer, dtype: str | None) -> bool:
    """Whether a few-step student caches in slots: with separate layers, unless the cache has a type of its own."""
    return not model.config.scan_layers and dtype in (None, model.config.dtype)


def in_place(cache: KVCache | SlotCache) -> KVCache | SlotCache:
    """Fixes the sharding of a cache, so that every call returns it with the sharding it came with."""
    return rollout_cache.by_axes(constrain, cache)


def by_video(tree: Any) -> Any:
    """Shards arrays [B, ...] over the devices by video only."""
    return jax.tree.map(lambda a: constrain(a, "batch", *[None] * (a.ndim - 1)), tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=6, compiler_options=COMPILER_OPTIONS)
def next_chunk(model, config, many, size, params, text, cache, source, place):
    """Generates the next chunk.

    Args:
      model: the transformer.
      config: chunks and steps.
      many: (solver, guidance) of a many-step network; None for a few-step student.
      size: (n, H, W, C) of the chunk.
      params: the transformer's parameters.
      text: from `encode_text`; with many steps, each prompt is followed by its negative prompt.
      cache: keys and values of the previous frames.
      source: (key, examples int32 [B], number) of the noise. The number is folded into the key of a chunk's initial
        noise and must differ from those of `rollout.key_draw`; None is the first number after them.
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
        noisy = ro.NoisyChunk(noise, start, chunk, count - 1, ro.key_draw(key, examples), timesteps)
        cache, clean, _ = ro.generate_chunk(model, config, params, text, cache, noisy, last=last)
    return in_place(cache), by_video(clean)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4, compiler_options=COMPILER_OPTIONS)
def write_initial(model, config, params, text, cache, clean, start):
    """Writes a chunk of given latents [B, n, H, W, C] to the cache."""
    clean = jnp.repeat(clean, text.k.shape[1] // clean.shape[0], axis=0)
    return in_place(ro.write_chunk(model, config, params, text, cache, clean, start))


@functools.partial(jax.jit, static_argnums=2)
def bidirectional_start(key: jax.Array, examples: jax.Array, shape: tuple[int, ...]) -> solvers.SolverState:
    """The solver's state before the first step, for whole videos of `shape` [B, F, H, W, C]."""
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


# Static arguments of the programs that `executables` caches.
STATIC = {
    sample_key: (),
    encode_text: (0,),
    empty_decoder_cache: (1, 2, 3),
    empty_cache: (0, 1, 2, 3, 4, 5, 6),
    latent_frame: (),
    join_frames: (),
    decode: (),
    next_chunk: (0, 1, 2, 3),
    write_initial: (0, 1),
    bidirectional_start: (2,),
    bidirectional_step: (0, 1),
}
