"""`python -m sf_jax.generate --model=...` on a small model folder: its output, and one line for every mistake."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from sf_jax import load_pipeline
from sf_jax.inference import batch, lengths
from sf_jax.inference.job import Job, video_names
from sf_jax.inference.sampling import Chunk
from sf_jax.io import video as video_io
from sf_jax.rollout import RolloutConfig
from sf_jax.weights.package import Package, load_package, read_header, save_package
from tests.forked import run_command
from tests.helpers import random_params, read_frames
from tests.wan_folder import MODEL, make_folder

SMALL = {"frames": 33, "height": 32, "width": 48, "dtype": "float32", "prompts": ("a cat in the snow", "a dog runs")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model folder."""
    return make_folder(tmp_path_factory.mktemp("models") / "wan")


def job(folder, out, **changes):
    fields = SMALL | {"model": str(folder), "checkpoint": f"{folder}/student.safetensors", "out": str(out)}
    return Job(**fields | changes)


def test_student_writes_videos_latents_and_a_sheet(folder, tmp_path, capsys):
    written = batch.run(job(folder, tmp_path, save_latents=True, num_samples=2))
    names = [f"{prompt}-{i}" for prompt in ("a_cat_in_the_snow", "a_dog_runs") for i in range(2)]
    assert {path.name for path in written} == {f"{n}.{end}" for n in names for end in ("mp4", "npy")} | {
        f"{n}.png" for n in names
    }
    videos = [read_frames(tmp_path / f"{name}.mp4") for name in names]
    assert all(video.shape == (33, 32, 48, 3) for video in videos)
    latents = [np.load(tmp_path / f"{name}.npy") for name in names]
    assert all(x.shape == (9, 4, 6, 16) and x.dtype == np.float32 for x in latents)
    assert all(np.abs(latents[0] - other).max() > 0.1 for other in latents[1:])
    printed = capsys.readouterr().out
    assert printed.count("chunk ") == 4 * 3 and "time to first frame" in printed and "FPS without decoding" in printed


