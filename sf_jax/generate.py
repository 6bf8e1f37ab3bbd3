"""Generates video from a prompt.

    python -m sf_jax.generate --prompt="a 7 moving left, fast"
    python -m sf_jax.generate --model=Wan2.1-T2V-1.3B --checkpoint=self_forcing_dmd.pt --prompt="a cat in the snow"

Without --model, the command uses the shipped student of moving digits. With --model (or the files of its parts:
--transformer, --vae, --text_encoder and --tokenizer), it uses Wan2.1 or a model distilled from it. Weights are paths,
or names on the Hugging Face hub. The command writes an mp4 per video (for Wan, while later chunks are still being
generated) and a contact sheet. Existing files are kept: a new video's name gets a number, unless --if_exists says
otherwise.

    python -m sf_jax.generate --compile_only=h100:1 --model=1.3B --window=12 --sink=3 --positions=relative

This compiles the same programs for devices that need not be attached: GPUs (`pip install "sf_jax[gpu_aot]"`) or a TPU
slice (`pip install "sf_jax[aot]"`, --compile_only=v6e:2x2). It prints what each program needs per chip: memory,
arithmetic, bytes moved, kernels, attention, and a lower bound on its time. No weights are read: --model may be a folder
with only a config.json, or a size, 1.3B or 14B. Without --checkpoint and --solver, the network is a few-step student.
"""

from absl import flags

from sf_jax import command
from sf_jax.data import captions
from sf_jax.diffusion.solvers import SOLVERS
from sf_jax.inference import batch
from sf_jax.inference.executables import executables
from sf_jax.inference.job import Job
from sf_jax.inference.names import IF_EXISTS
from sf_jax.rollout_config import CONTEXTS, POSITIONS
from sf_jax.weights import hub
from sf_jax.weights.adapter_list import parse_loras
from sf_jax.weights.package import captions_of

DEFAULT_PROMPTS = {"full": "a 3 moving up and right, slowly", "undirected": "a 3 moving, slowly"}

_PROMPT = flags.DEFINE_string("prompt", None, "What to show")
_PROMPTS = command.define_path(
    "prompts", None, "File of prompts, instead of --prompt: a line each, or a .csv, .tsv, .json or .jsonl"
)
_NAMES = command.define_path(
    "names", None, "Text file with a name a line for the files of extended prompts: VBench's own, short prompts"
)
_COMPILE_ONLY = flags.DEFINE_string(
    "compile_only", None, "Devices to compile for, and generate nothing: GPUs such as h100:1, or a TPU slice, v6e:2x2"
)
# Flags whose names are fields of `Job`; None means the model's default.
_JOB = {
    "model": command.define_weights(
        "model", None, "Wan: model folder, official or of diffusers, or its name on the hub (Wan-AI/Wan2.1-T2V-1.3B)"
    ),
    "transformer": command.define_weights("transformer", None, "Wan: file of the transformer, instead of --model's"),
    "text_encoder": command.define_weights("text_encoder", None, "Wan: file of the text encoder, instead of --model's"),
    "tokenizer": command.define_weights(
        "tokenizer", None, "Wan: tokenizer.json, spiece.model or the folder of one, instead of --model's"
    ),
    "checkpoint": command.define_weights(
        "checkpoint",
        None,
        "Digits: weights that sf_jax.train wrote, 'teacher', 'init' or 'consistency' (default: the shipped student). "
        "Wan: weights of a causal network, .pt or .safetensors (default: the bidirectional one of --model)",
    ),
    "part": flags.DEFINE_string("part", None, "Network of the checkpoint: generator_ema (default), generator, model"),
    "lora": flags.DEFINE_multi_string(
        "lora", None, "Adapter to merge into the network, FILE or FILE:SCALE; several with commas, or as often as given"
    ),
    "frames": flags.DEFINE_integer(
        "frames", None, "Frames of the video (digits: 48; Wan: 81, 1 + a multiple of 4; with --image one chunk more)"
    ),
    "height": flags.DEFINE_integer("height", None, "Rows of pixels (Wan: 480, a multiple of 16)"),
    "width": flags.DEFINE_integer("width", None, "Columns of pixels (Wan: 832, a multiple of 16)"),
    "seed": flags.DEFINE_integer("seed", 0, "Seed of the noise", lower_bound=0, upper_bound=2**32 - 1),
    "num_samples": flags.DEFINE_integer("num_samples", 1, "Videos per prompt", lower_bound=1),
    "fps": flags.DEFINE_float("fps", None, "Frames per second of the files (digits: 12; Wan: 16)", 1.0, 50.0),
    "scale": flags.DEFINE_integer("scale", None, "Enlargement of the pixels (digits: 12; Wan: 1)", lower_bound=1),
    "out": command.define_path("out", "out", "Folder for the files"),
    "image": command.define_path("image", None, "Wan: first frame (the network needs to know lone first frames)"),
    "video": command.define_path("video", None, "Wan: video to extend; --frames counts its frames too"),
    "solver": flags.DEFINE_enum("solver", None, ["few", *SOLVERS], "Few steps (a student's) or a many-step solver"),
    "steps": flags.DEFINE_integer("steps", None, "Steps of the solver (Wan: 50; digits: 24)", lower_bound=1),
    "shift": flags.DEFINE_float("shift", None, "Shift of the schedule (Wan: 5; bidirectional 8)"),
    "guidance": flags.DEFINE_float("guidance", None, "Guidance scale of many steps (Wan: 6)"),
    "negative_prompt": flags.DEFINE_string("negative_prompt", None, "What many steps are guided away from"),
    "denoising_steps": flags.DEFINE_list("denoising_steps", None, "The few steps (1000,750,500,250)"),
    "first_chunk_steps": flags.DEFINE_list("first_chunk_steps", None, "The few steps of a video's first chunk"),
    "chunk": flags.DEFINE_integer("chunk", None, "Latent frames generated together (3)", lower_bound=1),
    "window": flags.DEFINE_integer("window", None, "Latent frames that a chunk sees, itself included (Wan: all)"),
    "sink": flags.DEFINE_integer("sink", None, "First latent frames that stay visible in a window (Wan: 0)"),
    "positions": flags.DEFINE_enum(
        "positions", None, POSITIONS, "Positions: of the video, at most 1024 (Wan's), or relative to the window"
    ),
    "context": flags.DEFINE_enum("context", None, CONTEXTS, "What is cached, as in training (clean)"),
    "schedule": command.define_path(
        "schedule",
        None,
        "JSON file of prompts that change while the video plays, instead of --prompt (docs/streaming.md)",
    ),
    "vae": command.define_weights("vae", None, "Wan: decoder of --model, wan (default) or tiny; or the file of a VAE"),
    "dtype": flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Wan: numbers (bfloat16; float32 on a CPU)"),
    "quantize": flags.DEFINE_enum(
        "quantize",
        None,
        ["int8", "fp8"],
        "Weights in 8 bits; products, too, where the device has them (docs/eight_bit.md)",
    ),
    "cache_dtype": flags.DEFINE_enum(
        "cache_dtype", None, ["bfloat16", "float32", "int8", "fp8"], "Cached keys and values (the network's type)"
    ),
    "mesh": flags.DEFINE_string(
        "mesh", None, "Wan: devices that share a video, such as tensor:2,context:2 (a video has a device of its own)"
    ),
    "save_latents": flags.DEFINE_bool("save_latents", False, "Write latents, .npy float32 [F, H, W, C], too"),
    "vbench_names": flags.DEFINE_bool(
        "vbench_names", False, "Name the files prompt-index.mp4 (or NAME-index.mp4 by --names), write nothing else"
    ),
    "if_exists": flags.DEFINE_enum(
        "if_exists",
        None,
        IF_EXISTS,
        "Where a file of that name is there: number the new one (the default), replace the old one, skip the video, or "
        "refuse (the default with --vbench_names)",
    ),
}
GROUPS = {
    "What to show": ("prompt", "prompts", "names", "schedule", "seed", "num_samples", "frames"),
    "Moving digits and Wan": (
        *("checkpoint", "lora", "solver", "steps", "shift", "guidance", "negative_prompt", "denoising_steps"),
        *("first_chunk_steps", "chunk", "window", "sink", "positions", "context", "quantize", "cache_dtype"),
    ),
    "Wan": (
        *("model", "part", "height", "width", "image", "video", "dtype", "mesh"),
        *("transformer", "vae", "text_encoder", "tokenizer"),
    ),
    "Instead of a video": ("compile_only",),
    "Files": ("out", "if_exists", "vbench_names", "save_latents", "fps", "scale"),
}
_LISTS = ("denoising_steps", "first_chunk_steps")


