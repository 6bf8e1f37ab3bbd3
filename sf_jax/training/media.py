"""Where an update's real latents come from, and how a generated latent becomes the first frame of a video."""

import dataclasses
from collections.abc import Callable

import jax

from sf_jax.models.patch_codec import PatchCodec, to_float


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
