"""Layers with separate parameters: same results as a scan over stacked ones, with the cache read in place."""

import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sf_jax
from sf_jax import config as configuration
from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.diffusion.solvers import Solver
from sf_jax.inference import layers, programs, stream_files
from sf_jax.inference.load import load_pipeline
from sf_jax.models import attention, rope, wan
from sf_jax.models.rope import MAX_FRAMES
from sf_jax.models.slots import split_projections, stack_layers, unstack_layers
from sf_jax.weights.eight_bit import quantize_params, quantizer_for
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


def pipelines(fuse=True, cache_dtype=None, **changes):
    """The same network with scanned and with separate layers, whose projections are joined as for GPUs."""
    fields = {"chunk": 2, "window": 6, "sink": 2, "positions": "relative", "context_noise": "none"}
    rollout = ro.RolloutConfig(**fields | {"first_steps": (1000, 500)} | changes)
    params = random_params()
    for config, weights in ((SMALL, params), (APART, unstack_layers(params, fuse=fuse))):
        pipe = sf_jax.VideoPipeline(None, wan.WanTransformer(config), weights, rollout, cache_dtype=cache_dtype)
        yield pipe.with_sampling(height=4, width=4)


def prompt(seed=0):
    """A prompt's embedding."""
    return np.random.default_rng(seed).standard_normal((3, 8), np.float32)


@pytest.mark.parametrize("fuse", [False, True])
def test_joined_projections_are_the_same_parameters(fuse):
    params = unstack_layers(random_params(), fuse=fuse)
    assert ("qkv" in params["blocks_0"]["self_attn"]) == fuse
    chex.assert_trees_all_equal(stack_layers(params), random_params())


VIDEOS = [
    {},
    {"window": None, "sink": 0, "positions": "absolute"},
    {"window": 7, "sink": 1, "first_frame_alone": True},
    {"positions": "absolute"},
    {"chunk": 1, "window": 4, "sink": 3},
    {"window": 4},
    {"context": "noisy", "sink": 0},
]


@pytest.mark.parametrize("changes", [VIDEOS[0], *(pytest.param(case, marks=pytest.mark.slow) for case in VIDEOS[1:])])
def test_videos_from_slots_are_those_from_a_cache(changes, monkeypatch):
    """Far past the window, and from given frames."""
    monkeypatch.setattr(attention, "key_multiple", lambda *_: 50)  # as kernels that read keys in blocks have it
    scanned, apart = pipelines(**changes)
    alone, chunk = scanned.rollout.first_frame_alone, scanned.rollout.chunk
    given = np.random.default_rng(1).standard_normal((2, alone + chunk, 4, 4, 4), np.float32)
    prompts, frames = np.stack([prompt(0), prompt(1)]), 20 + alone
    ours, theirs = (pipe(prompts, frames=frames, output="latent", initial=given) for pipe in (apart, scanned))
    assert relative(ours, theirs) <= 1e-5
    np.testing.assert_array_equal(ours[:, : given.shape[1]], given)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_streams_with_slots_are_those_with_a_cache(slots, positions, monkeypatch):
    """Through every change of the prompt, a pause, and another stream that comes and goes."""
    if slots > 1:
        monkeypatch.setattr(attention, "key_multiple", lambda *_: 50)
    streams = [sf_jax.Stream(pipe, slots=slots) for pipe in pipelines(positions=positions, first_frame_alone=True)]
    names = [stream.join(prompt(), seed=1) for stream in streams]

    def compare(steps):
        for _ in range(steps):
            theirs, ours = (stream.step().latents(name) for stream, name in zip(streams, names, strict=True))
            assert relative(ours, theirs) <= 1e-5

    compare(5)
    if slots > 1:
        for stream in streams:
            other = stream.join(prompt(9), seed=2)
            stream.step(only=[other])
        compare(1)
        for stream in streams:
            stream.leave(other)
    for i, mode in enumerate(("flush", "swap", "recache", "cut")):
        for stream, name in zip(streams, names, strict=True):
            stream.prompt(name, prompt(i + 2), mode)
        compare(4)


FILES = [{}, {"window": 2, "sink": 0}, {"positions": "absolute"}, {"cache_dtype": "int8"}]


@pytest.mark.parametrize("changes", [FILES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in FILES[1:])])
def test_streams_go_on_from_files_of_either_form(tmp_path, changes, monkeypatch):
    monkeypatch.setattr(attention, "key_multiple", lambda *_: 50)
    streams = [sf_jax.Stream(pipe, slots=2) for pipe in pipelines(**changes)]
    names = [stream.join(prompt(), seed=1) for stream in streams]
    for stream, name in zip(streams, names, strict=True):
        for _ in range(5):
            stream.step()
        stream.prompt(name, prompt(1), "flush")
        for _ in range(2):
            stream.step()
    files = [tmp_path / f"{form}.safetensors" for form in ("cache", "slots")]
    for stream, name, file in zip(streams, names, files, strict=True):
        stream.save(name, file)
    expected = [stream.step().latents(name) for stream, name in zip(streams, names, strict=True)]
    for stream, own, file, other in zip(streams, expected, files, files[::-1], strict=True):
        same = stream.restore(file)
        np.testing.assert_array_equal(stream.step(only=[same]).latents(same), own)
        stream.leave(same)
        across = stream.restore(other)
        assert relative(stream.step(only=[across]).latents(across), own) <= (1e-3 if "cache_dtype" in changes else 1e-5)


