"""Training rollouts whose prompt changes: their contents, gradients and errors."""

import functools

import jax
import jax.numpy as jnp
import pytest

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.models.wan import WanTransformer
from sf_jax.replay import replay
from sf_jax.training import self_forcing
from sf_jax.training import step as steps
from tests.helpers import SMALL, random_params, relative
from tests.test_objectives import FRAMES, MEDIA, make_batch, make_config, setting

MODEL = WanTransformer(SMALL)
LONG = {"rollout_frames": (12,), "prompt_switch": 1.0}


@functools.partial(jax.jit, static_argnums=0)
def switched(config, text, examples):
    batch = {**make_batch(config), "text": text, "other_text": jnp.roll(text, 1, axis=0)}
    exits = jnp.full((4,), 2, jnp.int32)
    setup = self_forcing.Setup.of(config, MEDIA)
    return self_forcing._student_rollout(setup, random_params(), batch, jax.random.key(5), examples, exits, 12)


WINDOW = {"window": 9, "sink": 3, "positions": "relative"}


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [{}, WINDOW], ids=["all", "window"])
def test_prompts_change_before_the_frames_that_learn(rollout):
    config = make_config(**LONG, rollout=rollout)
    text, examples, params = make_batch(config)["text"], jnp.arange(4), random_params()
    past = switched(config, text, examples)
    assert past.video.shape[1] == 12 and past.initial_frames == 6 and past.exit_inputs.shape[1] == FRAMES
    # The first frames follow the neighbor's prompt.
    key = jax.random.key(5)
    noise = ro.example_noise(jax.random.fold_in(key, 1), examples, (4, 12, 4, 4, SMALL.channels))
    draw = ro.key_draw(jax.random.fold_in(key, 2), examples)
    before = ro.rollout(MODEL, config.rollout, params, jnp.roll(text, 1, axis=0), noise[:, :6], 2, draw)
    assert relative(past.video[:, :6], before.video) < 1e-5
    # The other frames equal the replay's, whose context depends on each video's mode.
    again = jax.jit(lambda past: replay(MODEL, config.rollout, params, text, past))(past)
    assert relative(again, past.video) < 1e-5
    old = MODEL.apply({"params": params}, jnp.roll(text, 1, axis=0), method="encode_text")
    written = ro.write_chunk(MODEL, config.rollout, params, old, before.cache, before.video[:, 3:], 3)
    swapped = jnp.stack([relative(past.cache.k[:, i, :24], written.k[:, i]) < 1e-5 for i in range(4)])
    kv = MODEL.apply({"params": params}, text, method="encode_text")
    cache = rollout_cache.empty_cache(MODEL, config.rollout, 4, 12, 4, 4, keep_from=0)
    for first in (0, 3):
        cache = ro.write_chunk(MODEL, config.rollout, params, kv, cache, past.video[:, first : first + 3], first)
    recached = jnp.stack([relative(past.cache.k[:, i, :24], cache.k[:, i, :24]) < 1e-5 for i in range(4)])
    assert (swapped != recached).all() and swapped.any() and recached.any(), (swapped, recached)
    # With the same prompt, both modes are equal.
    same = jnp.broadcast_to(text[:1], text.shape)
    kept = switched(config, same, examples)
    one = MODEL.apply({"params": params}, same, method="encode_text")
    cache = rollout_cache.empty_cache(MODEL, config.rollout, 4, 12, 4, 4, keep_from=0)
    for first in (0, 3):
        cache = ro.write_chunk(MODEL, config.rollout, params, one, cache, kept.video[:, first : first + 3], first)
    assert relative(kept.cache.k[:, :, :24], cache.k[:, :, :24]) < 1e-5


@pytest.mark.slow
def test_the_new_chunks_learn():
    config = make_config(**LONG)
    state, frozen, batch = setting(config)
    student, critic = (jax.jit(steps.make_step(config, p)) for p in self_forcing.programs(config, MEDIA))
    after, metrics = student(state, frozen, batch)
    assert metrics["generator_finite"]
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), after.model.params, state.model.params)
    assert all(jax.tree.leaves(changed)), changed
    assert critic(after, frozen, batch)[1]["critic_finite"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"image_to_video": True, "rollout": {"chunk": 5, "first_frame_alone": True}, "rollout_frames": (11,)},
        {"rollout": {"context_timestep": 80.0}},
        {"rollout": {"context": "noisy"}},
    ],
    ids=["image", "context noise", "noisy context"],
)
def test_every_kind_of_rollout_can_change_its_prompt(changes):
    config = make_config(**LONG | changes)
    frames, given = config.rollout_frames[0], int(config.image_to_video)
    batch, params = make_batch(config), random_params()
    batch["other_text"] = batch["text"]  # the same prompt gives an ordinary rollout
    chunks = config.rollout.chunks(frames - given, given)[1]
    exits, key = jnp.full(len(chunks), 1, jnp.int32), jax.random.key(5)
    setup = self_forcing.Setup.of(config, MEDIA)

    @jax.jit
    def run(batch):
        return self_forcing._student_rollout(setup, params, batch, key, jnp.arange(4), exits, frames)

    past = run(batch)
    before = past.initial_frames - given
    noise = ro.example_noise(jax.random.fold_in(key, 1), jnp.arange(4), (4, frames - given, 4, 4, SMALL.channels))
    draw, initial = ro.key_draw(jax.random.fold_in(key, 2), jnp.arange(4)), batch["latent"][:, :1] if given else None
    plain = jax.jit(lambda text: ro.rollout(MODEL, config.rollout, params, text, noise, 1, draw, initial))(
        batch["text"]
    )
    tokens = 4 * past.initial_frames
    assert before and relative(past.video[:, : past.initial_frames], plain.video[:, : past.initial_frames]) < 1e-5
    assert relative(past.cache.k[:, :, :tokens], plain.cache.k[:, :, :tokens]) < 1e-5
    again = jax.jit(lambda past: replay(MODEL, config.rollout, params, batch["text"], past))(past)
    assert relative(again, past.video) < 1e-5


def test_mistakes_are_named():
    for changes, message in (
        ({"prompt_switch": 1.5}, "prompt_switch is 1.5: it must be a share from 0 to 1"),
        (LONG | {"batch_size": 1}, "prompt_switch is 1.0, batch_size 1: the other prompt is a neighbor's"),
        ({"prompt_switch": 0.5}, r"prompts change in rollouts longer than data.frames, 6; give rollout_frames"),
        (LONG | {"cache_gradient": "write"}, "prompt_switch is 1.0, cache_gradient 'write'"),
        ({"stage": "teacher", "teacher_weights": None, "prompt_switch": 0.5}, "prompt_switch is 0.5: it is for stage"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(**changes)


@pytest.mark.parametrize(("changes", "capacity"), [({}, 9), ({"prompt_switch": 1.0}, 12)], ids=["plain", "switch"])
def test_long_rollouts_with_a_window_keep_what_the_replay_reads(changes, capacity):
    config = make_config(rollout_frames=(12,), rollout={"window": 6}, **changes)
    past = jax.eval_shape(lambda text: switched(config, text, jnp.arange(4)), make_batch(config)["text"])
    assert past.cache.capacity == capacity and past.video.shape[1] == 12
