"""Schedules: prompts that change while `sf_jax.generate` generates a video."""

import json

import numpy as np
import pytest

import sf_jax
from sf_jax.inference import batch
from sf_jax.inference.job import Job
from sf_jax.inference.scenes import Scene, read_schedule, scene_starts
from tests.helpers import read_frames

PROMPTS = ["a 7 moving left, fast", "a 2 moving up, slowly", "a 5 moving right"]
SMALL_VIDEO = {"height": 32, "width": 48}


def test_schedules_that_are_wrong_are_refused(tmp_path):
    path = tmp_path / "scenes.json"
    for content, message in (
        ("nothing", "cannot read"),
        ([], "must be a list of scenes"),
        ([{"prompt": "a 7"}], "scene 1: time is missing"),
        ([{"time": 0, "prompt": "a 7", "blur": 1}], "scene 1: blur is no field"),
        ([{"time": 0, "prompt": "a 7"}, {"time": 1, "prompt": "a 2", "fade": 1}], "scene 2: fade is 1: it must be"),
        ([{"time": 0, "prompt": ""}], "scene 1: prompt is ''"),
        ([{"time": True, "prompt": "a 7"}], "scene 1: time is True"),
        ([{"time": 0, "prompt": "a 7"}, {"time": 1, "prompt": "a 2", "mode": "blend"}], "scene 2: mode is 'blend'"),
        (
            [{"time": 0, "prompt": "a 7", "mode": "swap"}],
            "scene 1: only time and prompt are for the first scene",
        ),
        ([{"time": 0, "prompt": "a 7"}, {"time": 10**400, "prompt": "a 2"}], "scene 2: time is 1000"),
        ([{"time": 1, "prompt": "a 7"}], "the first must be 0"),
        ([{"time": 0, "prompt": "a 7"}, {"time": 0, "prompt": "a 2"}], "each later than the one before"),
    ):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_schedule(path)


def test_a_schedule_is_a_stream(digits, tmp_path):
    scenes = [{"time": 0, "prompt": PROMPTS[0]}, {"time": 0.6, "prompt": PROMPTS[1], "mode": "recache", "fade": 0.25}]
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps(scenes))
    fields = {"frames": 21, "seed": 4, "num_samples": 2, "out": str(tmp_path / "out"), "save_latents": True}
    batch.run(Job(prompts=(), schedule=str(path), **fields))
    stream = sf_jax.Stream(digits, slots=2)
    ids = [stream.join(PROMPTS[0], seed=4, number=number) for number in range(2)]
    parts = []
    for chunk in range(7):
        if chunk == 3:  # at 12 frames per second, the first chunk after 0.6 s
            for one in ids:
                stream.prompt(one, PROMPTS[1], "recache", fade=0.25)
        step = stream.step()
        parts.append(np.stack([step.latents(one) for one in ids]))
    for i, expected in enumerate(np.concatenate(parts, axis=1)):
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"a_7_moving_left_fast-{i}.npy"), expected)
    for time, message in (
        (50, "scene 2 begins at 50 s, behind the last chunk"),
        (0.61, "in the same chunk as scene 2"),
    ):
        wrong = (Scene(0, PROMPTS[0]), *([Scene(0.6, PROMPTS[1])] if time < 1 else []), Scene(time, PROMPTS[2]))
        with pytest.raises(ValueError, match=message):
            scene_starts(digits.with_sampling(frames=21), wrong, 12.0)
    with pytest.raises(ValueError, match="schedule and prompt are both given"):
        Job(prompts=("a 7",), schedule=str(path))
    with pytest.raises(ValueError, match="only few-step students stream without end"):
        batch.run(Job(prompts=(), schedule=str(path), checkpoint="teacher", out=str(tmp_path / "out")))


@pytest.mark.slow
def test_a_schedule_of_wan(folder, tmp_path):
    scenes = [{"time": 0, "prompt": "a cat"}, {"time": 0.6, "prompt": "a dog runs", "mode": "cut"}]
    path = tmp_path / "scenes.json"
    path.write_text(json.dumps(scenes))
    fields = {"model": str(folder), "checkpoint": str(folder / "student.safetensors"), "schedule": str(path)}
    fields |= {"frames": 33, "dtype": "float32", "out": str(tmp_path / "out"), **SMALL_VIDEO}
    (video, _) = batch.run(Job(prompts=(), window=6, **fields))
    assert read_frames(video).shape == (33, 32, 48, 3)  # 9 and 12, then 9 and 3 of 12 after the cut
    with pytest.raises(ValueError, match="window is None: a schedule needs one"):
        Job(prompts=(), **fields)
    with pytest.raises(ValueError, match="schedule needs a few-step student"):
        Job(prompts=(), window=6, solver="unipc", **fields)
