"""Trains a stage: `python -m sf_jax.train --config=configs/digits.py:distill --workdir=runs/distill`.

Any field can be changed on the command line, e.g. `--config.steps=100 --config.optimizer.lr=1e-4`. Running the same
command again continues from the newest checkpoint in the workdir.
"""

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sf_jax.config import from_dict
from sf_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/digits.py:distill")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, log and exported weights")


def main(arguments: list[str]) -> None:
    """Command line: see the module's docstring."""
    logging.set_verbosity(logging.WARNING)
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    try:
        config = from_dict(_CONFIG.value)
        print(f"{config.stage} on {jax.device_count()} x {jax.devices()[0].device_kind}", flush=True)
        path = train(config, _WORKDIR.value)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"wrote {path}")


def _parse(arguments: list[str]) -> list[str]:
    """Reads the flags; a config file or field that is not there becomes one line."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        sys.exit(f"error: {lines[-1] if lines else type(error).__name__}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
