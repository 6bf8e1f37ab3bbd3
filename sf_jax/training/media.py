"""Where an update's real latents come from, and how a generated latent becomes the first frame of a video."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sf_jax.models.patch_codec import PatchCodec, to_float
from sf_jax.models.vae import VaeConfig, WanVae


@dataclasses.dataclass(frozen=True)
class Media:
    """Latents of a kind of data.

    Attributes:
      clean: batch -> latents [B, F, H, W, C] of its real videos.
      as_image: (frozen, latents [B, n, H, W, C]) -> [B, 1, H, W, C], the latent that the last pixel frame of these has
        as an image; the official code makes it the first frame of a long rollout's last window.
    """

    clean: Callable[[dict], jax.Array]
    as_image: Callable[[dict, jax.Array], jax.Array]


def digits_media(codec: PatchCodec) -> Media:
    """Moving digits: a latent frame is a pixel frame, so only the last one counts."""

    def as_image(frozen, latents):
        del frozen
        return codec.encode(codec.decode(latents[:, -1:]))

    return Media(lambda batch: codec.encode(to_float(batch["video"])), as_image)


def wan_media(config: VaeConfig) -> Media:
    """Latents of Wan's VAE, whose parameters are `frozen["vae"]`; batches hold latents, as `latent` [B, F, H, W, C].

    Source: official `SelfForcingModel._run_generator`.
    """
    vae = WanVae(config)

    def as_image(frozen, latents):
        params = {"params": frozen["vae"]}

        def step(carry, latent):
            cache, pixels = vae.apply(params, carry[0], latent[:, None], method="stream")
            return (cache, pixels[:, -1:]), None

        # The decoder looks back over all frames, but of the pixels only the last frame is kept.
        first = vae.apply(params, None, latents[:, :1], method="stream")
        (_, pixels), _ = jax.lax.scan(step, first, jnp.moveaxis(latents[:, 1:], 1, 0))
        image = vae.apply(params, jnp.clip(pixels, -1.0, 1.0), method="encode")
        return image.astype(latents.dtype)

    return Media(lambda batch: batch["latent"], as_image)
