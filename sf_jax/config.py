"""Typed configuration: converts `ml_collections` to validated, frozen dataclasses. Unknown keys raise an error."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping

import ml_collections

from sf_jax.files import check_utf8, local_path
from sf_jax.messages import quoted, shortened
from sf_jax.models.rope import MAX_FRAMES
from sf_jax.models.wan import WanConfig
from sf_jax.objectives.gan import GanConfig
from sf_jax.objectives.scores import ScoreConfig
from sf_jax.options import (
    MAX_STEP,
    CausalConfig,
    ConsistencyConfig,
    DataConfig,
    EmaConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    OdeConfig,
    OptimizerConfig,
    at_least,
    at_most,
    one_of,
)
from sf_jax.replay import CACHE_GRADIENTS
from sf_jax.rollout import RolloutConfig
from sf_jax.weights import hub

STAGES = ("teacher", "causal", "init", "distill")
OBJECTIVES = ("dmd", "sid", "gan")
INITS = ("ode", "consistency")
INPUTS = ("rollout", "diffusion_forcing", "teacher_forcing")
EXITS = ("same", "per_chunk", "last")
# Fields that only stage "distill" reads, and their defaults.
DISTILL_ONLY = {
    "student_input": "rollout",
    "share_rollout": False,
    "rollout_frames": (),
    "prompt_switch": 0.0,
    "exits": "same",
    "cache_gradient": "stop",
    "regression_weight": 0.0,
    "critic_weights": None,
    "critic": None,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The full configuration of a training run.

    Attributes:
      stage: "teacher" (flow matching on videos), "causal" (causal diffusion on videos), "init" (initializes the
        few-step student) or "distill" (Self Forcing and its baselines).
      init: method of "init": regression on a teacher's "ode" pairs, or "consistency" distillation of a causal teacher.
      objective: the loss of "distill": "dmd", "sid" or "gan".
      student_input: training input of the student in "distill": its own "rollout" (Self Forcing), or real videos noised
        per chunk, conditioned on noisy ("diffusion_forcing", CausVid) or clean ("teacher_forcing") earlier chunks.
      seed: seed of every random number of the run.
      steps: iterations; in "distill" each is a critic update, every `generator_every`-th also a student update.
      batch_size: videos per update, over all devices.
      accumulate: number of parts in which the batch is computed sequentially; the update equals that of the whole batch
        (up to the number of learned chunks per part, if clean chunks do not count in the loss).
      generator_every: critic updates per student update.
      share_rollout: whether the critic reuses the student update's rollout in iterations that have one.
      exits: exit step (the denoising step at which a training rollout stops): the "same" random step for all chunks,
        one "per_chunk", or always the "last".
      rollout_frames: latent frames of the rollouts; each iteration draws one of these. Empty is `data.frames`. For
        longer rollouts the loss gets the last `data.frames`, with the first of them re-encoded as an image.
      prompt_switch: share of the videos in longer rollouts that begin with their batch neighbor's prompt and switch to
        their own before the last `data.frames`, to train for prompts that change during streaming. Half of them keep
        the cache unchanged, half recompute it under the new prompt.
      image_to_video: whether the first latent frame is given; needs `rollout.first_frame_alone` and videos.
      cache_gradient: which gradient flows between chunks, see `replay.replay`.
      regression_weight: weight of a regression added to the objective of "distill": the student denoises chunks of real
        videos, given the real clean chunks before them. It keeps what a mode-seeking loss loses; needs videos.
      on_nonfinite: reaction to a loss or gradient that is not finite: "stop" the run, or "skip" the update.
      model: sizes of the trained network.
      teacher: sizes of the teacher; None is `model`.
      critic: sizes of the critic; None is `model`.
      teacher_weights: file of the teacher's weights, or the name of a network of digits that the package has: "teacher"
        (or "shipped"), "init" and "consistency" (few-step starts), "student"; None only if none is needed.
      critic_weights: file or name of what the critic starts from; None is the teacher's weights.
      init_weights: file or name of what the trained network starts from; None is random, or the teacher's weights.
      vae_weights: file of Wan's VAE, or a model folder; rollouts longer than `data.frames` and sample videos need it.
      rollout: how the student generates.
      score: how the teacher's and critic's scores are evaluated.
      gan: the adversarial loss.
      causal: causal diffusion training.
      ode: ODE pairs of "init".
      consistency: consistency distillation of "init".
      lora: adapters of the trained network.
      critic_lora: adapters of the critic.
      optimizer: optimizer of the trained network.
      critic_optimizer: optimizer of the critic.
      ema: moving average of the trained network's parameters.
      data: dataset and sizes.
      mesh: device mesh.
      frozen_dtype: type of the frozen networks' parameters.
      offload_teacher: whether to keep the kernels of the teacher's blocks in host memory and copy each block to the
        device for its use. This frees most of the teacher's memory, at the cost of a transfer in every student update.
      log_every: iterations between log lines.
      checkpoint_every: iterations between checkpoints.
      keep_checkpoints: number of checkpoints to keep.
      grace_seconds: time between SIGTERM and the kill, in which a checkpoint must be written (SLURM's KillWait: 30).
      log: outputs in addition to `log.jsonl`.
    """

    stage: str = "distill"
    init: str = "ode"
    objective: str = "dmd"
    student_input: str = "rollout"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    generator_every: int = 5
    share_rollout: bool = False
    exits: str = "same"
    rollout_frames: tuple[int, ...] = ()
    prompt_switch: float = 0.0
    image_to_video: bool = False
    cache_gradient: str = "stop"
    regression_weight: float = 0.0
    on_nonfinite: str = "stop"
    model: WanConfig = WanConfig()
    teacher: WanConfig | None = None
    critic: WanConfig | None = None
    teacher_weights: str | None = None
    critic_weights: str | None = None
    init_weights: str | None = None
    vae_weights: str | None = None
    rollout: RolloutConfig = RolloutConfig()
    score: ScoreConfig = ScoreConfig()
    gan: GanConfig = GanConfig()
    causal: CausalConfig = CausalConfig()
    ode: OdeConfig = OdeConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()
    lora: LoraConfig = LoraConfig()
    critic_lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic_optimizer: OptimizerConfig = OptimizerConfig(lr=4e-7)
    ema: EmaConfig = EmaConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    frozen_dtype: str = "float32"
    offload_teacher: bool = False
    log_every: int = 20
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    grace_seconds: float = 30.0
    log: LogConfig = LogConfig()

    def __post_init__(self):
        """Validates the fields and their combinations."""
        for name, allowed in (
            ("stage", STAGES),
            ("init", INITS),
            ("objective", OBJECTIVES),
            ("student_input", INPUTS),
            ("exits", EXITS),
            ("cache_gradient", CACHE_GRADIENTS),
            ("on_nonfinite", ("stop", "skip")),
            ("frozen_dtype", ("float32", "bfloat16")),
        ):
            one_of(name, getattr(self, name), allowed)
        counts = ("steps", "batch_size", "accumulate", "generator_every", "log_every", "checkpoint_every")
        at_least(self, 1, *counts, "keep_checkpoints")
        at_least(self, 0, "regression_weight", "seed")
        at_most(self, MAX_STEP, "steps")
        at_most(self, 2**32 - 1, "seed")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate is {self.accumulate}: it must divide batch_size, {self.batch_size}")
        if self.grace_seconds <= 0:
            raise ValueError(f"grace_seconds is {self.grace_seconds}: it must be positive")
        self.model.grid(self.data.height, self.data.width)
        starts_alone = self.stage == "distill" and self.objective == "gan" and self.critic_weights is not None
        needs_teacher = self.stage in ("init", "distill") and not starts_alone
        if needs_teacher and self.teacher_weights is None and self.data.name == "digits":
            wants = (
                "a file of stage 'causal'"
                if self.stage == "init" and self.init == "consistency"
                else "a file or 'shipped'"
            )
            raise ValueError(f"teacher_weights is None: stage {self.stage!r} needs a teacher; give {wants}")
        if self.log.sample_every and self.log.sample_prompts and (self.data.name == "wan" or self.image_to_video):
            raise ValueError(
                f"log.sample_prompts is {self.log.sample_prompts}: samples of prepared data, and those that begin with "
                "given images, show the data's first entries; leave it empty and set log.sample_count"
            )
        if self.image_to_video and not self.rollout.first_frame_alone:
            raise ValueError("image_to_video is True: rollout.first_frame_alone must be True too")
        if self.image_to_video and self.stage == "teacher":
            raise ValueError(
                "image_to_video is True: a bidirectional network has no given first frame, it must be False"
            )
        self._check_sizes()
        if self.offload_teacher and (self.stage != "distill" or self.objective == "gan"):
            raise ValueError(
                "offload_teacher is True: it must be False where no teacher is asked, that is but for the objectives "
                "'dmd' and 'sid' of stage 'distill'"
            )
        if self.critic_lora.init is not None:
            raise ValueError(
                f"critic_lora.init is {self.critic_lora.init}: the adapters of the trained network alone start from a "
                "file, lora.init; leave it out"
            )
        for name, optimizer, adapters in (
            ("optimizer", self.optimizer, self.lora),
            ("critic_optimizer", self.critic_optimizer, self.critic_lora),
        ):
            if optimizer.name == "muon" and adapters.rank:
                raise ValueError(f"{name}.name is 'muon': it is for whole matrices, with adapters it must be 'adamw'")
        if self.stage == "init":
            self._check_init()
        (self._check_distill if self.stage == "distill" else self._check_others)()
        self._check_context()

    def _check_context(self):
        """Checks that no chunks are trained on clean context if the rollout's context is noisy."""
        behind_clean = self.stage == "causal" or self.regression_weight > 0 or self.student_input != "rollout"
        behind_clean |= self.stage == "init" and (self.init == "consistency" or self.ode.teacher == "causal")
        if self.rollout.context == "noisy" and behind_clean:
            raise ValueError(
                "rollout.context is 'noisy': this run trains chunks behind clean ones of real videos; "
                "it must be 'clean'"
            )

    def _check_sizes(self):
        """Checks that frames fit chunks and positions, and that networks scan their layers and share their inputs."""
        for name in ("model", "teacher", "critic"):
            if not getattr(getattr(self, name), "scan_layers", True):
                raise ValueError(f"{name}.scan_layers is False: training scans over stacked layers, it must be True")
        longest = max((self.data.frames, *self.rollout_frames))
        name = "data.frames" if longest == self.data.frames else "rollout_frames"
        if longest > MAX_FRAMES:
            raise ValueError(f"{name} is {longest}: at most {MAX_FRAMES} latent frames have positions")
        given = int(self.image_to_video)
        try:
            self.rollout.chunks(self.data.frames - given, given)
        except ValueError as error:
            raise ValueError(
                f"data.frames is {self.data.frames}, rollout.chunk {self.rollout.chunk}: {error}"
            ) from error
        for name in ("teacher", "critic"):
            other = getattr(self, name)
            for field in ("channels", "text_dim"):  # all networks share latents and prompts
                if other and getattr(other, field) != getattr(self.model, field):
                    raise ValueError(
                        f"{name}.{field} is {getattr(other, field)}: it must be that of the model, "
                        f"{getattr(self.model, field)}"
                    )

    def _check_others(self):
        """Checks that no fields of stage "distill" are set, and no teacher that the stage does not use."""
        given = {name: getattr(self, name) for name in DISTILL_ONLY if getattr(self, name) != DISTILL_ONLY[name]}
        given |= {"critic_lora.rank": self.critic_lora.rank} if self.critic_lora.rank else {}
        for name, value in given.items():
            raise ValueError(f"{name} is {value}: it is for stage 'distill'; in stage {self.stage!r} leave it out")
        if self.stage in ("teacher", "causal") and self.teacher_weights is not None:
            raise ValueError(
                f"teacher_weights is {self.teacher_weights}: stage {self.stage!r} asks no teacher, it must be None; a "
                "file to start from is init_weights"
            )

    def _check_init(self):
        if self.init == "ode" and not self.rollout.warp:
            raise ValueError("rollout.warp is False: ODE pairs are made at warped steps, stage 'init' needs True")
        if self.init == "ode" and any(self.ode.solver_steps * s % 1000 for s in self.rollout.steps):
            raise ValueError(
                f"ode.solver_steps is {self.ode.solver_steps}: it must hit every step of rollout.steps "
                f"{self.rollout.steps}"
            )

    def _check_distill(self):
        own = self.student_input == "rollout"
        for name in ("share_rollout", "rollout_frames", "prompt_switch", "exits", "cache_gradient"):
            if getattr(self, name) != DISTILL_ONLY[name] and not own:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: student_input is {self.student_input!r}, it must be 'rollout'"
                )
        if self.regression_weight and self.data.frames <= self.rollout.chunk:
            raise ValueError(
                f"regression_weight is {self.regression_weight}: with data.frames {self.data.frames} in one chunk "
                "no chunk has another before it, it must be 0"
            )
        if self.score.fake_guidance != 1.0 and self.objective != "dmd":
            raise ValueError(
                f"score.fake_guidance is {self.score.fake_guidance}: only the objective 'dmd' guides its critic, with "
                f"{self.objective!r} it must be 1"
            )
        for name in ("from_exit", "to_exit"):
            if getattr(self.score, name) and (not own or self.exits == "per_chunk"):
                raise ValueError(
                    f"score.{name} is True: the scores' times can follow the exit step only where all chunks of a "
                    "rollout have the same; set exits to 'same' or 'last' and student_input to 'rollout'"
                )
        if self.objective == "gan" and self.critic_lora.rank:
            raise ValueError("critic_lora.rank is above 0: the GAN's critic is trained whole, it must be 0")
        last = (self.steps - 1) // self.generator_every * self.generator_every
        if self.objective == "gan" and self.gan.warmup > last:
            raise ValueError(
                f"gan.warmup is {self.gan.warmup}: with steps {self.steps} and generator_every {self.generator_every} "
                f"it must be at most {last}, or the student never learns"
            )
        if self.objective == "gan" and max(self.gan.head.taps) >= self.critic_model.num_layers:
            last = self.critic_model.num_layers - 1
            raise ValueError(f"gan.head.taps is {self.gan.head.taps}: the critic's blocks are 0 to {last}")
        low, chunk = self.data.frames, self.rollout.chunk
        if not 0 <= self.prompt_switch <= 1:
            raise ValueError(f"prompt_switch is {self.prompt_switch}: it must be a share from 0 to 1")
        if self.prompt_switch and max((0, *self.rollout_frames)) <= low:
            raise ValueError(
                f"prompt_switch is {self.prompt_switch}: prompts change in rollouts longer than data.frames, {low}; "
                f"give rollout_frames, such as ({low}, {2 * low})"
            )
        if self.prompt_switch and self.batch_size < 2:
            raise ValueError(
                f"prompt_switch is {self.prompt_switch}, batch_size {self.batch_size}: the other prompt is a "
                "neighbor's, batch_size must be at least 2"
            )
        if self.prompt_switch and self.cache_gradient == "write" and self.rollout.context == "clean":
            raise ValueError(
                f"prompt_switch is {self.prompt_switch}, cache_gradient 'write': frames before the switch were written "
                "under another prompt; it must be 'stop' or 'straight_through'"
            )
        for frames in self.rollout_frames:
            if frames < low or (frames - low) % chunk:
                raise ValueError(
                    f"rollout_frames is {self.rollout_frames}: each must be data.frames, {low}, or a multiple of "
                    f"rollout.chunk, {chunk}, more"
                )

    @property
    def teacher_model(self) -> WanConfig:
        """Sizes of the teacher."""
        return self.teacher or self.model

    @property
    def offload(self) -> tuple[str, ...]:
        """Names of the frozen networks to keep in host memory."""
        return ("teacher",) if self.offload_teacher else ()

    @property
    def critic_model(self) -> WanConfig:
        """Sizes of the critic."""
        return self.critic or self.model


