"""Reading and writing videos and images: mp4, gif, png and contact sheets.

A file appears under its final name when it is complete, or not at all.
"""

import contextlib
import dataclasses
import math
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from sf_jax.files import replacing

CRF = 14  # x264's constant rate factor: 0 is lossless, 18 is hardly distinguishable from the source.
GIF_MAX_FPS = 50
HDR = ("smpte2084", "arib-std-b67")  # transfer functions
# to linear light with 100 nits (SDR white) at 1, brighter light rolled off, and to BT.709
TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)
SAMPLE_ROWS = 288  # Smaller samples are enlarged to about this height.
_MARGIN = 4
_RULE = 1
_PAPER, _GREY, _INK = 255, 160, (0, 0, 0)


def upscale(video: np.ndarray, factor: int) -> np.ndarray:
    """Repeats every pixel factor x factor times; [F, h, w, c] -> [F, h * factor, w * factor, c]."""
    if factor < 1:
        raise ValueError(f"factor: got {factor}, allowed: 1 or more")
    return np.asarray(video).repeat(factor, axis=-3).repeat(factor, axis=-2)


def read_image(path: str | Path, height: int, width: int) -> np.ndarray:
    """Reads an image and fits it: scaled until it covers the frame, then cut to its middle.

    Args:
      path: The image, any format that Pillow reads; transparency becomes black.
      height: Rows wanted.
      width: Columns wanted.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: The file is missing or no image.
    """
    try:
        with Image.open(path) as image:
            turned = _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise ValueError(f"image: cannot read {path} ({error}), allowed: an image file") from error
    return np.asarray(ImageOps.fit(turned, (width, height), Image.Resampling.BICUBIC))


def _rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; 16 bits are scaled to 8, where Pillow would cut them off.

    Raises:
      ValueError: its numbers have no range that is known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"it has numbers of 32 bits (mode {image.mode}), whose range is unknown: save 8 or 16 bits")
    return image.convert("RGB")


def _transfer(path: Path) -> str | None:
    """The transfer function of an HDR video, "smpte2084" (PQ) or "arib-std-b67" (HLG); None of all others."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-i", str(path.absolute())]
    words = subprocess.run(command, capture_output=True).stderr.decode(errors="replace")
    video = next((line for line in words.split("\n") if re.search(r"Stream #\d.*: Video:", line)), "")
    return next((name for name in HDR if name in video), None)


def read_video(
    path: str | Path, height: int, width: int, fps: float | None = None, limit: int | None = None
) -> np.ndarray:
    """Reads a video and fits its frames as `read_image` does; HDR (PQ, HLG) is tone-mapped to BT.709.

    Args:
      path: The video, any format that ffmpeg reads.
      height: Rows wanted.
      width: Columns wanted.
      fps: Frames a second wanted, by repeating or leaving out frames; None keeps all as they are.
      limit: How many frames to read at most.

    Returns:
      uint8 [F, height, width, 3].

    Raises:
      ValueError: The file is missing or no video.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"video: {path} {'is a folder' if path.is_dir() else 'does not exist'}, allowed: a video file")
    # the picture's shape, not that of its pixels, which need not be square
    wide, high = f"max({width},round({height}*dar))", f"max({height},round({width}/dar))"
    fit = f"scale=w='{wide}':h='{high}':flags=bicubic,crop={width}:{height}"
    if _transfer(path):
        fit = f"{TONE_MAP},{fit}"
    fit = fit if fps is None else f"fps={fps},{fit}"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-xerror", "-nostdin", "-i", str(path.absolute())]
    command += ["-vf", fit, "-fps_mode", "passthrough", *([] if limit is None else ["-frames:v", str(limit)])]
    done = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True)
    frames = len(done.stdout) // (height * width * 3)
    if done.returncode or not frames:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["it has no frames"])[-1]
        raise ValueError(f"video: cannot read {path} ({reason}), allowed: a video file")
    return np.frombuffer(done.stdout, np.uint8).reshape(frames, height, width, 3)


