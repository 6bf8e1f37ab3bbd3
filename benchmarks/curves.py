"""Trains a causal stage of the moving digits and prints evaluation figures during training.

  python -m benchmarks.curves --config=configs/digits.py:distill --workdir=runs/curve --every=40 \
      --config.init_weights=runs/init/student.safetensors

Figures are those of `sf_jax.evaluate` for the averaged weights; each line is also appended to WORKDIR/curve.jsonl.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from sf_jax.config import from_dict
from sf_jax.evaluation import judge as judging
from sf_jax.evaluation import metrics
from sf_jax.inference.load import digits_pipeline
from sf_jax.training import loop, sharding, stages
from sf_jax.training.step import new_state, student_params, whole_params
from sf_jax.weights.package import save_package

_CONFIG = config_flags.DEFINE_config_file("config", None, "File of the configuration")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the curve and of the last weights")
_EVERY = flags.DEFINE_integer("every", 40, "Iterations between evaluations", lower_bound=1)
_FRAMES = flags.DEFINE_integer("frames", 36, "Frames of the videos")
_SAMPLES = flags.DEFINE_integer("num_samples", 128, "Videos of an evaluation")
SHOWN = ("joint", "joint_inside", "joint_across", "border_jump", "diversity", "identity", "brightness", "motion")


def main(_) -> None:
    """Alternates training and evaluation."""
    config = from_dict(_CONFIG.value)
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    judge = judging.load()
    prompts, kinds, targets = metrics.choose_prompts(_SAMPLES.value)
    real = metrics.reference(metrics.real_clips(kinds, _FRAMES.value, 0), targets, judge)
    mesh = sharding.make_mesh(config.mesh)
    stage = stages.open_stage(config, workdir, mesh)
    state = new_state(config, stage.params, stage.critic, stage.adapters)
    state = jax.device_put(state, sharding.tree_shardings(state, mesh))
    programs = loop.compile_updates(stage, mesh, state)
    constants = sharding.put_whole(stage.constants, mesh)

    def show(step: int) -> None:
        params = whole_params(config, student_params(state.model), stage.frozen)
        package = stages.package_of(config, jax.device_get(params))
        pipe = digits_pipeline(package)
        starts = range(0, len(prompts), 64)
        parts = [pipe(prompts[i : i + 64], frames=_FRAMES.value, seed=0, first_index=i) for i in starts]
        chunk_starts = pipe.chunk_starts(_FRAMES.value)
        figures = dataclasses.asdict(metrics.measure(np.concatenate(parts), targets, judge, real, chunk_starts))
        line = {"step": step} | {name: round(figures[name], 3) for name in SHOWN}
        line["frechet"] = [round(x, 1) for x in figures["frechet_per_quarter"]]
        line["first_windows"] = [round(x, 2) for x in figures["joint_per_frame"][:4]]
        print(json.dumps(line), flush=True)
        with (workdir / "curve.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        save_package(workdir / f"{package.kind}.safetensors", package)

    show(0)
    for step in range(config.steps):
        for program in programs:
            if not program.due(step):
                continue
            batch = next(stage.iterator)
            batch = sharding.put_batch({key: batch[key] for key in stage.keys}, mesh) | constants
            if not program.compiled:
                program.compile(state, stage.frozen, batch)
            state, _ = program(state, stage.frozen, batch)
        if (step + 1) % _EVERY.value == 0 or step + 1 == config.steps:
            show(step + 1)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