_MAX_WHOLE = 1 << 64  # largest integer accepted for a float; much larger ones overflow
PATHS = ("dir", "teacher_weights", "critic_weights", "init_weights", "vae_weights")  # fields that hold paths


def from_dict(values: Mapping, kind: type = TrainConfig, where: str = ""):
    """Builds a config dataclass from a (possibly nested) mapping such as an `ml_collections.ConfigDict`.

    Raises:
      ValueError: if a key is unknown (names the closest known one), or a value has the wrong type or is invalid.
    """
    hints = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    out = {}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key)[:100], known, 1)
            hint = f"; did you mean {where}{close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
            raise ValueError(f"unknown config key {where}{shortened(str(key))}{hint}")
        out[key] = _convert(values[key], hints[key], f"{where}{key}")
    try:
        return kind(**out)
    except ValueError as error:
        told = str(error)
        if told.split(" ")[0] not in known:  # the message already has the full name
            raise
        raise ValueError(f"{where}{told}") from error


def _convert(value, hint, where):
    """Converts one value to the type that the dataclass declares."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None:
        if types.NoneType in options:
            return None
        raise ValueError(f"{where} is None: it must be {getattr(hint, '__name__', hint)}")
    kind = next(option for option in options if option is not types.NoneType)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ValueError(f"{where} is {quoted(value)}: it must be a group of fields of {kind.__name__}")
        return from_dict(value, kind, f"{where}.")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{where} is {quoted(value)}: it must be a sequence")
        kinds = [k for k in typing.get_args(kind) if k is not Ellipsis]
        return tuple(_convert(v, kinds[min(i, len(kinds) - 1)], f"{where}[{i}]") for i, v in enumerate(value))
    if kind is str and value == "None" and types.NoneType in options:  # from the command line
        return None
    if kind is str and isinstance(value, str) and (where.split(".")[-1] in PATHS or where == "lora.init"):
        try:
            if where.endswith(".dir"):
                check_utf8(value, where)
            return local_path(value) if where.endswith("dir") else hub.weights_path(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > _MAX_WHOLE:
            raise ValueError(f"{where} is {quoted(value, 30)}: it must be at most {float(_MAX_WHOLE):g}")
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: it must be a finite number")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where} is {quoted(value)}: it must be of type {kind.__name__}")
    return value


def config_dict(values: Mapping) -> ml_collections.ConfigDict:
    """A full `ConfigDict` from the fields that a config file sets, so that the command line can set every field."""

    def fill(config):
        hints = typing.get_type_hints(type(config))
        out = ml_collections.ConfigDict()
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                out[field.name] = fill(value)
            elif value is None:
                kind = next(k for k in typing.get_args(hints[field.name]) if k is not types.NoneType)
                kind = ml_collections.ConfigDict if dataclasses.is_dataclass(kind) else kind
                out[field.name] = ml_collections.config_dict.placeholder(kind)
            else:
                out[field.name] = value
        return out

    return fill(from_dict(values))


def to_dict(config) -> dict:
    """A config as plain nested dicts for JSON."""
    return dataclasses.asdict(config)


def difference(old: Mapping, new: Mapping, where: str = "") -> list[str]:
    """Differences between two configs in dict form, as lines `field: old -> new`."""
    lines = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += difference(a, b, f"{where}{key}.")
        elif (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            lines.append(f"{where}{key}: {a!r} -> {b!r}")
    return lines
