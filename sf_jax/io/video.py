"""Reads and writes videos and images: all public functions of `sf_jax.io` in one module."""

from sf_jax.io.images import read_image
from sf_jax.io.pictures import contact_sheet, upscale, write_gif, write_png
from sf_jax.io.video_read import read_end, read_video, stream_video
from sf_jax.io.video_write import Mp4Writer, check_encoder, write_mp4, write_samples

__all__ = [
    "Mp4Writer",
    "check_encoder",
    "contact_sheet",
    "read_end",
    "read_image",
    "read_video",
    "stream_video",
    "upscale",
    "write_gif",
    "write_mp4",
    "write_png",
    "write_samples",
]
