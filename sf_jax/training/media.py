"""Conversion of a batch's real videos to latents, and of generated latents to pixels."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models.patch_codec import PatchCodec, to_float, to_uint8
from sf_jax.models.vae import VaeConfig, WanVae


@dataclasses.dataclass(frozen=True)
class Media:
    """Conversion of latents for one kind of data.

    Attributes:
      clean: batch -> latents [B, F, H, W, C] of its real videos.
      as_image: (frozen, latents [B, n, H, W, C]) -> [B, 1, H, W, C], their last pixel frame encoded as an image; the
        official code makes it the first frame of a long rollout's last window.
      pixels: (frozen, latents [B, n, H, W, C]) -> uint8 [B, m, h, w, 1 or 3], in host memory.
      fps: frames per second.
    """

    clean: Callable[[dict], jax.Array]
    as_image: Callable[[dict, jax.Array], jax.Array]
    pixels: Callable[[dict, jax.Array], np.ndarray]
    fps: float


def digits_media(codec: PatchCodec) -> Media:
    """Media of the moving digits, where a latent frame is a pixel frame, so that only the last one counts."""

    def as_image(frozen, latents):
        del frozen
        return codec.encode(codec.decode(latents[:, -1:]))

    def pixels(frozen, latents):
        del frozen
        return np.asarray(to_uint8(codec.decode(latents)))

    return Media(lambda batch: codec.encode(to_float(batch["video"])), as_image, pixels, fps=12.0)


def wan_media(config: VaeConfig) -> Media:
    """Media of Wan's VAE, whose parameters are `frozen["vae"]`; batches hold latents as `latent` [B, F, H, W, C].

    Source: official `SelfForcingModel._run_generator`.
    """
    vae = WanVae(config)

    def as_image(frozen, latents):
        params = {"params": frozen["vae"]}

        def step(carry, latent):
            cache, pixels = vae.apply(params, carry[0], latent[:, None], method="stream")
            return (cache, pixels[:, -1:]), None

        # The decoder needs all earlier frames, but only the last pixel frame is kept.
        first = vae.apply(params, None, latents[:, :1], method="stream")
        (_, pixels), _ = jax.lax.scan(step, first, jnp.moveaxis(latents[:, 1:], 1, 0))
        image = vae.apply(params, jnp.clip(pixels, -1.0, 1.0), method="encode")
        return image.astype(latents.dtype)

    @jax.jit
    def decode(params, latents):
        return to_uint8(vae.apply({"params": params}, latents, method="decode"))

    def pixels(frozen, latents):
        # One video at a time, as the decoder's memory grows with the pixels.
        return np.concatenate([np.asarray(decode(frozen["vae"], latents[i : i + 1])) for i in range(len(latents))])

    return Media(lambda batch: batch["latent"], as_image, pixels, fps=16.0)
