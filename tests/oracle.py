"""The rollout's gradient without replay: differentiates through the scan over chunks. Slow but obviously correct."""

import jax
import jax.numpy as jnp

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.models import attention, kv_cache
from sf_jax.models.wan import KeysValues


def rollout_video(
    model, config, params, text, noise, exits, draw, initial=None, cache_gradient="stop", first_live=0
) -> jax.Array:
    """The video of `rollout.rollout` for the same arguments, differentiable in `params` and `text`.

    `cache_gradient` and `first_live` are those of `replay.replay`.
    """
    batch, frames, height, width, _ = noise.shape
    start = 0 if initial is None else initial.shape[1]
    given, chunks = config.chunks(frames, start)
    if not isinstance(text, KeysValues):
        text = model.apply({"params": params}, text, method="encode_text")
    cache = rollout_cache.empty_cache(model, config, batch, start + frames, height, width, keep_from=0)
    given_live = cache_gradient == "write" and config.context == "clean" and first_live == 0
    writer = (params, text) if given_live else jax.lax.stop_gradient((params, text))
    for first, last in attention.chunk_bounds(given) if given else ():
        cache = ro.write_chunk(model, config, *writer, cache, initial[:, first:last], first)
    exits = jnp.broadcast_to(jnp.asarray(exits, jnp.int32), (len(chunks),))

    def step(cache, noise, chunk, first, exit_step):
        live = jnp.asarray(chunk) >= first_live

        def passing(value):
            return jax.tree.map(lambda a: jnp.where(live, a, jax.lax.stop_gradient(a)), value)

        noisy = ro.NoisyChunk(noise, first, chunk, exit_step, draw)
        written, clean, x = ro.generate_chunk(model, config, params, text, cache, noisy)
        seen = jax.lax.stop_gradient(cache) if cache_gradient == "stop" else cache
        layout = rollout_cache.chunk_layout(seen, config, first, noise.shape[1])
        context = rollout_cache.Context(text, seen, layout)
        t = jnp.asarray(config.timesteps, jnp.float32)[exit_step]
        video, noisy_kv = ro.predict(model, config, params, x, t, context)
        if cache_gradient == "stop":
            return jax.lax.stop_gradient(written), passing(video)
        if config.context == "noisy":
            kv = noisy_kv
        elif cache_gradient == "write":
            read = ro.context_input(config, clean, draw, chunk)
            _, kv = ro.predict(model, config, params, read, config.context_timestep, context)
        else:  # values from the clean pass, gradient from the exit step
            kv = jax.tree.map(
                lambda whole, own: part_of(whole, own, first) + (own - jax.lax.stop_gradient(own)),
                KeysValues(written.k, written.v),
                noisy_kv,
            )
        kv = passing(kv)
        return kv_cache.write(cache, kv.k, kv.v, first), passing(video)

    def part_of(whole, own, first):
        part = jax.lax.dynamic_slice_in_dim(whole, first * cache.tokens_per_frame, own.shape[2], axis=2)
        return jax.lax.stop_gradient(part)

    _, video = ro.run_chunks(step, cache, noise, chunks, start, exits)
    return video if initial is None else jnp.concatenate([initial, video], axis=1)
