"""The update programs: each is one jitted, donated function (state, frozen, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sf_jax import rollout as ro
from sf_jax.config import TrainConfig
from sf_jax.diffusion.schedule import TRAIN_STEPS, FlowSchedule
from sf_jax.models import attention
from sf_jax.models.patch_codec import PatchCodec, to_float
from sf_jax.models.wan import Layout, WanTransformer, bidirectional_layout, init_params
from sf_jax.objectives import causal, dmd, ode, scores, sid
from sf_jax.objectives.flow import flow_loss
from sf_jax.rng import Purpose, key_for
from sf_jax.training.state import Network, TrainState, make_optimizer, new_network, update

OBJECTIVES = {"dmd": dmd.generator_loss, "sid": sid.generator_loss}
Step = Callable[[TrainState, dict, dict], tuple[TrainState, dict]]


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """Optimisers of the trained network and of the critic."""

    model: optax.GradientTransformation
    critic: optax.GradientTransformation


def make_optimizers(config: TrainConfig) -> Optimizers:
    """The optimisers of a run; decays end with the run."""
    updates = -(-config.steps // config.generator_every) if config.stage == "distill" else config.steps
    return Optimizers(make_optimizer(config.optimizer, updates), make_optimizer(config.critic_optimizer, config.steps))


def causal_layout(config: TrainConfig) -> Layout:
    """The student's layout for a whole training video at once (block-causal)."""
    rollout = config.rollout
    chunks = attention.split_chunks(config.data.frames, rollout.chunk, rollout.first_frame_alone)
    return causal.causal_layout(chunks, False, rollout.window, rollout.sink)


def new_state(config: TrainConfig, params: dict | None = None, critic: dict | None = None) -> TrainState:
    """The state at step 0, from given parameters or random ones."""
    optimizers = make_optimizers(config)
    if params is None:
        params = init_params(config.model, key_for(config.seed, 0, Purpose.INIT))
    network = new_network(params, optimizers.model, ema=True)
    critic_network = None
    if config.stage == "distill":
        if critic is None:
            critic = init_params(config.critic_model, key_for(config.seed, 0, Purpose.CRITIC_INIT))
        critic_network = new_network(critic, optimizers.critic, ema=False)
    return TrainState(step=jnp.zeros((), jnp.int32), model=network, critic=critic_network)


def _noise(key, batch, shape):
    """Noise keyed by the example's index in the global batch: the same however the batch is split over devices."""
    return ro.example_noise(key, jnp.arange(batch, dtype=jnp.int32), (batch, *shape))


def make_teacher_step(config: TrainConfig, codec: PatchCodec) -> Step:
    """Flow matching on real videos; the batch holds `video` uint8 [B, F, h, w, 1] and `text` [B, S, text_dim]."""
    model, schedule = WanTransformer(config.model), FlowSchedule(config.score.score_shift)
    optimizer = make_optimizers(config).model
    layout = bidirectional_layout(config.data.frames)

    def step(state, frozen, batch):
        del frozen
        key = key_for(config.seed, state.step, Purpose.FLOW)
        clean = codec.encode(to_float(batch["video"]))
        size = clean.shape[0]
        # stratified: the batch covers all noise levels evenly
        place = (jnp.arange(size) + jax.random.uniform(jax.random.fold_in(key, size))) / size
        t = jnp.asarray(schedule.timesteps)[(place * TRAIN_STEPS).astype(jnp.int32)][:, None]
        noise = _noise(key, size, clean.shape[1:])
        (loss, _), grads = jax.value_and_grad(flow_loss, has_aux=True)(
            state.model.params, model, layout, clean, batch["text"], t, noise, schedule
        )
        network, norm = update(state.model, grads, optimizer, config.ema)
        return state.replace(step=state.step + 1, model=network), {"loss": loss, "grad_norm": norm}

    return step


