"""Users' videos and images, compared with the output of the ffmpeg program."""

import dataclasses
import os
import re
import resource
import subprocess
import time

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from sf_jax.inference.job import Job
from sf_jax.io import images, tone_map, video_file, video_read
from sf_jax.io import video as video_io

RNG = np.random.Generator(np.random.Philox(0))
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SOURCE = ("-f", "lavfi", "-i", "testsrc2=size=64x40:rate=16")
# To linear light with 100 cd/m2 as 1, rolls off brighter light, and converts to BT.709.
TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv444p"
)


def made(path, *arguments, **options):
    """Creates a video with ffmpeg."""
    subprocess.run([FFMPEG, "-v", "error", "-y", *map(str, arguments), str(path)], check=True, **options)
    return path


def reference(path, height, width, fps=None, before=""):
    """The frames uint8 [F, height, width, 3], scaled and cropped by the ffmpeg program."""
    fit = f"{before}scale=w='max({width},round({height}*dar))':h='max({height},round({width}/dar))':flags=bicubic"
    fit = f"{'' if fps is None else f'fps={fps},'}{fit},crop={width}:{height}"
    command = [FFMPEG, "-v", "error", "-i", str(path), "-vf", fit, "-fps_mode", "passthrough", "-f", "rawvideo"]
    done = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def assert_like_ffmpeg(path, fps=None, most=1):
    wanted = reference(path, 32, 48, fps)
    pixels = video_io.read_video(path, 32, 48, fps)
    assert pixels.shape == wanted.shape
    assert np.abs(pixels.astype(int) - wanted).max() <= most


KINDS = {
    "h264.mp4": ("-pix_fmt", "yuv420p"),
    "444odd.mkv": ("-vf", "scale=97:65", "-pix_fmt", "yuv444p"),
    "bt709.mp4": ("-vf", "scale=out_color_matrix=bt709,setparams=colorspace=bt709", "-pix_fmt", "yuv420p"),
    "full.mp4": ("-vf", "scale=out_range=pc,setparams=range=pc", "-pix_fmt", "yuv420p"),
    "ten.mp4": ("-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le"),
    "av1.mp4": ("-c:v", "libsvtav1", "-pix_fmt", "yuv420p10le"),
    "b.avi": ("-c:v", "libx264", "-bf", "2", "-pix_fmt", "yuv420p"),
    "b.ts": ("-pix_fmt", "yuv420p"),
    "b.mpg": ("-c:v", "mpeg2video", "-r", "25"),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-pix_fmt", "yuv420p"),
    "a.y4m": ("-pix_fmt", "yuv420p"),
    "sar.mp4": ("-vf", "setsar=64/45", "-pix_fmt", "yuv420p"),
    "fields.mp4": ("-vf", "interlace", "-flags", "+ilme+ildct", "-pix_fmt", "yuv420p"),
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_ffmpeg(tmp_path, name):
    path = made(tmp_path / name, *SOURCE, "-frames:v", "12", *KINDS[name])
    assert_like_ffmpeg(path)
    assert_like_ffmpeg(path, fps=10.0)


def test_gif(tmp_path):
    assert_like_ffmpeg(made(tmp_path / "a.gif", *SOURCE, "-frames:v", "6"), most=2)


@pytest.mark.parametrize("turn", [(90,), (180,), (270,), (0, "h"), (0, "v"), (90, "h"), (270, "v")])
def test_turned_and_mirrored_clips(tmp_path, turn):
    stored = made(tmp_path / "a.mp4", *SOURCE, "-frames:v", "3", "-pix_fmt", "yuv420p")
    flips = [f"-display_{side}flip" for side in turn[1:]]
    path = made(tmp_path / "b.mp4", "-display_rotation", turn[0], *flips, "-i", stored, "-c", "copy")
    assert_like_ffmpeg(path)


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "vary.mp4", "cut.mp4"])
def test_odd_clocks(tmp_path, name):
    """Audio that starts before the video, variable frame rates, edit lists."""
    filters = {
        "late": "setpts=PTS+0.37/TB",
        "vary": "select='not(mod(n,3))+gt(mod(n,7),4)'",
        "cut": "null",
    }[name.split(".")[0]]
    sound = ["-f", "lavfi", "-i", "sine=duration=2"]
    path = made(
        tmp_path / name, *SOURCE, *sound, "-frames:v", "24", "-vf", filters, "-fps_mode", "vfr", "-pix_fmt", "yuv420p"
    )
    if name == "cut.mp4":
        path = made(tmp_path / "edited.mp4", "-ss", "0.4", "-i", path, "-c", "copy")
    assert_like_ffmpeg(path)
    assert_like_ffmpeg(path, fps=10.0)


