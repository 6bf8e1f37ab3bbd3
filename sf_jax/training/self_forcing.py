"""The student and critic programs of Self Forcing (paper, Algorithm 1) and of the baselines without rollouts."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.config import TrainConfig
from sf_jax.models import attention
from sf_jax.models.wan import WanTransformer
from sf_jax.objectives import causal, dmd, gan, scores, sid
from sf_jax.replay import keep_from, replay
from sf_jax.rng import Purpose, key_for
from sf_jax.training.media import Media
from sf_jax.training.step import Loss, Program, critic_params, model_params
from sf_jax.training.supervised import chunks_of, layout_of, per_chunk_index, per_example

# Numbers that are folded into an iteration's key, in addition to the small literals below.
PROMPT_SWITCH, SWITCHED_NOISE = 9, 10
OBJECTIVES = {"dmd": dmd.generator_loss, "sid": sid.generator_loss}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all update programs share: the configuration, its `media` (batch to latents), and the networks."""

    config: TrainConfig
    media: Media
    student: WanTransformer
    teacher: WanTransformer
    critic: WanTransformer

    @classmethod
    def of(cls, config: TrainConfig, media: Media) -> "Setup":
        """The setup of a configuration."""
        return cls(config, media, *map(WanTransformer, (config.model, config.teacher_model, config.critic_model)))


def programs(config: TrainConfig, media: Media) -> list[Program]:
    """Student and critic programs for every rollout length; the student's run first in an iteration.

    With `share_rollout`, iterations that update the student run one program for both networks.
    """
    setup = Setup.of(config, media)
    lengths = config.rollout_frames or (config.data.frames,)
    found = []
    for index, frames in enumerate(lengths):
        uses_length = functools.partial(_chosen, config.seed, index, len(lengths))
        suffix = f" of {frames} frames" if len(lengths) > 1 else ""
        found += _of_length(setup, frames, uses_length, suffix)
    return [program for program in found if not program.ends] + [program for program in found if program.ends]


def _of_length(setup: Setup, frames: int, uses_length: Callable[[int], bool], suffix: str) -> list[Program]:
    """The programs for one rollout length; `uses_length(step)` says whether an iteration uses it."""

    def student_due(step):
        return uses_length(step) and step % config.generator_every == 0 and step >= warmup

    config = setup.config
    warmup = config.gan.warmup if config.objective == "gan" else 0
    student = Loss("model", "generator_", functools.partial(_student_loss, setup))
    critic = Loss("critic", "critic_", functools.partial(_critic_loss, setup))
    prepare_student = functools.partial(_prepare, setup, frames, Purpose.GENERATOR)
    prepare_critic = functools.partial(_prepare, setup, frames, Purpose.CRITIC)
    calls = mean_calls(config, frames, last_exit=True)
    alone = Program(f"critic{suffix}", prepare_critic, (critic,), ends=True, due=uses_length, trips=calls)
    if config.share_rollout:
        losses = (student, critic)
        both = Program(f"student and critic{suffix}", prepare_student, losses, True, student_due, trips=calls)
        rest = dataclasses.replace(alone, due=lambda step: uses_length(step) and not student_due(step))
        return [both, rest]
    calls = mean_calls(config, frames, last_exit=False)
    return [Program(f"student{suffix}", prepare_student, (student,), False, student_due, trips=calls), alone]


def mean_calls(config: TrainConfig, frames: int, last_exit: bool) -> float:
    """Mean number of network calls per chunk of a rollout of `frames` frames, over all exit steps.

    These are the denoising steps up to the exit step, and any clean pass. The last chunk has no clean pass, and no exit
    step without `last_exit` (as in `rollout.rollout`). A rollout whose prompt changes is two, so that another clean
    pass is outside of their loops.
    """
    given = int(config.image_to_video)
    steps, chunks = len(config.rollout.steps), len(config.rollout.chunks(frames - given, given)[1])
    denoising = steps if config.exits == "last" else (steps + 1) / 2
    rollouts = 2 if config.prompt_switch and _first_live(config, frames) else 1
    clean_passes = (chunks - rollouts) * (config.rollout.context == "clean")
    return denoising + (clean_passes - (not last_exit)) / chunks


def _chosen(seed: int, index: int, count: int, step: int) -> bool:
    """Whether an iteration uses rollout length `index` of `count`; runs on the host."""
    return count == 1 or np.random.default_rng((seed, int(Purpose.ROLLOUT_FRAMES), step)).integers(count) == index


