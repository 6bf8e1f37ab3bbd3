"""Layers with separate parameters: same results as a scan over stacked ones, with the cache read in place."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sf_jax
from sf_jax import config as configuration
from sf_jax import rollout as ro
from sf_jax.inference import layers
from sf_jax.inference.load import load_pipeline
from sf_jax.models import attention, wan
from sf_jax.models.slots import stack_layers, unstack_layers
from tests.helpers import SMALL, inputs, random_params, relative, tree_relative

APART = dataclasses.replace(SMALL, scan_layers=False)
ROLLOUTS = [
    {"window": 9, "sink": 3, "positions": "relative"},
    {"chunk": 2, "window": 5, "sink": 1, "first_frame_alone": True},
    {"context": "noisy"},
    {"window": 3},
    {"context_timestep": 80.0, "first_steps": (1000, 500)},
]


def test_parameters_are_those_of_the_stacks():
    params = unstack_layers(random_params())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda a: a.shape, wan.param_shapes(APART))
    chex.assert_trees_all_equal(stack_layers(params), random_params())
    np.testing.assert_array_equal(params["blocks_1"]["ffn_in"]["bias"], random_params()["blocks"]["ffn_in"]["bias"][1])


@pytest.mark.parametrize("remat", ["none", pytest.param("block", marks=(pytest.mark.slow, pytest.mark.exhaustive))])
def test_outputs_taps_and_gradients_are_those_of_a_scan(remat):
    noise, text, _ = inputs(4)
    layout, params = wan.bidirectional_layout(4), random_params()

    @jax.jit
    def both(params):
        def loss(config, params):
            model = wan.WanTransformer(dataclasses.replace(config, remat=remat))
            flow, kv = model.apply({"params": params}, noise, jnp.ones((2, 1)), text, layout, return_kv=True)
            taps, _ = model.apply({"params": params}, noise, jnp.ones((2, 1)), text, layout, (1,), method="features")
            return (flow**2).mean() + (taps**2).mean(), (flow, kv, taps)

        outputs = []
        for config, prepare in ((SMALL, lambda p: p), (APART, unstack_layers)):
            gradient, rest = jax.grad(lambda p, c=config, u=prepare: loss(c, u(p)), has_aux=True)(params)
            outputs.append((gradient, *rest))
        return outputs

    (gradient, *whole), (apart_gradient, *apart) = both(params)
    assert tree_relative(apart, whole) <= 1e-6
    assert tree_relative(apart_gradient, gradient) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        ROLLOUTS[0],
        pytest.param(ROLLOUTS[1], marks=pytest.mark.slow),
        *(pytest.param(case, marks=(pytest.mark.slow, pytest.mark.exhaustive)) for case in ROLLOUTS[2:]),
    ],
)
def test_rollouts_are_those_of_a_scan(changes, monkeypatch):
    monkeypatch.setattr(attention, "key_multiple", lambda *_: 50)  # as kernels that read keys in blocks have it
    config = ro.RolloutConfig(**changes)
    noise, text, draw = inputs(13 if config.first_frame_alone else 12)
    params = random_params()

    def run(model_config, params):
        return ro.rollout(wan.WanTransformer(model_config), config, params, text, noise, 2, draw, None, None)

    scanned = jax.jit(run, static_argnums=0)(SMALL, params)
    apart = jax.jit(run, static_argnums=0)(APART, unstack_layers(params))
    assert relative(apart.video, scanned.video) <= 1e-5
    if scanned.cache.capacity:
        assert tree_relative((apart.cache.k, apart.cache.v), (scanned.cache.k, scanned.cache.v)) <= 1e-5
    np.testing.assert_array_equal(apart.cache.frames, scanned.cache.frames)


def pipelines():
    """The same network with scanned and with separate layers."""
    rollout = ro.RolloutConfig(
        chunk=2, window=6, sink=2, positions="relative", context_noise="none", first_steps=(1000, 500)
    )
    params = random_params()
    for config, weights in ((SMALL, params), (APART, unstack_layers(params))):
        pipe = sf_jax.VideoPipeline(None, wan.WanTransformer(config), weights, rollout)
        yield pipe.with_sampling(height=4, width=4)


def test_streams_are_those_of_a_scan_and_go_on_from_each_others_files(tmp_path):
    prompt = np.random.default_rng(0).standard_normal((3, 8), np.float32)
    scanned, apart = (sf_jax.Stream(pipe, slots=2) for pipe in pipelines())
    names = [stream.join(prompt, seed=1) for stream in (scanned, apart)]
    for _ in range(4):
        ours, theirs = (s.step().latents(name) for s, name in zip((apart, scanned), names[::-1], strict=True))
        assert relative(ours, theirs) <= 1e-5
    scanned.save(names[0], tmp_path / "stream.safetensors")
    again = apart.restore(tmp_path / "stream.safetensors")
    assert relative(apart.step().latents(again), scanned.step().latents(names[0])) <= 1e-5


def test_slots_are_updated_in_place():
    """In the loop over a chunk's calls, only the updates themselves write all slots."""
    config = ro.RolloutConfig(chunk=1, window=33)
    noise, text, draw = inputs(1, 1)
    model, params = wan.WanTransformer(APART), unstack_layers(random_params())
    cache = ro.empty_cache(model, config, 1, 64, *noise.shape[2:4])
    text = model.apply({"params": params}, text, method="encode_text")

    def run(cache, start):
        return ro.generate_chunk(model, config, params, text, cache, noise, start, 0, 2, draw)

    lines = jax.jit(run).lower(cache, jnp.int32(40)).compile().as_text().split("\n")
    shape = ",".join(map(str, (1, cache.k.shape[2] + cache.tokens_per_frame, *cache.k.shape[3:])))
    body = [line for line in lines if "while/body" in line and f" f32[{shape}]" in line.split("(")[0]]
    assert body
    assert all("dynamic-update-slice" in line or "dynamic_update_slice" in line for line in body), body