@pytest.mark.parametrize("frames", [7, 37])
def test_only_the_frames_of_the_sheet_stay_in_memory(tmp_path, monkeypatch, frames):
    whole = np.random.default_rng(0).integers(0, 256, (1, frames, 16, 16, 3), np.uint8)
    ends = [1, *range(5, frames, 12), frames]
    chunks = [Chunk(np.zeros(1), part, i) for i, part in enumerate(np.split(whole, ends[:-1], axis=1))]
    sheets, sheet = [], video_io.contact_sheet
    monkeypatch.setattr(video_io, "contact_sheet", lambda given, **o: sheets.append(given) or sheet(given, **o))
    pipe = types.SimpleNamespace(sampling=types.SimpleNamespace(frames=frames, height=16, width=16))
    written = batch._write(pipe, batch.Style(16.0), [(tmp_path / "a", "a")], iter(chunks), batch.Times(), "")
    assert [path.name for path in written] == ["a.mp4", "a.png"] and len(read_frames(written[0])) == frames
    assert sheets[0].shape[1] < 16
    with Image.open(written[1]) as image:
        np.testing.assert_array_equal(np.asarray(image), sheet(whole, every=max(1, frames // 8), factor=1))


@pytest.mark.parametrize("side", [24, 240])
def test_videos_of_digits_have_all_pixels_and_existing_files_stay(tmp_path, side):
    whole = np.random.default_rng(0).integers(0, 256, (2, 3, side, side, 1), np.uint8)
    pipe = types.SimpleNamespace(sampling=types.SimpleNamespace(frames=3, height=side, width=side))
    style = batch.Style(12.0, gif=True, sheet="contact_sheet", latents=True, keep=True)
    videos = [(tmp_path / name, name) for name in "ab"]
    for name in ("a.npy", "b.gif"):
        (tmp_path / name).write_text("kept")
    chunks = iter([Chunk(np.zeros((2, 1, 2, 2, 8)), whole, 0)])
    written = batch._write(pipe, style, videos, chunks, batch.Times(), "")
    assert {path.name for path in written} == {f"{n}.{end}" for n in "ab" for end in ("mp4", "npy", "gif")} | {
        "contact_sheet.png"
    }
    assert all(read_frames(tmp_path / f"{name}.mp4").shape[1:3] == (side, side) for name in "ab")
    assert [(tmp_path / name).read_text() for name in ("a.npy", "b.gif")] == ["kept", "kept"]
    assert np.load(tmp_path / "b.npy").shape == (1, 2, 2, 8)


def test_a_video_goes_on_after_a_lone_first_frame(tmp_path, monkeypatch):
    video = tmp_path / "clip.mp4"
    video_io.write_mp4(video, np.random.default_rng(0).integers(0, 256, (45, 32, 48, 3), np.uint8), 16)
    sizes = {"prompts": ("a cat",), "model": "m", "checkpoint": "c", "height": 32, "width": 48, "video": str(video)}
    for alone, frames, latent in ((True, 85, 10), (True, 37, 7), (False, 81, 12), (False, 45, 9)):
        rollout = RolloutConfig(first_frame_alone=alone, context_noise="none")
        monkeypatch.setattr(Job, "wan_rollout", rollout)
        assert len(Job(**sizes, frames=frames).initial_pixels()) == 4 * (latent - 1) + 1


@pytest.mark.slow
def test_a_video_is_the_same_on_any_number_of_devices(folder, tmp_path):
    code = f"""
import dataclasses, sys, numpy as np
from tests.test_generate_wan import job
from sf_jax.inference import batch
prompts = ("a cat", "a dog", "a cat runs")
batch.run(job({str(folder)!r}, sys.argv[1], prompts=prompts, frames=21, save_latents=True, vbench_names=True))
"""
    for devices in (1, 2):
        env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(devices))], env=env, check=True)
    for name in ("a cat-0", "a dog-0", "a cat runs-0"):
        one, two = (np.load(tmp_path / count / f"{name}.npy") for count in "12")
        np.testing.assert_array_equal(one, two)
        one, two = (read_frames(tmp_path / count / f"{name}.mp4") for count in "12")
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_image_video_and_many_steps(folder, tmp_path):
    one = {"prompts": ("a cat in the snow",), "save_latents": True}
    student = batch.run(job(folder, tmp_path / "a", frames=9, **one))
    image = read_frames(student[0])[0]
    video_io.write_png(tmp_path / "first.png", image)
    batch.run(job(folder, tmp_path / "b", image=str(tmp_path / "first.png"), frames=13, **one))
    assert read_frames(tmp_path / "b" / "a_cat_in_the_snow.mp4").shape[0] == 13
    longer = batch.run(job(folder, tmp_path / "c", video=str(student[0]), frames=21, vae="tiny", **one))
    assert read_frames(longer[0]).shape[0] == 21 and np.load(longer[1]).shape[0] == 6
    many = {"solver": "unipc", "steps": 2, "guidance": 3.0, "negative_prompt": "a dog", **one}
    causal = batch.run(job(folder, tmp_path / "d", frames=9, **many))
    teacher = batch.run(job(folder, tmp_path / "e", frames=9, checkpoint=None, **many))
    assert np.load(causal[1]).shape == np.load(teacher[1]).shape == (3, 4, 6, 16)
    without = batch.run(job(folder, tmp_path / "f", frames=9, **many | {"negative_prompt": "snow"}))
    assert np.abs(np.load(without[1]) - np.load(causal[1])).max() > 1e-3


def test_lengths_that_can_be_made_are_named():
    rollout = Job(model="m", prompts=("a",), checkpoint="c").wan_rollout
    with pytest.raises(ValueError, match="frames is 77 .20 latent frames.: .* at most 1024 in all .*: 69 or 81"):
        lengths.check_frames(rollout, 20, factor=4)
    alone = dataclasses.replace(rollout, first_frame_alone=True)
    with pytest.raises(ValueError, match="81 .* behind 1 initial latent frames: .*: 73 or 85"):
        lengths.check_frames(alone, 21, 1, 4)
    with pytest.raises(ValueError, match="frames is 7997 .* nearest that can be generated: 4077 or 4089"):
        lengths.check_frames(rollout, 2000, factor=4)
    assert lengths.latent_frames(81, 4) == 21


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": float("nan")}, "guidance is nan: it must be a finite number"),
        ({"shift": 0.0}, "shift is 0.0: it must be a finite number above 0"),
        ({"fps": -1.0}, "fps is -1.0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"image": ""}, "image is empty"),
        ({"sink": -1, "window": 6}, "sink is -1 frames: it must be at least 0"),
        ({"window": 2}, "window is 2 frames: it must be at least chunk [+] sink = 3 [+] 0"),
    ],
)
def test_jobs_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        job("folder", "out", **changes)