class Mp4Writer:
    """Writes an mp4 file chunk by chunk; a context manager.

    The file is H.264 in yuv420p with its index at the front, which every player and browser takes. Odd
    sides, which that format does not have, get one more row or column. If the block raises, or not a
    single frame comes, nothing appears under the final name.

    Attributes:
      path: The final name.
      num_frames: Frames appended so far.
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int]):
        """Checks the arguments; nothing is written before the block begins.

        Args:
          path: The file; its folder is made where missing.
          fps: Frames a second.
          size: Height and width of the frames in pixels.

        Raises:
          ValueError: An argument is out of range.
        """
        if not fps > 0:
            raise ValueError(f"fps: got {fps}, allowed: more than 0")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"size: got {tuple(size)}, allowed: height and width of at least 1")
        self.path = Path(path)
        self.num_frames = 0
        self._fps = fps
        self._size = (int(size[0]), int(size[1]))
        self._process: subprocess.Popen | None = None
        self._messages: IO[bytes] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Mp4Writer":
        with contextlib.ExitStack() as stack:
            # A file, not a pipe: a full pipe that nobody reads would stop ffmpeg.
            self._messages = stack.enter_context(tempfile.TemporaryFile())
            temporary = stack.enter_context(replacing(self.path))
            self._process = subprocess.Popen(
                self._command(temporary),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._messages,
                start_new_session=True,  # Ctrl-C is for the caller, who may still finish the file.
            )
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        return self._stack.__exit__(*error)

    def append(self, frames: np.ndarray) -> None:
        """Adds frames.

        Args:
          frames: uint8 [F, h, w, 1 or 3]; F may be 0.

        Raises:
          ValueError: The frames are not of this form, or the block has not begun.
          OSError: ffmpeg failed.
        """
        frames = _checked(frames, "frames", 4)
        if frames.shape[1:3] != self._size:
            raise ValueError(f"frames: got height and width {frames.shape[1:3]}, allowed: {self._size}")
        if self._process is None or self._process.stdin.closed:
            raise ValueError("append: got frames outside the with block, allowed: inside it")
        odd = [(0, side % 2) for side in self._size]
        frames = np.pad(_colour(frames), [(0, 0), *odd, (0, 0)], mode="edge")
        try:
            self._process.stdin.write(np.ascontiguousarray(frames).data)
        except OSError as error:
            raise OSError(self._complaint()) from error
        self.num_frames += len(frames)

    def _command(self, temporary: Path) -> list[str]:
        height, width = (side + side % 2 for side in self._size)
        source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(self._fps)]
        # Without the tags players guess the matrix from the size, and small videos get other colours.
        tags = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
        colours = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", "-color_range", "tv", *tags]
        codec = ["-c:v", "libx264", "-crf", str(CRF), "-pix_fmt", "yuv420p", "-movflags", "+faststart"]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-nostdin", *source, "-i", "-"]
        return [*command, "-an", *colours, *codec, "-f", "mp4", str(temporary.absolute())]

    def _finish(self, kind, error, trace) -> None:
        """Ends ffmpeg; runs before the temporary file gets its final name or is removed."""
        if kind is not None:
            self._process.kill()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        status = self._process.wait()
        if kind is not None:
            return
        if not self.num_frames:
            raise ValueError(f"frames: got none for {self.path}, allowed: 1 or more")
        if status:
            raise OSError(self._complaint())

    def _complaint(self) -> str:
        self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").strip().splitlines()
        return f"cannot write {self.path}: ffmpeg says: {'; '.join(lines[-3:]) or 'nothing'}"


def write_mp4(path: str | Path, video: np.ndarray, fps: float) -> None:
    """Writes a whole video as mp4; see `Mp4Writer`.

    Args:
      path: The file; its folder is made where missing.
      video: uint8 [F, h, w, 1 or 3].
      fps: Frames a second.

    Raises:
      ValueError: An argument is out of range.
      OSError: ffmpeg failed.
    """
    video = _checked(video, "video", 4)
    with Mp4Writer(path, fps, video.shape[1:3]) as writer:
        writer.append(video)


def write_gif(path: str | Path, video: np.ndarray, fps: float) -> None:
    """Writes a video as a gif that repeats for ever.

    Args:
      path: The file; its folder is made where missing.
      video: uint8 [F, h, w, 1 or 3], F at least 1.
      fps: Frames a second, at most GIF_MAX_FPS (players slow faster ones down).

    Raises:
      ValueError: An argument is out of range.
    """
    video = _checked(video, "video", 4)
    if not 0 < fps <= GIF_MAX_FPS:
        raise ValueError(f"fps: got {fps}, allowed: more than 0 and at most {GIF_MAX_FPS} for a gif")
    if not len(video):
        raise ValueError("video: got 0 frames, allowed: 1 or more")
    # The format counts in hundredths of a second; rounding the times, not the steps, keeps the pace.
    ticks = np.round(np.arange(len(video) + 1) * 100 / fps).astype(int)
    first, *rest = (_image(frame) for frame in video)
    with replacing(path) as temporary:
        durations = (np.diff(ticks) * 10).tolist()
        first.save(temporary, "GIF", save_all=True, append_images=rest, duration=durations, loop=0)


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Writes an image, uint8 [H, W, 1 or 3]; raises ValueError if it has another form."""
    image = _checked(image, "image", 3)
    with replacing(path) as temporary:
        _image(image).save(temporary, "PNG")