@pytest.mark.slow
def test_a_model_whose_kernel_is_told_how_many_keys_to_read_has_its_layers_apart(folder, monkeypatch):
    prompt = np.random.default_rng(0).standard_normal((1, 512, 16), np.float32)
    options = {"checkpoint": folder / "student.safetensors", "vae": "none", "dtype": "float32"}
    scanned = load_pipeline(folder, **options)
    assert scanned.transformer.config.scan_layers
    apart = load_pipeline(folder, scan_layers=False, **options)
    assert not apart.transformer.config.scan_layers
    ours, theirs = (
        pipe.with_sampling(frames=21, height=32, width=48)(prompt, seed=3, output="latent") for pipe in (apart, scanned)
    )
    assert relative(ours, theirs) <= 1e-5
    assert "layers apart" in apart.describe() and "layers apart" not in scanned.describe()
    wide = wan.wan_1_3b()
    half = dataclasses.replace(wide, dtype="bfloat16")
    shapes, rollout = wan.param_shapes(half), ro.RolloutConfig()

    def apart(config, rollout=rollout, many_steps=False, **videos):
        return layers.layers_apart(config, shapes, rollout, 24 << 30, layers.Videos(**videos), many_steps)

    assert not apart(half)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert apart(half) and apart(half, many_steps=True) and not apart(wide, frames=21)
    assert not any(apart(half, **more) for more in ({"height": 720, "width": 1280}, {"frames": 201}, {"count": 2}))
    assert apart(half, ro.RolloutConfig(window=21), frames=201)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert apart(half) and apart(wide, frames=21) and not apart(half, many_steps=True)
    assert (
        attention.key_multiple("auto", "bfloat16", 128) == 512 and attention.key_multiple("xla", "bfloat16", 128) == 1
    )


def test_training_scans():
    for name in ("model", "teacher", "critic"):
        with pytest.raises(ValueError, match=rf"{name}\.scan_layers is False.*must be True"):
            configuration.TrainConfig(**{name: APART}, teacher_weights="shipped")
