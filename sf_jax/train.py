"""Trains a stage: `python -m sf_jax.train --config=configs/digits.py:distill --workdir=runs/distill`.

Any config field can be set on the command line, such as `--config.steps=100 --config.optimizer.lr=1e-4`. Repeating the
command resumes from the newest complete checkpoint in the workdir. SIGTERM and Ctrl-C save a checkpoint first.

`--dry_run` prints the sizes of the networks, the memory per device, the FLOPs of an update and the sharding of every
array, without reading weights. `--compile_only=v5p:4x4x4` compiles the updates for a TPU slice that need not be
attached (`pip install "sf_jax[aot]"`), `--compile_only=h100:8` for GPUs (`pip install "sf_jax[gpu_aot]"`). It prints
what each update needs and what bounds an iteration. Neither flag needs a workdir.

Several processes train together if their environment says so; see `sf_jax.distributed` and the scripts in launch/.
"""

from collections.abc import Iterable

from absl import flags
from ml_collections import config_flags

from sf_jax import command, config_help, distributed
from sf_jax.config import from_dict
from sf_jax.io.video import check_encoder, write_samples
from sf_jax.training import ahead
from sf_jax.training.loop import train
from sf_jax.training.lora import resolved

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, e.g. configs/digits.py:distill")
flags.FLAGS["config"].parser = config_help.ConfigParser()
_WORKDIR = command.define_path("workdir", None, "Folder of checkpoints, log and exported weights")
_ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Continue although fields of the config differ from the checkpoint's"
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Describe the run and stop; no weight is read")
_COMPILE_ONLY = flags.DEFINE_string(
    "compile_only", None, "Devices to compile the updates for: a TPU slice, v5p:4x4x4, or GPUs, h100:8"
)

GROUPS = {"The run": ("config", "workdir", "allow_config_change"), "Instead of a run": ("dry_run", "compile_only")}


def main() -> None:
    """Command line: see the module's docstring."""
    import jax  # `command` has validated JAX's settings

    config = resolved(from_dict(_CONFIG.value))
    if _COMPILE_ONLY.value is not None:
        from sf_jax.perf import compile, training  # imported here, as no other run needs them

        compile.compile_anew()
        return _print(training.training_report(config, _COMPILE_ONLY.value))
    if _DRY_RUN.value:
        return _print(ahead.describe(config))
    if _WORKDIR.value is None:
        raise ValueError("flag --workdir=None: it must be given, a folder of checkpoints, log and exported weights")
    if config.log.sample_every:
        check_encoder()
    distributed.initialize()
    print(f"{config.stage} on {jax.device_count()} x {jax.devices()[0].device_kind}", flush=True)

    print(f"wrote {train(config, _WORKDIR.value, write_samples, _ALLOW.value)}")
    return None


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    command.run(
        main,
        required=["config"],
        groups=GROUPS,
        more_help=config_help.of_arguments,
        smaller="lower batch_size, raise accumulate, set model.remat to 'block', or use a mesh of more devices",
    )
