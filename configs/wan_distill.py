"""Self Forcing of Wan2.1 at full size: every stage, objective and baseline; 81 pixel frames of 480x832 by default.

  python -m sf_jax.train --config=configs/wan_distill.py:1_3b --workdir=runs/wan \
      --config.teacher_weights=Wan2.1-T2V-1.3B --config.init_weights=runs/ode/student.safetensors

Self Forcing, from a causal few-step initialization (`--config.init_weights`): `1_3b` (DMD, teacher Wan2.1-1.3B), `14b`
(teacher Wan2.1-14B, like the official release; also needs `--config.critic_weights=Wan2.1-T2V-1.3B`), `720p` (like
`14b`, at 720x1280), `14b_student` (all three networks 14B), `framewise` (chunks of one latent frame, also in the
initialization), `rolling` (a window that hides the first chunk from the last, for rolling caches), `long` (also
rollouts of twice the length; needs `--config.vae_weights`), `image` (85 frames, the first one given; reads clips),
`sid`, `gan` (reads clips; the teacher's weights only initialize the critic), `write` (later chunks' gradients flow into
the cache writes), and the baselines `causvid` and `tf_dmd` (read clips).

Initialization: `ode` (regression on ODE pairs that it generates with `--config.teacher_weights`, 42 MB each, 172 GB in
all), `causal_ode` (the same with real clips as context, 50 MB each) or `consistency`. The latter two need a many-step
causal network (`--config.teacher_weights=runs/causal/causal.safetensors`) and read clips. Such networks: `causal`
(teacher forcing) and `diffusion_forcing`, trained from `--config.init_weights=Wan2.1-T2V-1.3B` on clips.

Student and critic are 1.3B except in `14b_student`. `python -m sf_jax.prepare` makes the prompts and clips. Hardware:
the official run used 64 H100s; updates compile for TPU slices (`docs/scaling.md`). Nothing has been trained at this
size yet.

Published recipes: DMD's and SiD's learning rates are those of the official code. `gan` follows the paper: scores in the
exit step's range of times (the exit step is where a training rollout stops), one critic update per student update,
batch 768, R1 and R2 of 30 at sigma 0.05. `consistency` and `causal_ode` use guidance 3, and `consistency` 48 steps, as
in Causal Forcing. `write` has the window of 9 frames with a sink of 3 (first frames that stay visible) from Self
Gradient Forcing (arXiv 2607.20368). ODE pairs have the official script's steps and guidance, but the student's shift
(5; the script has 8). The learning rates of the GAN and of the stages that train on data are ours.
"""

from ml_collections import ConfigDict

from sf_jax.config import config_dict, to_dict
from sf_jax.models.wan import wan_1_3b, wan_14b

LARGE = {"height": 90, "width": 160}


def _common() -> dict:
    return {
        "model": to_dict(wan_1_3b(dtype="bfloat16")),
        "batch_size": 64,
        "data": {"name": "wan", "dir": "data/wan", "frames": 21, "height": 60, "width": 104},
        "rollout": {"steps": (1000, 750, 500, 250), "warp": True, "shift": 5.0, "chunk": 3, "context_noise": "exact"},
        "score": {"guidance": 4.0, "student_shift": 5.0, "score_shift": 8.0, "time_shift": 5.0},
        "frozen_dtype": "bfloat16",
        "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
        "checkpoint_every": 50,
        "log_every": 10,
    }


def _rate(lr: float, weight_decay: float = 0.01, beta1: float = 0.0) -> dict:
    return {"lr": lr, "beta1": beta1, "beta2": 0.999, "weight_decay": weight_decay, "clip": 10.0}


def _distill(rollout: dict | None = None, **changes) -> dict:
    """Self Forcing with DMD; student, teacher and critic are 1.3B."""
    values = _common() | {
        "stage": "distill",
        "objective": "dmd",
        "steps": 600,
        "generator_every": 5,
        "cache_gradient": "stop",
        "gan": {"head": {"taps": (13, 21, 29), "ffn_dim": 8192}},
        "optimizer": _rate(2e-6),
        "critic_optimizer": _rate(4e-7),
        "ema": {"decay": 0.99, "start": 200},
    }
    return values | {"rollout": values["rollout"] | (rollout or {})} | changes


def _supervised(**changes) -> dict:
    """A stage that trains on data."""
    return _common() | {"steps": 3000, "optimizer": _rate(5e-6, beta1=0.9), "checkpoint_every": 200} | changes


