"""Prepares training data at Wan's size: prompt embeddings, and latents of videos.

    python -m sf_jax.prepare --prompts=prompts.txt --model=Wan2.1-T2V-1.3B --output=data/wan
    python -m sf_jax.prepare --videos=videos --model=Wan2.1-T2V-1.3B --output=data/wan

Repeating a stopped command resumes it. Several processes can fill one folder, each with its own --process_index.
"""

from absl import flags

from sf_jax import command, distributed
from sf_jax.inference import prepare_job
from sf_jax.inference.prepare_job import Job

_MODEL = command.define_weights("model", None, "Model folder of Wan2.1, official or of diffusers; also of the hub")
_OUTPUT = command.define_path("output", None, "Data folder, the config's data.dir")
# Flags whose names are fields of `Job`; None means the job's default.
_FIELDS = {
    "prompts": command.define_path(
        "prompts", None, "Prompts: a line each, or prompt, caption or text in a .csv, .tsv, .json or .jsonl"
    ),
    "videos": command.define_path(
        "videos", None, "Folder of videos or of folders of images, with NAME.txt beside each or a metadata.csv/.jsonl"
    ),
    "negative_prompt": flags.DEFINE_string("negative_prompt", None, "What guidance leads away from (the official one)"),
    "dtype": flags.DEFINE_enum("dtype", None, prepare_job.DTYPES, "Text embeddings (bfloat16; float32 on a CPU)"),
    "process_index": flags.DEFINE_integer("process_index", None, "Which of the processes this is (JAX's own)"),
    "process_count": flags.DEFINE_integer("process_count", None, "How many processes fill the folder (JAX's own)"),
}
_OF_VIDEOS = {
    "frames": flags.DEFINE_integer("frames", None, f"Latent frames of a clip ({Job.frames}: 81 pixel frames)"),
    "height": flags.DEFINE_integer("height", None, f"Rows of pixels, a multiple of 16 ({Job.height})"),
    "width": flags.DEFINE_integer("width", None, f"Columns of pixels, a multiple of 16 ({Job.width})"),
    "fps": flags.DEFINE_float("fps", None, "Frames a second to resample videos to (their own)"),
    "clips_per_video": flags.DEFINE_integer("clips_per_video", None, "Consecutive clips of a video, at most (1)"),
}
GROUPS = {
    "What to prepare": ("prompts", "videos", "negative_prompt"),
    "Clips of videos": tuple(_OF_VIDEOS),
    "Wan": ("model", "dtype"),
    "Files": ("output",),
    "Several processes": ("process_index", "process_count"),
}


def job() -> Job:
    """The job that the command line describes.

    Raises:
      ValueError: a flag has an invalid value or no effect.
    """
    given = {name: flag.value for name, flag in (_FIELDS | _OF_VIDEOS).items() if flag.value is not None}
    if "prompts" in given:
        for name in _OF_VIDEOS:
            if name in given:
                raise ValueError(f"{name} changes nothing here: it is for --videos")
    if ("process_index" in given) != ("process_count" in given):
        raise ValueError("process_index and process_count: give both or none")
    import jax  # `command` has validated JAX's settings

    default = {"dtype": "float32" if jax.default_backend() == "cpu" else Job.dtype}
    default |= {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return Job(model=_MODEL.value, output=_OUTPUT.value, **default | given)


def main() -> None:
    """Command line: see the module's docstring."""
    distributed.initialize()
    prepare_job.run(job())


if __name__ == "__main__":
    command.run(main, ["model", "output"], groups=GROUPS)
