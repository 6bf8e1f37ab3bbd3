"""Training on prepared data and official weights, at minimal size: every stage, export, generation."""

import dataclasses
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from sf_jax.config import from_dict, to_dict
from sf_jax.inference import batch, prepare_job
from sf_jax.inference.job import Job
from sf_jax.io.video import write_samples
from sf_jax.options import LogConfig
from sf_jax.training import export, loop
from tests.helpers import read_frames, tree_relative
from tests.test_commands import command
from tests.test_prepare import SMALL, TEXTS, make_videos
from tests.wan_folder import MODEL, make_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model folder."""
    return make_folder(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def data(model, tmp_path_factory):
    """Prepared prompts and videos."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    make_videos(folder / "clips")
    for source in ({"prompts": str(folder / "prompts.txt")}, {"videos": str(folder / "clips"), "clips_per_video": 2}):
        assert prepare_job.run(prepare_job.Job(str(model), str(folder / "wan"), **SMALL, **source))
    return folder / "wan"


def config_for(model, data, stage, **changes):
    """A run of two steps on 4x6 latents, with chunks of one frame."""
    values = {
        "stage": stage,
        "steps": 2,
        "batch_size": 2,
        "generator_every": 1,
        "log_every": 1,
        "checkpoint_every": 1,
        "model": to_dict(MODEL),
        "teacher_weights": str(model) if stage in ("init", "distill") else None,
        "data": {"name": "wan", "dir": str(data), "frames": 2, "height": 4, "width": 6},
        "rollout": {"chunk": 1, "steps": (1000, 500)},
        "ode": {"pairs": 3, "batch_size": 2, "solver_steps": 4},
        "frozen_dtype": "bfloat16",
        "ema": {"start": 0},
    }
    return from_dict(values | changes)


IMAGE = {"image_to_video": True, "rollout": {"chunk": 1, "steps": (1000, 500), "first_frame_alone": True}}
RUNS = {
    "teacher": ("teacher", {}),
    "causal": ("causal", {}),
    "ode": ("init", {}),
    "distill": ("distill", {}),
    "sid": ("distill", {"objective": "sid", "student_input": "teacher_forcing"}),
    "gan": ("distill", {"objective": "gan", "gan": {"head": {"taps": (0, 1), "ffn_dim": 32}}}),
    "long": ("distill", {"rollout_frames": (2, 4), "steps": 3}),
    "consistency": ("init", {"init": "consistency", "teacher_weights": "causal"}),
    "adapters": ("distill", {"lora": {"rank": 2}, "critic_lora": {"rank": 2}, "accumulate": 2}),
    "image": ("distill", IMAGE),
    "image_ode": ("init", IMAGE),
    "causal_ode": ("init", {"teacher_weights": "causal", "ode": {"teacher": "causal", "pairs": 4, "solver_steps": 4}}),
}
FAST = ("teacher",)
SIMILAR = ("sid", "adapters")
# Stages with samples: many-step and few-step networks, and one that starts from a given image.
SAMPLED = ("causal", "long", "image", "image_ode")


@pytest.mark.parametrize(
    "name",
    [
        *FAST,
        *(pytest.param(n, marks=pytest.mark.slow) for n in RUNS if n not in (*FAST, *SIMILAR)),
        *(pytest.param(n, marks=(pytest.mark.slow, pytest.mark.exhaustive)) for n in SIMILAR),
    ],
)
def test_every_stage_trains_on_prepared_data(name, model, data, tmp_path):
    stage, changes = RUNS[name]
    changes = changes | {"init_weights": str(model)}
    if changes.get("teacher_weights") == "causal":
        changes["teacher_weights"] = str(
            loop.train(
                config_for(model, data, "causal", **changes | {"init": "ode", "teacher_weights": None}),
                tmp_path / "causal",
            )
        )
    if name in SAMPLED:
        changes |= {"vae_weights": str(model), "log": {"sample_every": 2, "sample_count": 3}}
    config = config_for(model, data, stage, **changes)
    path = loop.train(config, tmp_path, write_samples)
    if name in SAMPLED:
        video = read_frames(tmp_path / "samples" / "step_000002.mp4")
        assert video.shape == (5, 9 * 32, 9 * 3 * 48, 3) and video.std() > 1
        assert (tmp_path / "samples" / "step_000002.png").stat().st_size
    start = load_file(model / "diffusion_pytorch_model.safetensors")
    trained = load_file(path)
    assert set(trained) == set(start) and 0 < tree_relative(trained, start) < 0.1
    if name == "image_ode":  # only samples need the clips, as the pairs use the prompts
        loop.train(dataclasses.replace(config, log=LogConfig()), tmp_path)