def _gan() -> dict:
    """Self Forcing with the paper's GAN."""
    weights = {"generator_weight": 1.0, "critic_weight": 1.0, "r1_weight": 30.0, "r2_weight": 30.0}
    sigmas = {"r1_sigma": 0.05, "r2_sigma": 0.05}
    gan = {"head": {"taps": (13, 21, 29), "ffn_dim": 8192}, "relativistic": True, **weights, **sigmas}
    score = _common()["score"] | {"from_exit": True, "to_exit": True}
    changes = {"generator_every": 1, "batch_size": 768, "accumulate": 12, "critic_optimizer": _rate(2e-6)}
    return _distill(objective="gan", gan=gan, score=score, **changes)


def _14b() -> dict:
    """Self Forcing with DMD and the teacher Wan2.1-14B, like the official release."""
    return _distill(teacher=to_dict(wan_14b(dtype="bfloat16")))


def _14b_student() -> dict:
    """Self Forcing with DMD; all three networks are 14B."""
    return _distill(model=to_dict(wan_14b(dtype="bfloat16")))


def _720p() -> dict:
    """Self Forcing with DMD and the teacher Wan2.1-14B at 720x1280."""
    return _distill(teacher=to_dict(wan_14b(dtype="bfloat16")), data=_common()["data"] | LARGE)


def _framewise() -> dict:
    """Self Forcing with DMD in chunks of one latent frame."""
    return _distill({"chunk": 1})


def _rolling() -> dict:
    """Self Forcing with DMD and a window that hides the first chunk from the last, for rolling caches."""
    return _distill({"window": 18})


def _long() -> dict:
    """Self Forcing with DMD on rollouts of normal and double length; needs vae_weights."""
    return _distill(rollout_frames=(21, 42))


def _image() -> dict:
    """Self Forcing with DMD from a given first frame, with 85 frames; reads clips."""
    data = _common()["data"] | {"frames": 22}
    return _distill({"first_frame_alone": True}, image_to_video=True, data=data)


def _sid() -> dict:
    """Self Forcing with SiD."""
    return _distill(objective="sid", optimizer=_rate(2e-6, 0.0), critic_optimizer=_rate(2e-6, 0.0))


def _write() -> dict:
    """Self Forcing with DMD and gradients through the cache writes (Self Gradient Forcing)."""
    return _distill({"window": 9, "sink": 3}, cache_gradient="write")


def _causvid() -> dict:
    """The baseline DF+DMD (CausVid): the student's inputs are real clips, with separate noise for each chunk."""
    return _distill(student_input="diffusion_forcing")


def _tf_dmd() -> dict:
    """The baseline TF+DMD: like `causvid`, but each noisy chunk sees the clean chunks before it."""
    return _distill(student_input="teacher_forcing")


def _causal() -> dict:
    """Trains a many-step causal network by teacher forcing, on clips."""
    return _supervised(stage="causal", causal={"forcing": "teacher"})


def _diffusion_forcing() -> dict:
    """Trains a many-step causal network by diffusion forcing, on clips."""
    return _supervised(stage="causal", causal={"forcing": "diffusion"})


def _ode() -> dict:
    """Initializes the student by regression on ODE pairs of the bidirectional teacher."""
    pairs = {"pairs": 4096, "batch_size": 16, "solver_steps": 48, "guidance": 6.0}
    return _supervised(stage="init", init="ode", ode=pairs)


def _causal_ode() -> dict:
    """Initializes the student by regression on a many-step causal network's ODE pairs, with real clips as context."""
    pairs = {"teacher": "causal", "pairs": 4096, "batch_size": 16, "solver_steps": 48, "guidance": 3.0}
    return _supervised(stage="init", init="ode", ode=pairs)


def _consistency() -> dict:
    """Initializes the student by consistency distillation of a many-step causal network; reads clips."""
    return _supervised(stage="init", init="consistency", consistency={"solver_steps": 48, "guidance": 3.0})


VARIANTS = {
    "1_3b": _distill,
    "14b": _14b,
    "14b_student": _14b_student,
    "720p": _720p,
    "framewise": _framewise,
    "rolling": _rolling,
    "long": _long,
    "image": _image,
    "sid": _sid,
    "gan": _gan,
    "write": _write,
    "causvid": _causvid,
    "tf_dmd": _tf_dmd,
    "causal": _causal,
    "diffusion_forcing": _diffusion_forcing,
    "ode": _ode,
    "causal_ode": _causal_ode,
    "consistency": _consistency,
}


def get_config(variant: str = "1_3b") -> ConfigDict:
    """The config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}: configs/wan_distill.py has {', '.join(VARIANTS)}")
    return config_dict(VARIANTS[variant]())
