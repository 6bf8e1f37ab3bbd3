"""Every stage of Self Forcing on moving handwritten digits; needs only a laptop CPU and no downloads.

  python -m sf_jax.train --config=configs/digits.py:teacher --workdir=runs/teacher
  python -m sf_jax.train --config=configs/digits.py:init    --workdir=runs/init
  python -m sf_jax.train --config=configs/digits.py:distill --workdir=runs/distill \
      --config.init_weights=runs/init/student.safetensors

Without the last line, `distill` starts from the shipped result of `init`; `polish` starts from that of `consistency`.

Other variants: `causal` and `diffusion_forcing` (many-step causal networks), `causal_ode` and `consistency`
(initialization from a causal network, with and without ODE pairs:
`--config.teacher_weights=runs/causal/causal.safetensors`), `polish` (short GAN training after `consistency`), `switch`
(longer GAN training of the shipped student, on rollouts whose prompt changes), `sid` and `gan` (other objectives),
`causvid` and `tf_dmd` (the baselines without rollouts). All of them start from the same kinds of weight files.

Videos have 9 latent frames of 6x6x8 (24x24 pixels) with 9 tokens each; the network has 1.2 million parameters. `init`
and `distill` use the shipped teacher; `--config.teacher_weights=FILE` selects another. `docs/digits.md` has the
time and results of each stage.
"""

from ml_collections import ConfigDict

from sf_jax.config import config_dict


def _model() -> dict:
    return {
        "dim": 128,
        "ffn_dim": 512,
        "num_heads": 4,
        "num_layers": 4,
        "channels": 8,
        "text_dim": 64,
        "text_len": 10,
        "freq_dim": 64,
        "remat": "dots",
    }


def _common(stage: str) -> dict:
    return {
        "stage": stage,
        "seed": 0,
        "model": _model(),
        "data": {"name": "digits", "dir": "data", "frames": 9, "height": 6, "width": 6},
        "rollout": {
            "steps": (1000, 750, 500, 250),
            "shift": 3.0,
            "chunk": 3,
            "window": 9,
            "sink": 3,
            "positions": "relative",
        },
        # Unshifted times: a shift favors high noise, where scores pull all samples of a prompt to the same shape.
        "score": {"guidance": 2.5, "student_shift": 3.0, "score_shift": 3.0, "time_shift": 1.0},
    }


def _teacher() -> dict:
    """Bidirectional flow matching on the training clips, with Muon."""
    return _common("teacher") | {
        "steps": 4500,
        "batch_size": 48,
        "optimizer": {
            "name": "muon",
            "lr": 8e-3,
            "beta1": 0.9,
            "beta2": 0.99,
            "clip": 1.0,
            "warmup": 100,
            "decay": "cosine",
        },
        "ema": {"decay": 0.995, "start": 50},
        "checkpoint_every": 500,
    }


def _init() -> dict:
    """Initializes the causal student by regression on the teacher's ODE pairs."""
    return _common("init") | {
        "steps": 400,
        "batch_size": 32,
        "teacher_weights": "shipped",
        "ode": {"pairs": 512, "solver_steps": 24, "guidance": 2.5},
        "optimizer": {
            "name": "muon",
            "lr": 3e-3,
            "beta1": 0.9,
            "beta2": 0.99,
            "clip": 1.0,
            "warmup": 20,
            "decay": "cosine",
        },
        "ema": {"decay": 0.95, "start": 20},
    }


def _distill() -> dict:
    """Self Forcing with DMD: rollouts of 9 frames; updates the critic every step and the student every second step."""
    return _common("distill") | {
        "objective": "dmd",
        "steps": 120,
        "batch_size": 32,
        "generator_every": 2,
        "teacher_weights": "shipped",
        "init_weights": "init",
        # Twenty updates suffice if the initialization uses its context; six times this rate ruins the first chunk.
        "optimizer": {"lr": 1e-4, "beta1": 0.0, "beta2": 0.999, "clip": 10.0, "decay": "cosine"},
        "critic_optimizer": {"lr": 4e-4, "beta1": 0.0, "beta2": 0.999, "clip": 10.0},
        "ema": {"decay": 0.98, "start": 40},
    }


