"""What training reads and leaves out: recipes of ODE pairs, heads of a network, masked frames; and its warnings."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax.models.wan import WanTransformer, wan_1_3b
from sf_jax.objectives import sid
from sf_jax.training import health, pairs, self_forcing, stages
from tests.helpers import SIZE, SMALL, random_params
from tests.test_objectives import FRAMES, make_config
from tests.test_training import small_config


def test_causal_pairs_are_those_of_their_clips_and_positions(tmp_path):
    ode = {"teacher": "causal", "solver_steps": 40}
    rollout = {"window": 6, "sink": 3, "positions": "relative"}
    config = small_config("init", teacher_weights="unused", ode=ode, rollout=rollout)
    source = types.SimpleNamespace(digest="a", records="b")

    def recipe(source=source, **changes):
        changed = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, **changes))
        return pairs._recipe(changed, {"w": jnp.ones(3)}, source, (6, 6, 6, 8))

    assert recipe() == recipe()
    assert recipe() != recipe(positions="absolute")
    assert recipe() != recipe(types.SimpleNamespace(digest="a", records="c"))


def test_the_number_of_heads_is_compared_with_the_file_beside(tmp_path, capsys):
    sizes = {"dim": 256, "ffn_dim": 512, "freq_dim": 256, "num_heads": 2, "num_layers": 1, "in_dim": 16, "eps": 1e-6}
    wanted = wan_1_3b(dim=256, ffn_dim=512, num_heads=4, num_layers=1)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    stages._check_heads(file, wanted, "teacher_weights")
    assert "nothing in the file says how many heads it has; the config says 4, and Wan's" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(ValueError, match="num_heads is 2 in the config.json beside it, the config says 4"):
        stages._check_heads(file, wanted, "teacher_weights")
    stages._check_heads(file, dataclasses.replace(wanted, num_heads=2), "teacher_weights")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "transformer" / "config.json")
    with pytest.raises(ValueError, match="num_heads is 2 in the config.json beside it, the config says 4"):
        stages._check_heads(tmp_path, wanted, "teacher_weights")
    assert not capsys.readouterr().out


def test_masked_frames_take_no_gradient_of_sid():
    config, params = make_config(objective="sid"), random_params(seed=2)
    model = WanTransformer(SMALL)
    keys = jax.random.split(jax.random.key(0), 4)
    video, noise = (jax.random.normal(key, (2, FRAMES, *SIZE, SMALL.channels)) for key in keys[:2])
    text = jax.random.normal(keys[2], (2, SMALL.text_len, SMALL.text_dim))
    mask = (jnp.arange(FRAMES) > 2)[None, :, None, None, None]

    def loss(video):
        networks = ((model, random_params(seed=4)), (model, params))
        t = jnp.full((2, 1), 500.0)
        return sid.generator_loss(video, *networks, text, jnp.zeros_like(text), t, noise, config.score, mask)[0]

    grads = jax.grad(loss)(video)
    assert not np.any(grads[:, :3]) and np.all(np.any(grads[:, 3:], axis=(0, 2, 3, 4)))


def test_videos_of_one_frame_have_no_motion():
    health_of = self_forcing._health
    assert set(health_of(jnp.ones((2, 1, 4, 4, 8)))) == {"saturation"}
    assert float(health_of(jnp.ones((2, 2, 4, 4, 8)))["motion"]) == 0


def test_figures_that_run_away_are_warned_of():
    history = [{"critic_lag": 1.0, "motion": 0.2, "critic_loss": 1.0}] * 12
    assert not health.warnings(history, {"critic_lag": 4.0, "motion": 0.1})
    assert not health.warnings(history[:5], {"critic_lag": 50.0})
    found = health.warnings(history, {"critic_lag": 6.0, "motion": 0.01, "critic_loss": 99.0})
    assert len(found) == 2 and "the critic does not keep up" in found[0] and "stand still" in found[1]
