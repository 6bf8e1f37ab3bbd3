"""Encodes frames for a viewer: H.264 in fragmented MP4, or JPEG."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

CODEC = 'video/mp4; codecs="avc1.64001f"'
CRF = 20  # x264's constant rate factor; 18 is hardly distinguishable from the source
JPEG_QUALITY = 88
# Timestamps continue across fragments, although each has its own muxer.
_MUXER = {
    "movflags": "empty_moov+default_base_moof+frag_discont+frag_keyframe",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",
}
# sc_threshold: a scene cut would otherwise start a second fragment.
_ENCODER = {"preset": "veryfast", "tune": "zerolatency", "crf": str(CRF), "threads": "1", "profile": "high"}
_ENCODER |= {"sc_threshold": "0"}
_PARTS = (("ftyp", "moov"), ("moof", "mdat"))  # boxes of the initialization segment and of a fragment


def enlarged(frames: np.ndarray, scale: int) -> np.ndarray:
    """RGB frames uint8 [m, h * scale, w * scale, 3] from uint8 [m, h, w, 1 or 3]."""
    frames = np.asarray(frames).repeat(scale, axis=1).repeat(scale, axis=2)
    return np.broadcast_to(frames, (*frames.shape[:3], 3))


def fragment(frames: np.ndarray, fps: Fraction, first: int, index: int) -> tuple[bytes, bytes]:
    """Encodes frames as one fragment of an endless MP4; it begins with a key frame and depends on no other fragment.

    Args:
      frames: uint8 [m, h, w, 3], h and w even.
      fps: frames per second.
      first: number of the first frame in the video.
      index: number of the fragment, from 0.

    Returns:
      The initialization segment, which is the same for all fragments of one size and rate, and the fragment. The bytes
      depend only on the arguments.
    """
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options=_MUXER | {"fragment_index": str(index + 1)}) as container:
        video = container.add_stream("libx264", rate=fps, options=_ENCODER)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        video.codec_context.time_base, video.codec_context.gop_size = 1 / fps, 2**30
        for number, pixels in enumerate(np.ascontiguousarray(frames), first):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    boxes = list(_boxes(out.getvalue()))
    begin, part = (b"".join(data for name, data in boxes if name in names) for names in _PARTS)
    return begin, part


def _boxes(data: bytes):
    """Yields names and bytes of an MP4's top-level boxes."""
    place = 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8].decode("ascii"), data[place : place + size]
        place += size


def jpegs(frames: np.ndarray) -> list[bytes]:
    """Encodes frames uint8 [m, h, w, 3] as one JPEG each."""
    files = []
    for pixels in np.ascontiguousarray(frames):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY)
        files.append(out.getvalue())
    return files
