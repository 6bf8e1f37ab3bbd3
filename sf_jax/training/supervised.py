"""The programs of the stages that train on data: teacher, causal diffusion, ODE pairs, consistency."""

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.config import TrainConfig
from sf_jax.diffusion.schedule import TRAIN_STEPS, FlowSchedule
from sf_jax.models import attention
from sf_jax.models.wan import Layout, WanTransformer, bidirectional_layout
from sf_jax.objectives import causal, consistency, ode
from sf_jax.objectives.flow import flow_loss
from sf_jax.rng import Purpose, key_for
from sf_jax.training.media import Media
from sf_jax.training.step import Loss, Program, model_params


def chunks_of(config: TrainConfig) -> tuple[int, ...]:
    """Chunk sizes of a training video, including a given first frame."""
    return attention.split_chunks(config.data.frames, config.rollout.chunk, config.rollout.first_frame_alone)


def layout_of(config: TrainConfig, teacher_forcing: bool) -> Layout:
    """The causal layout of a whole training video, with the rollout's window, sink and positions."""
    rollout = config.rollout
    layout = causal.causal_layout(chunks_of(config), teacher_forcing, rollout.window, rollout.sink)
    return rollout_cache.with_moved_sink(rollout, layout)


def per_example(key: jax.Array, examples: jax.Array, draw) -> jax.Array:
    """`draw(key)` for each example, keyed by its global index, so that it does not depend on how the batch is split."""
    return jax.vmap(lambda i: draw(jax.random.fold_in(key, i)))(examples)


def per_chunk_index(config: TrainConfig, key: jax.Array, examples: jax.Array, count: int) -> jax.Array:
    """int32 [B, F]: a random integer in [0, count) for every chunk."""
    chunks = chunks_of(config)
    drawn = per_example(key, examples, lambda k: jax.random.randint(k, (len(chunks),), 0, count))
    return jnp.repeat(drawn, np.asarray(chunks), axis=1, total_repeat_length=sum(chunks))


def _always(name: str, prepare, loss) -> Program:
    return Program(name, prepare, (Loss("model", "", loss),), ends=True, due=lambda step: True)


def teacher_program(config: TrainConfig, media: Media) -> Program:
    """Flow matching of the bidirectional teacher on real videos."""
    model, schedule = WanTransformer(config.model), FlowSchedule(config.score.score_shift)
    layout = bidirectional_layout(config.data.frames)

    def prepare(state, frozen, batch, examples):
        del frozen
        key = key_for(batch["seed"], state.step, Purpose.FLOW)
        clean = media.clean(batch)
        # Stratified, so that the batch covers all noise levels evenly.
        place = (examples + jax.random.uniform(jax.random.fold_in(key, config.batch_size))) / config.batch_size
        t = jnp.asarray(schedule.timesteps)[(place * TRAIN_STEPS).astype(jnp.int32)][:, None]
        return clean, t, ro.example_noise(key, examples, clean.shape)

    def loss(params, state, frozen, batch, prepared):
        del state
        clean, t, noise = prepared
        params = model_params(config, params, frozen)
        return flow_loss(params, model, layout, clean, batch["text"], t, noise, schedule)

    return _always("teacher", prepare, loss)


