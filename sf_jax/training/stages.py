"""What each stage starts from, is fed with, and leaves behind."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sf_jax.config import TrainConfig
from sf_jax.data import moving_digits, pipeline
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.models.text import WordEmbedding
from sf_jax.models.wan import WanConfig
from sf_jax.training import pairs, self_forcing, supervised
from sf_jax.training import step as steps
from sf_jax.training.media import Media, digits_media
from sf_jax.weights.package import Package, load_package, shipped_path

Update = tuple[str, steps.Step, Callable[[int], bool]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage, ready to run.

    Attributes:
      params: parameters to start from, or None for random ones.
      critic: the critic's parameters to start from, or None.
      frozen: trees that the updates read but never change.
      constants: arrays that belong to every batch.
      keys: what of a batch the updates read.
      iterator: endless batches, with `get_state` and `set_state`.
      updates: (name, update program, whether an iteration runs it), in order; one of them ends each iteration.
      media: where latents come from.
    """

    params: dict | None
    critic: dict | None
    frozen: dict
    constants: dict
    keys: tuple[str, ...]
    iterator: grain.DatasetIterator
    updates: tuple[Update, ...]
    media: Media | None = None


def _load(path: str, wanted: WanConfig, field: str) -> Package:
    """A package whose sizes are those of the config."""
    package = load_package(shipped_path("teacher") if path == "shipped" else path)
    same = {"remat": wanted.remat, "dtype": wanted.dtype}
    if dataclasses.replace(package.config, **same) != wanted:
        raise ValueError(f"{field} {path} has sizes {package.config}: the config says {wanted}")
    return package


def _cast(params: dict, dtype: str) -> dict:
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), params)


def open_stage(config: TrainConfig, workdir: Path, mesh: Mesh, fresh: bool = True) -> Stage:
    """Prepares the stage of a config; may build the data set, and on the mesh the ODE pairs of "init".

    A run that is not `fresh` goes on from a checkpoint: the weights that it once started from are not read again, but
    for those that adapters are added to.

    Raises:
      ValueError: if data or weights are missing or do not fit.
    """
    if config.data.name != "digits":
        raise ValueError(f"data.name is {config.data.name!r}: training reads 'digits'; other sources are not there yet")
    codec, text = PatchCodec.load(), WordEmbedding()
    _check_digits(config, codec, text)
    media = digits_media(codec)
    wanted = fresh or config.lora.rank
    params = None
    if wanted and config.init_weights is not None:
        params = _load(config.init_weights, config.model, "init_weights").params
    teacher = _teacher(config)
    if wanted and params is None and teacher is not None and config.model == config.teacher_model:
        params = teacher.params
    if config.lora.rank and params is None:
        raise ValueError("init_weights is None: lora.rank is above 0, and adapters need a network to be added to")
    frozen = {"model_base": _cast(params, config.frozen_dtype)} if config.lora.rank else {}
    if config.stage == "init" and config.init == "ode":
        source = pairs.open_pairs(config, workdir, teacher, moving_digits.all_captions(), text, mesh)
        iterator = pairs.pair_iterator(source, config, text)
        return Stage(params, None, frozen, {}, ("trajectory", "text"), iterator, updates_of(config, media), media)
    keys = ("text",) if _prompts_only(config) else ("video", "text")
    iterator = _prompt_iterator(config, text) if _prompts_only(config) else _video_iterator(config, text)
    if config.stage in ("teacher", "causal"):
        return Stage(params, None, frozen, {}, keys, iterator, updates_of(config, media), media)
    frozen["teacher"] = _cast(teacher.params, config.frozen_dtype)
    constants, critic = {"negative": text.encode([""])}, None
    if config.stage == "distill":
        critic = _critic(config, teacher, fresh or config.critic_lora.rank)
        if config.critic_lora.rank:
            frozen["critic_base"] = _cast(critic, config.frozen_dtype)
    return Stage(params, critic, frozen, constants, keys, iterator, updates_of(config, media), media)