def make_init_step(config: TrainConfig) -> Step:
    """Regression on ODE pairs; the batch holds `trajectory` [B, S + 1, F, H, W, C] and `text` [B, N, text_dim]."""
    model, schedule = WanTransformer(config.model), config.rollout.schedule
    optimizer = make_optimizers(config).model
    layout = causal_layout(config)
    chunks = attention.split_chunks(config.data.frames, config.rollout.chunk, config.rollout.first_frame_alone)
    timesteps = jnp.asarray(config.rollout.timesteps + (0.0,), jnp.float32)

    def step(state, frozen, batch):
        del frozen
        key = key_for(config.seed, state.step, Purpose.ODE_INDEX)
        size = batch["trajectory"].shape[0]
        draw = jax.random.randint(key, (size, len(chunks)), 0, len(config.rollout.steps))
        index = jnp.repeat(draw, np.asarray(chunks), axis=1, total_repeat_length=config.data.frames)
        (loss, _), grads = jax.value_and_grad(ode.ode_loss, has_aux=True)(
            state.model.params, model, layout, batch["trajectory"], batch["text"], index, timesteps, schedule
        )
        network, norm = update(state.model, grads, optimizer, config.ema)
        return state.replace(step=state.step + 1, model=network), {"loss": loss, "grad_norm": norm}

    return step


def _student_rollout(config: TrainConfig, params: dict, text: jax.Array, key: jax.Array):
    """A training rollout from fresh noise; returns it with the exit step (one for all chunks)."""
    student, data = WanTransformer(config.model), config.data
    size = text.shape[0]
    exit_key, noise_key, draw_key = (jax.random.fold_in(key, i) for i in range(3))
    exit_step = jax.random.randint(exit_key, (), 0, len(config.rollout.steps))
    noise = _noise(noise_key, size, (data.frames, data.height, data.width, config.model.channels))
    draw = ro.key_draw(draw_key, jnp.arange(size, dtype=jnp.int32))
    return ro.rollout(student, config.rollout, params, text, noise, exit_step, draw), exit_step


def _score_draws(config: TrainConfig, key: jax.Array, exit_step: jax.Array, shape: tuple[int, ...]):
    """Random times [B, 1] and noise [B, F, H, W, C] at which the scores are asked."""
    low, high = scores.time_bounds(config.score, *ro.exit_range(config.rollout, exit_step))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, 3), i))(jnp.arange(shape[0]))
    even = jax.vmap(lambda k: jax.random.randint(k, (1,), low, high))(keys)
    return scores.score_time(config.score, even), _noise(jax.random.fold_in(key, 4), shape[0], shape[1:])


def make_generator_step(config: TrainConfig) -> Step:
    """The student's update of Self Forcing (paper, Algorithm 1); the batch holds `text` and `negative`.

    Rollout without gradient, replay of the exit step with gradient, distribution-matching loss, optimiser, EMA.
    """
    student, teacher, critic = (
        WanTransformer(sizes) for sizes in (config.model, config.teacher_model, config.critic_model)
    )
    optimizer = make_optimizers(config).model

    def step(state, frozen, batch):
        key = key_for(config.seed, state.step, Purpose.GENERATOR)
        text, negative = batch["text"], jnp.broadcast_to(batch["negative"], batch["text"].shape)
        past, exit_step = _student_rollout(config, state.model.params, text, key)
        t, noise = _score_draws(config, key, exit_step, past.video.shape)

        def loss(params):
            video = ro.replay(student, config.rollout, params, text, past, config.cache_gradient)
            return OBJECTIVES[config.objective](
                video,
                (teacher, frozen["teacher"]),
                (critic, state.critic.params),
                text,
                negative,
                t,
                noise,
                config.score,
            )

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.model.params)
        network, norm = update(state.model, grads, optimizer, config.ema)
        metrics = {"generator_loss": value, "generator_grad_norm": norm, "exit_step": exit_step}
        metrics |= {"dmd_gradient_norm": aux["gradient_norm"]} if "gradient_norm" in aux else {}
        return state.replace(model=network), metrics

    return step


def make_critic_step(config: TrainConfig) -> Step:
    """The critic's update of Self Forcing, on a rollout of its own; the batch holds `text`. Ends the iteration."""
    critic = WanTransformer(config.critic_model)
    optimizer = make_optimizers(config).critic

    def step(state, frozen, batch):
        del frozen
        key = key_for(config.seed, state.step, Purpose.CRITIC)
        past, exit_step = _student_rollout(config, state.model.params, batch["text"], key)
        t, noise = _score_draws(config, key, exit_step, past.video.shape)
        (value, _), grads = jax.value_and_grad(dmd.critic_loss, has_aux=True)(
            state.critic.params, critic, past.video, batch["text"], t, noise, config.score
        )
        network, norm = update(state.critic, grads, optimizer, None)
        metrics = {"critic_loss": value, "critic_grad_norm": norm}
        return state.replace(step=state.step + 1, critic=network), metrics

    return step


def student_params(network: Network) -> dict:
    """The weights to use: the average where there is one."""
    return network.params if network.ema is None else network.ema
