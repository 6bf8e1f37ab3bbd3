"""Decodes untrusted video files frame by frame with PyAV (ffmpeg's libraries in this process).

Files are opened only as one of `FORMATS`, none of which can refer to other files. Every size, time and count is bounded
before anything is allocated from it.
"""

import contextlib
import dataclasses
import errno
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av

# ffmpeg's names. Excludes playlists, concat scripts, image sequences, devices and stream descriptions.
FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg", "flv", "gif", "yuv4mpegpipe")
ALLOWED = "a video file (mp4, mov, mkv, webm, avi, mpeg, ts, ogg, flv, gif or y4m)"
MAX_PIXELS = 2**26  # per stored frame: 8192x8192
MAX_STREAMS = 64
SECONDS, SECONDS_PER_FRAME = 120.0, 2.0  # wall-time limit for decoding: a fixed part, plus a part per frame
MAX_GAP = 10  # seconds; a larger jump in a broadcast format means that its clock was reset
_BROADCAST = ("mpegts", "mpeg")
_PIXELS_IN_FLIGHT = 2**28  # limit for all frames in the decoder's threads
_OPTIONS = {
    "format_whitelist": ",".join(FORMATS),
    "protocol_whitelist": "file",
    "enable_drefs": "0",  # no mov tracks with data in another file
    "max_streams": str(MAX_STREAMS),
    "max_pixels": str(MAX_PIXELS),
}


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A decoded frame with its timing.

    Attributes:
      frame: the frame as stored.
      aspect: pixel width / pixel height.
      transfer: transfer function, a number of ITU-T H.273.
      time: seconds from the file's start until it is shown.
      end: seconds from the file's start until its duration ends.
    """

    frame: av.VideoFrame
    aspect: Fraction
    transfer: int
    time: Fraction
    end: Fraction


def decode(path: str | Path, start: float = 0.0) -> Iterator[Decoded]:
    """Decodes a video's frames in presentation order.

    Args:
      path: the file.
      start: seconds; the frames begin at or before this time, and close to it if the file is seekable.

    Yields:
      The frames; the file is read lazily.

    Raises:
      ValueError: if the file is missing, not a video, damaged (once the damage is reached), or exceeds a limit.
    """
    path = _checked(path)
    with _told(path):
        count = 0
        for count, decoded in enumerate(_decode(path, start), 1):  # noqa: B007
            yield decoded
        if not count:
            raise ValueError("it has no frames")


def duration(path: str | Path) -> tuple[float, float]:
    """A video's duration in seconds (0 if unknown) and its frame rate, from its header.

    Raises:
      ValueError: if the file is missing or not a video.
    """
    path = _checked(path)
    with _told(path), _opened(path) as container:
        stream, seconds = _video_stream(container), (container.duration or 0) / av.time_base
        rate = stream.frames / seconds if stream.frames and seconds else stream.guessed_rate
        return seconds, float(rate or 25)


def _checked(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no regular file" if path.exists() else "does not exist"
        raise ValueError(f"video: {path} {kind}, allowed: {ALLOWED}")
    return path


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns PyAV's errors and faults of the video into a ValueError that names the file."""
    try:
        yield
    except (av.FFmpegError, OSError, RuntimeError, ValueError) as error:  # PyAV's NotImplementedError is a RuntimeError
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, av.FFmpegError) and error.errno in (errno.EINVAL, errno.EBUSY):  # format or size rejected
            reason = f"its format is none of these, or its frames have more than {MAX_PIXELS} pixels"
        raise ValueError(f"video: cannot read {path} ({reason}), allowed: {ALLOWED}") from error


def _decode(path: Path, start: float) -> Iterator[Decoded]:
    for search in (True, False) if start > 0 else (False,):
        with _opened(path) as container:
            frames = _frames(container, start if search else 0.0)
            first = next(frames, None)
            if first is None or (search and first.time > start):
                continue  # the seek failed or went too far
            yield first
            yield from frames
            return


