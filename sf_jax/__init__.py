"""Self Forcing (arXiv 2506.08009) in JAX and Flax: train and stream causal, few-step video diffusion models.

Public names are imported on first use:

- `load_pipeline`, `VideoPipeline`, `Sampling`, `Solver`, `Chunk`, `WanOptions`: video from a prompt; `TextEncoder`,
  `Decoder`, `Encoder`: interfaces of a pipeline's parts;
- `Stream`: endless video, several streams at once, with prompts that change;
- `keep_compiled`: enables the on-disk cache of compiled programs, as the commands do;
- `train`, `TrainConfig`: training, as `python -m sf_jax.train` does (after `import sf_jax.train`, the name refers to
  the command's module, and the function is `sf_jax.train.train`);
- `WanConfig`, `WanTransformer`, `RolloutConfig`: the network, and its generation settings;
- the modules `rollout` and `replay`: Algorithm 1, as `rollout.rollout` and `replay.replay`;
- `dmd_loss`, `dmd_critic_loss`, `sid_loss`, `gan_loss`, `gan_critic_loss`, `ode_loss`, `consistency_loss`,
  `causal_loss`, `flow_loss`: the losses.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sf_jax import replay, rollout
    from sf_jax.compilation import keep_compiled
    from sf_jax.config import TrainConfig
    from sf_jax.diffusion.solvers import Solver
    from sf_jax.inference.decoders import Decoder, Encoder
    from sf_jax.inference.load import WanOptions, load_pipeline
    from sf_jax.inference.pipeline import VideoPipeline
    from sf_jax.inference.sampling import Chunk, Sampling
    from sf_jax.inference.stream import Stream
    from sf_jax.inference.text_encoder import TextEncoder
    from sf_jax.models.wan import WanConfig, WanTransformer
    from sf_jax.objectives.causal import causal_loss
    from sf_jax.objectives.consistency import consistency_loss
    from sf_jax.objectives.dmd import critic_loss as dmd_critic_loss
    from sf_jax.objectives.dmd import generator_loss as dmd_loss
    from sf_jax.objectives.flow import flow_loss
    from sf_jax.objectives.gan import critic_loss as gan_critic_loss
    from sf_jax.objectives.gan import generator_loss as gan_loss
    from sf_jax.objectives.ode import ode_loss
    from sf_jax.objectives.sid import generator_loss as sid_loss
    from sf_jax.rollout import RolloutConfig
    from sf_jax.training.loop import train

__version__ = "0.1.0"
# Public name -> module, and its name there.
_PUBLIC = {
    "load_pipeline": ("inference.load", "load_pipeline"),
    "WanOptions": ("inference.load", "WanOptions"),
    "VideoPipeline": ("inference.pipeline", "VideoPipeline"),
    "Sampling": ("inference.sampling", "Sampling"),
    "Chunk": ("inference.sampling", "Chunk"),
    "Stream": ("inference.stream", "Stream"),
    "Solver": ("diffusion.solvers", "Solver"),
    "Decoder": ("inference.decoders", "Decoder"),
    "Encoder": ("inference.decoders", "Encoder"),
    "TextEncoder": ("inference.text_encoder", "TextEncoder"),
    "keep_compiled": ("compilation", "keep_compiled"),
    "train": ("training.loop", "train"),
    "TrainConfig": ("config", "TrainConfig"),
    "WanConfig": ("models.wan", "WanConfig"),
    "WanTransformer": ("models.wan", "WanTransformer"),
    "RolloutConfig": ("rollout", "RolloutConfig"),
    "rollout": ("rollout", None),
    "replay": ("replay", None),
    "dmd_loss": ("objectives.dmd", "generator_loss"),
    "dmd_critic_loss": ("objectives.dmd", "critic_loss"),
    "sid_loss": ("objectives.sid", "generator_loss"),
    "gan_loss": ("objectives.gan", "generator_loss"),
    "gan_critic_loss": ("objectives.gan", "critic_loss"),
    "ode_loss": ("objectives.ode", "ode_loss"),
    "consistency_loss": ("objectives.consistency", "consistency_loss"),
    "causal_loss": ("objectives.causal", "causal_loss"),
    "flow_loss": ("objectives.flow", "flow_loss"),
}
__all__ = [
    "Chunk",
    "Decoder",
    "Encoder",
    "RolloutConfig",
    "Sampling",
    "Solver",
    "Stream",
    "TextEncoder",
    "TrainConfig",
    "VideoPipeline",
    "WanConfig",
    "WanOptions",
    "WanTransformer",
    "causal_loss",
    "consistency_loss",
    "dmd_critic_loss",
    "dmd_loss",
    "flow_loss",
    "gan_critic_loss",
    "gan_loss",
    "keep_compiled",
    "load_pipeline",
    "ode_loss",
    "replay",
    "rollout",
    "sid_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sf_jax' has no attribute {name!r}")
    place, attribute = _PUBLIC[name]
    module = importlib.import_module(f"sf_jax.{place}")
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
