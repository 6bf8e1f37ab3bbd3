"""Sample videos of a run under way: its averaged weights, on the whole mesh, with fixed prompts and noise."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sf_jax import rollout as ro
from sf_jax.config import TrainConfig
from sf_jax.diffusion.solvers import Solver, guided, integrate
from sf_jax.distributed import by_first
from sf_jax.many_step import guided_rollout
from sf_jax.models.wan import WanTransformer, bidirectional_layout
from sf_jax.parallel.params import WHOLE
from sf_jax.rng import Purpose, key_for
from sf_jax.training import sharding
from sf_jax.training.media import Media
from sf_jax.training.sources import Source
from sf_jax.training.state import TrainState
from sf_jax.training.step import model_params, student_params

# Takes uint8 videos [N, F, h, w, 1 or 3], their prompts, the path of the files without suffix, and frames a second.
WriteSamples = Callable[[np.ndarray, Sequence[str], Path, float], object]
# Of networks that need many.
SOLVER_STEPS = 24


def sample_latents(config: TrainConfig, media: Media, params: dict, frozen: dict, batch: dict) -> jax.Array:
    """Videos of the training length, of any stage.

    Args:
      config: of the run.
      media: where the latents of given first frames come from.
      params: what is trained of the network.
      frozen: the frozen networks; adapters are added to one of them.
      batch: `text` [N, S, text_dim], `negative` [1, S, text_dim] and, where a first frame is given, real videos.

    Returns:
      float32 latents [N, F, H, W, C].
    """
    model, data, text = WanTransformer(config.model), config.data, batch["text"]
    params = model_params(config, params, frozen)
    count, given = len(text), int(config.image_to_video)
    examples = jnp.arange(count, dtype=jnp.int32)
    key = key_for(config.seed, 0, Purpose.SAMPLE)
    noise = ro.example_noise(
        key, examples, (count, data.frames - given, data.height, data.width, config.model.channels)
    )
    negative = jnp.broadcast_to(batch["negative"], text.shape)
    initial = media.clean(batch)[:, :1] if given else None
    if config.stage == "teacher":
        layout = bidirectional_layout(data.frames)

        def flow(x, t):
            t = jnp.full((count, 1), t, jnp.float32)
            both = [model.apply({"params": params}, x, t, prompt, layout) for prompt in (text, negative)]
            return guided(*both, config.score.guidance)

        return integrate(Solver("unipc", config.score.score_shift, SOLVER_STEPS), flow, noise)
    if config.stage == "causal":
        solver = Solver("unipc", config.rollout.shift, SOLVER_STEPS)
        guidance = config.score.guidance
        return guided_rollout(model, config.rollout, params, text, negative, noise, solver, guidance, initial)
    draw = ro.key_draw(jax.random.fold_in(key, 1), examples)
    last = len(config.rollout.steps) - 1
    return ro.rollout(model, config.rollout, params, text, noise, last, draw, initial, keep_from=None).video


def sampler(
    config: TrainConfig, source: Source, frozen: dict, mesh: Mesh, workdir: Path, write: WriteSamples | None
) -> Callable[[int, TrainState], None]:
    """What writes the samples of the steps at which they are due, (step, state) -> None; all processes call it."""
    every = config.log.sample_every
    if not every:
        return lambda step, state: None
    entries = source.samples()
    captions = entries.pop("caption")
    whole = sharding.replicated(mesh)
    batch = sharding.put_whole(entries | {"negative": source.negative}, mesh)
    make = jax.jit(lambda *given: sample_latents(config, source.media, *given), out_shardings=whole)

    def due(step: int, state: TrainState) -> None:
        if step % every:
            return
        with jax.set_mesh(mesh):
            latents = make(student_params(state.model), frozen, batch)

        def show():  # with this process's own copy of what every device has
            mine = {name: jax.tree.map(_own, frozen[name]) for name in WHOLE if name in frozen}
            videos = source.media.pixels(mine, _own(latents))
            write(videos, captions, workdir / "samples" / f"step_{step:06d}", source.media.fps)

        by_first(show)

    return due


def _own(x: jax.Array) -> jax.Array:
    return x.addressable_data(0)