@dataclasses.dataclass(frozen=True)
class _Fake:
    """Inputs shared by the losses of one update: the rollout, and the timestep and noise of the scores."""

    past: ro.Rollout | None
    forced: tuple | None
    exits: jax.Array
    t: jax.Array
    noise: jax.Array
    key: jax.Array
    examples: jax.Array


jax.tree_util.register_dataclass(_Fake)


def _prepare(setup: Setup, frames: int, purpose: Purpose, state, frozen, batch, examples) -> _Fake:
    """A rollout of `frames` frames (or noised real videos), and the timesteps and noise of the scores."""
    config = setup.config
    key = key_for(batch["seed"], state.step, purpose)
    params = model_params(config, state.model.params, frozen)
    past, forced = None, None
    exits = _exits(config, jax.random.fold_in(key, 0), frames)
    if config.student_input == "rollout":
        last_exit = purpose == Purpose.CRITIC or config.share_rollout  # the student's loss recomputes it
        past = _student_rollout(setup, params, batch, key, examples, exits, frames, last_exit)
    else:
        # Diffusion forcing also needs clean chunks, as the cache will hold; they are context, without a loss.
        forced = _noised(setup, batch, key, examples, config.student_input == "diffusion_forcing")
    shape = (len(examples), config.data.frames, config.data.height, config.data.width, config.model.channels)
    t, noise = _score_draws(config, key, examples, exits, shape)
    return _Fake(past, forced, exits, t, noise, key, examples)


def _exits(config: TrainConfig, key: jax.Array, frames: int) -> jax.Array:
    """int32 [chunks]: the exit step of every chunk."""
    given = int(config.image_to_video)
    count, last = len(config.rollout.chunks(frames - given, given)[1]), len(config.rollout.steps) - 1
    if config.exits == "last":
        return jnp.full((count,), last, jnp.int32)
    shape = (count,) if config.exits == "per_chunk" else ()
    return jnp.broadcast_to(jax.random.randint(key, shape, 0, last + 1), (count,))


def _student_rollout(setup: Setup, params, batch, key, examples, exits, frames, last_exit=True) -> ro.Rollout:
    """A training rollout from fresh noise, after the given image if there is one; `last_exit` as in `ro.rollout`."""
    config = setup.config
    given, data = int(config.image_to_video), config.data
    shape = (len(examples), frames - given, data.height, data.width, config.model.channels)
    noise = ro.example_noise(jax.random.fold_in(key, 1), examples, shape)
    draw = ro.key_draw(jax.random.fold_in(key, 2), examples)
    initial = setup.media.clean(batch)[:, :1] if given else None
    if config.prompt_switch and _first_live(config, frames):
        prompts, sources = (batch["other_text"], batch["text"]), (key, examples, noise, draw)
        return _switched_rollout(setup, params, prompts, sources, exits, initial, last_exit)
    kept = keep_from(config.rollout, config.cache_gradient, frames - given, given, _first_live(config, frames))
    inputs = (batch["text"], noise, exits, draw, initial, kept)
    return ro.rollout(setup.student, config.rollout, params, *inputs, last_exit=last_exit)


def _switched_rollout(setup: Setup, params, prompts, sources, exits, initial, last_exit) -> ro.Rollout:
    """A rollout whose prompt changes before the first chunk that takes a gradient; earlier frames count as given.

    Half of the videos keep the cache unchanged (mode "swap" of `inference.stream`), the others recompute it under the
    new prompt ("recache"); a noisy context cannot be recomputed. Source: the long tuning of LongLive
    (arXiv 2509.22622).
    """
    config, student = setup.config, setup.student
    key, examples, noise, draw = sources
    rollout, given = config.rollout, 0 if initial is None else initial.shape[1]
    first_live = _first_live(config, given + noise.shape[1])
    before = sum(rollout.chunks(noise.shape[1], given)[1][:first_live])
    switches, recaches = per_example(
        jax.random.fold_in(key, PROMPT_SWITCH), examples, lambda k: jax.random.uniform(k, (2,))
    ).T
    recaches = (recaches < 0.5) & (rollout.context == "clean")
    other, text = prompts
    other = jnp.where((switches < config.prompt_switch)[:, None, None], other, text)
    old, new = (student.apply({"params": params}, prompt, method="encode_text") for prompt in (other, text))
    size = (len(examples), given + noise.shape[1], *noise.shape[2:4])
    empty = rollout_cache.empty_cache(student, rollout, *size, keep_from=0)
    chunks = rollout.chunks(before, given)
    bounds = attention.chunk_bounds(sum(chunks, ()))

    def write(cache, text, video, index):
        """A chunk's clean pass, as in the rollout (which skips it for the last chunk)."""
        first, last = bounds[index]
        part, t = video[:, first:last], 0.0
        if index >= len(chunks[0]):
            part, t = ro.context_input(rollout, part, draw, index - len(chunks[0])), rollout.context_timestep
        return ro.write_chunk(student, rollout, params, text, cache, part, first, t)

    start = empty
    for index in range(len(chunks[0])):
        start = write(start, old, initial, index)
    past = ro.rollout(student, rollout, params, old, noise[:, :before], exits[:first_live], draw, initial, cache=start)
    kept, again = past.cache, empty
    if rollout.context == "clean":
        kept = write(kept, old, past.video, len(bounds) - 1)
        for index in range(len(bounds)):
            again = write(again, new, past.video, index)
    mine = recaches[None, :, None, None, None]
    cache = kept.replace(k=jnp.where(mine, again.k, kept.k), v=jnp.where(mine, again.v, kept.v))
    draw = ro.key_draw(jax.random.fold_in(key, SWITCHED_NOISE), examples)
    inputs = (new, noise[:, before:], exits[first_live:], draw, past.video)
    return jax.lax.stop_gradient(ro.rollout(student, rollout, params, *inputs, cache=cache, last_exit=last_exit))