def updates_of(config: TrainConfig, media: Media) -> tuple[Update, ...]:
    """The update programs of a stage."""
    programs = {
        "teacher": lambda: [supervised.teacher_program(config, media)],
        "causal": lambda: [supervised.causal_program(config, media)],
        "ode": lambda: [supervised.ode_program(config)],
        "consistency": lambda: [supervised.consistency_program(config, media)],
        "distill": lambda: self_forcing.programs(config, media),
    }[config.init if config.stage == "init" else config.stage]()
    return tuple((program.name, steps.make_step(config, program), program.due) for program in programs)


def _prompts_only(config: TrainConfig) -> bool:
    """Whether the stage needs no videos, as Self Forcing with DMD or SiD from text."""
    own = config.stage == "distill" and config.student_input == "rollout" and config.objective != "gan"
    return own and not config.image_to_video


def _teacher(config: TrainConfig) -> Package | None:
    """The stage's teacher: bidirectional, but for starts that follow a causal one."""
    if config.stage in ("teacher", "causal"):
        return None
    teacher = _load(config.teacher_weights, config.teacher_model, "teacher_weights")
    causal = config.stage == "init" and (config.init == "consistency" or config.ode.teacher == "causal")
    kind = "causal" if causal else "teacher"
    if teacher.kind != kind:
        raise ValueError(
            f"teacher_weights {config.teacher_weights} is a {teacher.kind} network: here it must be a {kind} network"
        )
    return teacher


def _critic(config: TrainConfig, teacher: Package, wanted: bool) -> dict | None:
    """The critic's parameters to start from."""
    if wanted and config.critic_weights is not None:
        return _load(config.critic_weights, config.critic_model, "critic_weights").params
    if config.critic_model == config.teacher_model:
        return teacher.params
    if not wanted:
        return None
    raise ValueError("critic_weights is None: a critic of other sizes than the teacher needs weights to start from")


def _prompt_iterator(config: TrainConfig, text: WordEmbedding) -> grain.DatasetIterator:
    """Endless batches of captions."""
    prompts = moving_digits.all_captions()
    return pipeline.prompt_iterator(prompts, batch_size=config.batch_size, seed=config.seed, text_encoder=text)


def _video_iterator(config: TrainConfig, text: WordEmbedding) -> grain.DatasetIterator:
    """Endless batches of the training clips, which are built where they are missing."""
    moving_digits.build(config.data.dir)
    return pipeline.video_iterator(
        moving_digits.source(config.data.dir, "train"),
        batch_size=config.batch_size,
        num_frames=config.data.frames,
        seed=config.seed,
        text_encoder=text,
        # only networks that are sampled with guidance need to know the empty prompt
        text_dropout=config.data.text_dropout if config.stage in ("teacher", "causal") else 0.0,
    )


def _check_digits(config: TrainConfig, codec: PatchCodec, text: WordEmbedding) -> None:
    """Refuses sizes that moving digits do not have."""
    side = moving_digits.CANVAS // codec.spatial_factor
    wanted = {
        "model.channels": (config.model.channels, codec.channels),
        "model.text_dim": (config.model.text_dim, text.dim),
        "model.text_len": (config.model.text_len, text.length),
        "data.height": (config.data.height, side),
        "data.width": (config.data.width, side),
    }
    for field, (seen, allowed) in wanted.items():
        if seen != allowed:
            raise ValueError(f"{field} is {seen}: for moving digits it must be {allowed}")


def package_of(config: TrainConfig, params: dict, frozen: dict | None = None) -> Package:
    """What a finished run leaves: its averaged weights with all that is needed to use them.

    Args:
      config: of the run.
      params: what was trained, see `steps.student_params`.
      frozen: with adapters, the trees that hold the network they are added to.
    """
    kind = config.stage if config.stage in ("teacher", "causal") else "student"
    if config.lora.rank:
        params = jax.device_get(steps.model_params(config, params, frozen))
    return Package(
        kind=kind,
        config=dataclasses.replace(config.model, remat="none"),
        rollout=config.rollout,
        frames=config.data.frames,
        size=(config.data.height, config.data.width),
        shift=config.score.score_shift if kind == "teacher" else config.rollout.shift,
        guidance=config.score.guidance,
        params=params,
    )
