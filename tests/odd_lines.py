"""Runs odd command lines of a command in this process: `python -m tests.odd_lines COMMAND FOLDER`.

Prints one JSON object per line: arguments, exit code, stderr, seconds. Command lines are generated from the command's
flags, so new flags are covered automatically.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from absl import flags

LONG = "x" * 5000
HUGE = "9" * 30
# Values that are invalid for every flag of a kind.
ODD = {
    "int": ["", "abc", "1.5", "nan", HUGE],
    "float": ["", "abc", "nan", "inf", "1e999"],
    "bool": ["maybe", ""],
    "path": ["gs://bucket/a", "s3://b", "C:\\videos", "~nobody-of-this-name/x", "a\0b"],
    "enum": ["", "nonsense", "\x1b[31m", LONG],
    "config": ["", "configs/none.py", "configs", "configs/digits.py:none", "README.md", LONG],
}
# Other invalid lines; {m} is a Wan model folder, {t} an empty folder, {f} a text file.
WAN = [
    "--model={m}",
    "--checkpoint={m}/student.safetensors",
    "--height=32",
    "--width=48",
    "--frames=9",
    "--prompt=a cat",
]
LINES = {
    "generate": [
        *([f"--{name}={value}"] for name in ("frames", "num_samples", "steps", "chunk", "scale") for value in (-1, 0)),
        *([f"--{name}={10**12}"] for name in ("frames", "num_samples", "scale", "chunk", "window", "sink", "seed")),
        *([f"--{name}=-1"] for name in ("seed", "window", "sink", "shift", "fps")),
        *([f"--{name}={{t}}"] for name in ("prompts", "checkpoint", "schedule")),
        *([f"--{name}={{t}}/none"] for name in ("prompts", "checkpoint", "schedule", "names")),
        *([f"--{name}="] for name in ("checkpoint", "out", "schedule", "prompts", "names")),
        *([f"--{name}={LONG}"] for name in ("checkpoint", "out", "prompts", "schedule", "prompt", "names")),
        *(
            [f"--prompt={text}"]
            for text in ("\x1b[31m red", "nonsense", "\udcff", "a 7 moving left " * 1000, "\n", "7" * 10**6)
        ),
        ["--prompt=a 7", "--prompts={f}"],
        ["--prompts={f}", "--names={t}/names"],
        ["--denoising_steps=,"],
        ["--denoising_steps=a,b"],
        ["--denoising_steps=1,2,3"],
        ["--denoising_steps=" + "1000," * 10_000 + "1"],
        ["--first_chunk_steps=nan"],
        ["--guidance=1e308"],
        ["--shift=1e308", "--checkpoint=teacher"],
        ["--steps=1000000000", "--checkpoint=teacher"],
        ["--schedule={f}"],
        ["--checkpoint={f}"],
        ["--checkpoint=README.md"],
        ["--out={f}"],
        ["--out={f}/videos"],
        ["--framez=9"],
        ["--" + LONG],
        ["--" + LONG + "=1"],
        ["frames=9"],
        ["a 7 moving left"],
        ["--frames"],
        ["-frames=x"],
        ["--flagfile={t}/none"],
        ["--flagfile={t}"],
        ["--nosave_latents=x"],
        *([*WAN, f"--{name}={value}"] for name in ("height", "width") for value in (-1, 0, 17, 10**12)),
        *([*WAN, f"--{name}={{t}}"] for name in ("image", "video", "checkpoint")),
        *([*WAN, f"--{name}={{f}}"] for name in ("image", "video", "checkpoint", "model")),
        *([*WAN, f"--{name}="] for name in ("image", "video", "model", "prompt")),
        *([*WAN, f"--{name}=0"] for name in ("fps", "scale", "window", "num_samples", "shift")),
        *([*WAN, f"--{name}={10**12}"] for name in ("frames", "num_samples", "scale", "window", "sink", "chunk")),
        [*WAN, "--model={t}"],
        [*WAN, "--model={t}/none"],
        [*WAN, f"--model={LONG}"],
        [*WAN, "--part=nonsense"],
        [*WAN, "--steps=9"],
        [*WAN, "--solver=unipc", "--steps=0"],
        [*WAN, "--solver=unipc", f"--guidance={10**12}"],
        [*WAN[:-1], f"--prompt={'snow ' * 10**6}"],
        [*WAN, "--image={t}/none.png"],
        [*WAN, "--video={t}/none.mp4"],
    ],
    "train": [
        ["--workdir={t}/run"],
        ["--config=configs/digits.py"],
        ["--config=configs/digits.py", "--workdir={f}"],
        ["--config=configs/digits.py", "--workdir="],
        ["--config=configs/digits.py", f"--workdir={LONG}"],
        ["--config=configs/digits.py:teacher", "--workdir={t}/run", "--config.data.dir={f}"],
        ["--config=configs/digits.py:teacher", "--workdir={t}/run", "--config.data.dir=\udcff"],
        ["--config=configs/digits.py", "--compile_only="],
        ["--config=configs/digits.py", "--compile_only=nonsense"],
        ["--config=configs/digits.py", f"--compile_only={LONG}"],
        ["--config=configs/digits.py", "--config.stepz=3", "--dry_run"],
        ["--config=configs/digits.py", "--config.=3", "--dry_run"],
        ["--config=configs/digits.py", f"--config.{LONG}=3", "--dry_run"],
        ["--config=configs/digits.py", "--config.optimizer=adamw", "--dry_run"],
        ["--config=configs/digits.py", "--config.rollout.steps=(1,2)", "--dry_run"],
        ["--config=configs/digits.py", "--config.rollout.steps=()", "--dry_run"],
        *(
            ["--config=configs/digits.py", f"--config.{name}={value}", "--dry_run"]
            for name in (
                *("steps", "batch_size", "accumulate", "generator_every", "checkpoint_every", "keep_checkpoints"),
                *("data.frames", "data.height", "data.width", "rollout.chunk", "model.dim", "model.num_heads"),
                *("ema.decay", "optimizer.beta1", "optimizer.clip", "optimizer.lr", "log_every", "grace_seconds"),
            )
            for value in (-1, "1e400")
        ),
        *(
            ["--config=configs/digits.py", f"--config.{name}={10**12}", "--dry_run"]
            for name in ("data.frames", "rollout.chunk", "rollout.window", "mesh.data", "accumulate")
        ),
        *(
            ["--config=configs/digits.py", f"--config.{name}=nonsense", "--dry_run"]
            for name in ("stage", "objective", "init", "exits", "cache_gradient", "frozen_dtype", "data.name")
        ),
        *(
            [
                "--config=configs/digits.py",
                f"--config.{name}={value}",
                "--workdir={t}/run",
                "--config.data.dir={t}/data",
            ]
            for name in ("teacher_weights", "init_weights", "critic_weights")
            for value in ("gs://b/a", "{t}/none", "{t}", "{f}", LONG)
        ),
    ],
    "prepare": [
        ["--prompts={f}"],
        ["--model={m}"],
        ["--model={m}", "--output={t}/data"],
        *(
            [f"--model={model}", f"--output={output}", f"--prompts={prompts}"]
            for model, output, prompts in (
                ("{t}", "{t}/data", "{f}"),
                ("{t}/none", "{t}/data", "{f}"),
                ("", "{t}/data", "{f}"),
                (LONG, "{t}/data", "{f}"),
                ("{m}", "", "{f}"),
                ("{m}", "{f}", "{f}"),
                ("{m}", "{f}/data", "{f}"),
                ("{m}", LONG, "{f}"),
                ("{m}", "\udcff", "{f}"),
                ("{m}", "{t}/data", "{t}"),
                ("{m}", "{t}/data", "{t}/none"),
                ("{m}", "{t}/data", ""),
                ("{m}", "{t}/data", LONG),
                ("{m}", "{t}/data", "{m}/student.safetensors"),
            )
        ),
        *(["--model={m}", "--output={t}/d", f"--videos={videos}"] for videos in ("", "{t}", "{t}/none", "{f}", LONG)),
        *(
            ["--model={m}", "--output={t}/d", "--videos={t}", f"--{name}={value}"]
            for name in ("frames", "height", "width", "fps", "clips_per_video")
            for value in (-1, 0, 10**12)
        ),
        ["--model={m}", "--output={t}/d", "--prompts={f}", "--fps=8"],
        ["--model={m}", "--output={t}/d", "--prompts={f}", "--videos={t}"],
        ["--model={m}", "--output={t}/d", "--prompts={f}", "--process_index=1"],
        ["--model={m}", "--output={t}/d", "--prompts={f}", "--process_index=5", "--process_count=2"],
        ["--model={m}", "--output={t}/d", "--prompts={f}", "--process_index=-1", "--process_count=2"],
        ["--model={m}", "--output={t}/d", "--prompts={f}", "--process_index=0", "--process_count=0"],
    ],
    "convert": [
        [],
        ["--input={f}"],
        *([f"--input={source}", "--output={t}/o.safetensors"] for source in ("", "{t}", "{t}/none", "{f}", LONG, "\0")),
        *([f"--from={source}"] for source in ("", "{t}", "{t}/none", "{f}", LONG)),
        *(
            ["--input={m}/student.safetensors", f"--output={target}"]
            for target in ("", "{t}", "{t}/o", "{f}/o.safetensors", "{t}/o.txt", f"{LONG}.safetensors")
        ),
        ["--input={m}/student.safetensors", "--output={t}/o.safetensors", "--to=transformers"],
        ["--input={m}/student.safetensors", "--from={t}", "--output={t}/o.safetensors"],
        ["--input=sf_jax/assets/digits_student.safetensors", "--output={t}/o.safetensors", "--dtype=bfloat16"],
    ],
    "evaluate": [
        *([f"--{name}={value}"] for name in ("frames", "num_samples", "batch_size") for value in (-1, 0, 10**12)),
        ["--seed=-1"],
        *([f"--checkpoint={path}"] for path in ("{t}", "{t}/none", "{f}", LONG, "gs://b/a", "student,student")),
        ["--checkpoint=student", "--names=a,b"],
        ["--names=real clips"],
        ["--guidance=3"],
        ["--out={f}"],
        ["--out={f}/report"],
        [f"--out={LONG}"],
        ["--frames=9", "--checkpoint=student,teacher", "--names=a"],
    ],
    "serve": [
        *([f"--port={value}"] for value in (-1, 70_000)),
        *([f"--{name}={value}"] for name in ("slots", "fps", "scale", "memory") for value in (-1, 0, 10**30)),
        *([f"--{name}=-1"] for name in ("waiting", "ahead", "lifetime", "drain")),
        ["--host=nonsense host"],
        [f"--host={LONG}"],
        ["--token_file={t}"],
        ["--token_file={t}/none"],
        ["--token_file={f}", "--host=0.0.0.0"],
        ["--replicas=2"],
        ["--accelerator=GPU"],
        ["--vae=tiny"],
        ["--model={m}"],
    ],
}


def by_kind(name: str, own: dict[str, flags.Flag]) -> list[list[str]]:
    """Command lines with an invalid value for each flag, chosen by the flag's kind."""
    lines = []
    for flag in own.values():
        kind = "bool" if flag.boolean else "config" if flag.name == "config" else flag.flag_type()
        kind = "enum" if getattr(flag.parser, "enum_values", None) else kind
        base = ["--config=configs/digits.py", "--dry_run"] if name == "train" and flag.name != "config" else []
        base = [] if flag.name == "dry_run" else base
        lines += [[*base, f"--{flag.name}={value}"] for value in ODD.get(kind, [])]
    return lines