def _opened(path: Path):
    name, settings = str(path.absolute()), {"options": _OPTIONS, "timeout": (SECONDS, SECONDS)}
    try:
        return av.open(name, **settings)
    except UnicodeDecodeError:  # from PyAV before 19, on titles that are not UTF-8
        return av.open(name, metadata_errors="replace", **settings)


def _frames(container, start: float) -> Iterator[Decoded]:
    stream = _video_stream(container)
    context, origin = stream.codec_context, Fraction(container.start_time or 0, av.time_base)
    stream.thread_type = "AUTO"
    threads = _PIXELS_IN_FLIGHT // max(1, context.width * context.height)
    if threads < 16:  # ffmpeg's own maximum
        context.thread_count = max(1, threads)
    context.options = {"max_pixels": str(MAX_PIXELS)}
    if start:
        try:
            container.seek(int((origin + Fraction(start)) / stream.time_base), stream=stream)
        except av.FFmpegError:
            return
    usual = 1 / stream.guessed_rate if stream.guessed_rate else Fraction(1, 25)
    aspect = stream.sample_aspect_ratio or Fraction(1)
    stamps, last, due = _Stamps(), None, None
    spent, seen = 0.0, 0
    began = time.monotonic()
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ValueError("a part of it is damaged")
        for frame in packet.decode():
            if frame.is_corrupt and not (start and last is None):  # after a seek, reference frames may be missing
                raise ValueError("a frame is damaged")
            stamp = stamps.best(frame)
            shown = (due or Fraction(0)) if stamp is None else stamp * stream.time_base - origin
            leap = due is not None and shown - due > MAX_GAP and container.format.name in _BROADCAST
            if last is not None and (shown < last or leap):
                origin += shown - due
                shown = due
            last, due = shown, shown + (frame.duration * stream.time_base or usual)
            seen += 1
            spent += time.monotonic() - began
            yield Decoded(frame, aspect, context.color_trc, shown, due)
            began = time.monotonic()
        if spent + time.monotonic() - began > SECONDS + SECONDS_PER_FRAME * seen:
            raise ValueError(f"decoding takes too long: {seen} frames in {SECONDS + SECONDS_PER_FRAME * seen:.0f} s")


class _Stamps:
    """libavcodec's heuristic: presentation timestamps, or decoding ones if the former go backwards more often."""

    def __init__(self):
        self._last, self._faults = [None, None], [0, 0]

    def best(self, frame: av.VideoFrame) -> int | None:
        """The timestamp of the next frame in the stream's time base, or None."""
        stamps = (frame.pts, frame.dts)
        for i, stamp in enumerate(stamps):
            if stamp is not None:
                self._faults[i] += self._last[i] is not None and stamp <= self._last[i]
                self._last[i] = stamp
        pts, dts = stamps
        return pts if pts is not None and (dts is None or self._faults[0] <= self._faults[1]) else dts


def _video_stream(container):
    """The stream that a player would show: the default or else the largest one, cover pictures excluded.

    Raises:
      ValueError: if there is none, or it cannot be decoded.
    """
    videos = [stream for stream in container.streams if stream.type == "video"]
    moving = [stream for stream in videos if not stream.disposition & av.stream.Disposition.attached_pic]
    if not moving:
        raise ValueError("it has a cover picture and no video" if videos else "it has no video")
    known = [stream for stream in moving if stream.codec_context is not None]
    if not known:
        raise ValueError("PyAV has no decoder for its video")
    stream = max(known, key=lambda stream: (_is_default(stream), stream.width * stream.height))
    if stream.width * stream.height > MAX_PIXELS:
        raise ValueError(f"its frames are {stream.width}x{stream.height}: at most {MAX_PIXELS} pixels are read")
    return stream


def _is_default(stream) -> bool:
    return bool(stream.disposition & av.stream.Disposition.default)
