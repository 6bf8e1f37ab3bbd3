"""The video VAE and the tiny decoder: streaming, shapes, name maps."""

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax.models import tiny_vae, vae
from sf_jax.models.streaming import Conv, StreamCache, empty_decode_cache
from sf_jax.weights import mapping
from sf_jax.weights import vae as weights
from tests.helpers import relative

MANIFESTS = pathlib.Path(__file__).parent / "manifests"
SMALL = vae.VaeConfig(
    dim=4,
    z_dim=3,
    dim_mult=(1, 2),
    temporal_downsample=(True,),
    mean=(0.5, -0.25, 1.0),
    std=(2.0, 0.5, 1.5),
)
# One more level, whose resampling keeps the number of frames.
LARGER = dataclasses.replace(SMALL, dim_mult=(1, 2, 1), temporal_downsample=(False, True))
TINY = tiny_vae.TinyVaeConfig(z_dim=3, widths=(8, 4, 4, 4), blocks=2)
MODELS = {"vae": (vae, vae.WanVae(SMALL)), "tiny": (tiny_vae, tiny_vae.TinyVaeDecoder(TINY))}


def random_params(shapes, seed=0):
    """Numpy parameters without zeros, so that every path affects the output."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        value = rng.normal(size=shape.shape)
        if path[-1].key == "kernel":
            return np.asarray(value * np.prod(shape.shape[:-1]) ** -0.5, np.float32)
        return np.asarray(0.2 * value + (path[-1].key == "scale"), np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def network(kind):
    """(model, parameters, compiled decode)."""
    module, model = MODELS[kind]
    params = random_params(module.param_shapes(model.config))
    return model, params, jax.jit(lambda params, z: model.apply({"params": params}, z, method="decode"))


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(1).normal(size=(2, 4, 2, 3, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", MODELS)
def test_chunks_give_the_whole_decode_to_the_bit_and_one_program_each(kind, latents):
    model, params, decode = network(kind)
    factor = model.config.temporal_factor
    whole = np.asarray(decode(params, latents))
    side = model.config.spatial_factor
    assert whole.shape == (2, 1 + 3 * factor, 2 * side, 3 * side, 3)
    assert whole.dtype == np.float32
    splits = ((1,) * 4, (3, 1), (1, 3))
    programs = {(start == 0, size) for split in splits for start, size in zip(np.cumsum(split) - split, split)}

    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=len(programs))
    def step(cache, z):
        return model.apply({"params": params}, cache, z, method="decode_chunk")

    shapes = [frames.shape for frames in empty_decode_cache(model, 2, 2, 3).frames]
    for split in splits:
        cache, start, parts = empty_decode_cache(model, 2, 2, 3), 0, []
        for size in split:
            cache, pixels = step(cache, latents[:, start : start + size])
            assert pixels.shape[1] == factor * size - (factor - 1) * (start == 0)
            assert [frames.shape for frames in cache.frames] == shapes
            start += size
            parts.append(np.asarray(pixels))
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    # Future frames have no effect, past frames do.
    changed = latents.copy()
    changed[:, 1] += 1
    other = np.asarray(decode(params, changed))
    np.testing.assert_array_equal(other[:, :1], whole[:, :1])
    assert all(np.abs(other[:, i] - whole[:, i]).max() > 0 for i in range(1, factor + 2))


def test_encodes_group_by_group_and_causally():
    model = vae.WanVae(LARGER)
    params = {"encoder": random_params(vae.param_shapes(LARGER))["encoder"]}
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))
    pixels = np.random.default_rng(2).uniform(-1, 1, (1, 5, 8, 12, 3)).astype(np.float32)
    whole = np.asarray(encode(pixels))
    assert whole.shape == (1, 3, 2, 3, 3)
    assert whole.dtype == np.float32
    pixels[:, 4] *= -1  # the second frame of the last latent frame
    changed = np.asarray(encode(pixels))
    np.testing.assert_array_equal(changed[:, :2], whole[:, :2])
    assert np.abs(changed[:, 2] - whole[:, 2]).max() > 0.01


@pytest.mark.parametrize(("window", "stride", "frames"), [((3, 3, 3), 1, 6), ((3, 3, 3), 1, 7), ((3, 1, 1), 2, 7)])
def test_convolutions_over_frames_are_the_same_both_ways(window, stride, frames):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, frames, 4, 6, 3)).astype(np.float32)
    conv = Conv(5, window, "float32", frame_stride=stride)
    kernel = rng.normal(size=(*window, 3, 5)).astype(np.float32)
    ours, reference = conv._by_planes(x, kernel), conv._volume(x, kernel)
    assert ours.shape == (2, (frames - 3) // stride + 1, 4, 6, 5)
    assert relative(ours, reference) < 1e-6


@pytest.mark.parametrize("frames", [1, 2])
def test_frames_before_the_video_are_zeros_that_need_no_work(frames):
    rng = np.random.default_rng(0)
    conv = Conv(5, (3, 3, 3), "float32")
    x = rng.normal(size=(1, 3, 4, 6, 3)).astype(np.float32)
    x[:, : 3 - frames] = 0
    params = conv.init(jax.random.key(0), x)
    assert relative(conv.apply(params, x[:, 3 - frames :]), conv.apply(params, x)) < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_bfloat16_is_close(kind, latents):
    model, params, decode = network(kind)
    half = type(model)(dataclasses.replace(model.config, dtype="bfloat16"))
    pixels = jax.jit(lambda z: half.apply({"params": params}, z, method="decode"))(latents)
    assert pixels.dtype == np.float32
    assert 1e-4 < relative(pixels, decode(params, latents)) < 0.1
    assert {frames.dtype for frames in empty_decode_cache(half, 1, 2, 3).frames} == {jnp.dtype("bfloat16")}


def _plane(x, kernel, bias=0.0):
    """Convolves [H, W, C] with [3, 3, in, out] in float64, zero-padded."""
    height, width = x.shape[:2]
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = sum(padded[i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))
    return out + bias


def test_the_tiny_decoder_equals_numpy_frame_by_frame(latents):
    _, params, decode = network("tiny")
    p = jax.tree.map(np.float64, params["decoder"])

    def conv(x, name, tree=p):
        return _plane(x, tree[name]["kernel"], tree[name].get("bias", 0.0))

    frames = [np.maximum(conv(np.tanh(z / 3) * 3, "conv_in"), 0) for z in np.float64(latents[0, :3])]
    for stage, count in enumerate(TINY.grow):
        for block in range(TINY.blocks):
            tree, before, out = p[f"stage{stage}_block{block}"], np.zeros_like(frames[0]), []
            for x in frames:
                h = conv(np.concatenate([x, before], axis=-1), "conv1", tree)
                h = conv(np.maximum(conv(np.maximum(h, 0), "conv2", tree), 0), "conv3", tree)
                out.append(np.maximum(x + h, 0))
                before = x
            frames = out
        frames = [x.repeat(2, 0).repeat(2, 1) for x in frames]
        grown = [np.split(x @ p[f"stage{stage}_grow"]["kernel"][0, 0], count, axis=-1) for x in frames]
        frames = [conv(x, f"stage{stage}_out") for parts in grown for x in parts]
    pixels = np.stack([conv(np.maximum(x, 0), "conv_out") for x in frames][3:]) * 2 - 1
    assert relative(decode(params, latents)[0, :9], pixels) < 1e-5


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_name_maps_are_those_of_the_real_files(naming):
    manifest = json.loads((MANIFESTS / f"wan2.1-vae.{naming}.json").read_text())["tensors"]
    config = weights.vae_config_of(manifest)
    assert config == vae.wan_vae()
    entries = weights.entries(config, naming)
    assert sorted(entry.name for entry in entries) == sorted(manifest)
    found = {entry.path: entry for entry in entries}
    leaves = jax.tree_util.tree_leaves_with_path(_full_shapes())
    assert len(found) == len(entries) == len(leaves)
    for path, leaf in leaves:
        entry = found[tuple(part.key for part in path)]
        assert entry.layout.theirs(np.broadcast_to(np.int8(0), leaf.shape)).shape == tuple(manifest[entry.name])


@functools.cache
def _full_shapes():
    return vae.param_shapes(vae.wan_vae())


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_name_maps_of_the_vae_go_both_ways(naming):
    params = random_params(vae.param_shapes(LARGER))
    entries = weights.entries(LARGER, naming)
    tensors = mapping.to_tensors(entries, params)
    sizes = dataclasses.replace(LARGER, mean=(0.0,) * 3, std=(1.0,) * 3)  # files do not store them
    assert weights.vae_config_of({name: value.shape for name, value in tensors.items()}) == sizes
    jax.tree.map(np.testing.assert_array_equal, mapping.to_params(entries, tensors, params, "vae"), params)


def test_name_maps_of_the_tiny_decoder_go_both_ways():
    _, params, _ = network("tiny")
    entries = weights.tiny_entries(TINY)
    tensors = mapping.to_tensors(entries, params)
    assert weights.tiny_vae_config_of({name: value.shape for name, value in tensors.items()}) == TINY
    jax.tree.map(np.testing.assert_array_equal, mapping.to_params(entries, tensors, params, "tiny"), params)
    official = {entry.name for entry in weights.tiny_entries(tiny_vae.TinyVaeConfig())}
    assert {"decoder.1.bias", "decoder.3.conv.4.weight", "decoder.7.conv.weight", "decoder.22.bias"} < official
    assert len(official) == 64


def test_foreign_weights_are_refused():
    for config_of in (weights.vae_config_of, weights.tiny_vae_config_of):
        with pytest.raises(ValueError, match="not the weights of a"):
            config_of({"blocks.0.self_attn.q.weight": (4, 4)})


def test_bad_input_is_one_clear_error(latents):
    model, params, _ = network("vae")

    def run(x, method):
        return model.apply({"params": params}, x, method=method)

    with pytest.raises(ValueError, match=r"4 frames: it must be 1 \+ a multiple of 2"):
        run(np.zeros((1, 4, 8, 8, 3)), "encode")
    with pytest.raises(ValueError, match="7x8: both sides must be multiples of 2"):
        run(np.zeros((1, 3, 7, 8, 3)), "encode")
    with pytest.raises(ValueError, match=r"must be \[B, F, h, w, 3\]"):
        run(np.zeros((1, 3, 8, 8, 1)), "encode")
    for kind in MODELS:
        model, params, _ = network(kind)
        with pytest.raises(ValueError, match=r"must be \[B, F, H, W, 3\]"):
            run(latents[..., :2], "decode")
        cache = empty_decode_cache(model, 2, 2, 3)
        with pytest.raises(ValueError, match="the cache is for B = 2, H = 2, W = 3"):
            model.apply({"params": params}, cache, latents[:, :, :, :2], method="decode_chunk")
    for changes in ({"dtype": "float16"}, {"mean": (0.0,)}, {"temporal_downsample": ()}, {"dim": 3}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            dataclasses.replace(LARGER, **changes)
    with pytest.raises(ValueError, match="widths"):
        tiny_vae.TinyVaeConfig(widths=(8, 8))


def test_the_cache_is_a_tree_whose_start_is_static():
    cache = StreamCache((jnp.zeros(1),), started=False)
    assert len(jax.tree.leaves(cache)) == 1
    assert jax.tree.structure(cache) != jax.tree.structure(cache.replace(started=True))
