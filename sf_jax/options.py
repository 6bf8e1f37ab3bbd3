"""The groups of a configuration: validated, frozen dataclasses that `config.py` combines."""

import dataclasses

from sf_jax.messages import quoted

OPTIMIZERS = ("adamw", "muon")
DECAYS = ("constant", "cosine")
FORCINGS = ("teacher", "diffusion")
CAPTIONS = ("full", "undirected")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Validates that a value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {quoted(value)}: it must be one of {', '.join(allowed)}")


MAX_STEP = 2**31 - 1  # steps are counted in 32 bits


def at_most(config, high: float, *names: str, group: str = "") -> None:
    """Validates upper bounds of fields of `config`."""
    for name in names:
        if getattr(config, name) > high:
            raise ValueError(f"{group}{name} is {getattr(config, name)}: it must be at most {high}")


def at_least(config, low: float, *names: str, group: str = "") -> None:
    """Validates lower bounds of fields of `config`."""
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"{group}{name} is {getattr(config, name)}: it must be at least {low}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer.

    Attributes:
      name: "adamw", or "muon" (Muon for matrices, AdamW for the rest; optax.contrib).
      lr: peak learning rate.
      beta1: decay of AdamW's first moment (Muon's momentum is 0.95).
      beta2: decay of the second moment.
      weight_decay: decoupled weight decay.
      clip: maximum global gradient norm.
      warmup: steps of linear warm-up.
      decay: "constant", or "cosine" to zero at the last step.
    """

    name: str = "adamw"
    lr: float = 2e-6
    beta1: float = 0.0
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 10.0
    warmup: int = 0
    decay: str = "constant"

    def __post_init__(self):
        """Validates names and ranges."""
        one_of("name", self.name, OPTIMIZERS)
        one_of("decay", self.decay, DECAYS)
        at_least(self, 0, "lr", "weight_decay", "warmup")
        at_most(self, MAX_STEP, "warmup")
        if self.clip <= 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(
                f"clip is {self.clip}, beta1 {self.beta1}, beta2 {self.beta2}: clip must be positive, betas in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average (EMA) of the trained weights.

    Attributes:
      decay: share of the old average that an update keeps.
      start: iteration at which averaging begins; until then the average equals the weights.
    """

    decay: float = 0.99
    start: int = 200

    def __post_init__(self):
        """Validates ranges."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}: it must be in [0, 1)")
        at_least(self, 0, "start", group="ema.")
        at_most(self, MAX_STEP, "start", group="ema.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes the remaining devices.

    Attributes:
      data: splits the batch, and replicates the parameters.
      fsdp: splits the batch and the parameters.
      context: splits the tokens of a video.
      tensor: splits heads and hidden features.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class OdeConfig:
    """ODE pairs for the student's initialization.

    Attributes:
      teacher: "bidirectional" (one trajectory per video; the student sees noisy earlier chunks; CausVid) or "causal"
        (one trajectory per chunk, given the clean earlier chunks of real videos, which the student sees too; Causal
        Forcing).
      pairs: number of trajectories to generate.
      solver_steps: Euler steps of the teacher; a multiple of `1000 / step spacing`, so that every rollout step is hit.
      guidance: the teacher's guidance scale.
      dir: folder of the pairs; None is a folder inside the workdir.
      batch_size: pairs generated together, and stored in one file; a killed run loses its current batch.
    """

    teacher: str = "bidirectional"
    pairs: int = 1024
    batch_size: int = 64
    solver_steps: int = 24
    guidance: float = 2.0
    dir: str | None = None

    def __post_init__(self):
        """Validates names and ranges."""
        one_of("ode.teacher", self.teacher, ("bidirectional", "causal"))
        at_least(self, 1, "pairs", "solver_steps", "batch_size")


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Causal diffusion training (stage "causal").

    Attributes:
      forcing: "teacher" (earlier chunks are clean) or "diffusion" (every chunk has its own noise level).
      context_noise: with teacher forcing, the highest timestep of the noise added to the clean chunks; 0 adds none.
        Each chunk draws its level uniformly from the schedule's entries up to it.
    """

    forcing: str = "teacher"
    context_noise: float = 0.0

    def __post_init__(self):
        """Validates values; only teacher forcing has context noise."""
        one_of("causal.forcing", self.forcing, FORCINGS)
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"causal.context_noise is {self.context_noise}: it must be in [0, 1000]")
        if self.context_noise and self.forcing == "diffusion":
            raise ValueError(f"causal.context_noise is {self.context_noise}: with diffusion forcing it must be 0")


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig:
    """Causal consistency distillation (stage "init" with `init` "consistency").

    Attributes:
      solver_steps: entries of the teacher's Euler table; the student learns to map neighboring entries to the same
        result.
      guidance: the teacher's guidance scale.
      later_guidance: guidance scale for all chunks except the first, whose context already shows the prompt's content;
        None is `guidance`. Guidance keeps a chunk from continuing exactly like its context.
    """

    solver_steps: int = 48
    guidance: float = 3.0
    later_guidance: float | None = None

    def __post_init__(self):
        """Validates that the table has neighboring entries."""
        at_least(self, 2, "solver_steps")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685), trained instead of all parameters of a network.

    Attributes:
      rank: rank of the adapters of every matrix in the blocks; 0 trains the network itself.
      alpha: the adapters' product is scaled by `alpha / rank`.
      init: file of adapters to start from; with rank 0, the file sets rank and alpha.
    """

    rank: int = 0
    alpha: float = 16.0
    init: str | None = None

    def __post_init__(self):
        """Validates ranges."""
        at_least(self, 0, "rank")
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}: it must be above 0")
        if self.init == "":
            raise ValueError("init is empty: give a file of adapters or leave it out")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data.

    Attributes:
      name: "digits" (the embedded moving digits) or "wan" (prompt embeddings and latents of Wan2.1).
      dir: folder of the dataset. The moving digits are generated there; prepared data must already exist.
      frames: latent frames of a training video.
      height: latent rows.
      width: latent columns.
      text_dropout: share of captions that "teacher" and "causal" replace by the empty prompt.
      cut: share of digit clips, in stages that train on them, whose first `rollout.sink` frames are shifted around the
        canvas. For a much later chunk, the sink then shows what the digit looks like, but not where it is.
      captions: of digit clips: "full", or "undirected", which do not say where a digit goes.
    """

    name: str = "digits"
    dir: str = "data"
    frames: int = 9
    height: int = 6
    width: int = 6
    text_dropout: float = 0.1
    cut: float = 0.0
    captions: str = "full"

    def __post_init__(self):
        """Validates names and ranges."""
        one_of("data.name", self.name, ("digits", "wan"))
        one_of("data.captions", self.captions, CAPTIONS)
        if self.captions != "full" and self.name != "digits":
            raise ValueError(f"data.captions is {self.captions!r}: for the data {self.name!r} it must be 'full'")
        if not 0 <= self.cut <= 1 or (self.cut and self.name != "digits"):
            raise ValueError(f"data.cut is {self.cut}: it must be in [0, 1], and 0 but for the data 'digits'")
        at_least(self, 1, "frames", "height", "width")
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"data.text_dropout is {self.text_dropout}: it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Outputs of a run in addition to `log.jsonl`.

    Attributes:
      tensorboard: write event files to `workdir/tensorboard` (needs tensorboardX).
      wandb_project: Weights & Biases project to log to (needs wandb); None disables it.
      sample_every: iterations between sample videos of the averaged weights in `workdir/samples`; 0 disables them.
      sample_prompts: prompts of the samples, for moving digits. Empty is the data's first `sample_count` prompts.
      sample_count: number of samples, if no prompts are given.
    """

    tensorboard: bool = False
    wandb_project: str | None = None
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_count: int = 2

    def __post_init__(self):
        """Validates ranges."""
        at_least(self, 0, "sample_every", group="log.")
        at_least(self, 1, "sample_count", group="log.")
