"""The rollout: cache, replay, gradients."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax import many_step, rollout_cache
from sf_jax import rollout as ro
from sf_jax.diffusion.solvers import Solver
from sf_jax.models import attention, kv_cache, pattern_attention, wan
from sf_jax.models.slot_cache import Span
from sf_jax.replay import CACHE_GRADIENTS, keep_from, replay, replay_recorded
from sf_jax.training.programs import matmul_flops
from tests import oracle
from tests.helpers import SIZE, SMALL, inputs, random_params, relative, tree_relative

MODEL = wan.WanTransformer(SMALL)
SHAPES = {
    "chunk-wise": ro.RolloutConfig(chunk=3),
    "frame-wise": ro.RolloutConfig(chunk=1),
    "windowed": ro.RolloutConfig(chunk=3, window=6),
    "window and sink": ro.RolloutConfig(chunk=2, window=5, sink=1),
    "first frame alone": ro.RolloutConfig(chunk=2, first_frame_alone=True, window=6, sink=1),
    "context noise": ro.RolloutConfig(chunk=3, context_timestep=80.0),
    "noisy context": ro.RolloutConfig(chunk=3, window=6, context="noisy"),
}
FRAMES = {"first frame alone": 9, "window and sink": 10}


def case(name):
    config, frames = SHAPES[name], FRAMES.get(name, 9)
    return config, frames, *inputs(frames)


@functools.partial(jax.jit, static_argnums=(0, 4, 6))
def run(config, params, text, noise, draw, exits, full_cache=True, initial=None):
    return ro.rollout(MODEL, config, params, text, noise, exits, draw, initial, 0 if full_cache else None)


def mostly_slow(*fast, leave_out=(), exhaustive=()):
    """All shapes except `leave_out`; those not in `fast` are marked slow, and `exhaustive` ones exhaustive."""
    longest = (pytest.mark.slow, pytest.mark.exhaustive)
    marks = {name: () if name in fast else longest if name in exhaustive else pytest.mark.slow for name in SHAPES}
    names = [name for name in SHAPES if name not in leave_out]
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


@mostly_slow("window and sink", "first frame alone", leave_out=("context noise", "noisy context"))
def test_cached_rollout_equals_one_block_causal_forward(name):
    config, frames, noise, text, draw = case(name)
    params = random_params()
    past = run(config, params, text, noise, draw, 2)
    chunks = sum(config.chunks(frames), ())
    pattern = attention.block_causal(chunks, config.window, config.sink)
    layout = wan.Layout(frames=np.arange(frames), pattern=pattern)
    _, kv = jax.jit(lambda x: MODEL.apply({"params": params}, x, jnp.zeros((2, 1)), text, layout, return_kv=True))(
        past.video
    )
    for start, stop in attention.chunk_bounds(chunks)[:-1]:  # the last chunk's are never read
        part = slice(start * 4, stop * 4)
        assert relative(past.cache.k[:, :, part], kv.k[:, :, part]) < 1e-5, (start, stop)
        assert relative(past.cache.v[:, :, part], kv.v[:, :, part]) < 1e-5, (start, stop)
    # The same for noisy chunks: clean video and exit inputs together, in the teacher-forcing pattern.
    forcing = wan.Layout(
        frames=np.tile(np.arange(frames), 2), pattern=attention.teacher_forcing(chunks, config.window, config.sink)
    )
    t = jnp.full((2, frames), config.timesteps[2])
    both = jnp.concatenate([past.video, past.exit_inputs], axis=1)
    times = jnp.concatenate([0 * t, t], axis=1)
    flow = jax.jit(lambda x: MODEL.apply({"params": params}, x, times, text, forcing))(both)[:, frames:]
    video = config.schedule.to_clean(flow, past.exit_inputs, t)
    for start, stop in attention.chunk_bounds(chunks):
        assert relative(past.video[:, start:stop], video[:, start:stop]) < 1e-5, (start, stop)


@pytest.mark.parametrize("name", ["windowed", "window and sink", "first frame alone"])
def test_ring_equals_the_full_cache(name):
    config, _, noise, text, draw = case(name)
    full, ring = (run(config, random_params(), text, noise, draw, 1, keep) for keep in (True, False))
    assert ring.cache.capacity == config.window - config.chunk < full.cache.capacity
    assert relative(ring.video, full.video) < 1e-6


@pytest.mark.parametrize("name", ["windowed", "window and sink"])
def test_a_window_in_a_whole_cache_needs_no_mask(name):
    config, frames, *_ = case(name)
    cache = rollout_cache.empty_cache(MODEL, config, 1, frames, *SIZE, keep_from=0)
    cache = cache.replace(frames=jnp.arange(frames))
    for start in range(0, frames - config.chunk + 1, config.chunk):
        past = cache.replace(frames=jnp.where(cache.frames < start, cache.frames, -1))
        seen = rollout_cache.seen_cache(config, past, start)
        layout = rollout_cache.chunk_layout(seen, config, jnp.int32(start), config.chunk)
        assert seen.capacity == config.window - config.chunk and layout.mask_is_prefix
        past = attention.visible_past(start, start + config.chunk, config.window, config.sink)
        visible = [frame for first, last in past for frame in range(first, last)]
        assert layout.context_mask.sum() == len(visible) and layout.context_mask[: len(visible)].all()
        np.testing.assert_array_equal(seen.frames[: len(visible)], visible)


@pytest.mark.parametrize("most", [16, 2])
@pytest.mark.parametrize("name", ["chunk-wise", "window and sink", "first frame alone"])
def test_nothing_is_computed_for_empty_cache(name, most, monkeypatch):
    config, frames, noise, text, draw = case(name)
    params, videos, work = random_params(), [], []
    monkeypatch.setattr(rollout_cache, "MAX_PREFIXES", most)
    for small in (1 << 30, 0):  # one masked attention for all chunks, or one per number of cached frames
        monkeypatch.setattr(pattern_attention, "PREFIX_LOGITS", small)

        def video(noise):
            return ro.rollout(MODEL, config, params, text, noise, 1, draw, None, None).video

        videos.append(jax.jit(video)(noise))
        work.append(matmul_flops(jax.make_jaxpr(video)(noise), 3))
    assert relative(videos[1], videos[0]) < 1e-6
    assert work[1] < 0.99 * work[0]


def test_the_last_chunk_has_no_clean_pass():
    config, _, noise, text, draw = case("chunk-wise")
    params, cache = random_params(), rollout_cache.empty_cache(MODEL, config, 2, 9, *SIZE)
    text = MODEL.apply({"params": params}, text, method="encode_text")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def chunk(last):
        noisy = ro.NoisyChunk(noise[:, :3], 0, 0, 1, draw)
        made = ro.generate_chunk(MODEL, config, params, text, cache, noisy, last)
        return made[:2], ro.predict(MODEL, config, params, made[2], config.timesteps[1], context)[1]

    context = rollout_cache.open_chunk(config, cache, text, Span(0, 3))
    ((cached, clean), _), ((kept, same), exit_kv) = chunk(False), chunk(True)
    np.testing.assert_array_equal(clean, same)
    assert relative(kept.k[:, :, :12], exit_kv.k) < 1e-6 and relative(cached.k[:, :, :12], exit_kv.k) > 1e-3


@pytest.mark.parametrize("name", ["first frame alone", pytest.param("context noise", marks=pytest.mark.slow)])
def test_a_rollout_without_its_last_exit_has_all_that_replay_needs(name):
    config, frames, noise, text, draw = case(name)
    params, chunks = random_params(), config.chunks(frames)[1]
    without = jax.jit(lambda exits: ro.rollout(MODEL, config, params, text, noise, exits, draw, last_exit=False))
    again = jax.jit(lambda past: replay(MODEL, config, params, text, past, "write"))
    before = frames - chunks[-1]
    for exits in (np.zeros_like(chunks), np.arange(len(chunks)) % 3 + 1):
        whole, part = run(config, params, text, noise, draw, exits), without(exits)
        assert relative(part.exit_inputs, whole.exit_inputs) < 1e-6
        assert relative(part.video[:, :before], whole.video[:, :before]) < 1e-6 and not part.video[:, before:].any()
        assert relative(part.cache.k[:, :, : before * 4], whole.cache.k[:, :, : before * 4]) < 1e-6
        assert relative(again(part), whole.video) < 1e-5


@mostly_slow(
    leave_out=("chunk-wise", "context noise"),
    exhaustive=("frame-wise", "windowed", "first frame alone"),
)
def test_replay_equals_differentiating_through_the_scan(name):
    config, _, noise, text, draw = case(name)
    params = random_params()
    weight = jax.random.normal(jax.random.key(9), noise.shape)

    def by_scan(inputs, exits, mode):
        return (oracle.rollout_video(MODEL, config, *inputs, noise, exits, draw, cache_gradient=mode) * weight).sum()

    def by_replay(inputs, exits, mode):
        past = ro.rollout(MODEL, config, *inputs, noise, exits, draw, last_exit=False)  # as in training
        return (replay(MODEL, config, *inputs, past, mode) * weight).sum()

    @jax.jit  # compiles all gradients as one program
    def gradients(inputs, exits):
        return [[jax.grad(f)(inputs, exits, mode) for f in (by_scan, by_replay)] for mode in CACHE_GRADIENTS]

    count = len(config.chunks(noise.shape[1])[1])
    for exits in (0, 1, 2, 3, np.arange(count) % 4):
        exits = jnp.broadcast_to(jnp.asarray(exits, jnp.int32), (count,))
        for scanned, replayed in gradients((params, text), exits):
            assert tree_relative(replayed, scanned) < 1e-6, exits


def test_gradient_is_zero_where_it_must_be():
    config = SHAPES["chunk-wise"]
    params, (noise, text, draw) = random_params(), inputs(6)
    past = run(config, params, text, noise, draw, 1)
    early = jnp.zeros_like(noise).at[:, :3].set(1.0)
    late = 1 - early

    @functools.partial(jax.jit, static_argnums=(1, 2))
    @jax.grad
    def gradient(params, mode, first_live, weight):
        return (replay(MODEL, config, params, text, past, mode, first_live) * weight).sum()

    assert all(not np.any(g) for g in jax.tree.leaves(gradient(params, "stop", 1, early)))  # chunks that are not live
    assert any(np.any(g) for g in jax.tree.leaves(gradient(params, "stop", 0, early)))
    # The rollout, including its non-exit steps and clean passes, has no gradient.
    through = jax.grad(lambda p: run(config, p, text, noise, draw, 1).video.sum())(params)
    assert all(not np.any(g) for g in jax.tree.leaves(through))
    # With "stop", later chunks' loss does not reach earlier chunks' inputs; "straight_through" differs.
    alone = gradient(params, "stop", 1, late)
    assert tree_relative(gradient(params, "stop", 0, late), alone) < 1e-6
    assert tree_relative(gradient(params, "straight_through", 0, late), alone) > 0.01


@pytest.mark.parametrize("name", ["window and sink", "first frame alone", "context noise"])
def test_replay_with_live_clean_passes_has_the_rollouts_values(name):
    config, _, noise, text, draw = case(name)
    params = random_params()
    ring = run(config, params, text, noise, draw, 2, False)  # it reads no cache
    video = jax.jit(functools.partial(replay, MODEL, config, cache_gradient="write"))(params, text, ring)
    assert relative(video, ring.video) < 1e-5


@mostly_slow(
    leave_out=("chunk-wise", "frame-wise", "noisy context"),
    exhaustive=("windowed", "context noise", "first frame alone"),
)
def test_live_clean_passes_behind_given_and_earlier_frames(name):
    config = SHAPES[name]
    frames = {"first frame alone": 8, "window and sink": 8}.get(name, 9)
    noise, text, draw = inputs(frames)
    given = 1 if config.first_frame_alone else config.chunk
    initial = jax.random.normal(jax.random.key(5), (2, given, *SIZE, SMALL.channels))
    params = random_params()
    weight = jax.random.normal(jax.random.key(9), (2, given + frames, *SIZE, SMALL.channels))
    past = run(config, params, text, noise, draw, 1, True, initial)

    @jax.jit
    def gradients(params, text):
        def by_scan(params, text, live):
            return oracle.rollout_video(MODEL, config, params, text, noise, 1, draw, initial, "write", live)

        def by_replay(params, text, live):
            return replay(MODEL, config, params, text, past, "write", live)

        return [
            [jax.grad(lambda *a, f=f, live=live: (f(*a, live) * weight).sum(), (0, 1))(params, text) for live in (0, 1)]
            for f in (by_scan, by_replay)
        ]

    scanned, replayed = gradients(params, text)
    for live in (0, 1):
        assert tree_relative(replayed[live], scanned[live]) < 1e-6, live
    assert tree_relative(replayed[0], replayed[1]) > 0.01


def test_a_later_loss_reaches_every_earlier_clean_pass():
    config = SHAPES["chunk-wise"]
    params, (noise, text, draw) = random_params(), inputs(9)
    past = run(config, params, text, noise, draw, 1)

    @jax.jit
    def recorded_gradient(video):
        """Gradient of the last chunk only, in the clean latents."""
        return jax.grad(
            lambda video: replay_recorded(MODEL, config, params, text, past.replace(video=video), "write", 0)[
                :, 6:
            ].sum()
        )(video)

    size = np.abs(np.asarray(recorded_gradient(past.video))).max(axis=(0, 2, 3, 4))
    assert (size[:6] > 0).all() and (size[6:] == 0).all()

    # The rollout's recorded values are constants; the parameters of the clean passes are not.
    def loss(params, past, mode):
        return replay(MODEL, config, params, text, past, mode)[:, 6:].sum()

    by_past = jax.jit(jax.grad(functools.partial(loss, mode="write"), 1, allow_int=True))(params, past)
    for leaf in jax.tree.leaves(by_past):
        assert leaf.dtype == jax.dtypes.float0 or not np.any(leaf)
    stop, write = (jax.jit(jax.grad(functools.partial(loss, mode=mode)))(params, past) for mode in ("stop", "write"))
    assert tree_relative(write, stop) > 0.01


@pytest.mark.slow
def test_live_clean_passes_have_the_same_gradient_with_checkpointing():
    config = SHAPES["chunk-wise"]
    params, (noise, text, draw) = random_params(), inputs(6)
    past = run(config, params, text, noise, draw, 1)

    @jax.jit
    def gradients(params):
        def loss(params, remat):
            model = wan.WanTransformer(dataclasses.replace(SMALL, remat=remat))
            return replay(model, config, params, text, past, "write")[:, 3:].sum()

        return [jax.grad(functools.partial(loss, remat=remat))(params) for remat in ("none", "dots", "block")]

    plain, *others = gradients(params)
    for other in others:
        assert tree_relative(other, plain) < 1e-6


def test_noisy_context_needs_no_clean_pass():
    config, _, noise, text, draw = case("noisy context")
    params, calls = random_params(), []

    def counted(kind, chunk, step, shape):
        jax.debug.callback(lambda s: calls.append((kind, int(s))), step)
        return draw(kind, chunk, step, shape)

    past = jax.jit(lambda: ro.rollout(MODEL, config, params, text, noise, 2, counted))()
    jax.effects_barrier()
    assert sorted(calls) == sorted([("renoise", 0), ("renoise", 1)] * 3)
    # The cache equals the result of one pass over all noisy chunks.
    layout = wan.Layout(frames=np.arange(9), pattern=attention.block_causal((3, 3, 3), config.window))
    t = jnp.full((2, 9), config.timesteps[2])
    flow, kv = jax.jit(lambda x: MODEL.apply({"params": params}, x, t, text, layout, return_kv=True))(past.exit_inputs)
    assert relative(past.cache.k, kv.k) < 1e-5 and relative(past.cache.v, kv.v) < 1e-5
    assert relative(past.video, config.schedule.to_clean(flow, past.exit_inputs, t)) < 1e-5


def test_exit_step_is_traced_and_saves_work():
    config, _, noise, text, draw = case("chunk-wise")
    params, steps = random_params(), []

    def counted(kind, chunk, step, shape):
        jax.debug.callback(lambda s: steps.append(int(s)), step)
        return draw(kind, chunk, step, shape)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def one(exit_step):
        return ro.rollout(MODEL, config, params, text, noise, exit_step, counted).video

    for exit_step in range(4):
        steps.clear()
        one(exit_step).block_until_ready()
        jax.effects_barrier()
        assert sorted(steps) == sorted(list(range(exit_step)) * 3)  # three chunks, no step after the exit


def test_an_examples_noise_does_not_depend_on_its_batch():
    config, _, noise, text, _ = case("chunk-wise")
    key, params = jax.random.key(3), random_params()
    whole = run(config, params, text, noise, ro.key_draw(key, jnp.arange(2)), 2).video
    alone = run(config, params, text[1:], noise[1:], ro.key_draw(key, jnp.arange(1, 2)), 2).video
    assert relative(alone, whole[1:]) < 1e-6


def test_initial_latents_are_kept_and_seen():
    config = SHAPES["chunk-wise"]
    noise, text, draw = inputs(6)
    initial = jax.random.normal(jax.random.key(5), (2, 3, *SIZE, SMALL.channels))
    params = random_params()
    one, two = (run(config, params, text, noise, draw, 3, True, given) for given in (initial, initial + 0.1))
    np.testing.assert_array_equal(one.video[:, :3], initial)
    assert relative(two.video[:, 3:], one.video[:, 3:]) > 1e-3
    assert relative(jax.jit(functools.partial(replay, MODEL, config))(params, text, one), one.video) < 1e-6


def test_context_noise_exact_adds_none_and_official_a_little():
    config, _, noise, text, draw = case("chunk-wise")
    params = random_params()
    exact, official, none = (
        run(dataclasses.replace(config, context_noise=kind), params, text, noise, draw, 1).video
        for kind in ("exact", "official", "none")
    )
    np.testing.assert_array_equal(exact, none)
    assert 1e-6 < relative(official, exact) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (250, 500)}, "steps is .250, 500.: it must descend"),
        ({"steps": (2000, 500)}, "first entry must be at most 1000"),
        ({"context_noise": "some"}, "context_noise is 'some': it must be one of exact, official, none"),
        ({"window": 2}, "window is 2 frames: it must be at least chunk"),
        ({"context": "dirty"}, "context is 'dirty': it must be one of clean, noisy"),
        ({"context": "noisy", "context_timestep": 80.0}, "without a clean pass they must be 0 and 'exact'"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ro.RolloutConfig(**changes)


def test_bad_rollouts_are_refused_before_anything_runs():
    config = SHAPES["windowed"]
    noise, text, draw = inputs(8)
    with pytest.raises(ValueError, match="frames is 8: with chunk=3 it must be a multiple of 3"):
        ro.rollout(MODEL, config, random_params(), text, noise, 0, draw)
    cache = rollout_cache.empty_cache(MODEL, SHAPES["chunk-wise"], 2, 6, *SIZE)
    kv = jax.eval_shape(lambda: MODEL.apply({"params": random_params()}, text, method="encode_text"))
    with pytest.raises(ValueError, match="the cache holds 6 frames but the rollout has 9"):
        ro.write_chunk(MODEL, SHAPES["chunk-wise"], random_params(), kv, cache, noise[:, :3], 6)
    with pytest.raises(ValueError, match="positions are tabulated for 1024"):
        ro.rollout(MODEL, config, random_params(), text, jnp.zeros((1, 1026, *SIZE, 4)), 0, draw)
    noise, text, draw = inputs(9)
    ring = jax.eval_shape(lambda: run(config, random_params(), text, noise, draw, 0, False))
    with pytest.raises(ValueError, match="make the rollout with keep_from=0"):
        replay(MODEL, config, random_params(), text, ring)
    with pytest.raises(ValueError, match="cache_gradient is 'all'"):
        replay(MODEL, config, random_params(), text, ring, "all")


TAILS = {
    "window": ro.RolloutConfig(chunk=2, window=4),
    "relative sink": ro.RolloutConfig(chunk=2, window=5, sink=1, positions="relative"),
    "first frame alone": ro.RolloutConfig(chunk=2, window=4, sink=1, first_frame_alone=True),
    "noisy context": ro.RolloutConfig(chunk=2, window=6, context="noisy"),
}


LONG = (pytest.mark.slow,)
LONGEST = (pytest.mark.slow, pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("name", "cache_gradient"),
    [
        pytest.param("relative sink", "stop", marks=LONG),
        pytest.param("relative sink", "write", marks=LONG),
        pytest.param("first frame alone", "straight_through", marks=LONG),
        *(pytest.param(name, gradient, marks=LONGEST) for name in TAILS for gradient in CACHE_GRADIENTS),
    ],
)
def test_a_window_needs_only_the_newest_frames_for_its_replay(name, cache_gradient):
    config, given = TAILS[name], int(name == "first frame alone")
    frames, live = 16, 5
    noise, text, draw = inputs(frames)
    initial, params = inputs(1, seed=3)[0] if given else None, random_params()
    kept = keep_from(config, cache_gradient, frames, given, live)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, kept):
        def loss(params):
            past = ro.rollout(MODEL, config, params, text, noise, 2, draw, initial, kept)
            video = replay(MODEL, config, params, text, past, cache_gradient, live)
            return (video[:, -6:] ** 2).mean(), (video, past)

        return jax.grad(loss, has_aux=True)(params)

    (whole, (video, full)), (tail, (same, past)) = gradient(params, 0), gradient(params, kept)
    assert past.cache.capacity == config.sink + full.cache.capacity - kept < full.cache.capacity
    newest = slice(-(past.cache.capacity - config.sink) * past.cache.tokens_per_frame, None)
    ordered = kv_cache.in_order(past.cache, frames + given)
    assert relative(ordered.k[:, :, newest], full.cache.k[:, :, newest]) < 1e-6
    assert relative(same, video) < 1e-6 and relative(same, past.video) < 1e-5
    assert tree_relative(tail, whole) < 1e-5


@pytest.mark.slow
def test_causal_trajectories_end_in_the_causal_video():
    noise, text, _ = inputs(6)
    model, params = wan.WanTransformer(SMALL), random_params()
    config = ro.RolloutConfig(shift=3.0, window=6)
    solver = Solver("euler", 3.0, 4)
    video = many_step.guided_rollout(model, config, params, text, 0 * text, noise, solver, 2.0)
    # With its own video as forced context, every chunk ends as in the rollout.
    path = many_step.forced_trajectory(model, config, 3.0, 4, 2.0, (0, 2, 4), params, noise, video, text, 0 * text)
    chex.assert_trees_all_equal(path[0], noise)
    chex.assert_trees_all_close(path[2], video, rtol=1e-4, atol=1e-5)
    other = many_step.forced_trajectory(model, config, 3.0, 4, 2.0, (0, 2, 4), params, noise, 0 * video, text, 0 * text)
    chex.assert_trees_all_close(other[2][:, :3], video[:, :3], rtol=1e-4, atol=1e-5)
    assert relative(other[2][:, 3:], video[:, 3:]) > 0.01


def test_a_call_slices_only_what_it_reads_out_of_all_layers(monkeypatch):
    monkeypatch.setattr(pattern_attention, "PREFIX_LOGITS", 0)
    config = ro.RolloutConfig(steps=(1000, 500), context_noise="none")
    cache = rollout_cache.empty_cache(MODEL, config, 1, 12, *SIZE)
    text = MODEL.apply({"params": random_params()}, jnp.zeros((1, 3, MODEL.config.text_dim)), method="encode_text")
    noise, draw = jnp.zeros((1, 3, *SIZE, MODEL.config.channels)), ro.key_draw(jax.random.key(0), jnp.arange(1))

    def chunk(cache, start):
        return ro.generate_chunk(MODEL, config, random_params(), text, cache, ro.NoisyChunk(noise, start, 0, 1, draw))

    lowered = jax.jit(chunk).lower(cache, jnp.int32(0)).as_text()
    rows, heads = cache.k.shape[2], f"{MODEL.config.num_heads}x{MODEL.config.head_dim}xf32"
    assert f"tensor<1x{rows - rows // 4}x{heads}>" in lowered  # the longest context
    assert f"tensor<1x{rows}x{heads}>" not in lowered  # a whole layer
