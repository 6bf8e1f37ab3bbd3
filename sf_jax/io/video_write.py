"""Writes videos as mp4 with PyAV (x264 in this process, without a subprocess).

Writes are atomic: a file appears under its name only when it is complete.
"""

import contextlib
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from sf_jax.files import reason_of, replacing
from sf_jax.io.pictures import checked, colored, contact_sheet, upscale, write_png

CRF = 15  # x264's constant rate factor: 0 is lossless, 18 is almost indistinguishable from the source
CODEC = "libx264"
# The output must depend only on the frames, so threads are fixed, and mbtree is off because it reads past its arrays
# (x264 165, if the width is not a multiple of 128 pixels). In a fresh process it mostly reads the same bytes.
_ENCODER = {"crf": str(CRF), "threads": "4", "x264-params": "mbtree=0"}
_BT709, _TV = 1, 1  # color space, primaries and transfer function in ITU-T H.273; range 16 to 235
MAX_SIDE = 8192  # pixels; more than the highest level of H.264 allows
SAMPLE_ROWS = 288  # smaller samples are upscaled to about this height


def check_encoder() -> None:
    """Raises a ValueError if PyAV was built without x264; call it before generating anything."""
    if CODEC not in av.codecs_available:
        raise ValueError(
            f"PyAV {av.__version__} of this machine has no encoder {CODEC}, which mp4 files need: install its wheel, "
            "pip install --force-reinstall --only-binary=av av"
        )


class Mp4Writer:
    """Context manager that writes an mp4 file chunk by chunk.

    The file is H.264 in yuv420p with its index at the front, which every player and browser supports. Odd sides, which
    that format does not allow, get one more row or column. If the block raises or appends no frames, no file appears.

    Attributes:
      path: the final name.
      num_frames: frames appended so far.
    """

    def __init__(self, path: str | Path, fps: float, size: tuple[int, int]):
        """Checks the arguments; writes nothing before the block begins.

        Args:
          path: the file; its folder is created if missing.
          fps: frames per second.
          size: height and width of the frames in pixels.

        Raises:
          ValueError: if an argument is out of range, or there is no encoder.
        """
        if not 0 < fps < float("inf"):
            raise ValueError(f"fps: got {fps}, allowed: more than 0")
        if len(size) != 2 or not 1 <= min(size) <= max(size) <= MAX_SIDE:
            raise ValueError(f"size: got {tuple(size)}, allowed: height and width of 1 to {MAX_SIDE}")
        check_encoder()
        self.path = Path(path)
        self.num_frames = 0
        self._rate = Fraction(fps).limit_denominator(1001000)
        self._size = (int(size[0]), int(size[1]))
        self._container = self._stream = self._graph = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Mp4Writer":
        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path))
            with self._told():
                self._container = av.open(
                    str(temporary.absolute()), "w", format="mp4", options={"movflags": "+faststart"}
                )
            self._open()
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
          ValueError: if the frames have another type or shape, or the block has not begun.
          OSError: if the file cannot be written.
        """
        frames = checked(frames, "frames", 4)
        if frames.shape[1:3] != self._size:
            raise ValueError(f"frames: got height and width {frames.shape[1:3]}, allowed: {self._size}")
        if self._container is None:
            raise ValueError("append: got frames outside the with block, allowed: inside it")
        odd = [(0, side % 2) for side in self._size]
        for pixels in frames:
            pixels = np.pad(colored(pixels), [*odd, (0, 0)], mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame.pts, frame.time_base = self.num_frames, 1 / self._rate
            with self._told():
                self._graph.push(frame)
                self._container.mux(self._stream.encode(self._graph.pull()))
            self.num_frames += 1

    def _open(self) -> None:
        """Creates the encoder, and the filter graph that converts its frames."""
        height, width = (side + side % 2 for side in self._size)
        self._stream = stream = self._container.add_stream(CODEC, rate=self._rate, options=_ENCODER)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / self._rate
        context.thread_type = "FRAME"  # slice threads would lower the quality
        # Without these tags, players guess the color matrix from the size and show small videos with wrong colors.
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _TV
        self._graph = graph = av.filter.Graph()
        nodes = [graph.add("buffer", f"video_size={width}x{height}:pix_fmt=rgb24:time_base={1 / self._rate}")]
        nodes += [graph.add("scale", "out_color_matrix=bt709:out_range=tv:flags=bicubic")]
        nodes += [graph.add("format", "yuv420p"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()

    @contextlib.contextmanager
    def _told(self):
        """Turns PyAV's errors into an OSError that names the file."""
        try:
            yield
        except (av.FFmpegError, OSError) as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or reason_of(error)}") from error

    def _finish(self, kind, error, trace) -> None:
        """Closes the file; runs before the temporary file is renamed or removed."""
        container, self._container = self._container, None
        if kind is not None or not self.num_frames:
            with contextlib.suppress(av.FFmpegError, OSError):
                container.close()
            if kind is None:
                raise ValueError(f"frames: got none for {self.path}, allowed: 1 or more")
            return
        with self._told():
            container.mux(self._stream.encode(None))
            container.close()


def write_mp4(path: str | Path, video: np.ndarray, fps: float) -> None:
    """Writes a whole video as mp4; see `Mp4Writer`.

    Args:
      path: the file; its folder is created if missing.
      video: uint8 [F, h, w, 1 or 3].
      fps: frames per second.

    Raises:
      ValueError: if an argument is out of range.
      OSError: if the file cannot be written.
    """
    video = checked(video, "video", 4)
    with Mp4Writer(path, fps, video.shape[1:3]) as writer:
        writer.append(video)


def write_samples(videos: np.ndarray, labels: Sequence[str], path: str | Path, fps: float) -> list[Path]:
    """Writes videos side by side as one mp4, and their contact sheet; upscales small ones.

    Args:
      videos: uint8 [N, F, h, w, 1 or 3].
      labels: N texts.
      path: path of the files without suffix; its folder is created if missing.
      fps: frames per second.

    Returns:
      The files.

    Raises:
      ValueError: if an argument is out of range.
      OSError: if a file cannot be written.
    """
    videos = checked(videos, "videos", 5)
    written = [Path(path).with_suffix(suffix) for suffix in (".mp4", ".png")]
    factor = max(1, SAMPLE_ROWS // videos.shape[2])
    write_mp4(written[0], upscale(np.concatenate(list(videos), axis=2), factor), fps)
    small = videos[:, :, :: max(1, videos.shape[2] // 120), :: max(1, videos.shape[2] // 120)]
    every = max(1, videos.shape[1] // 12)
    short = [textwrap.shorten(str(label), 60, placeholder="...") for label in labels]
    sheet = contact_sheet(small, every=every, labels=short, factor=max(1, 72 // small.shape[2]))
    write_png(written[1], sheet)
    return written