def test_times_before_zero_and_clocks_that_are_set_anew(tmp_path):
    path = made(tmp_path / "a.mp4", *SOURCE, "-frames:v", "24", "-pix_fmt", "yuv420p")
    options = ("-c", "copy", "-avoid_negative_ts", "disabled", "-output_ts_offset", "-0.5")
    early = made(tmp_path / "b.mkv", "-i", path, *options)
    wanted = video_io.read_video(path, 32, 48, 32.0)
    assert len(wanted) == 48
    np.testing.assert_array_equal(video_io.read_video(early, 32, 48, 32.0), wanted)
    times = [video_file.Decoded(i, 1, 1, t, t + 1) for i, t in enumerate([0, 1, 2, 2, 6, 7])]
    shown = list(video_read._picked(times, lambda decoded: decoded.frame, 1.0, 0.0))
    assert shown == [0, 1, 3, 3, 3, 3, 4, 5]  # of two frames at the same time, the second


def test_start_and_end_are_searched(tmp_path):
    path = tmp_path / "a.mp4"
    made(path, *SOURCE, "-frames:v", "480", "-g", "16", "-pix_fmt", "yuv420p")
    whole = video_io.read_video(path, 32, 48)
    assert len(whole) == 480
    np.testing.assert_array_equal(video_io.read_video(path, 32, 48, start=7.0, limit=5), whole[112:117])
    np.testing.assert_array_equal(video_io.read_video(path, 32, 48, 8.0, start=7.0, limit=3), whole[112:117:2])
    np.testing.assert_array_equal(video_io.read_video(path, 32, 48, last=4), whole[-4:])
    decoded = sum(1 for _ in video_file.decode(path, 29.0))
    assert decoded <= 32
    np.testing.assert_array_equal(video_io.read_end(path, 32, 48, 20), whole[-20:])
    np.testing.assert_array_equal(video_io.read_end(path, 32, 48, 999), whole)
    with pytest.raises(ValueError, match=r"a\.mp4 has no frames after 40\.0 s"):
        video_io.read_video(path, 32, 48, start=40.0)


@pytest.mark.parametrize(("stored", "ratio"), [("90x72", "64/45"), ("128x72", "1/1"), ("144x72", "8/9")])
def test_pixels_need_not_be_square(tmp_path, stored, ratio):
    disc = "color=black:s=128x72:r=16,format=gray,geq=lum='if(lt(hypot(X-64,Y-36),25),235,16)'"
    width, height = stored.split("x")
    fit = f"scale={width}:{height},setsar={ratio}"
    path = made(tmp_path / "a.mp4", "-f", "lavfi", "-i", disc, "-frames:v", "3", "-vf", fit, "-pix_fmt", "yuv420p")
    pixels = video_io.read_video(path, 60, 104)[0][..., 1] > 128
    wide, high = pixels.any(0).sum(), pixels.any(1).sum()
    assert abs(wide - high) <= 2 and 40 <= high <= 46


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
@pytest.mark.parametrize("light", ["", "max-cll=3000,400"])
def test_hdr_is_tone_mapped_as_by_ffmpeg(tmp_path, transfer, light):
    colors = (
        np.linspace(0, 1, 10)[:, None] * np.array([[1, 1, 1], [1, 0.5, 0.2], [0.3, 0.8, 1], [0.9, 0.2, 0.6]])[:, None]
    )
    pixels = np.round(np.kron(colors, np.ones((16, 16, 1))) * 65535).astype("<u2")  # [64, 160, 3]
    tags = f"setparams=color_primaries=bt2020:color_trc={transfer}:colorspace=bt2020nc:range=tv"
    filters = f"scale=out_color_matrix=bt2020:out_range=tv,format=yuv444p10le,{tags}"
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", "160x64", "-i", "-")
    codec = ("-c:v", "libx265", "-x265-params", f"log-level=none:lossless=1{light and ':'}{light}")
    path = made(tmp_path / "a.mp4", *raw, "-vf", filters, *codec, input=pixels.tobytes())
    wanted = reference(path, 64, 160, before=f"{TONE_MAP},")[0, 8::16, 8::16].astype(int)
    found = video_io.read_video(path, 64, 160)[0, 8::16, 8::16].astype(int)
    assert np.abs(found - wanted).max() <= 3 and np.abs(found - wanted).mean() < 0.6
    assert np.ptp(wanted[0]) == 255