def _causal() -> dict:
    """Trains a many-step causal network by teacher forcing, from the teacher's weights."""
    values = _teacher()
    changes = {"stage": "causal", "steps": 1000, "batch_size": 32, "init_weights": "shipped"}
    return values | changes | {"causal": {"forcing": "teacher"}, "optimizer": values["optimizer"] | {"lr": 6e-3}}


def _diffusion_forcing() -> dict:
    """Trains a many-step causal network by diffusion forcing, from the teacher's weights."""
    return _causal() | {"causal": {"forcing": "diffusion"}}


def _consistency() -> dict:
    """Initializes the student by consistency distillation of a many-step causal network, without ODE pairs."""
    values = _init()
    return values | {
        "init": "consistency",
        # For a causal network with long training; 2.0 suffices after 1000 steps.
        "consistency": {"solver_steps": 24, "guidance": 3.0, "later_guidance": 2.0},
        "teacher_weights": "./runs/causal/causal.safetensors",
    }


def _causal_ode() -> dict:
    """Initializes the student by regression on a many-step causal network's ODE pairs, with real clips as context."""
    values = _init() | {"teacher_weights": "./runs/causal/causal.safetensors"}
    return values | {"ode": values["ode"] | {"teacher": "causal"}}


def _sid() -> dict:
    """Self Forcing with SiD."""
    return _distill() | {"objective": "sid"}


def _gan() -> dict:
    """Self Forcing with a relativistic GAN against real clips."""
    head = {"taps": (1, 2, 3), "ffn_dim": 256}
    weights = {"generator_weight": 1.0, "critic_weight": 1.0, "r1_weight": 0.1, "r2_weight": 0.1}
    return _distill() | {"objective": "gan", "gan": {"head": head, "relativistic": True, **weights}}


def _polish() -> dict:
    """Short Self Forcing with the GAN after `consistency`, as the shipped student was made (from another start)."""
    values = _gan()
    # Digits keep their shape in real clips, but not in samples of DMD's teacher.
    optimizer = values["optimizer"] | {"lr": 5e-5, "decay": "constant"}
    changes = {"init_weights": "consistency", "steps": 24, "ema": {"decay": 0.9, "start": 0}}
    return values | changes | {"optimizer": optimizer}


def _switch() -> dict:
    """GAN training after `polish`, on rollouts whose prompt changes; the student then follows new prompts at once."""
    values = _polish()
    optimizer = values["optimizer"] | {"lr": 3e-4}
    changes = {"init_weights": "student", "steps": 120, "optimizer": optimizer}
    return values | changes | {"rollout_frames": (18,), "prompt_switch": 1.0}


def _causvid() -> dict:
    """The baseline DF+DMD (CausVid): the student's inputs are real clips, with separate noise for each chunk."""
    return _distill() | {"student_input": "diffusion_forcing"}


def _tf_dmd() -> dict:
    """The baseline TF+DMD: like `causvid`, but each noisy chunk sees the clean chunks before it."""
    return _distill() | {"student_input": "teacher_forcing"}


VARIANTS = {
    "teacher": _teacher,
    "causal": _causal,
    "diffusion_forcing": _diffusion_forcing,
    "init": _init,
    "causal_ode": _causal_ode,
    "consistency": _consistency,
    "distill": _distill,
    "polish": _polish,
    "switch": _switch,
    "sid": _sid,
    "gan": _gan,
    "causvid": _causvid,
    "tf_dmd": _tf_dmd,
}


def get_config(variant: str = "distill") -> ConfigDict:
    """The config of a stage."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}: configs/digits.py has {', '.join(VARIANTS)}")
    return config_dict(VARIANTS[variant]())