@pytest.mark.slow
def test_a_student_goes_on_from_others_weights_and_out_again(model, data, tmp_path, capsys):
    changes = {"init_weights": f"{model}/student.safetensors", "mesh": {"data": 1, "fsdp": -1}}
    config = config_for(model, data, "distill", **changes)
    whole = loop.train(config, tmp_path / "whole")
    loop.train(dataclasses.replace(config, steps=1), tmp_path / "run")
    # Runs in the parent folder, as users give relative paths; PYTHONPATH finds the package.
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    done = command("--from=run", module="sf_jax.convert", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "student of step 1: wrote run/student_000001.safetensors" in done.stdout, (
        done.stderr
    )
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| iterations | 1 of 1 |" in card and "| objective | dmd |" in card and "generator_loss" in card, card
    one = load_file(tmp_path / "run" / "student_000001.safetensors")
    start = load_file(model / "student.safetensors")
    assert set(one) == set(start) and 0 < tree_relative(one, start) < 0.1
    step, package = export.load_run(tmp_path / "whole")
    assert step == 2 and package.kind == "student"
    np.testing.assert_array_equal(load_file(whole)["head.head.bias"], package.params["head"]["bias"])
    written = batch.run(
        Job(
            model=str(model), checkpoint=str(whole), out=str(tmp_path / "out"), prompts=("a cat",), frames=9, chunk=1,
            height=32, width=48, dtype="float32",
        )
    )  # fmt: skip
    assert written and all(path.stat().st_size for path in written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_weights": None}, "teacher_weights is None: stage 'distill' needs a teacher"),
        ({"teacher_weights": "none.safetensors"}, "teacher_weights: none.safetensors does not exist"),
        ({"rollout_frames": (4,)}, "vae_weights is None: rollouts longer than data.frames and sample videos"),
        ({"model": to_dict(MODEL) | {"text_dim": 8}}, "model.text_dim is 8: the prompts of data.dir"),
        ({"model": to_dict(MODEL) | {"ffn_dim": 64}}, "of the wrong shape"),
        ({"objective": "gan", "gan": {"head": {"taps": (0,)}}, "data": {"height": 8}}, "data.height is 8"),
    ],
)
def test_wrong_inputs_are_told_by_their_field(changes, message, model, data, tmp_path):
    base = to_dict(config_for(model, data, "distill"))
    if "data" in changes:
        changes = changes | {"data": base["data"] | changes["data"]}
    with pytest.raises(ValueError) as error:
        loop.train(from_dict(base | changes), tmp_path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--from=none", "--output=x.safetensors"], "there is no finished checkpoint in"),
        (["--output=x.safetensors"], "input and from: give one of them"),
        (["--input=x.safetensors"], "output is missing"),
    ],
)
def test_export_answers_a_wrong_command_line_in_one_line(arguments, message, tmp_path):
    done = command(*arguments, module="sf_jax.convert")
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_torch_checkpoint_is_a_start_for_training(model, data, tmp_path):
    torch = pytest.importorskip("torch", reason="a .pt checkpoint needs the [convert] extra (PyTorch)")
    own = {name: 2 * value for name, value in load_file(model / "diffusion_pytorch_model.safetensors").items()}
    # The official trainer's format: three networks, prefixed names.
    states = {
        part: {f"model.{name}": torch.from_numpy(scale * value) for name, value in own.items()}
        for part, scale in (("generator", 3.0), ("critic", 5.0), ("generator_ema", 1.0))
    }
    torch.save(states, tmp_path / "others.pt")
    config = config_for(model, data, "distill", steps=1, init_weights=f"{tmp_path}/others.pt")
    trained = load_file(loop.train(config, tmp_path / "run"))
    assert 0 < tree_relative(trained, own) < 0.1
    made = command(f"--from={tmp_path}/run", f"--output={tmp_path}/student.pt", module="sf_jax.convert")
    assert made.returncode == 0, made.stderr
    again = torch.load(tmp_path / "student.pt", weights_only=True)["generator_ema"]
    assert all((again[f"model.{name}"].numpy() == value).all() for name, value in trained.items())