def _prompts(default: str | None, checkpoint: str | None) -> list[str]:
    """The prompts of the command line; `default` is used for Wan, which has no default prompt."""
    if _PROMPTS.value is None:
        wan = any(_JOB[name].value for name in ("model", "transformer", "text_encoder", "tokenizer", "vae"))
        missing = [] if default is None else [default]
        default = missing if wan else [DEFAULT_PROMPTS[captions_of(checkpoint)]]
        default = [] if _JOB["schedule"].value else default
        if flags.FLAGS["prompt"].present > 1:
            raise ValueError("prompt is given more than once: write the prompts to a file, a line each, for --prompts")
        return default if _PROMPT.value is None else [captions.valid_text(_PROMPT.value)]
    if _PROMPT.value is not None:
        raise ValueError("prompt and prompts are both given: choose one")
    return captions.read_texts(_PROMPTS.value, paired=_NAMES.value is not None)


def _steps(name: str, values: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in values)
    except ValueError as error:
        raise ValueError(f"{name} is {','.join(values)}: whole numbers only") from error


def job(prompt: str | None = None) -> Job:
    """The job that the command line describes.

    Args:
      prompt: the prompt for Wan if no flag gives one.

    Raises:
      ValueError: if a flag contradicts another one or a file.
    """
    fields = {name: flag.value for name, flag in _JOB.items() if flag.value is not None}
    fields |= {name: _steps(name, fields[name]) for name in _LISTS if name in fields}
    if "lora" in fields:
        fields["lora"] = parse_loras(fields["lora"])
    if fields.get("checkpoint"):
        fields["checkpoint"] = hub.local_file(fields["checkpoint"])  # its header is read first
    prompts, keys = _prompts(prompt, fields.get("checkpoint")), ("name", *captions.CAPTION_KEYS)
    names = [] if _NAMES.value is None else captions.read_texts(_NAMES.value, "names", keys, paired=True)
    return Job(prompts=tuple(prompts), names=tuple(names), abstract=_COMPILE_ONLY.value is not None, **fields)


def main() -> None:
    """Command line: see the module's docstring."""
    if _COMPILE_ONLY.value is not None:
        from sf_jax.perf import compile, generation, report  # imported here, as no other run needs them

        compile.compile_anew()
        for line in report.generation_report(generation.generation_of(job()), _COMPILE_ONLY.value):
            print(line, flush=True)
        return
    paths = batch.run(job(), executables())
    if paths:
        print("wrote", *paths, sep="\n  ")


if __name__ == "__main__":
    command.run(main, groups=GROUPS)
