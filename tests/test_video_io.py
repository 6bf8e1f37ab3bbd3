"""Video and image files."""

import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from sf_jax import files
from sf_jax.inference import video_io

RNG = np.random.Generator(np.random.Philox(0))


def blobs(frames, height, width, channels=1):
    """A smooth bright blob that moves, uint8 [F, h, w, c]."""
    y, x = np.mgrid[:height, :width]
    centre = np.arange(frames)[:, None, None] + 4
    light = 255 * np.exp(-((y - height / 2) ** 2 + (x - centre) ** 2) / 20)
    return np.stack([light / (c + 1) for c in range(channels)], axis=-1).astype(np.uint8)


def decode(path):
    """What ffmpeg says about the stream, and the frames [F, h, w, 3]; imageio's reader would fork under JAX."""
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
    assert "yuv420p" in stream and "12.50 fps" in stream
    assert np.abs(decoded.astype(int) - video).mean() < 2
    assert [file.name for file in path.parent.iterdir()] == ["video.mp4"]


def test_mp4_pads_odd_sides_and_keeps_colours(tmp_path):
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


def test_failing_ffmpeg_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho 'disk full' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(program))
    with pytest.raises(OSError, match="a.mp4: ffmpeg says: disk full"):
        video_io.write_mp4(tmp_path / "out" / "a.mp4", blobs(50, 96, 96), 8)
    assert not list((tmp_path / "out").iterdir())


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
    labelled = video_io.contact_sheet(videos, every=3, factor=1, labels=["an 8 moving up", "b", "c"])
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 40 and (labelled[:, margin:] == plain).all()
    assert (labelled[top : top + 25, :margin] < 100).any()
    video_io.write_png(tmp_path / "sheet.png", labelled)
    with Image.open(tmp_path / "sheet.png") as image:
        assert (np.asarray(image) == labelled).all()
    with pytest.raises(ValueError, match="labels: got 1, allowed: one for each of the 3"):
        video_io.contact_sheet(videos, labels=["a"])


def test_upscale_repeats_pixels():
    video = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
    assert video_io.upscale(video, 2)[0, ..., 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    with pytest.raises(ValueError, match="factor: got 0"):
        video_io.upscale(video, 0)


def made(path, *arguments):
    """A video that ffmpeg makes."""
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments, str(path)], check=True)
    return path


@pytest.mark.parametrize(("stored", "ratio"), [("90x72", "64/45"), ("128x72", "1/1"), ("144x72", "8/9")])
def test_pixels_need_not_be_square(tmp_path, stored, ratio):
    disc = "color=black:s=128x72:r=16,format=gray,geq=lum='if(lt(hypot(X-64,Y-36),25),235,16)'"
    width, height = stored.split("x")
    fit = f"scale={width}:{height},setsar={ratio}"
    path = made(tmp_path / "a.mp4", "-f", "lavfi", "-i", disc, "-frames:v", "3", "-vf", fit, "-pix_fmt", "yuv420p")
    pixels = video_io.read_video(path, 60, 104)[0][..., 1] > 128
    wide, high = pixels.any(0).sum(), pixels.any(1).sum()
    assert abs(wide - high) <= 2 and 40 <= high <= 46


def test_hdr_is_tone_mapped(tmp_path):
    for name, code in (("smpte2084", 0.508), ("arib-std-b67", 0.75)):  # white paper
        level = int(64 + code * 876)
        source = "color=black:s=64x48:r=16,format=yuv420p10le"
        source += f",geq=lum='if(lt(Y,24),{level},64)':cb=512:cr=512"
        colors = f"log-level=none:colorprim=bt2020:transfer={name}:colormatrix=bt2020nc"
        tags = ["-color_primaries", "bt2020", "-color_trc", name, "-colorspace", "bt2020nc"]
        codec = ["-c:v", "libx265", "-x265-params", colors, *tags, "-pix_fmt", "yuv420p10le"]
        path = made(tmp_path / f"{name}.mp4", "-f", "lavfi", "-i", source, "-frames:v", "3", *codec)
        frame = video_io.read_video(path, 48, 64)[0].astype(int)
        assert frame[8, 32].min() > 200 and np.ptp(frame[8, 32]) <= 6
        assert frame[40, 32].max() < 8


def test_images_of_16_bits_and_damaged_ones(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 96, dtype=np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "16.png")
    image = video_io.read_image(tmp_path / "16.png", 64, 96)
    np.testing.assert_array_equal(image, np.repeat((ramp >> 8)[..., None], 3, axis=-1))
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="numbers of 32 bits"):
        video_io.read_image(tmp_path / "float.tiff", 64, 96)
    Image.fromarray(RNG.integers(0, 256, (256, 256, 3), np.uint8)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    third = len(whole) // 3
    for data in (
        whole[: second - 4] + bytes(8) + whole[second + 4 :],
        whole[: len(whole) // 2],
        whole[:third] + bytes(third) + whole[2 * third :],
    ):
        (tmp_path / "bad.png").write_bytes(data)
        with pytest.raises(ValueError, match=r"image: cannot read .*bad\.png"):
            video_io.read_image(tmp_path / "bad.png", 64, 96)


def test_names_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("a" * 251 + ".png")
    video_io.write_png(path, np.zeros((4, 4, 3), np.uint8))
    assert path.is_file()