@pytest.fixture(scope="module")
def trained(folder):
    """A function that writes a file like sf_jax.train's, given its name and changes to the header."""
    rollout = RolloutConfig(
        steps=(1000, 500), shift=3.0, chunk=2, window=6, sink=2, positions="relative", context_timestep=100.0
    )
    package = Package("student", MODEL, rollout, 9, (4, 6), 3.0, 2.5, random_params(MODEL, 2))

    def write(name, rollout=None, **changes):
        changes["rollout"] = dataclasses.replace(package.rollout, **rollout or {})
        save_package(folder / name, dataclasses.replace(package, **changes))
        return str(folder / name)

    return write


@pytest.mark.slow
def test_what_a_checkpoint_says_of_itself_sets_the_defaults(folder, trained, tmp_path):
    one = {"prompts": ("a cat in the snow",), "save_latents": True, "frames": None}
    path = trained("few.safetensors", {"first_frame_alone": True})
    few = job(folder, "out", checkpoint=path, **one)
    rollout = few.trained.rollout
    assert few.wan_rollout == rollout and rollout.adds_context_noise and few.wan_frames == 81
    written = batch.run(dataclasses.replace(few, out=str(tmp_path), frames=25, vae="tiny"))
    pipe = load_pipeline(folder, path, vae="tiny", dtype="float32")
    assert pipe.rollout == rollout and pipe.kind == "student"
    options = {"frames": 25, "height": 32, "width": 48}
    latents = pipe("a cat in the snow", output="latent", **options)[0]
    np.testing.assert_array_equal(np.load(written[1]), latents)
    plain = RolloutConfig(chunk=2, first_frame_alone=True, context_noise="none")
    other = load_pipeline(folder, folder / "student.safetensors", dtype="float32", rollout=plain)
    assert np.abs(other("a cat in the snow", output="latent", **options)[0] - latents).max() > 0.1
    many = load_pipeline(folder, trained("many.safetensors", kind="causal"), vae="none")
    assert many.kind == "causal" and many.sampling.solver.shift == 3.0 and many.sampling.guidance == 2.5
    official = {"context_timestep": 0.0, "context_noise": "official"}
    noisy = {"context": "noisy", "context_timestep": 0.0}
    for changes, expected in ((official, "none"), (noisy, "exact")):
        noise = job(folder, "out", checkpoint=trained("noise.safetensors", changes), **one)
        assert noise.wan_rollout.context_noise == expected and noise.wan_frames == 85  # whole chunks


@pytest.mark.parametrize(
    ("header", "changes", "message"),
    [
        (
            {},
            {"denoising_steps": (1000, 750)},
            "denoising_steps is .1000, 750.: .* trained with .1000, 500.; leave",
        ),
        ({}, {"shift": 5.0}, "shift is 5.0: checkpoint .* was trained with 3.0"),
        ({}, {"chunk": 3}, "chunk is 3: checkpoint .* was trained with 2"),
        ({}, {"window": 8}, "window is 8: .* was trained with 6"),
        ({}, {"sink": 0}, "sink is 0: .* was trained with 2"),
        ({}, {"positions": "absolute"}, "positions is absolute: .* was trained with relative"),
        ({}, {"context": "noisy"}, "context is noisy: .* was trained with clean"),
        ({}, {"image": "a.png"}, "image is a.png: .* was trained without lone first frames"),
        ({}, {"solver": "unipc"}, "solver is 'unipc': .* takes the few steps it was trained for"),
        ({"kind": "causal"}, {}, "takes many steps .its header says so.: choose a solver"),
        ({"kind": "causal"}, {"solver": "unipc", "shift": 5.0}, "shift is 5.0: .* was trained with 3.0"),
        ({"kind": "teacher"}, {}, "is a bidirectional network .its header says so."),
    ],
)
def test_flags_that_contradict_a_checkpoint_are_refused(folder, trained, header, changes, message):
    path = trained("header.safetensors", **header)
    with pytest.raises(ValueError, match=message):
        job(folder, "out", checkpoint=path, frames=29, **changes)