def contact_sheet(
    videos: np.ndarray, *, every: int = 1, labels: Sequence[str] | None = None, factor: int = 2
) -> np.ndarray:
    """Draws frames of videos side by side, one row per video, under the frames' numbers.

    Args:
      videos: uint8 [N, F, h, w, 1 or 3].
      every: Show the frames 0, every, 2 * every, ...
      labels: N texts for the left margin.
      factor: Enlargement of the frames.

    Returns:
      The sheet, uint8 [H, W, 3].

    Raises:
      ValueError: An argument is out of range.
    """
    videos = _checked(videos, "videos", 5)
    if every < 1:
        raise ValueError(f"every: got {every}, allowed: 1 or more")
    labels = [""] * len(videos) if labels is None else [str(label) for label in labels]
    if len(labels) != len(videos):
        raise ValueError(f"labels: got {len(labels)}, allowed: one for each of the {len(videos)} videos")
    tiles = np.stack([upscale(_colour(video), factor) for video in videos[:, ::every]])
    rows, columns, height, width, _ = tiles.shape
    font = ImageFont.load_default()
    line = math.ceil(font.getbbox("Ag")[3]) + _MARGIN
    left = math.ceil(max(font.getlength(text) for text in labels)) + 2 * _MARGIN if any(labels) else 0
    grid = _Grid(top=line, left=left, row=max(height, line) + _RULE, column=width + _RULE)
    sheet = np.full((grid.top + rows * grid.row, grid.left + columns * grid.column, 3), _PAPER, np.uint8)
    sheet[grid.top :, grid.left :] = _GREY
    for i, j in np.ndindex(rows, columns):
        y, x = grid.top + i * grid.row + _RULE, grid.left + j * grid.column + _RULE
        sheet[y : y + height, x : x + width] = tiles[i, j]
    image = Image.fromarray(sheet)
    draw = ImageDraw.Draw(image)
    for i, label in enumerate(labels):
        y = grid.top + i * grid.row + (grid.row - line) // 2
        draw.text((_MARGIN, y), label, fill=_INK, font=font)
    for j in range(columns):
        number = str(j * every)
        if font.getlength(number) < grid.column:
            draw.text((grid.left + j * grid.column + _RULE, _MARGIN // 2), number, fill=_INK, font=font)
    return np.asarray(image)


def write_samples(videos: np.ndarray, labels: Sequence[str], path: str | Path, fps: float) -> list[Path]:
    """Writes videos side by side as one mp4, and a contact sheet of them; small ones are enlarged.

    Args:
      videos: uint8 [N, F, h, w, 1 or 3].
      labels: N texts.
      path: of the files, without suffix; its folder is made where missing.
      fps: Frames a second.

    Returns:
      The files.

    Raises:
      ValueError: An argument is out of range.
      OSError: A file cannot be written.
    """
    videos = _checked(videos, "videos", 5)
    written = [Path(path).with_suffix(suffix) for suffix in (".mp4", ".png")]
    factor = max(1, SAMPLE_ROWS // videos.shape[2])
    write_mp4(written[0], upscale(np.concatenate(list(videos), axis=2), factor), fps)
    small = videos[:, :, :: max(1, videos.shape[2] // 120), :: max(1, videos.shape[2] // 120)]
    every = max(1, videos.shape[1] // 12)
    short = [textwrap.shorten(str(label), 60, placeholder="...") for label in labels]
    sheet = contact_sheet(small, every=every, labels=short, factor=max(1, 72 // small.shape[2]))
    write_png(written[1], sheet)
    return written


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Layout of a contact sheet in pixels: its margins and the distances of its rows and columns."""

    top: int
    left: int
    row: int
    column: int


def _image(frame: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame[..., 0] if frame.shape[-1] == 1 else frame))


def _colour(frames: np.ndarray) -> np.ndarray:
    """[..., 1 or 3] -> [..., 3]."""
    return np.broadcast_to(frames, (*frames.shape[:-1], 3))


def _checked(pixels: np.ndarray, name: str, dims: int) -> np.ndarray:
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != dims or pixels.shape[-1] not in (1, 3):
        form = ", ".join(("N", "F", "h", "w", "1 or 3")[5 - dims :])
        raise ValueError(f"{name}: got {pixels.dtype} {pixels.shape}, allowed: uint8 [{form}]")
    return pixels