def test_white_paper_stays_white():
    for transfer, code in ((tone_map.PQ, 0.508), (tone_map.HLG, 0.75)):
        pixels = np.full((2, 2, 3), round(code * 65535), np.uint16)
        assert 200 < tone_map.tone_map(pixels, transfer).min() <= 255


@pytest.mark.parametrize("codec", [("prores_ks", "yuva444p10le"), ("qtrle", "argb")])
def test_transparency_becomes_black(tmp_path, codec):
    pixels = np.zeros((16, 32, 4), np.uint8) + np.uint8([200, 120, 40, 255])
    pixels[:, 16:, 3] = 51
    raw = ("-f", "rawvideo", "-pix_fmt", "rgba", "-s", "32x16", "-i", "-")
    path = made(tmp_path / "a.mov", *raw, "-c:v", codec[0], "-pix_fmt", codec[1], input=pixels.tobytes())
    found = video_io.read_video(path, 16, 32)[0].astype(int)
    assert np.abs(found[8, 4] - [200, 120, 40]).max() <= 3 and np.abs(found[8, 28] - [40, 24, 8]).max() <= 3
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = video_io.read_image(tmp_path / "a.png", 16, 32).astype(int)
    assert found[8, 4].tolist() == [200, 120, 40] and found[8, 28].tolist() == [40, 24, 8]


def test_the_film_is_read_and_not_the_cover(tmp_path):
    Image.fromarray(np.full((512, 512, 3), 255, np.uint8)).save(tmp_path / "cover.png")
    film = made(tmp_path / "a.mp4", *SOURCE, "-frames:v", "5", "-pix_fmt", "yuv420p")
    both = ("-i", film, "-i", tmp_path / "cover.png", "-map", "0", "-map", "1", "-c", "copy")
    path = made(tmp_path / "b.mp4", *both, "-disposition:v:1", "attached_pic")
    np.testing.assert_array_equal(video_io.read_video(path, 32, 48), video_io.read_video(film, 32, 48))
    song = ("-f", "lavfi", "-i", "sine=duration=0.2", "-i", tmp_path / "cover.png", "-map", "0", "-map", "1")
    path = made(tmp_path / "c.m4a", *song, "-c:v", "copy", "-disposition:v:0", "attached_pic")
    with pytest.raises(ValueError, match="it has a cover picture and no video"):
        video_io.read_video(path, 32, 48)
    path = made(tmp_path / "d.mp4", "-f", "lavfi", "-i", "sine=duration=0.2")
    with pytest.raises(ValueError, match="it has no video"):
        video_io.read_video(path, 32, 48)


def test_damage_is_told_where_it_is_reached(tmp_path):
    path = made(
        tmp_path / "a.mp4", *SOURCE, "-frames:v", "48", "-g", "8", "-movflags", "+faststart", "-pix_fmt", "yuv420p"
    )
    whole = path.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    np.testing.assert_array_equal(
        video_io.read_video(tmp_path / "cut.mp4", 32, 48, limit=9), video_io.read_video(path, 32, 48, limit=9)
    )
    with pytest.raises(ValueError, match=r"video: cannot read .*cut\.mp4 \(.*damaged\)"):
        video_io.read_video(tmp_path / "cut.mp4", 32, 48)
    for content in (b"", b"<!DOCTYPE html><html><body>403</body></html>", whole[-2000:]):
        (tmp_path / "no.mp4").write_bytes(content)
        with pytest.raises(ValueError, match=r"video: cannot read .*no\.mp4 .*allowed: a video file \(mp4, mov"):
            video_io.read_video(tmp_path / "no.mp4", 32, 48)


