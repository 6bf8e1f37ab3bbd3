"""The groups of a configuration, frozen dataclasses that refuse what cannot be; `config.py` puts them together."""

import dataclasses

from sf_jax.messages import quoted

OPTIMIZERS = ("adamw", "muon")
DECAYS = ("constant", "cosine")
FORCINGS = ("teacher", "diffusion")


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {quoted(value)}: it must be one of {', '.join(allowed)}")


def at_least(config, low: float, *names: str, group: str = "") -> None:
    """Refuses fields of `config` below a bound."""
    for name in names:
        if getattr(config, name) < low:
            raise ValueError(f"{group}{name} is {getattr(config, name)}: it must be at least {low}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer.

    Attributes:
      name: "adamw", or "muon" (Muon for matrices, AdamW for the rest; optax.contrib).
      lr: peak learning rate.
      beta1: decay of the first moment (of AdamW; Muon's momentum is 0.95).
      beta2: decay of the second moment.
      weight_decay: decoupled weight decay.
      clip: largest global gradient norm.
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
        """Refuses values that no optimizer can have."""
        one_of("name", self.name, OPTIMIZERS)
        one_of("decay", self.decay, DECAYS)
        at_least(self, 0, "lr", "weight_decay", "warmup")
        if self.clip <= 0 or not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(
                f"clip is {self.clip}, beta1 {self.beta1}, beta2 {self.beta2}: clip must be positive, betas in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the trained weights.

    Attributes:
      decay: share of the old average that an update keeps.
      start: iteration from which on weights are averaged; before it the average is the weights.
    """

    decay: float = 0.99
    start: int = 200

    def __post_init__(self):
        """Refuses decays that never forget."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}: it must be in [0, 1)")
        at_least(self, 0, "start", group="ema.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes what is left.

    Attributes:
      data: over these the batch is split, and parameters are copied.
      fsdp: over these the batch and the parameters are split.
      context: over these the tokens of a video are split.
      tensor: over these heads and hidden features are split.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class OdeConfig:
    """ODE pairs for the student's initialization.

    Attributes:
      teacher: "bidirectional" (trajectories of whole videos; the student sees noisy chunks before a noisy one; CausVid)
        or "causal" (one per chunk, behind the clean chunks of real videos, which the student sees too; Causal Forcing).
      pairs: how many trajectories to generate.
      solver_steps: Euler steps of the teacher; a multiple of `1000 / step spacing`, so that every rollout step is hit.
      guidance: the teacher's guidance scale.
      dir: where they are kept; None is a folder inside the workdir.
      batch_size: pairs made together, and kept in a file; a run that is killed loses the batch it was at.
    """

    teacher: str = "bidirectional"
    pairs: int = 1024
    batch_size: int = 64
    solver_steps: int = 24
    guidance: float = 2.0
    dir: str | None = None

    def __post_init__(self):
        """Refuses empty sets."""
        one_of("ode.teacher", self.teacher, ("bidirectional", "causal"))
        at_least(self, 1, "pairs", "solver_steps", "batch_size")


@dataclasses.dataclass(frozen=True)
class CausalConfig:
    """Causal diffusion training (stage "causal").

    Attributes:
      forcing: "teacher" (the chunks before are clean) or "diffusion" (they have noise levels of their own).
      context_noise: with teacher forcing, the highest timestep to which the clean chunks are noised; 0 is none. Each
        chunk draws its level evenly from the schedule's entries up to it.
    """

    forcing: str = "teacher"
    context_noise: float = 0.0

    def __post_init__(self):
        """Refuses noise where there is no clean context."""
        one_of("causal.forcing", self.forcing, FORCINGS)
        if not 0 <= self.context_noise <= 1000:
            raise ValueError(f"causal.context_noise is {self.context_noise}: it must be in [0, 1000]")
        if self.context_noise and self.forcing == "diffusion":
            raise ValueError(f"causal.context_noise is {self.context_noise}: with diffusion forcing it must be 0")


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig:
    """Causal consistency distillation (stage "init" with `init` "consistency").

    Attributes:
      solver_steps: entries of the teacher's Euler table; neighbours must agree on where they lead.
      guidance: the teacher's guidance scale.
      later_guidance: its scale for all chunks but the first, which have a context that shows what the prompt wants;
        None is `guidance`. Guidance keeps a chunk from going on exactly as its context did.
    """

    solver_steps: int = 48
    guidance: float = 3.0
    later_guidance: float | None = None

    def __post_init__(self):
        """Refuses tables without neighbours."""
        at_least(self, 2, "solver_steps")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685) in place of all parameters of a trained network.

    Attributes:
      rank: of the adapters of every matrix in the blocks; 0 trains the network itself.
      alpha: the adapters' product counts `alpha / rank`.
      init: file of adapters to start from; with rank 0, rank and alpha are those of the file.
    """

    rank: int = 0
    alpha: float = 16.0
    init: str | None = None

    def __post_init__(self):
        """Refuses negative ranks and adapters that do nothing."""
        at_least(self, 0, "rank")
        if self.alpha <= 0:
            raise ValueError(f"alpha is {self.alpha}: it must be above 0")
        if self.init == "":
            raise ValueError("init is empty: give a file of adapters or leave it out")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on.

    Attributes:
      name: "digits" (the embedded moving digits) or "wan" (prompt embeddings and latents of Wan2.1).
      dir: where the dataset is: that of the moving digits is built there, prepared data must be there.
      frames: latent frames of a training video.
      height: latent rows.
      width: latent columns.
      text_dropout: share of the captions that "teacher" and "causal" replace by the empty prompt.
      cut: share of the digits' clips whose first `rollout.sink` frames are shifted around the canvas: to a chunk that
        is generated much later, the sink shows what the digit looks like, and not where it is.
    """

    name: str = "digits"
    dir: str = "data"
    frames: int = 9
    height: int = 6
    width: int = 6
    text_dropout: float = 0.1
    cut: float = 0.0

    def __post_init__(self):
        """Refuses sizes that no video has."""
        one_of("data.name", self.name, ("digits", "wan"))
        if not 0 <= self.cut <= 1 or (self.cut and self.name != "digits"):
            raise ValueError(f"data.cut is {self.cut}: it must be in [0, 1], and 0 but for the data 'digits'")
        at_least(self, 1, "frames", "height", "width")
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"data.text_dropout is {self.text_dropout}: it must be in [0, 1]")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run shows beside `log.jsonl`.

    Attributes:
      tensorboard: write event files to `workdir/tensorboard` (needs tensorboardX).
      wandb_project: project of Weights & Biases to log to (needs wandb); None is none.
      sample_every: iterations between sample videos of the averaged weights in `workdir/samples`; 0 is never.
      sample_prompts: what they show, of moving digits. Empty is the data's first `sample_count` prompts.
      sample_count: how many videos, where no prompts are given.
    """

    tensorboard: bool = False
    wandb_project: str | None = None
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_count: int = 2

    def __post_init__(self):
        """Refuses samples of nothing."""
        at_least(self, 0, "sample_every", group="log.")
        at_least(self, 1, "sample_count", group="log.")
