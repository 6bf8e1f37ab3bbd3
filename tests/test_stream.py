"""Endless streams: same frames as a pipeline, independent of each other, with prompt changes and one compilation."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sf_jax
from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.inference import stream_state
from sf_jax.inference.load import load_pipeline
from sf_jax.inference.prompt_change import MODES
from sf_jax.inference.stream_memory import bytes_per_stream
from sf_jax.models import attention, kv_cache, wan
from sf_jax.models.kv_cache import KVCache
from sf_jax.models.rope import MAX_FRAMES
from sf_jax.rollout import RolloutConfig
from tests.helpers import SMALL, random_params, relative

PROMPTS = ["a 7 moving left, fast", "a 2 moving up, slowly", "a 5 moving right", "a 3 moving down"]
BARE = RolloutConfig(chunk=2, window=6, sink=2, positions="relative", context_noise="none")
SMALL_VIDEO = {"height": 32, "width": 48}


def bare(**changes):
    """A network from embeddings to latents."""
    config = dataclasses.replace(BARE, **changes)
    pipe = sf_jax.VideoPipeline(None, wan.WanTransformer(SMALL), random_params(), config)
    return pipe.with_sampling(height=4, width=4)


def text(seed):
    """A prompt's embedding."""
    return np.random.default_rng(seed).standard_normal((3, 8), np.float32)


def latents(stream, one, steps):
    """New latents of the next steps."""
    return np.concatenate([stream.step().latents(one) for _ in range(steps)])


FAST = [{}, {"window": 2, "sink": 0}, {"first_frame_alone": True, "first_steps": (1000, 500)}]
SLOW = [
    {"positions": "absolute"},
    {"sink": 0},
    {"window": 4},
    {"chunk": 1, "window": 4, "sink": 1},
    {"steps": (1000,)},
    {"context": "noisy"},
]


