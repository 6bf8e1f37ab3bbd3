"""Video and image files."""

import re
import subprocess

import av
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from sf_jax import files
from sf_jax.inference import batch
from sf_jax.inference.job import Job
from sf_jax.io import video as video_io
from sf_jax.io.arrays import npy_writer

try:
    import resource
except ImportError:
    resource = None

RNG = np.random.Generator(np.random.Philox(0))


def blobs(frames, height, width, channels=1):
    """A smooth, bright, moving blob, uint8 [F, h, w, c]."""
    y, x = np.mgrid[:height, :width]
    center = np.arange(frames)[:, None, None] + 4
    light = 255 * np.exp(-((y - height / 2) ** 2 + (x - center) ** 2) / 20)
    return np.stack([light / (c + 1) for c in range(channels)], axis=-1).astype(np.uint8)


def decode(path):
    """ffmpeg's description of the stream, and the frames [F, h, w, 3]."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    stream = re.search(r"Video: h264.*", done.stderr.decode())[0]
    width, height = map(int, re.search(r", (\d+)x(\d+)", stream).groups())
    return stream, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_decodes_to_the_same_frames(tmp_path, channels):
    video = video_io.upscale(blobs(17, 24, 32, channels), 4)
    path = tmp_path / "new" / "video.mp4"
    video_io.write_mp4(path, video, fps=12.5)
    stream, decoded = decode(path)
    assert decoded.shape == (17, 96, 128, 3)
    assert "yuv420p(tv, bt709" in stream and "12.50 fps" in stream
    assert np.abs(decoded.astype(int) - video).mean() < 2
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]
    whole = path.read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")


def test_mp4_pads_odd_sides_and_keeps_colors(tmp_path):
    video = np.zeros((5, 33, 47, 3), np.uint8) + np.uint8([200, 40, 90])
    video_io.write_mp4(tmp_path / "odd.mp4", video, fps=8)
    _, decoded = decode(tmp_path / "odd.mp4")
    assert decoded.shape == (5, 34, 48, 3)
    assert np.abs(decoded.astype(int) - [200, 40, 90]).max() <= 4


def test_mp4_writer_takes_chunks_of_any_length(tmp_path):
    video = blobs(12, 24, 24)
    with video_io.Mp4Writer(tmp_path / "a.mp4", 8, (24, 24)) as writer:
        for part in np.split(video, [1, 1, 8]):
            writer.append(part)
            assert not (tmp_path / "a.mp4").exists()
    assert writer.num_frames == 12 and len(decode(tmp_path / "a.mp4")[1]) == 12
    with pytest.raises(ValueError, match="outside the with block"):
        writer.append(video)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_no_file_behind_and_keeps_the_old_one(tmp_path, error):
    for name, old in (("new.mp4", None), ("old.mp4", b"kept")):
        if old:
            (tmp_path / name).write_bytes(old)
        with pytest.raises(error), video_io.Mp4Writer(tmp_path / name, 8, (24, 24)) as writer:
            writer.append(blobs(9, 24, 24))
            raise error
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"old.mp4": b"kept"}


def test_no_frames_and_wrong_frames_are_refused(tmp_path):
    with pytest.raises(ValueError, match="frames: got none"), video_io.Mp4Writer(tmp_path / "a.mp4", 8, (4, 4)):
        pass
    wrong_size = pytest.raises(ValueError, match=r"height and width \(24, 24\), allowed: \(4, 4\)")
    with wrong_size, video_io.Mp4Writer(tmp_path / "a.mp4", 8, (4, 4)) as writer:
        writer.append(blobs(9, 24, 24))
    with pytest.raises(ValueError, match=r"video: got float32 .* allowed: uint8 \[F, h, w, 1 or 3\]"):
        video_io.write_mp4(tmp_path / "a.mp4", np.zeros((3, 4, 4, 1), np.float32), 8)
    with pytest.raises(ValueError, match="fps: got 0"):
        video_io.write_mp4(tmp_path / "a.mp4", blobs(3, 4, 4), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(resource is None, reason="Windows has no limits of a process")
def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\.mp4: (File too large|the disk is full)"):
            video_io.write_mp4(tmp_path / "out" / "a.mp4", RNG.integers(0, 256, (60, 96, 96, 3), dtype=np.uint8), 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "out").iterdir())


def test_bytes_depend_on_the_frames_alone(tmp_path):
    video, files_seen = RNG.integers(0, 256, (12, 48, 64, 3), dtype=np.uint8), set()
    for i in range(4):
        used = [np.full(2**k * 1000, 37 * i, np.uint8) for k in range(10)]  # memory that malloc reuses
        del used
        video_io.write_mp4(tmp_path / "a.mp4", video, 8)
        files_seen.add((tmp_path / "a.mp4").read_bytes())
    assert len(files_seen) == 1


def test_no_encoder_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"h264"})
    with pytest.raises(ValueError, match="has no encoder libx264, which mp4 files need: install"):
        batch.run(Job(prompts=("a 7",), checkpoint="none.safetensors", out=str(tmp_path)))


def test_sizes_are_bounded_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="scale is 999999999999: it must be at most 8192"):
        Job(prompts=("a 7",), scale=999999999999)
    for field in ("frames", "num_samples"):
        with pytest.raises(ValueError, match=f"{field} is 1000000000000: it must be at most"):
            Job(prompts=("a 7",), **{field: 10**12})
    with pytest.raises(ValueError, match="scale is 8000: for 48 frames of 24x24 it must be at most 278"):
        batch.run(Job(prompts=("a 7",), scale=8000, out=str(tmp_path)))
    with pytest.raises(ValueError, match=r"size: got \(9000, 24\), allowed: height and width of 1 to 8192"):
        video_io.Mp4Writer(tmp_path / "a.mp4", 8, (9000, 24))


def test_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="out: cannot write in .*file/x .*allowed: a folder"):
        files.check_writable(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match="cannot write in"):
        video_io.write_mp4(tmp_path / "file" / "a.mp4", blobs(3, 4, 4), 8)
    with pytest.raises(ValueError, match="allowed: the name of a file"):
        video_io.write_png(tmp_path, blobs(1, 4, 4)[0])
    assert files.check_writable(tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_keeps_frames_and_pace(tmp_path, channels):
    video = blobs(9, 24, 24, channels)
    video_io.write_gif(tmp_path / "a.gif", video, fps=12)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 9 and image.size == (24, 24)
        total, frames = 0, []
        for i in range(image.n_frames):
            image.seek(i)
            total += image.info["duration"]
            frames.append(np.asarray(image.convert("RGB")))
    assert total == 750
    assert np.abs(np.stack(frames).astype(int) - video).mean() < 2
    with pytest.raises(ValueError, match="fps: got 60"):
        video_io.write_gif(tmp_path / "b.gif", video, fps=60)


def test_contact_sheet_shows_the_right_frames(tmp_path):
    videos = RNG.integers(0, 256, (3, 8, 24, 24, 1), dtype=np.uint8)
    plain = video_io.contact_sheet(videos, every=3, factor=1)
    assert plain.dtype == np.uint8 and plain.shape[1:] == (3 * 25, 3)
    top = plain.shape[0] - 3 * 25
    for row in range(3):
        for column, frame in enumerate((0, 3, 6)):
            y, x = top + row * 25 + 1, column * 25 + 1
            assert (plain[y : y + 24, x : x + 24] == videos[row, frame]).all()
    assert (video_io.contact_sheet(videos[:, ::3], stride=3, factor=1) == plain).all()
    labeled = video_io.contact_sheet(videos, every=3, factor=1, labels=["an 8 moving up", "b", "c"])
    margin = labeled.shape[1] - plain.shape[1]
    assert margin > 40 and (labeled[:, margin:] == plain).all()
    assert (labeled[top : top + 25, :margin] < 100).any()
    video_io.write_png(tmp_path / "sheet.png", labeled)
    with Image.open(tmp_path / "sheet.png") as image:
        assert (np.asarray(image) == labeled).all()
    with pytest.raises(ValueError, match="labels: got 1, allowed: one for each of the 3"):
        video_io.contact_sheet(videos, labels=["a"])


def test_npy_files_grow(tmp_path):
    path, values = tmp_path / "a.npy", RNG.normal(size=(7, 3, 2)).astype(np.float32)
    with npy_writer(path) as append:
        for part in np.split(values, [1, 4]):
            append(part)
        assert not path.exists()
    written = np.load(path)
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, values)
    np.save(tmp_path / "b.npy", values)
    assert (tmp_path / "b.npy").read_bytes() == path.read_bytes()
    before = path.read_bytes()
    for parts, message in (
        ([values, values.astype(np.float64)], r"array: got float64 .*, allowed: float32 \[n, \*\(3, 2\)\]"),
        ([values, values[..., :1]], "array: got float32"),
        ([], "has no entries"),
        ([np.float32(1).reshape(())], r"array: got float32 \(\), allowed: numbers \[n, ...\]"),
        ([np.array(["a"])], "array: got <U1"),
    ):
        with pytest.raises(ValueError, match=message), npy_writer(path) as append:
            for part in parts:
                append(part)
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_upscale_repeats_pixels():
    video = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    assert video_io.upscale(video, 2)[0, ..., 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    with pytest.raises(ValueError, match="factor: got 0"):
        video_io.upscale(video, 0)


def test_names_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("a" * 251 + ".png")
    video_io.write_png(path, np.zeros((4, 4, 3), np.uint8))
    assert path.is_file()