@pytest.mark.slow
def test_a_pause_at_the_last_position_harms_no_stream():
    """A paused stream computes, too; where its frames would lie past the last position, their rotation is NaN."""
    _, pipe = pipelines(chunk=60, window=60, sink=0, positions="absolute", steps=(1000,), first_steps=())
    stream = sf_jax.Stream(pipe, slots=2)
    ends, other = stream.join(prompt(0), seed=0), stream.join(prompt(1), seed=1)
    for _ in range(MAX_FRAMES // 60):
        stream.step(only=[ends])
    stream.step(only=[other])
    stream.prompt(ends, prompt(2), "cut")
    assert np.isfinite(stream.step().latents(ends)).all()


def test_a_video_that_is_longer_than_its_slots_is_refused():
    model, config = wan.WanTransformer(APART), ro.RolloutConfig(chunk=2)
    noise, text, draw = inputs(2)
    params = unstack_layers(random_params())
    text = model.apply({"params": params}, text, method="encode_text")
    cache = rollout_cache.empty_slots(model, config, 2, 4, 4, 4)
    with pytest.raises(ValueError, match="holds 4 frames but the rollout has 6"):
        ro.generate_chunk(model, config, params, text, cache, ro.NoisyChunk(noise, 4, 2, 0, draw))


@pytest.mark.slow
def test_many_steps_need_no_slots():
    (scanned, apart), solver = pipelines(window=None, sink=0, positions="absolute"), Solver("euler", 3.0, 4)
    ours, theirs = (
        pipe.with_sampling(solver=solver, guidance=2.0)(prompt()[None], frames=6, output="latent")
        for pipe in (apart, scanned)
    )
    assert relative(ours, theirs) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_kernels_of_8_bits_are_joined_too(name):
    """Also their digest in files of streams, and the form that a mesh gets whose devices share a video's heads."""
    narrow = quantize_params(random_params(), quantizer_for(name))
    forms = [unstack_layers(narrow, fuse=fuse) for fuse in (False, True)]
    joined = forms[1]["blocks_0"]["self_attn"]["qkv"]["kernel"]
    assert joined.values.shape == (3 * 32, 32) and joined.scale.shape == (3 * 32, 1)
    chex.assert_trees_all_equal(split_projections(forms[1]), forms[0])
    digests = {stream_files._digest({"params": params, "decoder": None}) for params in (narrow, *forms)}
    assert len(digests) == 1
    rollout = ro.RolloutConfig(chunk=2, context_noise="none")
    videos = [
        sf_jax.VideoPipeline(None, wan.WanTransformer(APART), params, rollout).with_sampling(height=4, width=4)(
            prompt()[None], frames=4, output="latent"
        )
        for params in forms
    ]
    assert relative(videos[1], videos[0]) <= 1e-5


def test_slots_are_never_copied():
    """In the program of a chunk, only the writes of own frames and of the sink have arrays of all slots."""
    _, pipe = pipelines(chunk=1, window=33, sink=1)
    model, config, size = pipe.transformer, pipe.rollout, (4, 4, 4)
    text = programs.encode_text(model, pipe.params, prompt()[None])
    cache = programs.empty_cache(model, config, 1, 64, size)
    source = (jax.random.key(0), jnp.zeros(1, jnp.int32), None)
    place = (jnp.int32(40), jnp.int32(40), jnp.bool_(False))
    compiled = programs.next_chunk.lower(model, config, None, (1, *size), pipe.params, text, cache, source, place)
    compiled = compiled.compile()
    shape = ",".join(map(str, cache.k[0].shape))
    lines = [line for line in compiled.as_text().split("\n") if f" f32[{shape}]" in line.split("(")[0]]
    quiet = ("parameter(", "get-tuple-element(", "dynamic-update-slice", "dynamic_update_slice", "bitcast(")
    assert lines
    assert not [line for line in lines if not any(word in line for word in quiet)]
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(a.nbytes for a in (*cache.k, *cache.v, *cache.sink_k))


def test_positions_without_end_keep_their_distances():
    grid, dim = (1, 2), 12
    keys = np.random.default_rng(0).standard_normal((1, 6, 2, dim)).astype(np.float32)
    rotated = rope.rotate(keys, rope.rotation(np.arange(3), grid, dim))
    products = np.einsum("btnd,bsnd->bnts", rotated, rotated)
    for first in (0, 5, 100_003, 2**31 - 2, -7):
        frames = (np.arange(3) + first).astype(np.uint32).astype(np.int32) if first > 0 else np.arange(3) + first
        far = rope.rotate(keys, rope.endless_rotation(jnp.asarray(frames, jnp.int32), grid, dim))
        np.testing.assert_allclose(np.einsum("btnd,bsnd->bnts", far, far), products, atol=1e-5)
        back = rope.rotate(far, rope.shift_rotation(jnp.int32(-first), dim))
        np.testing.assert_allclose(back, rotated, atol=1e-5)


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
    for capability in ("7.5", "gfx942", "9.0"):  # a T4, one of AMD, an H100
        gpu = types.SimpleNamespace(compute_capability=capability, device_kind=capability)
        monkeypatch.setattr(jax, "local_devices", lambda: [gpu])  # noqa: B023
        assert bool(apart(half)) == (capability == "9.0")
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