def _noised(setup: Setup, batch, key, examples, clean_chunks=False) -> tuple:
    """Real videos, a random denoising timestep per chunk (including 0 with `clean_chunks`), and noise."""
    config = setup.config
    clean = setup.media.clean(batch)
    steps = jnp.asarray(config.rollout.timesteps + (0.0,) * clean_chunks, jnp.float32)
    t = steps[per_chunk_index(config, jax.random.fold_in(key, 1), examples, len(steps))]
    t = t.at[:, 0].set(0.0) if config.image_to_video else t
    return clean, t, ro.example_noise(jax.random.fold_in(key, 2), examples, clean.shape)


def _score_draws(config: TrainConfig, key, examples, exits, shape) -> tuple[jax.Array, jax.Array]:
    """Random timesteps [B, 1] and noise [B, F, H, W, C] of the scores."""
    bounds = jnp.int32(config.rollout.schedule.steps), jnp.int32(0)
    if config.student_input == "rollout" and config.exits != "per_chunk":
        bounds = ro.exit_range(config.rollout, exits[0])
    low, high = scores.time_bounds(config.score, *bounds)
    time_key, noise_key = jax.random.fold_in(key, 3), jax.random.fold_in(key, 4)
    even = per_example(time_key, examples, lambda k: jax.random.randint(k, (1,), low, high))
    return scores.score_time(config.score, even), ro.example_noise(noise_key, examples, shape)


def _health(video: jax.Array) -> dict:
    """Metrics that show a student going wrong: latents out of range, and videos that stand still."""
    video = jax.lax.stop_gradient(video)
    metrics = {"saturation": (jnp.abs(video) > 3).mean(dtype=jnp.float32)}
    if video.shape[1] > 1:
        metrics["motion"] = jnp.abs(jnp.diff(video, axis=1)).mean()
    return metrics


def _video(setup: Setup, params, frozen, batch, fake: _Fake) -> tuple[jax.Array, jax.Array | None, dict]:
    """The student's videos with the length of the scores, differentiable in `params`, the loss's mask, and metrics."""
    config = setup.config
    if fake.forced is not None:
        clean, t, noise = fake.forced
        layout = layout_of(config, config.student_input == "teacher_forcing")
        video = causal.causal_video(
            params, setup.student, layout, clean, batch["text"], t, noise, config.rollout.schedule
        )
        return video, (t != 0)[:, :, None, None, None], _health(video)
    total = fake.past.video.shape[1]
    # After a prompt switch, all frames before the first chunk that takes a gradient count as given.
    switched = fake.past.initial_frames > int(config.image_to_video)
    first_live = 0 if switched else _first_live(config, total)
    video = replay(setup.student, config.rollout, params, batch["text"], fake.past, config.cache_gradient, first_live)
    metrics = {"exit_step": fake.exits.mean(dtype=jnp.float32)} | _health(video)
    return *_last_window(setup, frozen, video), metrics


def _first_live(config: TrainConfig, total: int) -> int:
    """The first new chunk that takes a gradient, which is the first to begin within the last `data.frames`."""
    given = int(config.image_to_video)
    chunks = config.rollout.chunks(total - given, given)[1]
    starts = given + np.cumsum((0, *chunks[:-1]))
    return int((starts < total - config.data.frames).sum())


