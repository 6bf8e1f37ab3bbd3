"""Trains a stage: `python -m sf_jax.train --config=configs/digits.py:distill --workdir=runs/distill`.

Any field can be changed on the command line, e.g. `--config.steps=100 --config.optimizer.lr=1e-4`. Running the same
command again continues from the newest checkpoint in the workdir.
"""

import jax
from absl import flags
from ml_collections import config_flags

from sf_jax import command
from sf_jax.config import from_dict
from sf_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/digits.py:distill")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, log and exported weights")


def main() -> None:
    """Command line: see the module's docstring."""
    config = from_dict(_CONFIG.value)
    print(f"{config.stage} on {jax.device_count()} x {jax.devices()[0].device_kind}", flush=True)
    print(f"wrote {train(config, _WORKDIR.value)}")


if __name__ == "__main__":
    command.run(main, required=["config", "workdir"])
