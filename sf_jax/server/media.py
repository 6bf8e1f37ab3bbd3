"""What frames become on their way to a viewer: H.264 in fragmented MP4, or JPEG."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

CODEC = 'video/mp4; codecs="avc1.64001f"'
CRF = 20  # x264's constant rate factor; 18 is hardly distinguishable from the source
JPEG_QUALITY = 88
# Timestamps go on from fragment to fragment, although each is written by a muxer of its own.
_MUXER = {
    "movflags": "empty_moov+default_base_moof+frag_discont+frag_keyframe",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",
}
# sc_threshold: a cut in the picture would begin a second fragment
_ENCODER = {"preset": "veryfast", "tune": "zerolatency", "crf": str(CRF), "threads": "1", "profile": "high"}
_ENCODER |= {"sc_threshold": "0"}
_PARTS = (("ftyp", "moov"), ("moof", "mdat"))  # boxes of the initialization segment and of a fragment


def enlarged(frames: np.ndarray, scale: int) -> np.ndarray:
    """RGB frames uint8 [m, h * scale, w * scale, 3] of uint8 [m, h, w, 1 or 3]."""
    frames = np.asarray(frames).repeat(scale, axis=1).repeat(scale, axis=2)
    return np.broadcast_to(frames, (*frames.shape[:3], 3))


def fragment(frames: np.ndarray, fps: Fraction, first: int, index: int) -> tuple[bytes, bytes]:
    """Encodes frames as one fragment of an endless MP4, which begins with a key frame and depends on no other.

    Args:
      frames: uint8 [m, h, w, 3], h and w even.
      fps: frames a second.
      first: number of the first one in the video.
      index: number of the fragment, from 0.

    Returns:
      The initialization segment, the same for all fragments of a size and rate, and the fragment. The bytes depend on
      the arguments alone.
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
    """Names and bytes of an MP4's outermost boxes."""
    place = 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        yield data[place + 4 : place + 8].decode("ascii"), data[place : place + size]
        place += size


def jpegs(frames: np.ndarray) -> list[bytes]:
    """Frames uint8 [m, h, w, 3], each as a JPEG."""
    files = []
    for pixels in np.ascontiguousarray(frames):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=JPEG_QUALITY)
        files.append(out.getvalue())
    return files