@pytest.mark.parametrize("changes", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_streams_are_the_videos_of_a_pipeline(changes):
    pipe = bare(**changes)
    embeddings, frames = np.stack([text(0), text(1)]), 12 + pipe.rollout.first_frame_alone
    whole = pipe(embeddings, frames=frames, output="latent", seed=2**31 + 5, first_index=[3, 9])
    stream = sf_jax.Stream(pipe, slots=2)
    ids = [stream.join(embeddings[i], seed=2**31 + 5, number=number) for i, number in enumerate((3, 9))]
    parts = {one: [] for one in ids}
    for _ in range(12 // pipe.rollout.chunk):
        step = stream.step()
        assert list(step) == ids and len(step) == 2
        for one in ids:
            parts[one].append(step.latents(one))
            assert step.count(one) == len(parts[one][-1])
    for i, one in enumerate(ids):
        assert relative(np.concatenate(parts[one]), whole[i]) < 1e-5
        assert stream.frames(one) == frames


def test_a_stream_starts_from_an_image():
    pipe, image = bare(first_frame_alone=True), np.random.default_rng(5).standard_normal((1, 1, 4, 4, 4), np.float32)
    whole = pipe(text(0)[None], frames=7, output="latent", seed=3, initial=image)[0]
    stream = sf_jax.Stream(pipe)
    one = stream.join(text(0), seed=3, initial=image[0])
    np.testing.assert_array_equal(whole[:1], image[0])
    streamed = latents(stream, one, 3)
    assert relative(streamed, whole[-len(streamed) :]) < 1e-5 and stream.frames(one) == len(whole) == 7


@pytest.mark.slow
@pytest.mark.parametrize("vae", ["wan", "tiny"])
def test_pixels_are_those_of_a_pipeline(folder, vae):
    rollout = RolloutConfig(window=6, positions="relative", context_noise="none")
    pipe = load_pipeline(folder, folder / "student.safetensors", vae=vae, rollout=rollout)
    whole = pipe("a dog runs", **SMALL_VIDEO, frames=45, seed=3)[0]
    stream = sf_jax.Stream(pipe, slots=3, **SMALL_VIDEO)
    other = stream.join("a cat")
    first = stream.step()[other]
    assert first.shape[0] == 9 and first.dtype == np.uint8
    one = stream.join("a dog runs", seed=3)
    steps = [stream.step() for _ in range(4)]
    assert [step.count(one) for step in steps] == [9, 12, 12, 12] == [len(step[one]) for step in steps]
    assert np.abs(np.concatenate([step[one] for step in steps]).astype(int) - whole).max() <= 1
    assert steps[0].count(other) == 12
    # The latents of an image or a video, then new frames.
    given = pipe("a dog runs", **SMALL_VIDEO, frames=9, seed=3, output="latent")
    longer = pipe("a cat", **SMALL_VIDEO, frames=33, seed=4, first_index=2, initial=given)[0]
    extended = stream.join("a cat", seed=4, number=2, initial=given[0])
    steps = [stream.step() for _ in range(2)]
    assert [step.count(extended) for step in steps] == [21, 12]
    assert np.abs(np.concatenate([step[extended] for step in steps]).astype(int) - longer).max() <= 1
    stream.prompt(one, "a cat", "cut")
    assert stream.step().count(one) == 9


def test_no_stream_depends_on_another_and_nothing_is_compiled_again(digits):
    stream = sf_jax.Stream(digits, slots=4)
    alone = stream.join(PROMPTS[1], seed=5, number=9)
    expected = latents(stream, alone, 8)
    stream.leave(alone)
    before = {name: getattr(stream_state, name)._cache_size() for name in ("step", "begin", "set_text")}
    ids = [stream.join(prompt, seed=i) for i, prompt in enumerate(PROMPTS[:3])]
    stream.step()
    stream.leave(ids[0])
    stream.step()
    one, pausing = stream.join(PROMPTS[1], seed=5, number=9), stream.join(PROMPTS[0], seed=1)
    parts = []
    for i in range(8):
        chosen = [stream for stream in stream.playing if stream != pausing] if i % 2 else None
        parts.append(stream.step(chosen).latents(one))
        if i == 3:
            stream.prompt(ids[1], PROMPTS[3], "swap", transition_chunks=2)
            stream.leave(ids[2])
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    after = {name: getattr(stream_state, name)._cache_size() for name in before}
    assert after["step"] == before["step"] and after["begin"] == before["begin"]
    assert after["set_text"] <= before["set_text"] + 1  # the first change of a prompt
    assert stream.frames(pausing) == 12 and stream.free == 1


def test_a_pause_changes_nothing(digits):
    stream = sf_jax.Stream(digits, slots=2)
    one = stream.join(PROMPTS[0], seed=1)
    expected = latents(stream, one, 6)
    stream.leave(one)
    other, one = stream.join(PROMPTS[1]), stream.join(PROMPTS[0], seed=1)
    parts = []
    for _ in range(6):
        stream.step([other])
        parts.append(stream.step([one]).latents(one))
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def next_chunk(pipe, kept, positions, own, embedding, noise_of):
    """A stream's next chunk after given frames, at given positions, from the stream's own noise."""
    model, params, config = pipe.transformer, pipe.params, pipe.rollout
    kv = model.apply({"params": params}, jnp.asarray(embedding[None]), method="encode_text")
    layout = wan.Layout(own, positions, pattern=attention.cached(len(own), len(positions)))
    state, slot = noise_of
    one = stream_state.take(state, slot)
    cache = ro.KVCache(*kept, frames=jnp.asarray(positions))
    noise, draw, t = drawn(pipe, one)
    calls = len(config.steps) + 1
    context = rollout_cache.Context(kv, cache, layout)
    chunk = ro.NoisyChunk(noise, 0, one.chunk[0], len(config.steps) - 1, draw, t)
    return ro.denoise_chunk(model, config, params, context, chunk, calls)[1][0]


def drawn(pipe, one):
    """Noise of a stream's next chunk, drawn as in a pipeline."""
    key = stream_state.key_for(one.seed[0], 0, stream_state.Purpose.SAMPLE)
    noise_key = jax.random.fold_in(jax.random.fold_in(key, pipe.noise_number), one.chunk[0])
    noise = ro.example_noise(noise_key, one.number, (1, pipe.rollout.chunk, 4, 4, 4))
    return noise, ro.key_draw(key, one.number), jnp.asarray(pipe.rollout.timesteps, jnp.float32)


def kept_in_order(stream, slot):
    """Keys and values of a stream's kept frames, oldest first, and their frame numbers."""
    one = stream_state.take(stream.state, slot)
    held = np.asarray(one.held[0])
    order = [place for place in np.argsort(held) if held[place] >= 0]
    tokens = (np.asarray(order)[:, None] * 4 + np.arange(4)).ravel()
    return (one.k[:, :, tokens], one.v[:, :, tokens]), held[order], one


@pytest.mark.parametrize("positions", ["relative", pytest.param("absolute", marks=pytest.mark.slow)])
@pytest.mark.parametrize("sink", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_prompts_change_in_every_mode(positions, sink):
    pipe = bare(positions=positions, sink=sink)
    stream = sf_jax.Stream(pipe, slots=2)
    one = stream.join(text(0), seed=3)
    latents(stream, one, 6)
    (k, v), held, before = kept_in_order(stream, 0)
    clean = before.latents[0, np.argsort(np.asarray(before.held[0]))]
    assert held.tolist() == ([0, 1, 10, 11] if sink else [8, 9, 10, 11])
    moved, relative_to_window = max(0, 14 - 6), positions == "relative"

    def frames(numbers):
        numbers = np.asarray(numbers)
        return np.where(numbers < sink, numbers, numbers - moved) if relative_to_window else numbers

    saved = jax.tree.map(jnp.copy, stream.state)
    for mode in MODES:
        stream.state = jax.tree.map(jnp.copy, saved)
        playing = stream._playing[one]
        playing.sizes, playing.position, playing.frames, playing.change = [2] * 6, 12, 12, None
        stream.prompt(one, text(7), mode)
        own = frames([12, 13])
        if mode == "swap":
            wanted = next_chunk(pipe, (k, v), frames(held), own, text(7), (saved, 0))
        elif mode == "flush":
            last = [*range(sink), len(held) - 1]
            tokens = (np.asarray(last)[:, None] * 4 + np.arange(4)).ravel()
            places, own = (
                (np.arange(sink + 1), np.arange(sink + 1, sink + 3)) if relative_to_window else (held[last], own)
            )
            wanted = next_chunk(pipe, (k[:, :, tokens], v[:, :, tokens]), places, own, text(7), (saved, 0))
        elif mode == "cut":
            kv = pipe.transformer.apply({"params": pipe.params}, text(7)[None], method="encode_text")
            noise, draw, t = drawn(pipe, before)
            cache = rollout_cache.empty_cache(pipe.transformer, pipe.rollout, 1, 12, 4, 4)
            chunk = ro.NoisyChunk(noise, 0, before.chunk[0], len(pipe.rollout.steps) - 1, draw, t)
            wanted = ro.generate_chunk(pipe.transformer, pipe.rollout, pipe.params, kv, cache, chunk)[1][0]
        else:
            kv = pipe.transformer.apply({"params": pipe.params}, text(7)[None], method="encode_text")
            places = np.arange(4) if relative_to_window else frames(held)
            causal = wan.Layout(places, pattern=attention.block_causal((2, 2)))
            inputs = (clean[None], jnp.zeros((1, 1)), kv, causal)
            _, again = pipe.transformer.apply({"params": pipe.params}, *inputs, return_kv=True)
            own = np.arange(4, 6) if relative_to_window else own
            wanted = next_chunk(pipe, (again.k, again.v), places, own, text(7), (saved, 0))
        assert relative(stream.step().latents(one), wanted) < 1e-5, mode
        after = stream_state.take(stream.state, 0)
        held_after = {"swap": 4, "recache": 4, "flush": min(4, sink + 3), "cut": 2}[mode]
        assert (np.asarray(after.held) >= 0).sum() == held_after == sum(stream._kept_sizes(stream._playing[one]))


@pytest.mark.slow
def test_what_is_kept_can_be_computed_again_with_noise():
    pipe = bare(context_noise="none")
    stream = sf_jax.Stream(pipe)
    one = stream.join(text(0), seed=3)
    latents(stream, one, 6)
    before = stream_state.take(stream.state, 0)
    newest = before.latents[:, kv_cache.slot_of(KVCache(before.k, before.v, before.held[0], 2), 11)[0]]
    clean = jnp.concatenate([before.latents[:, :2], newest[:, None]], axis=1)  # the sink and the newest frame
    stream.prompt(one, text(7), "flush", context_timestep=300)
    stream._prepare(stream._playing[one])
    draw, chunk = drawn(pipe, before)[1], before.chunk[0]
    noise = [draw("context", chunk, 1 + first, clean[:, first:stop].shape) for first, stop in ((0, 2), (2, 3))]
    read = 0.7 * clean + 0.3 * jnp.concatenate(noise, axis=1)
    kv = pipe.transformer.apply({"params": pipe.params}, text(7)[None], method="encode_text")
    causal = wan.Layout(np.arange(3), pattern=attention.block_causal((2, 1)))
    inputs = (read, jnp.full((1, 1), 300.0), kv, causal)
    _, again = pipe.transformer.apply({"params": pipe.params}, *inputs, return_kv=True)
    (k, v), held, after = kept_in_order(stream, 0)
    assert held.tolist() == [0, 1, 2]
    assert relative(k, again.k) < 1e-5 and relative(v, again.v) < 1e-5
    np.testing.assert_array_equal(after.latents[0, :3], clean[0])
    for mode, timestep in (("swap", 300), ("cut", 0), ("recache", 1000), ("flush", -1), ("recache", True)):
        with pytest.raises(ValueError, match="context_timestep is"):
            stream.prompt(one, text(7), mode, context_timestep=timestep)


def test_a_transition_goes_in_even_steps():
    pipe = bare()
    stream = sf_jax.Stream(pipe)
    one = stream.join(text(0))
    stream.step()
    for mode in ("swap", "recache", "flush"):
        old, new = stream._playing[one].embedding[0], text(MODES.index(mode) + 1)
        stream.prompt(one, new, mode, transition_chunks=3)
        for part in (0.25, 0.5, 0.75, 1.0, 1.0):
            stream.step()
            mixed = jnp.asarray((1 - part) * old + part * new)[None]
            expected = pipe.transformer.apply({"params": pipe.params}, mixed, method="encode_text")
            assert relative(stream.state.text.k, expected.k) < 1e-5


@pytest.mark.parametrize("faded", ["pending", "done"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_stream_goes_on_from_a_file(digits, tmp_path, compact, faded):
    stream = sf_jax.Stream(digits, slots=2)
    stream.join(PROMPTS[2])
    one = stream.join(PROMPTS[0], seed=1)
    latents(stream, one, 5)
    options = {"transition_chunks": 1, "context_timestep": 300} if faded == "pending" else {}
    stream.prompt(one, PROMPTS[1], "flush", fade=0.5, **options)
    stream.step()
    stream.save(one, tmp_path / "one.safetensors", compact=compact)
    expected = latents(stream, one, 6)
    again = sf_jax.Stream(digits, slots=2)
    again.join(PROMPTS[3])
    restored = again.restore(tmp_path / "one.safetensors")
    assert again.frames(restored) == 18
    if faded == "done":  # the sink and the newest frame have faded, the chunk after them has not
        scale = np.asarray(again.state.value_scale[again._playing[restored].slot])
        assert sorted(scale) == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
    if compact:
        assert relative(latents(again, restored, 1), expected[:3]) < 0.5
        assert (tmp_path / "one.safetensors").stat().st_size < 60_000
    else:
        np.testing.assert_array_equal(latents(again, restored, 6), expected)


@pytest.mark.parametrize("noise", ["none", "exact"])
def test_recache_writes_as_the_rollout_does(noise):
    stream = sf_jax.Stream(bare(sink=0, context_timestep=250.0, context_noise=noise))
    one = stream.join(text(0), seed=3)
    latents(stream, one, 2)  # nothing has left the window
    before = np.array(stream.state.k)
    stream.prompt(one, text(0), "recache")
    stream._prepare(stream._playing[one])
    difference = relative(stream.state.k, before)
    assert difference < 1e-5 if noise == "none" else 1e-3 < difference < 0.5  # noise is redrawn


def test_what_begins_anew_begins_as_a_video_does():
    alone = bare(first_frame_alone=True)
    stream = sf_jax.Stream(alone)
    one = stream.join(text(0))
    assert stream.step().count(one) == 3 and stream.frames(one) == 3
    stream.prompt(one, text(1), "cut")
    assert stream.step().latents(one).shape[0] == 3 and np.asarray(stream.state.age).tolist() == [3]
    # Without a cache, only a video's first chunk uses the first chunk's steps.
    steps = bare(window=2, sink=0, first_steps=(1000,))
    parts = {}
    for mode in ("swap", "recache", "flush"):
        stream = sf_jax.Stream(steps)
        one = stream.join(text(0))
        stream.step()
        stream.prompt(one, text(0), mode)
        parts[mode] = stream.step().latents(one)
    assert relative(parts["recache"], parts["swap"]) < 1e-5 and relative(parts["flush"], parts["swap"]) < 1e-5
    noisy = sf_jax.Stream(bare(context="noisy"))
    with pytest.raises(ValueError, match="mode is 'recache': rollout.context is 'noisy'"):
        noisy.prompt(noisy.join(text(0)), text(1), "recache")


def test_a_stream_that_was_interrupted_ends(digits, monkeypatch):
    stream = sf_jax.Stream(digits, slots=2)
    one, other = stream.join(PROMPTS[0]), stream.join(PROMPTS[1])
    stream.step()
    stream.prompt(one, PROMPTS[2], "recache")
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_append", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stream.step()
    assert stream.playing == (other,) and list(stream.step()) == [other]


@pytest.mark.slow
def test_another_process_goes_on_with_the_same_bits(digits, tmp_path):
    stream = sf_jax.Stream(digits)
    one = stream.join(PROMPTS[0], seed=1)
    latents(stream, one, 3)
    stream.save(one, tmp_path / "one.safetensors")
    program = (
        "import sys, numpy as np, sf_jax; stream = sf_jax.Stream(sf_jax.load_pipeline());"
        "one = stream.restore(sys.argv[1]); np.save(sys.argv[2], np.concatenate([stream.step()[one] for _ in '123']))"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "one.safetensors", tmp_path / "rest.npy"], check=True)
    expected = np.concatenate([stream.step()[one] for _ in range(3)])
    np.testing.assert_array_equal(np.load(tmp_path / "rest.npy"), expected)


@pytest.mark.slow
def test_eight_devices_are_one(tmp_path):
    program = """
import sys, numpy as np, jax, dataclasses, sf_jax
from jax.sharding import AxisType, Mesh
pipe = sf_jax.load_pipeline()
if sys.argv[2] == "8":
    pipe = dataclasses.replace(pipe, mesh=Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,)))
stream = sf_jax.Stream(pipe, slots=8)
ids = [stream.join("a 7 moving left, fast", seed=i) for i in range(7)]
parts = [np.stack([step.latents(i) for i in ids]) for step in (stream.step() for _ in range(3))]
stream.prompt(2, "a 3 moving up", "recache")
stream.prompt(3, "a 3 moving up", "flush")
stream.prompt(4, "a 3 moving up", "cut")
parts += [np.stack([step.latents(i) for i in ids]) for step in (stream.step() for _ in range(3))]
assert sf_jax.inference.stream_state.step._cache_size() == 1, "compiled again"
np.save(sys.argv[1], np.concatenate(parts, axis=1))
"""
    for count in ("1", "8"):
        environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        command = [sys.executable, "-c", program, str(tmp_path / count), count]
        subprocess.run(command, check=True, env={**__import__("os").environ, **environment})
    one, eight = (np.load(tmp_path / f"{count}.npy") for count in ("1", "8"))
    assert relative(eight[:, :9], one[:, :9]) < 1e-5
    assert relative(eight, one) < 1e-4  # rounding adds up over the chunks


def test_what_streams_take_is_known_before(digits):
    spec = sf_jax.Stream(digits).spec
    each = bytes_per_stream(spec, digits, 4)
    config = digits.transformer.config
    assert each.cache == 2 * config.num_layers * 6 * 9 * config.dim * 4
    assert each.latents == 6 * 6 * 6 * config.channels * 4 and each.decoder == 0 and each.workspace > 0
    assert each.total > each.cache and "cache" in each.describe()
    with pytest.raises(ValueError, match=r"slots is 4: a stream takes .*, and .* are free on a device: at most 2 fit"):
        sf_jax.Stream(digits, slots=4, memory=int(2.5 * each.total))
    with pytest.raises(ValueError, match="not even one fits"):
        sf_jax.Stream(digits, memory=1000)
    assert digits.bytes_per_stream(4) == each
    with pytest.raises(ValueError, match="at most 1 fit"):
        sf_jax.Stream(digits, slots=20, memory=bytes_per_stream(spec, digits, 1).total)


def test_absolute_positions_end(digits):
    stream = sf_jax.Stream(bare(positions="absolute"))
    one = stream.join(text(0))
    playing = stream._playing[one]
    playing.frames = playing.position = MAX_FRAMES - 2
    stream.step()
    with pytest.raises(ValueError, match="stream 0 is at latent frame 1024: positions 'absolute' end at 1024"):
        stream.step()
    stream.prompt(one, text(1), "cut")
    stream.step()


def test_numbers_of_numpy_can_be_saved(digits, tmp_path):
    rollout, sampling = digits.rollout, digits.sampling
    changes = {
        "window": np.int64(rollout.window),
        "steps": np.asarray(rollout.steps),
        "shift": np.float64(rollout.shift),
    }
    pipe = digits.with_rollout(**changes).with_sampling(height=np.int64(sampling.height))
    assert pipe.rollout == rollout and pipe.sampling == sampling
    stream = sf_jax.Stream(pipe)
    stream.save(stream.join(PROMPTS[0]), tmp_path / "a.safetensors")


def test_mistakes_are_named(digits, folder, tmp_path):
    stream = sf_jax.Stream(digits)
    one = stream.join(PROMPTS[0])
    for call, message in (
        (lambda: stream.join(PROMPTS[1]), "all 1 slots play"),
        (lambda: stream.prompt(one, "a cat"), "unknown word 'cat'"),
        (lambda: stream.prompt(one, PROMPTS[1], "blend"), "mode is 'blend': it must be one of swap, recache"),
        (lambda: stream.prompt(one, PROMPTS[1], "cut", 2), "transition_chunks is 2: a cut is at once"),
        (lambda: stream.prompt(one, PROMPTS[1], "swap", -1), "transition_chunks is -1: it must be a whole number"),
        (lambda: stream.prompt(one, PROMPTS[1], "swap", 10**9), "transition_chunks is 1000000000: it must be a whole"),
        (lambda: stream.prompt(one, PROMPTS[1], fade=1), "fade is 1: it must be a number of at least 0 and below 1"),
        (lambda: stream.prompt(one, PROMPTS[1], "cut", fade=0.5), "fade is 0.5: a cut keeps no frames"),
        (lambda: stream.step([7]), "stream 7 does not play: streams that do: 0"),
        (lambda: stream.leave("a"), "stream 'a' does not play"),
        (lambda: stream.save(5, tmp_path / "x"), "stream 5 does not play"),
        (lambda: sf_jax.Stream(digits, slots=0), "slots is 0: it must be a whole number of at least 1"),
        (lambda: sf_jax.Stream(digits, frames=3), "frames is no option of a stream"),
        (lambda: sf_jax.Stream(load_pipeline("teacher")), "has a bidirectional network: only few-step students"),
        (lambda: sf_jax.Stream(None), "pipe is None: it must be a VideoPipeline"),
        (lambda: sf_jax.Stream(digits, memory="4GB"), "memory is '4GB': it must be a whole number of bytes"),
        (lambda: digits.bytes_per_stream(0), "slots is 0: it must be a whole number"),
        (lambda: stream.step(0), "only is 0: it must be a list of ids"),
        (lambda: stream.step([0.0]), "stream 0.0 does not play"),
        (lambda: stream.prompt(one, ""), "prompt is '': it must be a text"),
        (lambda: stream.prompt(one, np.zeros((10, 3))), r"prompt is an embedding of the shape \(10, 3\): it must be"),
        (
            lambda: stream.prompt(one, np.full((10, 64), np.nan)),
            "embeddings are float64 with values that are no finite",
        ),
        (lambda: stream.save(one, 3), "path is 3: it must be the name of a file"),
        (lambda: sf_jax.Stream(bare(window=None, sink=0, positions="absolute")), "window is None: an endless stream"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    stream.leave(one)
    for options, message in (
        ({"seed": -1}, "seed is -1"),
        ({"number": 0.5}, "number is 0.5: it must be a whole number"),
        ({"initial": np.zeros((3, 6, 6, 1), np.float32)}, "initial has the shape"),
        ({"initial": np.zeros((2, 6, 6, 8), np.float32)}, "initial has 2 latent frames: frames is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.join(PROMPTS[0], **options)
    assert stream.free == 1
    assert len(stream.step([])) == 0 and list(stream.step()) == []
    with pytest.raises(ValueError, match="path: cannot read .*none"):
        stream.restore(tmp_path / "none")
    one = stream.join(PROMPTS[0])
    stream.step()
    stream.save(one, tmp_path / "one")
    stream.leave(one)
    other = dataclasses.replace(digits, params=jax.tree.map(lambda a: a + 1, digits.params))
    with pytest.raises(ValueError, match="was saved with other weights"):
        sf_jax.Stream(other).restore(tmp_path / "one")
    with pytest.raises(ValueError, match="was saved with rollout.window 9: here it is 12"):
        sf_jax.Stream(digits.with_rollout(window=12)).restore(tmp_path / "one")
    with pytest.raises(KeyError, match="stream 7 has no frames in this step: streams that do: none"):
        stream.step()[7]
    host = b'"frames\\": 3'
    damaged = (tmp_path / "one").read_bytes()
    assert host in damaged
    (tmp_path / "other").write_bytes(damaged.replace(host, b'"frame_\\": 3'))
    with pytest.raises(ValueError, match="is damaged"):
        stream.restore(tmp_path / "other")
    (tmp_path / "cut").write_bytes((tmp_path / "one").read_bytes()[:-100])
    with pytest.raises(ValueError, match="is a damaged safetensors file"):
        stream.restore(tmp_path / "cut")
    assert stream.free == 1 and stream.frames(stream.restore(tmp_path / "one")) == 3