def causal_program(config: TrainConfig, media: Media) -> Program:
    """Teacher or diffusion forcing on real videos (paper, Section 2)."""
    model, schedule = WanTransformer(config.model), config.rollout.schedule
    forcing = config.causal.forcing == "teacher"
    layout = layout_of(config, forcing)
    # Number of entries of the descending table that are at most the context's highest timestep.
    quiet = int((schedule.timesteps <= config.causal.context_noise).sum())
    if config.causal.context_noise and not quiet:
        lowest = schedule.timesteps[-1]
        raise ValueError(
            f"causal.context_noise is {config.causal.context_noise}: it must be 0 or at least {lowest:.2f}"
        )

    def prepare(state, frozen, batch, examples):
        del frozen
        key = key_for(batch["seed"], state.step, Purpose.CAUSAL)
        time_key, noise_key, context_key = (jax.random.fold_in(key, i) for i in range(3))
        clean = media.clean(batch)
        t = jnp.asarray(schedule.timesteps)[per_chunk_index(config, time_key, examples, TRAIN_STEPS)]
        context_t = None
        if quiet:
            index = TRAIN_STEPS - quiet + per_chunk_index(config, context_key, examples, quiet)
            context_t = jnp.asarray(schedule.timesteps)[index]
        if config.image_to_video:
            t = t.at[:, 0].set(0.0)
            context_t = None if context_t is None else context_t.at[:, 0].set(0.0)
        return clean, t, ro.example_noise(noise_key, examples, clean.shape), context_t

    def loss(params, state, frozen, batch, prepared):
        del state
        clean, t, noise, context_t = prepared
        params = model_params(config, params, frozen)
        value, _ = causal.causal_loss(params, model, layout, clean, batch["text"], t, noise, schedule, context_t)
        return value, {}

    return _always("causal", prepare, loss)


def ode_program(config: TrainConfig) -> Program:
    """Regression on ODE pairs; the batch holds `trajectory` [B, S + 1, F, H, W, C] and `text` [B, N, text_dim].

    With a causal teacher it also holds `context` [B, F, H, W, C], the real videos that the pairs were conditioned on.
    """
    behind_real = config.ode.teacher == "causal"
    model, schedule, layout = WanTransformer(config.model), config.rollout.schedule, layout_of(config, behind_real)
    timesteps = jnp.asarray(config.rollout.timesteps + (0.0,), jnp.float32)

    def prepare(state, frozen, batch, examples):
        del frozen
        key = key_for(batch["seed"], state.step, Purpose.ODE_INDEX)
        # Includes the clean entry, as the cache will hold clean chunks; it is context, without a loss. After real
        # chunks the student has clean context anyway, and with a noisy context it never has.
        entries = len(timesteps) - (behind_real or config.rollout.context == "noisy")
        index = per_chunk_index(config, key, examples, entries)
        if config.image_to_video:
            index = index.at[:, 0].set(len(timesteps) - 1)
        return index

    def loss(params, state, frozen, batch, index):
        del state
        params = model_params(config, params, frozen)
        return ode.ode_loss(
            params,
            model,
            layout,
            batch["trajectory"],
            batch["text"],
            index,
            timesteps,
            schedule,
            batch.get("context"),
        )

    return _always("ode", prepare, loss)


def consistency_program(config: TrainConfig, media: Media) -> Program:
    """Causal consistency distillation on real videos; `frozen` has the causal `teacher`, the batch has `negative`."""
    model, teacher = WanTransformer(config.model), WanTransformer(config.teacher_model)
    solver = FlowSchedule(config.rollout.shift, config.consistency.solver_steps)
    guidance = np.full(config.data.frames, config.consistency.guidance, np.float32)
    if config.consistency.later_guidance is not None:
        guidance[chunks_of(config)[0] :] = config.consistency.later_guidance
    layout = layout_of(config, True)

    def prepare(state, frozen, batch, examples):
        key = key_for(batch["seed"], state.step, Purpose.CONSISTENCY)
        clean = media.clean(batch)
        noise = ro.example_noise(jax.random.fold_in(key, 0), examples, clean.shape)
        index = per_chunk_index(config, jax.random.fold_in(key, 1), examples, solver.steps)
        if config.image_to_video:
            index = index.at[:, 0].set(solver.steps)
        text, negative = batch["text"], jnp.broadcast_to(batch["negative"], batch["text"].shape)
        stepped = consistency.teacher_step(
            (teacher, frozen["teacher"]),
            layout,
            clean,
            text,
            negative,
            index,
            noise,
            solver,
            guidance,
        )
        return clean, stepped, index, noise

    def loss(params, state, frozen, batch, prepared):
        clean, stepped, index, noise = prepared
        # Until `ema.start`, the EMA equals the parameters.
        average = state.model.ema
        params, target = (model_params(config, tree, frozen) for tree in (params, average))
        return consistency.consistency_loss(
            params, target, model, layout, clean, stepped, batch["text"], index, noise, solver
        )

    return _always("consistency", prepare, loss)