def test_files_that_name_other_files_are_refused(tmp_path):
    secret = made(tmp_path / "secret.ts", *SOURCE, "-frames:v", "3", "-pix_fmt", "yuv420p")
    frame = tmp_path / "img-001.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(frame)
    (tmp_path / "list.sdp").write_text("")
    texts = {
        "concat.mp4": f"ffconcat version 1.0\nfile '{secret}'\n",
        "near.mp4": "ffconcat version 1.0\nfile secret.ts\n",
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "dash.mp4": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd"><BaseURL>{secret}</BaseURL></MPD>',
        "reel.mp4": f"[{secret}]\n",
        "text.mp4": "hello\n" * 50,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=f"video: cannot read .*{re.escape(name)}"):
            video_io.read_video(tmp_path / name, 32, 48)
    for name in ("img-%03d.png", "concat:secret.ts", "file:secret.ts", "testsrc"):
        with pytest.raises(ValueError, match="does not exist"):
            video_io.read_video(tmp_path / name, 32, 48)
    with pytest.raises(ValueError, match="cannot read"):
        video_io.read_video(frame, 32, 48)


def test_tracks_whose_data_is_in_another_file_are_refused(tmp_path):
    """A mov whose data reference no longer says "in this file"."""
    path = made(tmp_path / "a.mov", *SOURCE, "-frames:v", "3", "-pix_fmt", "yuv420p")
    whole = path.read_bytes()
    place = whole.index(b"url ", whole.index(b"dref"))
    assert whole[place + 4 : place + 8] == b"\0\0\0\1"
    other = os.fsencode(tmp_path / "secret.mov") + b"\0"
    made(tmp_path / "secret.mov", *SOURCE, "-frames:v", "3", "-pix_fmt", "yuv420p")
    assert video_file._OPTIONS["enable_drefs"] == "0" and video_file._OPTIONS["protocol_whitelist"] == "file"
    (tmp_path / "b.mov").write_bytes(whole[: place + 7] + b"\0" + other + whole[place + 8 + len(other) :])
    with pytest.raises(ValueError, match="video: cannot read"):
        video_io.read_video(tmp_path / "b.mov", 32, 48)


