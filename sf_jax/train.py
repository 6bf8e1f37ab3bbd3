"""Trains a stage: `python -m sf_jax.train --config=configs/digits.py:distill --workdir=runs/distill`.

Any field can be changed on the command line, e.g. `--config.steps=100 --config.optimizer.lr=1e-4`. Running the same
command again continues from the newest checkpoint in the workdir that is whole; SIGTERM and Ctrl-C save one.
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from sf_jax import command
from sf_jax.config import from_dict
from sf_jax.inference import digits_job
from sf_jax.training.loop import train
from sf_jax.weights.package import Package

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/digits.py:distill")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, log and exported weights")
_ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Continue although fields of the config differ from the checkpoint's"
)


def main() -> None:
    """Command line: see the module's docstring."""
    config = from_dict(_CONFIG.value)
    print(f"{config.stage} on {jax.device_count()} x {jax.devices()[0].device_kind}", flush=True)

    def sample(package: Package, path: Path) -> None:
        digits_job.write_samples(package, config.log.sample_prompts, path)

    print(f"wrote {train(config, _WORKDIR.value, sample, _ALLOW.value)}")


if __name__ == "__main__":
    command.run(main, required=["config", "workdir"])