@pytest.mark.parametrize(
    "header",
    [
        '"abc"',
        "3",
        "null",
        "[" * 100_000,
        {"kind": "evil"},
        {"kind": None},
        {"frames": -1},
        {"frames": "x"},
        {"shift": "x"},
        {"shift": float("inf")},
        {"size": [-6, 6]},
        {"size": "ab"},
        {"size": [6]},
        {"more": 1},
        {"rollout": 3},
    ],
    ids=lambda header: str(header)[:30],
)
def test_damaged_headers_are_one_line(folder, trained, header):
    path = trained("damaged.safetensors")
    if isinstance(header, dict):
        with safe_open(path, "np") as stored:
            header = json.dumps(json.loads(stored.metadata()["sf_jax"]) | header)
    save_file({"a": np.zeros(1, np.float32)}, path, {"sf_jax": header})
    for load in (load_package, read_header):
        with pytest.raises(ValueError, match=r"damaged\.safetensors was made by another version or is damaged"):
            load(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"high_noise_model/config.json": {}, "low_noise_model/config.json": {}},
            "Wan2.2-A14B, whose transformer is two",
        ),
        ({"transformer_2/config.json": {}}, "Wan2.2-A14B, whose transformer is two experts .transformer_2 is there"),
        ({"model_index.json": {"transformer_2": ["diffusers", "WanTransformer3DModel"]}}, "Wan2.2-A14B, with two"),
        ({"model_index.json": {"boundary_ratio": 0.875}}, "Wan2.2-A14B, with two experts"),
        ({"model_index.json": {"_class_name": "WanImageToVideoPipeline"}}, "is a WanImageToVideoPipeline"),
        ({"Wan2.2_VAE.pth": {}}, "Wan2.2-TI2V-5B, which has another VAE"),
        ({"vae/config.json": {"z_dim": 48}}, "a VAE of 48 channels"),
        ({"image_encoder/config.json": {}}, "an image-to-video model"),
        ({"model_index.json": [1]}, "model_index.json holds no table"),
    ],
)
def test_other_models_are_named(folder, tmp_path, files, message):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    for name, content in files.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(json.dumps(content))
    for checkpoint in (None, copy / "student.safetensors"):
        with pytest.raises(ValueError, match=message):
            load_pipeline(copy, checkpoint=checkpoint)


def test_a_scheduler_of_diffusers_sets_the_solver(folder, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "transformer_2": [None, None]}))
    (copy / "scheduler").mkdir()
    file = copy / "scheduler" / "scheduler_config.json"
    for stored, expected in (
        ({"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}, ("unipc", 3.0)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5}, ("euler", 5.0)),
    ):
        file.write_text(json.dumps(stored))
        solver = load_pipeline(copy, vae="none").sampling.solver
        assert (solver.name, solver.shift) == expected
    file.write_text(json.dumps({"_class_name": "LCMScheduler"}))
    with pytest.warns(UserWarning, match="asks for LCMScheduler, which is not known"):
        assert load_pipeline(copy, vae="none").sampling.solver.shift == 8.0
    file.write_text(json.dumps({"_class_name": "UniPCMultistepScheduler", "flow_shift": -1}))
    with pytest.raises(ValueError, match="flow_shift is -1"):
        load_pipeline(copy, vae="none")


def test_vbench_counts_the_samples_of_a_prompt_on():
    named = dataclasses.replace(job("m", "out"), prompts=("a cat", "a/dog", "a cat"), vbench_names=True, num_samples=2)
    assert video_names(named) == ["a cat-0", "a cat-1", "a dog-0", "a dog-1", "a cat-2", "a cat-3"]
    plain = dataclasses.replace(named, vbench_names=False, num_samples=1)
    # VBench expects the whole prompt; VBench 2.0 expects 180 characters of prompts too long for a file name.
    long, longer = "a cat " + "in the snow and " * 11 + "the dog runs", "the dog\u2019s world " * 20
    for prompt, name in ((long, long), (longer, longer[:180])):
        one = Job(model="m", prompts=(prompt,), checkpoint="c", vbench_names=True)
        assert video_names(one) == [f"{name}-0"]
    assert video_names(plain) == ["0000_a_cat", "0001_a_dog", "0002_a_cat"]


def test_times_leave_compilation_out_where_they_can():
    times = batch.Times([5.0], [batch.ChunkTime(4.0, 1.0, 9, compiled=True)])
    assert times.summary() == (
        "time to first frame 5.00 s (compilation included); 5.00 s per chunk (compilation included); "
        "2.25 FPS without decoding, 1.80 FPS with it (compilation included)"
    )
    times.chunks.append(batch.ChunkTime(1.0, 1.0, 12, compiled=False))
    assert times.summary().endswith("2.00 s per chunk; 12.00 FPS without decoding, 6.00 FPS with it")
    assert batch.Times().summary() == "no video for this process"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps=7"], "steps has no effect here: a few-step student has none"),
        (["--solver=euler", "--denoising_steps=500"], "denoising_steps has no effect here"),
    ],
)
def test_flags_without_a_meaning_are_refused(flags, message, folder, tmp_path):
    done = generate(f"--model={folder}", f"--checkpoint={folder}/student.safetensors", *GOOD, *flags)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_cut_video_is_refused_before_anything_is_loaded(folder, tmp_path):
    whole = tmp_path / "whole.mp4"
    video_io.write_mp4(whole, np.random.default_rng(0).integers(0, 256, (33, 32, 48, 3), np.uint8), 16)
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match="video: cannot read"):
        batch.run(job("nowhere", tmp_path, video=str(tmp_path / "cut.mp4"), frames=45))


