"""Self Forcing of Wan2.1 at full size: the paper's recipe (81 pixel frames of 480x832, chunk-wise or frame-wise).

  python -m sf_jax.train --config=configs/wan_distill.py:1_3b --workdir=runs/wan \
      --config.teacher_weights=Wan2.1-T2V-1.3B

Variants: `1_3b` (teacher Wan2.1-1.3B), `14b` (teacher Wan2.1-14B, as the official release), `framewise` (chunks of one
latent frame, teacher 1.3B). Student and critic are always 1.3B. Hardware: the official run used 64 H100s; both updates
of every variant compile for TPU slices (`docs/scaling.md`). Nothing was trained at this size yet.
Needs prompt embeddings (`python -m sf_jax.prepare`), `--config.teacher_weights=` (Wan2.1) and `--config.init_weights=`
(a causal start; for `14b` also `--config.critic_weights=`, Wan2.1-T2V-1.3B).
"""

from ml_collections import ConfigDict

from sf_jax.config import config_dict, to_dict
from sf_jax.models.wan import wan_1_3b, wan_14b

VARIANTS = ("1_3b", "14b", "framewise")


def get_config(variant: str = "1_3b") -> ConfigDict:
    """The configuration of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}: configs/wan_distill.py has {', '.join(VARIANTS)}")
    student = to_dict(wan_1_3b(dtype="bfloat16"))
    values = {
        "stage": "distill",
        "objective": "dmd",
        "steps": 600,
        "batch_size": 64,
        "generator_every": 5,
        "cache_gradient": "stop",
        "model": student,
        "data": {"name": "wan", "dir": "data/wan", "frames": 21, "height": 60, "width": 104},
        "rollout": {
            "steps": (1000, 750, 500, 250),
            "warp": True,
            "shift": 5.0,
            "chunk": 1 if variant == "framewise" else 3,
            "context_noise": "exact",
        },
        "gan": {"head": {"taps": (13, 21, 29), "ffn_dim": 8192}},
        "score": {"guidance": 4.0, "student_shift": 5.0, "score_shift": 8.0, "time_shift": 5.0},
        "optimizer": {"lr": 2e-6, "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "clip": 10.0},
        "critic_optimizer": {"lr": 4e-7, "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "clip": 10.0},
        "ema": {"decay": 0.99, "start": 200},
        "frozen_dtype": "bfloat16",
        "mesh": {"data": 1, "fsdp": -1, "context": 1, "tensor": 1},
        "checkpoint_every": 50,
        "log_every": 10,
    }
    if variant == "14b":
        values["teacher"] = to_dict(wan_14b(dtype="bfloat16"))
    return config_dict(values)
