"""Writes frames for viewing: gif, png and contact sheets.

Writes are atomic: a file appears under its name only when it is complete.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sf_jax.files import replacing

if TYPE_CHECKING:  # imported lazily, after the first frames have been shown
    from PIL import Image

GIF_MAX_FPS = 50
_MARGIN = 4
_RULE = 1
_PAPER, _GRAY, _INK = 255, 160, (0, 0, 0)


def upscale(video: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel factor x factor times; [F, h, w, c] -> [F, h * factor, w * factor, c]."""
    if factor < 1:
        raise ValueError(f"factor: got {factor}, allowed: 1 or more")
    return np.asarray(video).repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_gif(path: str | Path, video: np.ndarray, fps: float) -> None:
    """Writes a video as a gif that loops forever.

    Args:
      path: The file; its folder is created if missing.
      video: uint8 [F, h, w, 1 or 3], F at least 1.
      fps: Frames per second, at most GIF_MAX_FPS (players slow down faster ones).

    Raises:
      ValueError: If an argument is out of range.
    """
    video = checked(video, "video", 4)
    if not 0 < fps <= GIF_MAX_FPS:
        raise ValueError(f"fps: got {fps}, allowed: more than 0 and at most {GIF_MAX_FPS} for a gif")
    if not len(video):
        raise ValueError("video: got 0 frames, allowed: 1 or more")
    # The format counts in hundredths of a second; rounding times instead of durations keeps the average rate.
    ticks = np.round(np.arange(len(video) + 1) * 100 / fps).astype(int)
    first, *rest = (_image(frame) for frame in video)
    with replacing(path) as temporary:
        durations = (np.diff(ticks) * 10).tolist()
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Writes an image, uint8 [H, W, 1 or 3]; raises a ValueError for other types and shapes."""
    image = checked(image, "image", 3)
    with replacing(path) as temporary:
        _image(image).save(temporary, "PNG")


def contact_sheet(
    videos: np.ndarray, *, every: int = 1, stride: int = 1, labels: Sequence[str] | None = None, factor: int = 2
) -> np.ndarray:
    """Draws frames of videos side by side, one row per video, with frame numbers above.

    Args:
      videos: uint8 [N, F, h, w, 1 or 3].
      every: Show the given frames 0, every, 2 * every, ...
      stride: The given frames are number 0, stride, 2 * stride, ... of their videos.
      labels: N texts for the left margin.
      factor: Upscaling of the frames.

    Returns:
      The sheet, uint8 [H, W, 3].

    Raises:
      ValueError: If an argument is out of range.
    """
    videos = checked(videos, "videos", 5)
    if every < 1:
        raise ValueError(f"every: got {every}, allowed: 1 or more")
    labels = [""] * len(videos) if labels is None else [str(label) for label in labels]
    if len(labels) != len(videos):
        raise ValueError(f"labels: got {len(labels)}, allowed: one for each of the {len(videos)} videos")
    tiles = np.stack([upscale(colored(video), factor) for video in videos[:, ::every]])
    rows, columns, height, width, _ = tiles.shape
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    line = math.ceil(font.getbbox("Ag")[3]) + _MARGIN
    left = math.ceil(max(font.getlength(text) for text in labels)) + 2 * _MARGIN if any(labels) else 0
    grid = _Grid(top=line, left=left, row=max(height, line) + _RULE, column=width + _RULE)
    sheet = np.full((grid.top + rows * grid.row, grid.left + columns * grid.column, 3), _PAPER, np.uint8)
    sheet[grid.top :, grid.left :] = _GRAY
    for i, j in np.ndindex(rows, columns):
        y, x = grid.top + i * grid.row + _RULE, grid.left + j * grid.column + _RULE
        sheet[y : y + height, x : x + width] = tiles[i, j]
    image = Image.fromarray(sheet)
    draw = ImageDraw.Draw(image)
    for i, label in enumerate(labels):
        y = grid.top + i * grid.row + (grid.row - line) // 2
        draw.text((_MARGIN, y), label, fill=_INK, font=font)
    for j in range(columns):
        number = str(j * every * stride)
        if font.getlength(number) < grid.column:
            draw.text((grid.left + j * grid.column + _RULE, _MARGIN // 2), number, fill=_INK, font=font)
    return np.asarray(image)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Layout of a contact sheet in pixels: its margins, and the pitch of its rows and columns."""

    top: int
    left: int
    row: int
    column: int


def _image(frame: np.ndarray) -> "Image.Image":
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(frame[..., 0] if frame.shape[-1] == 1 else frame))


def colored(frames: np.ndarray) -> np.ndarray:
    """Broadcasts frames [..., 1 or 3] to [..., 3]."""
    return np.broadcast_to(frames, (*frames.shape[:-1], 3))


def checked(pixels: np.ndarray, name: str, dims: int) -> np.ndarray:
    """Pixels as an array; raises a ValueError unless it is uint8 with `dims` axes, the last of size 1 or 3."""
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] not in (1, 3):
        form = ", ".join(("N", "F", "h", "w", "1 or 3")[5 - dims :])
        raise ValueError(f"{name}: got {pixels.dtype} {pixels.shape}, allowed: uint8 [{form}]")
    return pixels
