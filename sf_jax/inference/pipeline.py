"""From text to video: a student streams chunk by chunk, a teacher makes a whole video in many steps."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax.diffusion.solvers import Solver, teacher_trajectory
from sf_jax.many_step import guided_rollout
from sf_jax.models import attention
from sf_jax.models.patch_codec import PatchCodec, to_uint8
from sf_jax.models.text import WordEmbedding
from sf_jax.models.wan import WanTransformer
from sf_jax.rng import Purpose, key_for
from sf_jax.weights.package import Package, load_package, shipped_path


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _chunk(model, config, size, params, text, cache, key, examples, start, chunk, codec):
    """Generates, decodes and caches one chunk of `size` (frames, H, W, C); pixels are uint8."""
    draw = ro.key_draw(key, examples)
    # behind the numbers that `key_draw` folds in for the steps
    timesteps, count = config.timesteps_of(chunk)
    noise_key = jax.random.fold_in(jax.random.fold_in(key, 2 * count), chunk)
    noise = ro.example_noise(noise_key, examples, (examples.shape[0], *size))
    cache, clean, _ = ro.generate_chunk(
        model, config, params, text, cache, noise, start, chunk, count - 1, draw, timesteps
    )
    return cache, to_uint8(codec.decode(clean))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _causal_video(model, config, solver, guidance, shape, params, text, key, examples, codec):
    """A whole video of a many-step causal network; pixels are uint8."""
    noise = ro.example_noise(key, examples, shape)
    video = guided_rollout(model, config, params, text, jnp.zeros_like(text), noise, solver, guidance)
    return to_uint8(codec.decode(video))


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A network with its text encoder and codec.

    Attributes:
      package: the network.
      codec: latents to pixels.
      text: prompts to embeddings.
      teacher_steps: solver steps of a teacher, and of each chunk of a many-step causal network.
    """

    package: Package
    codec: PatchCodec
    text: WordEmbedding
    teacher_steps: int = 24

    @functools.cached_property
    def model(self) -> WanTransformer:
        """The network."""
        return WanTransformer(self.package.config)

    @functools.cached_property
    def params(self) -> dict:
        """Its parameters, on the device."""
        return jax.tree.map(jnp.asarray, self.package.params)

    @property
    def max_frames(self) -> int | None:
        """Frames of a teacher's videos; None for students, which go on as long as positions last."""
        return self.package.frames if self.package.kind == "teacher" else None

    def chunk_starts(self, frames: int) -> tuple[int, ...]:
        """First frames of the chunks in which a video of this length is made; a teacher makes it whole."""
        if self.package.kind == "teacher":
            return (0,)
        return tuple(start for start, _ in attention.chunk_bounds(self.package.rollout.chunks(frames)[1]))

    def check_frames(self, frames: int) -> None:
        """Refuses lengths that the network cannot make."""
        if self.package.kind == "teacher":
            if frames != self.package.frames:
                raise ValueError(f"frames is {frames}: this teacher makes {self.package.frames}")
            return
        self.package.rollout.chunks(frames)
        self.package.rollout.check_frames(frames)

    def stream(self, prompts: Sequence[str], frames: int, seed: int, first_index: int = 0) -> Iterator[np.ndarray]:
        """Generates videos chunk by chunk.

        The video of a prompt depends on the prompt, the seed and its index, not on the batch it is in.

        Args:
          prompts: B prompts.
          frames: frames of each video; a multiple of the student's chunk.
          seed: seed of the noise.
          first_index: index of the first prompt; the others count on.

        Yields:
          uint8 [B, n, h, w, 1], the frames of each chunk; many-step networks give all at once.

        Raises:
          ValueError: on frames or words that the model does not know.
        """
        self.check_frames(frames)
        text = jnp.asarray(self.text.encode(list(prompts)))
        examples = jnp.arange(first_index, first_index + len(prompts), dtype=jnp.int32)
        key = key_for(seed, 0, Purpose.SAMPLE)
        if self.package.kind in ("teacher", "causal"):
            yield self._by_many_steps(text, frames, key, examples)
            return
        height, width = self.package.size
        channels = self.package.config.channels
        config = self.package.rollout
        text = _encode_text(self.model, self.params, text)
        cache = ro.empty_cache(self.model, config, len(prompts), frames, height, width)
        start = 0
        for chunk, size in enumerate(config.chunks(frames)[1]):
            shape = (size, height, width, channels)
            static = (self.model, config, shape)
            cache, pixels = _chunk(*static, self.params, text, cache, key, examples, start, chunk, self.codec)
            yield np.asarray(pixels)
            start += size

    def _by_many_steps(self, text: jax.Array, frames: int, key: jax.Array, examples: jax.Array) -> np.ndarray:
        """Whole videos of a network of many steps, uint8 [B, F, h, w, 1]; text is [B, L, D]."""
        package = self.package
        shape = (len(examples), frames, *package.size, package.config.channels)
        if package.kind == "teacher":
            sampling = (package.shift, self.teacher_steps, package.guidance)
            noise = ro.example_noise(key, examples, shape)
            path = teacher_trajectory(self.model, *sampling, self.params, noise, text, jnp.zeros_like(text))
            return np.asarray(to_uint8(self.codec.decode(path[-1])))
        solver = Solver("unipc", package.shift, self.teacher_steps)
        sampling = (package.rollout, solver, package.guidance)
        given = (self.params, text, key, examples, self.codec)
        return np.asarray(_causal_video(self.model, *sampling, shape, *given))

    def generate(self, prompts: Sequence[str], frames: int, seed: int, first_index: int = 0) -> np.ndarray:
        """Whole videos, uint8 [B, F, h, w, 1]; arguments as in `stream`."""
        return np.concatenate(list(self.stream(prompts, frames, seed, first_index)), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _encode_text(model, params, text):
    return model.apply({"params": params}, text, method="encode_text")


def load_pipeline(path: Path | str | None = None, guidance: float | None = None) -> Pipeline:
    """Loads a network with the moving digits' text encoder and codec.

    Args:
      path: a file that training wrote; None is the shipped student, "teacher" the shipped teacher.
      guidance: replaces a teacher's guidance scale.

    Raises:
      ValueError: if the file is missing, damaged, or something else.
    """
    path = shipped_path("student" if path is None else path) if path in (None, "teacher", "student") else path
    package = load_package(path)
    if guidance is not None:
        if package.kind == "student":
            raise ValueError(f"guidance is {guidance}: a student has none (it was distilled from a guided teacher)")
        package = dataclasses.replace(package, guidance=float(guidance))
    return pipeline_of(package, f"checkpoint {path}")


def pipeline_of(package: Package, title: str = "package") -> Pipeline:
    """A network with the moving digits' text encoder and codec.

    Raises:
      ValueError: if it is not one of moving digits; `title` names it.
    """
    codec, text = PatchCodec.load(), WordEmbedding()
    if package.config.channels != codec.channels or package.config.text_dim != text.dim:
        raise ValueError(
            f"{title} has {package.config.channels} latent channels and text_dim {package.config.text_dim}: "
            f"moving digits have {codec.channels} and {text.dim}"
        )
    return Pipeline(package, codec, text)