def _last_window(setup: Setup, frozen, video) -> tuple[jax.Array, jax.Array | None]:
    """The last `data.frames` frames of a rollout, the first of them re-encoded as an image, and the loss's mask.

    Source: official `SelfForcingModel._run_generator`; the mask excludes the first chunk, which holds that image.
    """
    config, total, window = setup.config, video.shape[1], setup.config.data.frames
    if total == window:
        return video, _given_mask(config)
    image = setup.media.as_image(frozen, jax.lax.stop_gradient(video[:, : total - window + 1]))
    video = jnp.concatenate([image.astype(video.dtype), video[:, total - window + 1 :]], axis=1)
    hidden = 1 if config.rollout.first_frame_alone else config.rollout.chunk
    return video, (jnp.arange(window) >= hidden)[None, :, None, None, None]


def _given_mask(config: TrainConfig) -> jax.Array | None:
    """The loss's mask, which excludes a given first frame; None without one."""
    return (jnp.arange(config.data.frames) >= 1)[None, :, None, None, None] if config.image_to_video else None


def _regression(setup: Setup, params, batch, fake: _Fake) -> jax.Array:
    """Mean squared error of the clean prediction of real chunks, each conditioned on the real clean chunks before it.

    The past nearly determines the next chunk, so the mean that a regression learns is sharp. This does not hold for the
    first chunk, which is excluded.
    """
    clean, t, noise = _noised(setup, batch, jax.random.fold_in(fake.key, 8), fake.examples)
    schedule, layout = setup.config.rollout.schedule, layout_of(setup.config, True)
    video = causal.causal_video(params, setup.student, layout, clean, batch["text"], t, noise, schedule)
    return jnp.square(video - clean)[:, chunks_of(setup.config)[0] :].mean()


def _student_loss(setup: Setup, params, state, frozen, batch, fake: _Fake) -> tuple[jax.Array, dict]:
    """The student's loss and metrics: its objective, plus a regression on real videos if configured."""
    config = setup.config
    params = model_params(config, params, frozen)
    value, metrics = _objective(setup, params, state, frozen, batch, fake)
    if not config.regression_weight:
        return value, metrics
    error = _regression(setup, params, batch, fake)
    return value + config.regression_weight * error, metrics | {"regression": error}


def _objective(setup: Setup, params, state, frozen, batch, fake: _Fake) -> tuple[jax.Array, dict]:
    """Replay of the exit steps, then the distribution-matching objective; `params` are the whole student's."""
    config = setup.config
    video, mask, metrics = _video(setup, params, frozen, batch, fake)
    critic = (setup.critic, critic_params(config, state.critic.params, frozen))
    if config.objective == "gan":
        real = setup.media.clean(batch)
        real_noise = ro.example_noise(jax.random.fold_in(fake.key, 5), fake.examples, real.shape)
        # A discriminator sees whole videos, so the masked part gets no gradient instead.
        video = video if mask is None else jnp.where(mask, video, jax.lax.stop_gradient(video))
        draws = (fake.t, fake.noise, real_noise)
        value, aux = gan.generator_loss(video, real, critic, batch["text"], *draws, config.score, config.gan)
        return value, metrics | aux
    teacher = (setup.teacher, frozen["teacher"])
    texts = (batch["text"], jnp.broadcast_to(batch["negative"], batch["text"].shape))
    generator_loss = OBJECTIVES[config.objective]
    value, aux = generator_loss(video, teacher, critic, *texts, fake.t, fake.noise, config.score, mask)
    norm = {"dmd_gradient_norm": aux["gradient_norm"]} if "gradient_norm" in aux else {}
    return value, metrics | norm | {name: aux[name] for name in ("critic_lag", "teacher_distance")}


def _critic_loss(setup: Setup, params, state, frozen, batch, fake: _Fake) -> tuple[jax.Array, dict]:
    """The critic's loss and metrics on the student's videos, which are constants here."""
    config = setup.config
    student = jax.lax.stop_gradient(model_params(config, state.model.params, frozen))
    if fake.past is not None:
        video, _ = _last_window(setup, frozen, fake.past.video)
    else:
        video, *_ = _video(setup, student, frozen, batch, fake)
    video = jax.lax.stop_gradient(video)
    params = critic_params(config, params, frozen)
    if config.objective == "gan":
        real = setup.media.clean(batch)
        steps = [ro.example_noise(jax.random.fold_in(fake.key, i), fake.examples, real.shape) for i in (6, 7)]
        value, aux = gan.critic_loss(
            params, setup.critic, video, real, batch["text"], fake.t, fake.noise, steps, config.score, config.gan
        )
        return value, {name: aux[name].mean() for name in aux}
    return dmd.critic_loss(params, setup.critic, video, batch["text"], fake.t, fake.noise, config.score)