def test_only_what_is_needed_must_be_in_the_folder(folder, tmp_path):
    part = shutil.copytree(folder, tmp_path / "part")
    for name in ("diffusion_pytorch_model.safetensors", "Wan2.1_VAE.safetensors"):
        (part / name).unlink()
    changes = {"prompts": ("a cat",), "frames": 9, "checkpoint": f"{folder}/student.safetensors", "vae": "tiny"}
    assert len(batch.run(job(part, tmp_path / "out", **changes))) == 2
    with pytest.raises(ValueError, match="lacks: vae"):
        batch.run(job(part, tmp_path / "out", **changes | {"vae": "wan"}))


GOOD = ["--prompt=a cat", "--frames=9", "--height=32", "--width=48"]


def generate(*arguments):
    return run_command("sf_jax.generate", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=none", *GOOD, "--solver=unipc"], "model folder none does not exist"),
        (["--model={folder}", *GOOD], "solver is 'few': a model without checkpoint"),
        (["--model={folder}", "--checkpoint=none.pt", *GOOD], "none.pt does not exist"),
        (["--model={folder}", "--checkpoint={folder}/student.safetensors", *GOOD, "--frames=80"], "frames is 80"),
        (["--model={folder}", "--checkpoint={folder}/student.safetensors", *GOOD, "--frames=13"], "9 or 21"),
        (["--model={folder}", *GOOD, "--height=40", "--solver=euler"], "height is 40: it must be a multiple of 16"),
        (["--model={folder}", "--prompt= ", *GOOD[1:], "--solver=euler"], "prompt is empty"),
        (["--model={folder}", "--solver=euler"], "prompt is missing"),
        (["--model={folder}", *GOOD, "--seed=4294967296"], "flag --seed=4294967296"),
        (["--model={folder}", "--prompt=a", "cat"], "unexpected argument 'cat'"),
        (["--model={folder}", *GOOD, "--solver=foo"], "flag --solver=foo"),
        (["--height=64"], "height is given without model"),
        (["--model={folder}", "--checkpoint={folder}/Wan2.1_VAE.safetensors", *GOOD], "VAE"),
        (
            [
                "--model={folder}",
                "--checkpoint={folder}/student.safetensors",
                *GOOD,
                "--frames=13",
                "--image={folder}/config.json",
            ],
            "image",
        ),
        (
            ["--model={folder}", "--checkpoint={folder}/student.safetensors", *GOOD, "--video={folder}/config.json"],
            "video",
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(arguments, message, folder, tmp_path):
    done = generate(*[a.format(folder=folder) for a in arguments], f"--out={tmp_path}/out")
    assert done.returncode == 1, done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="a full disk needs the rights to mount one")
def test_a_full_disk_leaves_no_half_written_video(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises((OSError, ValueError), match="cannot write"):
            batch.run(job(folder, disk, prompts=("a cat",)))
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)
