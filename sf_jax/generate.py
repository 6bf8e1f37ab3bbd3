"""Video from a prompt.

    python -m sf_jax.generate --prompt="a 7 moving left, fast"
    python -m sf_jax.generate --model=Wan2.1-T2V-1.3B --checkpoint=self_forcing_dmd.pt --prompt="a cat in the snow"

Without --model, the shipped student of moving digits; with it, Wan2.1 and what was distilled from it. Writes an mp4 per
video and a contact sheet while later chunks are still being made.
"""

from pathlib import Path

import jax
from absl import flags

from sf_jax import command
from sf_jax.diffusion.solvers import SOLVERS
from sf_jax.inference import digits_job, wan, wan_job

_PROMPT = flags.DEFINE_string("prompt", None, "What to show")
_PROMPTS = flags.DEFINE_string("prompts", None, "Text file with a prompt a line, instead of --prompt")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Digits: weights that sf_jax.train wrote, or 'teacher' (default: the shipped student). "
    "Wan: weights of a causal network, .pt or .safetensors (default: the bidirectional one of --model)",
)
_FRAMES = flags.DEFINE_integer(
    "frames", None, "Frames of the video (digits: 48; Wan: 81, 1 + a multiple of 4; with --image one chunk more)"
)
_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Videos per prompt", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise", lower_bound=0, upper_bound=2**32 - 1)
_GUIDANCE = flags.DEFINE_float("guidance", None, "Guidance scale of a teacher or of many steps (Wan: 6)")
_FPS = flags.DEFINE_float("fps", None, "Frames per second of the files (digits: 12; Wan: 16)", 1.0, 50.0)
_OUT = flags.DEFINE_string("out", "out", "Folder for the files")
_SCALE = flags.DEFINE_integer("scale", None, f"Digits: enlargement ({digits_job.SCALE})", lower_bound=1)

_MODEL = flags.DEFINE_string("model", None, "Wan: model folder, official or of diffusers")
# Wan's flags whose names are fields of `wan_job.Job`; None means that the job's default stands.
_WAN = {
    "part": flags.DEFINE_string("part", None, "Network of the checkpoint: generator_ema (default), generator, model"),
    "height": flags.DEFINE_integer("height", None, "Rows of pixels, a multiple of 16 (480)"),
    "width": flags.DEFINE_integer("width", None, "Columns of pixels, a multiple of 16 (832)"),
    "image": flags.DEFINE_string("image", None, "First frame (the network needs to know lone first frames)"),
    "video": flags.DEFINE_string("video", None, "Video to extend; --frames counts its frames too"),
    "solver": flags.DEFINE_enum("solver", None, ["few", *SOLVERS], "Few steps (default) or a many-step solver"),
    "steps": flags.DEFINE_integer("steps", None, "Steps of the solver (50)", lower_bound=1),
    "shift": flags.DEFINE_float("shift", None, "Shift of the schedule (5; bidirectional 8)"),
    "negative_prompt": flags.DEFINE_string("negative_prompt", None, "What many steps are guided away from"),
    "denoising_steps": flags.DEFINE_list("denoising_steps", None, "The few steps (1000,750,500,250)"),
    "chunk": flags.DEFINE_integer("chunk", None, "Latent frames generated together (3)", lower_bound=1),
    "window": flags.DEFINE_integer("window", None, "Latent frames that a chunk sees, itself included (all)"),
    "sink": flags.DEFINE_integer("sink", None, "First latent frames that stay visible in a window (0)"),
    "context": flags.DEFINE_enum("context", None, ["clean", "noisy"], "What is cached, as in training (clean)"),
    "vae": flags.DEFINE_enum("vae", None, list(wan_job.DECODERS), "Decoder (wan)"),
    "dtype": flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Numbers (bfloat16; float32 on a CPU)"),
    "save_latents": flags.DEFINE_bool("save_latents", None, "Write latents, .npy float32 [F, H, W, C], too"),
    "vbench_names": flags.DEFINE_bool("vbench_names", None, "Name the files prompt-index.mp4"),
}


def _prompts() -> list[str]:
    """The prompts of the command line."""
    if _PROMPTS.value is None:
        return [_PROMPT.value if _PROMPT.value is not None else "a 3 moving up and right, slowly"]
    if _PROMPT.value is not None:
        raise ValueError("prompt and prompts are both given: choose one")
    try:
        lines = [line.strip() for line in Path(_PROMPTS.value).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"prompts: cannot read {_PROMPTS.value} ({reason})") from error
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"prompts: {_PROMPTS.value} holds no prompt: give one a line")
    return lines


def _digits() -> list[Path]:
    given = [name for name, flag in _WAN.items() if flag.value is not None]
    if given:
        raise ValueError(f"{given[0]} is given without model: it is for Wan, whose folder --model names")
    optional = {"frames": _FRAMES.value, "guidance": _GUIDANCE.value, "fps": _FPS.value, "scale": _SCALE.value}
    optional = {name: value for name, value in optional.items() if value is not None}
    common = {"num_samples": _SAMPLES.value, "seed": _SEED.value, "out": _OUT.value}
    return digits_job.run(_prompts(), _CHECKPOINT.value, **optional, **common)


def _check_meant(fields: dict) -> None:
    """Refuses flags of Wan that would change nothing beside the others."""
    few, causal = fields.get("solver", wan_job.Job.solver) == "few", _CHECKPOINT.value is not None
    if _SCALE.value is not None:
        raise ValueError("scale changes nothing here: it is for the moving digits")
    unmeant = {
        "a few-step student has none: choose a --solver": ["steps", "guidance", "negative_prompt"] if few else [],
        "it is for few steps, without --solver": [] if few else ["denoising_steps"],
        "it is for a causal network: give --checkpoint": [] if causal else ["part", "chunk", "window", "sink"],
    }
    for reason, names in unmeant.items():
        for name in names:
            if name in fields:
                raise ValueError(f"{name} changes nothing here: {reason}")


def _wan() -> list[Path]:
    if _PROMPT.value is None and _PROMPTS.value is None:
        raise ValueError("prompt is missing: say what to show, or name a file of prompts with --prompts")
    fields = {name: flag.value for name, flag in _WAN.items()}
    fields |= {"frames": _FRAMES.value, "guidance": _GUIDANCE.value, "fps": _FPS.value}
    fields = {name: value for name, value in fields.items() if value is not None}
    _check_meant(fields)
    if "image" in fields and "frames" not in fields:
        chunk = fields.get("chunk", wan_job.Job.chunk)
        more = -(-(wan.latent_frames(wan_job.Job.frames) - 1) // chunk) * chunk
        fields["frames"] = 1 + wan.TEMPORAL_FACTOR * more
    if "denoising_steps" in fields:
        try:
            fields["denoising_steps"] = tuple(int(step) for step in fields["denoising_steps"])
        except ValueError as error:
            raise ValueError(f"denoising_steps is {','.join(fields['denoising_steps'])}: whole numbers only") from error
    if jax.default_backend() == "cpu":
        fields.setdefault("dtype", "float32")
    common = {"num_samples": _SAMPLES.value, "seed": _SEED.value, "out": _OUT.value, "checkpoint": _CHECKPOINT.value}
    return wan_job.run(wan_job.Job(model=_MODEL.value, prompts=tuple(_prompts()), **fields, **common))


def main() -> None:
    """Command line: see the module's docstring."""
    print("wrote", *(_digits() if _MODEL.value is None else _wan()), sep="\n  ")


if __name__ == "__main__":
    command.run(main)
