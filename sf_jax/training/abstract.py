"""An abstract training run: shapes and shardings of its arrays, and its update programs.

`--dry_run` describes it and `--compile_only` compiles it, without weights, data or devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sf_jax.config import TrainConfig
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.models.vae import param_shapes as vae_shapes
from sf_jax.models.vae import wan_vae
from sf_jax.models.wan import WanConfig, param_shapes
from sf_jax.training import sharding
from sf_jax.training.media import Media, digits_media, wan_media
from sf_jax.training.programs import Program, jit_updates
from sf_jax.training.stages import keys_of, needs_teacher, updates_of, uses_vae
from sf_jax.training.step import CONSTANTS, new_state


@dataclasses.dataclass(frozen=True)
class AbstractRun:
    """A run's arrays as `ShapeDtypeStruct`s with shardings.

    Attributes:
      config: the run's configuration.
      mesh: the devices.
      state: the training state.
      frozen: the frozen networks.
      batch: the batch of one update.
      media: converts between latents and pixels.
      programs: the jitted updates.
    """

    config: TrainConfig
    mesh: Mesh
    state: object
    frozen: dict
    batch: dict
    media: Media
    programs: list[Program]

    @property
    def arguments(self) -> tuple:
        """The arguments of every update."""
        return self.state, self.frozen, self.batch


def abstract_run(config: TrainConfig, mesh: Mesh) -> AbstractRun:
    """Describes a run.

    Raises:
      ValueError: if the mesh does not divide an axis that it splits.
    """
    sharding.check_config(config, mesh)
    wan = config.data.name == "wan"
    vae = wan_vae(dtype=config.model.dtype)
    media = wan_media(vae) if wan else digits_media(PatchCodec.load())
    state = _placed(jax.eval_shape(lambda: new_state(config)), mesh)
    frozen = {}
    if needs_teacher(config):
        frozen["teacher"] = _network(config.teacher_model, config.frozen_dtype)
    if config.lora.rank:
        frozen["model_base"] = _network(config.model, config.frozen_dtype)
    if config.stage == "distill" and config.critic_lora.rank:
        frozen["critic_base"] = _network(config.critic_model, config.frozen_dtype)
    if uses_vae(config):
        frozen["vae"] = _typed(vae_shapes(vae), config.frozen_dtype)
    frozen = _with(frozen, sharding.frozen_shardings(frozen, mesh, config.offload))
    keys, constants = keys_of(config)
    batch = {key: value for key, value in _inputs(config).items() if key in (*keys, *constants)}
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    batch = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole if key in CONSTANTS else split)
        for key, x in batch.items()
    }
    shardings = [jax.tree.map(lambda x: x.sharding, tree) for tree in (state, frozen)]
    updates = jit_updates(updates_of(config, media), keys, constants, mesh, *shardings)
    programs = [Program(update, mesh) for update in updates]
    return AbstractRun(config, mesh, state, frozen, batch, media, programs)


def _network(config: WanConfig, dtype: str) -> dict:
    return _typed(param_shapes(config), dtype)


def _typed(shapes, dtype: str):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)


def _placed(shapes, mesh: Mesh):
    return _with(shapes, sharding.tree_shardings(shapes, mesh))


def _with(shapes, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _inputs(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of everything that a batch can hold."""
    data, model, batch = config.data, config.model, config.batch_size
    latent = (data.frames, data.height, data.width, model.channels)
    text = jnp.dtype("bfloat16" if data.name == "wan" else "float32")
    rows = len(config.rollout.steps) + 1
    found = {
        "seed": ((), jnp.uint32),
        "text": ((batch, model.text_len, model.text_dim), text),
        "negative": ((1, model.text_len, model.text_dim), text),
        "latent": ((batch, *latent), jnp.float32),
        "context": ((batch, *latent), jnp.float32),
        "trajectory": ((batch, rows, *latent), jnp.float32),
    }
    if data.name == "digits":
        factor = PatchCodec.load().spatial_factor
        found["video"] = ((batch, data.frames, factor * data.height, factor * data.width, 1), jnp.uint8)
    return {name: jax.ShapeDtypeStruct(*given) for name, given in found.items()}


def bytes_per_device(tree, on_host: bool = False) -> int:
    """Bytes per device of a tree of arrays with shardings, or the bytes that the host keeps for it."""
    mine = [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind == sharding.HOST_MEMORY) == on_host]
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in mine)
