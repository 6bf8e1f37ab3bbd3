"""Reads videos lazily as frames of a given size and rate."""

import collections
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from sf_jax.io import tone_map
from sf_jax.io.video_file import ALLOWED, MAX_GAP, Decoded, decode, duration
from sf_jax.messages import shortened

MAX_BYTES = 2**32  # limit on the result of `read_video` without `limit` and `last`
MAX_FPS = 240
MAX_CUT = 16  # maximum area of the scaled picture before the crop, relative to the frame
# Chroma samples are at the left of each pair of pixels, the default of HEVC and AV1.
_EXACT = "scale=flags=bicubic+accurate_rnd+full_chroma_int:in_h_chr_pos=0:in_v_chr_pos=128"
_TRANSPOSED = {(1, 1): "cclock_flip", (1, -1): "clock", (-1, 1): "cclock", (-1, -1): "clock_flip"}


def read_video(
    path: str | Path,
    height: int,
    width: int,
    fps: float | None = None,
    limit: int | None = None,
    *,
    last: int | None = None,
    start: float = 0.0,
    repeat: bool = True,
) -> np.ndarray:
    """Reads a video; holds only the returned frames in memory.

    Args:
      path: see `stream_video`.
      height: see `stream_video`.
      width: see `stream_video`.
      fps: see `stream_video`.
      limit: maximum number of frames to read; the rest is not decoded.
      last: maximum number of frames to keep, the last ones read.
      start: see `stream_video`.
      repeat: see `stream_video`.

    Returns:
      uint8 [F, height, width, 3].

    Raises:
      ValueError: see `stream_video`; also if the frames exceed `MAX_BYTES` and neither `limit` nor `last` is given.
    """
    frames = itertools.islice(stream_video(path, height, width, fps, start=start, repeat=repeat), limit)
    if limit is None and last is None:
        frames = _bounded(frames, path, max(1, MAX_BYTES // (height * width * 3)))
    return np.stack(collections.deque(frames, maxlen=last))


def read_end(path: str | Path, height: int, width: int, count: int, most_fps: float | None = None) -> np.ndarray:
    """Reads the last frames of a video; seeks near the end of a long one if its index allows.

    Args:
      path: see `stream_video`.
      height: see `stream_video`.
      width: see `stream_video`.
      count: maximum number of frames to keep.
      most_fps: maximum number of frames per second to keep; None keeps all frames.

    Returns:
      uint8 [F, height, width, 3]; all frames if there are at most `count`.

    Raises:
      ValueError: see `stream_video`.
    """
    seconds, rate = duration(path)
    kept = {"fps": most_fps, "last": count, "repeat": False}
    start = seconds - 2 * count / min(rate, most_fps or rate) - MAX_GAP
    if start > 0:
        try:
            frames = read_video(path, height, width, start=start, **kept)
            if len(frames) == count:
                return frames
        except ValueError:  # the header's times are wrong, or the seek hit damaged data
            pass
    return read_video(path, height, width, **kept)


def _bounded(frames, path, most) -> Iterator[np.ndarray]:
    for count, frame in enumerate(frames, 1):
        if count > most:
            raise ValueError(f"video: {path} has more than the {most} frames that fit in memory: say how many to read")
        yield frame


def stream_video(
    path: str | Path, height: int, width: int, fps: float | None = None, *, start: float = 0.0, repeat: bool = True
) -> Iterator[np.ndarray]:
    """Reads a video frame by frame; scales each to cover the output frame and crops the center.

    The file's rotation and pixel aspect ratio are applied, HDR (PQ, HLG) is tone-mapped to BT.709, and transparency
    becomes black.

    Args:
      path: the video, in one of `video_file.FORMATS`.
      height: output rows.
      width: output columns.
      fps: output frames per second, at most `MAX_FPS`, by repeating or dropping frames; None keeps all frames.
      repeat: whether frames are repeated; otherwise slow videos keep their frames, and their rate.
      start: seconds from the beginning of the video to the first output frame.

    Yields:
      uint8 [height, width, 3].

    Raises:
      ValueError: if the file is missing, not a video, damaged or exceeds a limit, or ffmpeg cannot convert its colors.
    """
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps is {fps}: it must be above 0 and at most {MAX_FPS}")
    fit, count = _Fit(path, height, width), 0
    for count, pixels in enumerate(_picked(decode(path, start), fit, fps, start, repeat), 1):  # noqa: B007
        yield pixels
    if not count:
        where = f" after {start} s" if start else f" at {fps} a second"
        raise ValueError(f"video: {path} has no frames{where}, allowed: {ALLOWED}")


def _picked(
    frames: Iterable[Decoded], fit: "_Fit", fps: float | None, start: float, repeat: bool = True
) -> Iterator[np.ndarray]:
    """The pixels of all frames from `start` on, or with `fps`, of the frame on screen at each tick.

    Without `repeat`, a frame is yielded at its first tick only.
    """
    if fps is None:
        yield from (fit(decoded) for decoded in frames if not start or decoded.end > Fraction(start))
        return
    rate, tick, shown, end = Fraction(fps).limit_denominator(1001000), None, None, None
    for decoded in frames:
        due = _rounded((decoded.time - Fraction(start)) * rate)
        tick = (0 if start else due) if tick is None else tick
        if tick < due:
            pixels = fit(shown or decoded)
            for _ in range(tick, due if repeat else tick + 1):
                yield pixels
            tick = due
        shown, end = decoded, _rounded((decoded.end - Fraction(start)) * rate)
    if shown is not None and tick < end:
        pixels = fit(shown)
        for _ in range(tick, end if repeat else tick + 1):
            yield pixels


def _rounded(value: Fraction) -> int:
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


class _Fit:
    """Converts frames to pixels [height, width, 3]; builds one libavfilter graph for each kind of frame."""

    def __init__(self, path: str | Path, height: int, width: int):
        self._path, self._height, self._width = path, height, width
        self._graphs = {}

    def __call__(self, decoded: Decoded) -> np.ndarray:
        """Pixels uint8 [height, width, 3]."""
        frame = decoded.frame
        turns, turned = _turns(frame.side_data.get("DISPLAYMATRIX"))
        columns, rows = frame.width * decoded.aspect, Fraction(frame.height)
        scale = self._scale(*((rows, columns) if turned else (columns, rows)))
        if decoded.transfer in (tone_map.PQ, tone_map.HLG):
            wide = self._filtered(frame, (_EXACT, "format=rgb48le")).to_ndarray()
            frame = av.VideoFrame.from_ndarray(tone_map.tone_map(wide, decoded.transfer), "rgb24")
        if any(component.is_alpha for component in frame.format.components):
            pixels = self._filtered(frame, (*turns, *scale, "format=rgba")).to_ndarray()
            return (pixels[..., :3] * (pixels[..., 3:] / np.float32(255)) + 0.5).astype(np.uint8)
        return self._filtered(frame, (*turns, *scale, "format=rgb24")).to_ndarray()

    def _scale(self, columns: Fraction, rows: Fraction) -> tuple[str, str]:
        """Filters that scale a picture of this shape to cover the frame, and crop it."""
        wide = max(self._width, _rounded(self._height * columns / rows))
        high = max(self._height, _rounded(self._width * rows / columns))
        if wide * high > MAX_CUT * self._width * self._height:
            shape = f"{float(columns):.0f}x{float(rows):.0f}"
            raise ValueError(
                f"video: cannot read {self._path} (its picture is {shape}: of one scaled to cover a frame, at most "
                f"{MAX_CUT} times the frame is made)"
            )
        return f"scale={wide}:{high}:flags=bicubic", f"crop={self._width}:{self._height}"

    def _filtered(self, frame: av.VideoFrame, filters: tuple[str, ...]) -> av.VideoFrame:
        source = {"video_size": f"{frame.width}x{frame.height}", "pix_fmt": frame.format.name, "time_base": "1/1000"}
        source |= {"colorspace": frame.colorspace, "range": frame.color_range}
        key = (*source.values(), filters)
        try:
            if key not in self._graphs:
                self._graphs = {} if len(self._graphs) > 4 else self._graphs
                self._graphs[key] = _graph(source, filters)
            frame.pts = None
            self._graphs[key].push(frame)
            return self._graphs[key].pull()
        except (av.FFmpegError, OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or shortened(str(error)) or type(error).__name__
            colors = f"format {frame.format.name}, color matrix {frame.colorspace}, range {frame.color_range}"
            raise ValueError(
                f"video: cannot read {self._path} (ffmpeg cannot make RGB of its pixels, {colors}: {reason}); convert "
                "it first, to the color matrix bt709"
            ) from error


def _graph(source: dict, filters: tuple[str, ...]) -> av.filter.Graph:
    graph = av.filter.Graph()
    nodes = [graph.add("buffer", ":".join(f"{name}={value}" for name, value in source.items()))]
    nodes += [graph.add(*text.split("=", 1)) for text in filters] + [graph.add("buffersink")]
    graph.link_nodes(*nodes).configure()
    return graph


def _turns(matrix: bytes | None) -> tuple[tuple[str, ...], bool]:
    """Filters that rotate and flip a picture by ffmpeg's display matrix, and whether they swap its sides."""
    if matrix is None:
        return (), False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5] / 2**16
    if abs(b) + abs(c) > abs(a) + abs(d):
        return (f"transpose={_TRANSPOSED[1 if b > 0 else -1, 1 if c > 0 else -1]}",), True
    return (*(["hflip"] if a < 0 else []), *(["vflip"] if d < 0 else [])), False
