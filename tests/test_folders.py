"""Configs of model folders: errors for other networks, and warnings for settings that are ignored."""

import json
import re
import warnings

import pytest

from sf_jax.models import vae
from sf_jax.weights import folders

# The file in Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "thresholding": False,
    "timestep_spacing": "linspace",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
VAE = {"_class_name": "AutoencoderKLWan", "base_dim": 96, "z_dim": 16, "scale_factor_spatial": 8}
VAE |= {"latents_mean": list(vae.WAN_MEAN), "latents_std": list(vae.WAN_STD)}


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction_type", "epsilon"),
        ("use_flow_sigmas", False),
        ("solver_order", 3),
        ("solver_type", "bh1"),
        ("num_train_timesteps", 500),
        ("shift_terminal", 0.02),
        ("use_karras_sigmas", True),
        ("disable_corrector", [0]),
        ("final_sigmas_type", "sigma_min"),
    ],
)
def test_what_is_not_followed_of_a_scheduler_is_named(field, value, tmp_path):
    put(tmp_path, "scheduler/scheduler_config.json", SCHEDULER | {field: value})
    with pytest.warns(UserWarning, match=f"{field} {re.escape(repr(value))} is not followed") as told:
        assert folders.read_solver(tmp_path) == ("unipc", 3.0)
    assert len(told) == 1


def test_published_schedulers_are_followed(tmp_path):
    dpm = {"_class_name": "DPMSolverMultistepScheduler", "solver_type": "midpoint", "algorithm_type": "dpmsolver++"}
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 5.0, "shift_terminal": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content, solver in ((SCHEDULER, "unipc"), (SCHEDULER | dpm, "dpm++"), (euler, "euler")):
            put(tmp_path, "scheduler/scheduler_config.json", content)
            assert folders.read_solver(tmp_path)[0] == solver


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("latents_mean", [0.0] * 16),
        ("latents_std", [1.0] * 16),
        ("latents_std", [1.0]),
        ("latents_mean", "none"),
        ("scale_factor_spatial", 16),
        ("scaling_factor", 0.18),
        ("_class_name", "AutoencoderKLQwenImage"),
        ("z_dim", 48),
    ],
)
def test_other_latents_are_refused(field, value, tmp_path):
    put(tmp_path, "vae/config.json", VAE | {field: value})
    with pytest.raises(ValueError, match=rf"vae/config.json: .*{field}.*Wan2.1's text-to-video"):
        folders.find_model(tmp_path, [])
    put(tmp_path, "vae/config.json", VAE)
    folders.find_model(tmp_path, [])


@pytest.mark.parametrize("name", ["WanVACETransformer3DModel", "VaceWanModel", "WanModel_S2V"])
def test_classes_of_other_transformers_are_refused(name, tmp_path):
    sizes = {"dim": 256, "ffn_dim": 8, "num_heads": 2, "num_layers": 1, "in_dim": 16, "freq_dim": 8}
    with pytest.raises(ValueError, match=f"_class_name is '{name}', another network"):
        folders.read_config(put(tmp_path, "config.json", sizes | {"_class_name": name}))
    assert folders.read_config(put(tmp_path, "config.json", sizes | {"_class_name": "CausalWanModel"})).dim == 256
