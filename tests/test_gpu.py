"""GPU-only code: its attention, its convolutions, layers apart. Skipped elsewhere; gpu_hour.sh runs it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sf_jax
from sf_jax.inference.layers import layers_apart, separated
from sf_jax.models import vae
from sf_jax.models.wan import WanConfig, WanTransformer
from sf_jax.rollout import RolloutConfig
from tests.helpers import random_params, relative
from tests.wan_folder import VAE, random_like

pytestmark = pytest.mark.gpu
HEADS_OF_64 = WanConfig(dim=128, ffn_dim=256, num_heads=2, num_layers=2, text_dim=16, text_len=128, freq_dim=32)


@pytest.mark.parametrize("window", [{}, {"window": 6, "sink": 1, "positions": "relative"}])
def test_a_student_with_cudnn_and_layers_apart_equals_the_scanned_one(window):
    text = np.random.default_rng(0).standard_normal((1, 128, 16), np.float32)
    rollout, videos = RolloutConfig(context_noise="none", **window), []
    for attention, scanned, dtype in (("cudnn", None, "bfloat16"), ("xla", True, "bfloat16"), ("xla", True, "float32")):
        config = dataclasses.replace(HEADS_OF_64, attention=attention, dtype=dtype)
        params = random_params(config)
        if not scanned:
            assert layers_apart(config, params, rollout, None)
            config, params = separated(config, params)
        pipe = sf_jax.VideoPipeline(None, WanTransformer(config), params, rollout)
        videos.append(pipe(text, output="latent", frames=12, height=16, width=32))
    rounding = relative(videos[1], videos[2])
    assert relative(videos[0], videos[2]) < 2 * rounding < 0.2


def test_the_digits_are_those_of_a_cpu(digits):
    with jax.default_matmul_precision("highest"):
        video = digits(["a 7 moving left, fast", "a 2 moving up, slowly"], frames=12, seed=3)
    recorded = np.load("tests/recorded/digits.npz")["video"]
    assert np.abs(video.astype(int) - recorded).max() <= 2


def test_the_decoder_is_that_of_a_cpu():
    params = random_like(vae.param_shapes(VAE))
    latents = np.random.default_rng(0).standard_normal((1, 3, 4, 6, 16), np.float32)
    videos = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            decode = jax.jit(lambda p, x: vae.WanVae(VAE).apply({"params": p}, x, method="decode"))
            videos.append(np.asarray(decode(params, jnp.asarray(latents))))
    assert relative(videos[1], videos[0]) < 1e-4
