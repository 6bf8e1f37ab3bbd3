"""The cost of reading a clip: with PyAV in this process, and with the ffmpeg program, which PyAV replaced.

    taskset -c 0 python -m benchmarks.video_reading

Creates 1080p clips with ffmpeg, reads 81 frames of each as `sf_jax.prepare` does at 480x832, and prints CPU seconds (of
all processes) and the peak memory of each process. Needs imageio-ffmpeg.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

FRAMES, HEIGHT, WIDTH = 81, 480, 832
SOURCE = "gradients=size={size}:rate=30:speed=0.1,noise=alls=12:allf=t"
HDR = "format=yuv420p10le,setparams=color_primaries=bt2020:color_trc={}:colorspace=bt2020nc:range=tv"
CLIPS = {
    "1080p, H.264": ("1920x1080", ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p")),
    "1080p, HEVC, PQ": ("1920x1080", ("-vf", HDR.format("smpte2084"), "-c:v", "libx265", "-preset", "ultrafast")),
}
TONE_MAP = (
    "zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv444p,"
)


def read_pyav(path: str) -> int:
    """Reads with PyAV; returns the number of frames."""
    from sf_jax.io.video import read_video

    return len(read_video(path, HEIGHT, WIDTH, limit=FRAMES))


def read_program(path: str) -> int:
    """Reads with the ffmpeg program; returns the number of frames."""
    import imageio_ffmpeg
    import numpy as np

    tone_map = "" if "H.264" in path else TONE_MAP
    fit = f"{tone_map}scale=w='max({WIDTH},round({HEIGHT}*dar))':h='max({HEIGHT},round({WIDTH}/dar))':flags=bicubic"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-vf", f"{fit},crop={WIDTH}:{HEIGHT}"]
    command += ["-fps_mode", "passthrough", "-frames:v", str(FRAMES), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    return len(np.frombuffer(done.stdout, np.uint8)) // (HEIGHT * WIDTH * 3)


def measure(kind: str, path: str) -> None:
    """Prints the cost of reading once, without imports."""
    read = {"PyAV": read_pyav, "program": read_program}[kind]
    import imageio_ffmpeg  # noqa: F401
    import numpy as np  # noqa: F401

    import sf_jax.io.video  # noqa: F401

    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    begin = sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who))
    assert read(path) == FRAMES
    usages = [resource.getrusage(one) for one in who]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in usages) - begin
    memory = " + ".join(f"{usage.ru_maxrss / 1024:.0f}" for usage in usages)
    print(
        f"{Path(path).stem:18} {kind:8} {seconds:6.1f} s of processor, {memory} MiB (this process + ffmpeg's)",
        flush=True,
    )


def main() -> None:
    """Command line: see the module's docstring."""
    if len(sys.argv) == 3:
        return measure(*sys.argv[1:])
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        for name, (size, codec) in CLIPS.items():
            path = f"{folder}/{name}.mp4"
            source = ["-f", "lavfi", "-i", SOURCE.format(size=size), "-frames:v", str(FRAMES + 20)]
            subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *codec, path], check=True)
            for kind in ("program", "PyAV", "program", "PyAV"):
                subprocess.run([sys.executable, "-m", "benchmarks.video_reading", kind, path], check=True)
    return None


if __name__ == "__main__":
    main()
