"""Reads untrusted image files."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported lazily, as few commands read images
    from PIL import Image

# Pillow's names. Excludes PostScript, which Pillow reads with an external program, and rare formats.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
ALLOWED = "an image file (png, jpeg, webp, bmp, gif, tiff or avif)"
MAX_PIXELS = 2**27  # 11585x11585


def read_image(path: str | Path, height: int, width: int) -> np.ndarray:
    """Reads an image, scales it to cover the frame and crops the center.

    Args:
      path: the image, in one of `FORMATS`; transparency becomes black, and an animation's first picture is read.
      height: output rows.
      width: output columns.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: if the file is missing, not an image, damaged, or has more than `MAX_PIXELS` pixels.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise ValueError(f"image: {path} {kind}, allowed: {ALLOWED}")
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS replaces its limit
            image = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it is {image.width}x{image.height}: at most {MAX_PIXELS} pixels are read")
            turned = _rgb(ImageOps.exif_transpose(image), image.format)
    except Exception as error:  # Pillow can raise almost anything on damaged files
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"image: cannot read {path} ({reason}), allowed: {ALLOWED}") from error
    return np.asarray(ImageOps.fit(turned, (width, height), Image.Resampling.BICUBIC))


def _rgb(image: "Image.Image", kind: str) -> "Image.Image":
    """Converts an image to RGB; scales 16 bits to 8, which Pillow would clip.

    Raises:
      ValueError: if the range of its values is unknown.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"it has numbers of 32 bits (mode {image.mode}), whose range is unknown: save 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("RGB")
    return image.convert("RGB")
