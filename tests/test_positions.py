"""Positions relative to the window, a sink that stays visible, endless videos, separate steps for the first chunk.

`python -m tests.test_positions` prints the relative error of cached rollouts against block-causal forwards, the whole
grid of chunks, windows, sinks and positions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax import load_pipeline, rollout_cache
from sf_jax import rollout as ro
from sf_jax.inference import programs
from sf_jax.models import attention, wan
from sf_jax.models.rope import MAX_FRAMES
from sf_jax.objectives.causal import causal_layout
from sf_jax.replay import CACHE_GRADIENTS, replay
from tests import oracle
from tests.helpers import SMALL, inputs, random_params, relative, tree_relative

MODEL = wan.WanTransformer(SMALL)
WINDOW = ro.RolloutConfig(chunk=2, window=6, positions="relative")
SINK = dataclasses.replace(WINDOW, sink=2)
FRAMES = 10


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def run(config, params, text, noise, draw, exits, full_cache=True):
    return ro.rollout(MODEL, config, params, text, noise, exits, draw, None, 0 if full_cache else None)


def test_without_sink_they_are_the_absolute_ones():
    params, (noise, text, draw) = random_params(), inputs(FRAMES)
    absolute = dataclasses.replace(WINDOW, positions="absolute")
    past, other = (run(config, params, text, noise, draw, 1) for config in (absolute, WINDOW))
    assert relative(other.video, past.video) < 1e-5
    replayed = jax.jit(lambda past: replay(MODEL, WINDOW, params, text, past))(other)
    assert relative(replayed, other.video) < 1e-5


def test_a_sink_is_right_before_the_window():
    params, (noise, text, draw) = random_params(), inputs(FRAMES)
    past = run(SINK, params, text, noise, draw, 1)
    ring = run(SINK, params, text, noise, draw, 1, False)
    assert ring.cache.capacity == 4 and relative(ring.video, past.video) < 1e-6
    absolute = run(dataclasses.replace(SINK, positions="absolute"), params, text, noise, draw, 1)
    assert relative(absolute.video[:, :6], past.video[:, :6]) < 1e-6  # nothing has left the window yet
    assert relative(absolute.video[:, 6:8], past.video[:, 6:8]) > 1e-4
    kv = jax.jit(functools.partial(MODEL.apply, method="encode_text"))({"params": params}, text)
    layout = wan.Layout(np.arange(4, 6), np.arange(4), pattern=attention.cached(2, 4))
    apply = jax.jit(lambda x, t, context: MODEL.apply({"params": params}, x, t, kv, layout, context))
    for start in (6, 8):  # the chunk after a video with only its window's frames
        seen = np.array([0, 1, start - 2, start - 1])
        tokens = (seen[:, None] * 4 + np.arange(4)).ravel()
        context = wan.KeysValues(past.cache.k[:, :, tokens], past.cache.v[:, :, tokens])
        x, t = past.exit_inputs[:, start : start + 2], jnp.full((2, 1), SINK.timesteps[1])
        flow = apply(x, t, context)
        clean = SINK.schedule.to_clean(flow, x, t)
        assert relative(past.video[:, start : start + 2], clean) < 1e-5


CASES = [
    {"chunk": chunk, "window": window, "sink": sink, "positions": positions}
    for chunk in (1, 2)
    for window in (4, 6, 8)
    for sink in (0, 1, 2, 3)
    for positions in ("absolute", "relative")
    if sink + chunk <= window
]
# As the shipped student and the paper have them.
SHIPPED = [
    {"chunk": 3, "window": window, "sink": sink, "positions": positions}
    for window in (6, 9)
    for sink in (0, 3)
    for positions in ("absolute", "relative")
]
# Subsets that cover every kind of window and sink at least once.
FAST, SLOW = [*CASES[1::13], SHIPPED[3]], [*CASES[7::13], SHIPPED[4]]
CASES += SHIPPED
LONGEST = (pytest.mark.slow, pytest.mark.exhaustive)
MARKED = [
    pytest.param(case, marks=() if case in FAST else pytest.mark.slow if case in SLOW else LONGEST) for case in CASES
]


def block_causal_error(case: dict) -> float:
    """Relative error of a cached rollout's video against one block-causal forward pass."""
    config, frames = ro.RolloutConfig(**case), 12
    params, (noise, text, draw) = random_params(), inputs(frames)
    past = run(config, params, text, noise, draw, 1, False)
    chunks = (config.chunk,) * (frames // config.chunk)
    layout = rollout_cache.with_moved_sink(config, causal_layout(chunks, True, config.window, config.sink))
    clean_t = jnp.zeros((2, frames))
    t = jnp.concatenate([clean_t, clean_t + config.timesteps[1]], axis=1)
    both = jnp.concatenate([past.video, past.exit_inputs], axis=1)
    flow = MODEL.apply({"params": params}, both, t, text, layout)[:, frames:]
    return float(relative(config.schedule.to_clean(flow, past.exit_inputs, t[:, frames:]), past.video))


@pytest.mark.parametrize("case", MARKED, ids=str)
def test_cached_is_block_causal(case):
    assert block_causal_error(case) < 1e-5


@pytest.mark.slow
def test_a_moved_sink_is_replayed_and_has_its_gradient():
    params, (noise, text, draw) = random_params(), inputs(FRAMES)
    weight = jax.random.normal(jax.random.key(9), noise.shape)

    def by_scan(params, mode):
        return (oracle.rollout_video(MODEL, SINK, params, text, noise, 1, draw, cache_gradient=mode) * weight).sum()

    def by_replay(params, mode):
        past = ro.rollout(MODEL, SINK, params, text, noise, 1, draw)
        video = replay(MODEL, SINK, params, text, past, mode)
        return (video * weight).sum(), (video, past.video)

    @jax.jit
    def gradients(params):
        return [
            (jax.grad(by_scan)(params, mode), jax.grad(by_replay, has_aux=True)(params, mode))
            for mode in CACHE_GRADIENTS
        ]

    for scanned, (replayed, (video, expected)) in gradients(params):
        assert relative(video, expected) < 1e-5 and tree_relative(replayed, scanned) < 2e-6


@pytest.mark.parametrize("start", [4, 5000, np.int32(2**31 - 100)])
def test_there_is_no_longest_video(start):
    cache = rollout_cache.empty_cache(MODEL, SINK, 1, FRAMES, 2, 2)
    held = np.array([0, 1, start - 2, start - 1], np.int32)
    layout = rollout_cache.chunk_layout(cache.replace(frames=jnp.asarray(held)), SINK, jnp.int32(start), 2)
    np.testing.assert_array_equal(layout.frames, [4, 5])
    np.testing.assert_array_equal(layout.context_frames, [0, 1, 2, 3])
    assert layout.context_mask.all()


@pytest.mark.slow
def test_streams_go_on_past_the_table():
    pipe, frames = load_pipeline("student"), MAX_FRAMES + 2
    assert pipe.rollout.sink and pipe.rollout.positions == "relative"
    parts = list(pipe.stream("a 3 moving left, fast", frames=frames))
    assert sum(part.shape[1] for part in parts) == frames
    # The digit still moves and keeps its brightness.
    early, late = (np.concatenate(parts[place : place + 4], axis=1).astype(float) for place in (4, len(parts) - 4))
    assert np.abs(np.diff(late, axis=1)).mean() > 0.5 * np.abs(np.diff(early, axis=1)).mean()
    assert 0.7 < late.mean() / early.mean() < 1.4


def test_the_first_chunk_has_steps_of_its_own():
    prompts, pipe = ["a 3 moving left, fast"], load_pipeline("student")

    def video(**changes):
        return pipe.with_rollout(**changes)(prompts, frames=6)

    plain, two = (video(steps=steps, first_steps=()) for steps in ((1000, 750, 500, 250), (1000, 500)))
    compiled = programs.next_chunk._cache_size()
    mixed = video(steps=(1000, 750, 500, 250), first_steps=(1000, 500))
    assert programs.next_chunk._cache_size() == compiled + 1  # one program for all chunks
    np.testing.assert_array_equal(mixed[:, :3], two[:, :3])
    assert (mixed[:, 3:] != plain[:, 3:]).any() and (mixed[:, 3:] != two[:, 3:]).any()
    with pytest.raises(ValueError, match=r"first_steps is \(500, 750\): it must descend strictly"):
        ro.RolloutConfig(first_steps=(500, 750))


def test_what_they_cannot_do_is_refused():
    with pytest.raises(ValueError, match="positions is 'other': it must be one of absolute, relative"):
        ro.RolloutConfig(positions="other")
    with pytest.raises(ValueError, match="positions is 'relative', window None"):
        ro.RolloutConfig(positions="relative")
    with pytest.raises(ValueError, match=f"frames is {MAX_FRAMES + 1}: positions are tabulated"):
        ro.RolloutConfig().check_frames(MAX_FRAMES + 1)


if __name__ == "__main__":
    errors = [block_causal_error(case) for case in CASES]
    for case, error in zip(CASES, errors, strict=True):
        print(f"{case}: {error:.1e}")
    print(f"{len(CASES)} cases, largest error {max(errors):.1e}")