def config_lines() -> list[list[str]]:
    """Command lines with a value of the wrong type for each field of a config."""
    from configs import digits
    from sf_jax.config import from_dict
    from sf_jax.config_help import fields_of

    wrong = {"int": "abc", "float": "abc", "bool": "maybe", "several int": "abc"}
    fields = fields_of(from_dict(digits.get_config()))
    kinds = [(name, kind.partition(" or ")[0]) for name, kind, _, _ in fields]
    return [
        ["--config=configs/digits.py", f"--config.{name}={wrong[kind]}", "--dry_run"]
        for name, kind in kinds
        if kind in wrong
    ]


@contextlib.contextmanager
def captured(path: str):
    """Redirects stderr to a file, also that of C libraries; discards stdout."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(path, "wb") as errors, open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1), os.dup2(errors.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for target, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, target)
            os.close(descriptor)


def run_line(main, options: dict, arguments: list[str], seconds: int = 60) -> dict:
    """Runs a command line and returns the outcome."""
    before = set(flags.FLAGS)
    sys.argv = ["command", *arguments]
    began, code = time.monotonic(), 0

    def late(number, frame):
        raise TimeoutError(f"took more than {seconds} s")

    from sf_jax import command

    with tempfile.NamedTemporaryFile() as errors:
        signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
        with captured(errors.name):
            try:
                command.run(main, **options)
            except SystemExit as end:  # sets the exit code as Python does
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                code = 1
                traceback.print_exc()
            finally:
                signal.alarm(0)
        text = Path(errors.name).read_bytes().decode(errors="replace")
    for name in list(flags.FLAGS):
        if name not in before | {"help", "helpshort", "version", "h"}:
            delattr(flags.FLAGS, name)
        else:
            flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()
    return {"arguments": arguments, "code": code, "error": text, "seconds": time.monotonic() - began}


def lines_of(name: str) -> list[list[str]]:
    """Handwritten command lines; `warm` has `generate`'s flags but ignores those for files and prompts."""
    if name != "warm":
        return LINES[name]
    files = ("--out", "--prompt", "--fps", "--scale", "--save", "--names")
    kept = [line for line in LINES["generate"] if not any(part.startswith(files) for part in line)]
    return [["--compile_only=h100:1"], *kept]


def main(name: str, folder: str, every: str = "1") -> None:
    """Runs the lines of a command, or only every `every`-th."""
    module = importlib.import_module(f"sf_jax.{name}")
    if name == "evaluate":
        module.define_flags()
    modules = flags.FLAGS.flags_by_module_dict()
    own = {flag.name: flag for flag in [*modules.get(f"sf_jax.{name}", []), *modules.get(sys.argv[0], [])]}
    required = {"train": ["config"], "prepare": ["model", "output"]}.get(name, [])
    lines = by_kind(name, own) + lines_of(name) + (config_lines() if name == "train" else [])
    (Path(folder) / "text.txt").write_text("a 7 moving left\n")
    (Path(folder) / "names").write_text("a\nb\n")
    for line in lines[:: int(every)]:
        empty = Path(folder) / "empty"
        shutil.rmtree(empty, ignore_errors=True)
        empty.mkdir()
        line = [
            a.replace("{m}", f"{folder}/wan").replace("{t}", str(empty)).replace("{f}", f"{folder}/text.txt")
            for a in line
        ]
        options = {"required": required}
        print(json.dumps(run_line(module.main, options, line)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