@pytest.mark.parametrize("read", [video_io.read_image, video_io.read_video])
def test_only_regular_files_are_opened(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    begin = time.monotonic()
    for path, kind in (
        (tmp_path / "pipe", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ValueError, match=f"{path} {kind}, allowed:"):
            read(path, 32, 48)
    with pytest.raises(ValueError, match="none does not exist"):
        read(tmp_path / "none", 32, 48)
    assert time.monotonic() - begin < 5


def test_absurd_sizes_are_refused(tmp_path, monkeypatch):
    header = b"YUV4MPEG2 W30000 H30000 F16:1 Ip A1:1 C420\nFRAME\n"
    (tmp_path / "a.y4m").write_bytes(header + bytes(1000))
    with pytest.raises(ValueError, match="or its frames have more than 67108864 pixels"):
        video_io.read_video(tmp_path / "a.y4m", 32, 48)
    path = made(
        tmp_path / "thin.mkv", "-f", "lavfi", "-i", "testsrc2=size=16x4000:rate=16", "-frames:v", "1", "-c:v", "ffv1"
    )
    with pytest.raises(ValueError, match="its picture is 16x4000: .* at most 16 times the frame"):
        video_io.read_video(path, 480, 832)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 40 - 1)
    path = made(tmp_path / "b.mp4", *SOURCE, "-frames:v", "1", "-pix_fmt", "yuv420p")
    with pytest.raises(ValueError, match="its frames are 64x40: at most 2559 pixels are read"):
        video_io.read_video(path, 32, 48)
    Image.fromarray(np.zeros((40, 64), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 40 - 1)
    with pytest.raises(ValueError, match=r"a\.png \(it is 64x40: at most 2559 pixels are read\)"):
        video_io.read_image(tmp_path / "a.png", 32, 48)


def test_long_videos_are_not_held(tmp_path, monkeypatch):
    path = made(
        tmp_path / "a.mp4",
        "-f",
        "lavfi",
        "-i",
        "color=s=16x16:r=16",
        "-frames:v",
        "6000",
        "-preset",
        "ultrafast",
        "-pix_fmt",
        "yuv420p",
    )
    assert path.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frames = video_io.read_video(path, 96, 160, last=5)
    assert frames.shape == (5, 96, 160, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # kB, of 276 MB
    monkeypatch.setattr(video_read, "MAX_BYTES", 96 * 160 * 3 * 40)
    with pytest.raises(ValueError, match="more than the 40 frames that fit in memory: say how many to read"):
        video_io.read_video(path, 96, 160)


def test_decoding_has_a_time_limit(tmp_path, monkeypatch):
    path = made(tmp_path / "a.mp4", *SOURCE, "-frames:v", "24", "-pix_fmt", "yuv420p")
    monkeypatch.setattr(video_file, "SECONDS_PER_FRAME", 0.0)
    monkeypatch.setattr(video_file, "SECONDS", 1e-9)
    monkeypatch.setattr(video_file, "_opened", lambda path: video_file.av.open(str(path)))
    with pytest.raises(ValueError, match="decoding takes too long"):
        video_io.read_video(path, 32, 48)


def test_rates_are_bounded(tmp_path):
    path = made(tmp_path / "a.mp4", *SOURCE, "-frames:v", "3", "-pix_fmt", "yuv420p")
    for fps in (1e9, 0, float("nan")):
        with pytest.raises(ValueError, match="fps is .*: it must be above 0 and at most 240"):
            video_io.read_video(path, 32, 48, fps)
    with pytest.raises(ValueError, match="has no frames at 1e-06 a second"):
        video_io.read_video(path, 32, 48, 1e-6)


def test_the_end_of_a_long_video_is_gone_on_from(tmp_path, capsys):
    path = tmp_path / "a.mp4"
    video = RNG.integers(0, 256, (60, 16, 16, 3), np.uint8)
    video_io.write_mp4(path, video, 16)
    job = Job(prompts=("a cat",), model="m", checkpoint="c", video=str(path), frames=45, height=16, width=16)
    pixels = job.initial_pixels()
    whole = video_io.read_video(path, 16, 16)
    np.testing.assert_array_equal(pixels, whole[-33:])  # 9 of 12 latent frames
    assert "its last 33 frames are gone on from, to 45 in all" in capsys.readouterr().out
    slow = dataclasses.replace(job, fps=8.0).initial_pixels()
    np.testing.assert_array_equal(slow, video_io.read_video(path, 16, 16, 8.0)[-21:])  # 6 of 8 latent frames
    assert "has about 16 frames a second, the new video 8: frames are left out" in capsys.readouterr().out
    fast = dataclasses.replace(job, fps=30.0).initial_pixels()
    np.testing.assert_array_equal(fast, pixels)
    assert "the new video 30: it plays faster there" in capsys.readouterr().out


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


def test_images_of_other_programs_are_refused(tmp_path):
    pixels = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for kind in ("EPS", "PDF", "PCX", "ICO", "PPM"):
        pixels.save(tmp_path / "a.png", kind)
        with pytest.raises(ValueError, match="cannot identify image file.*allowed: an image file .png, jpeg"):
            video_io.read_image(tmp_path / "a.png", 16, 16)
    for kind in ("JPEG", "WEBP", "BMP", "GIF", "TIFF"):
        pixels.save(tmp_path / "a.png", kind)
        assert video_io.read_image(tmp_path / "a.png", 16, 16).max() == 0


@pytest.mark.parametrize("matrix", range(16))
def test_color_matrices_are_converted_or_refused_in_one_line(tmp_path, matrix):
    good = made(tmp_path / "good.mp4", *SOURCE, "-frames:v", "2", "-c:v", "libx264", "-pix_fmt", "yuv420p")
    flags = ("-c", "copy", "-bsf:v", f"h264_metadata=matrix_coefficients={matrix}")
    path = made(tmp_path / "a.mp4", "-i", good, *flags)
    if matrix in (1, 2, 4, 5, 6, 7, 9):
        assert_like_ffmpeg(path)
        return
    try:
        assert video_io.read_video(path, 32, 48).shape == (2, 32, 48, 3)
    except ValueError as error:
        assert str(error).startswith(f"video: cannot read {path} (") and "\n" not in str(error)
        assert f"color matrix {matrix}" in str(error)
    else:
        assert matrix in (0, 3), matrix
