"""Optional logs in addition to `log.jsonl`: TensorBoard and Weights & Biases."""

import importlib
from pathlib import Path
from typing import Protocol

import jax

from sf_jax.config import TrainConfig, to_dict

_EXTRA = "pip install 'sf_jax[logs]'"


class Sink(Protocol):
    """Receives the values of log lines."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line."""

    def close(self) -> None:
        """Closes the log."""


class TensorBoard:
    """Event files in `workdir/tensorboard`; what a killed run wrote after `start` is hidden by TensorBoard."""

    def __init__(self, workdir: Path, start: int):
        """Opens a new event file."""
        from tensorboardX import SummaryWriter

        # TensorBoard drops steps from `purge_step` on in earlier files.
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its id is stored in `workdir/wandb_id.txt`, so that a resumed run continues it."""

    def __init__(self, workdir: Path, config: TrainConfig):
        """Opens a new run, or continues the interrupted one.

        Raises:
          ValueError: if Weights & Biases fails, for example because the user is not logged in.
        """
        import wandb

        kept = workdir / "wandb_id.txt"
        known = kept.read_text().strip() if kept.is_file() else None
        try:
            self._run = wandb.init(
                project=config.log.wandb_project,
                dir=str(workdir),
                id=known or None,
                resume="allow",
                config=to_dict(config),
                name=workdir.name,
            )
        except Exception as error:  # wandb raises its own exception types
            raise ValueError(f"log.wandb_project is {config.log.wandb_project!r}: wandb says: {error}") from error
        kept.write_text(f"{self._run.id}\n")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one line."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finishes the upload."""
        self._run.finish()


def check_packages(config: TrainConfig) -> None:
    """Checks that the packages of the configured logs are installed.

    Raises:
      ValueError: if one is not; names the field and what to install.
    """
    wanted = {
        "tensorboardX": config.log.tensorboard and "log.tensorboard is True",
        "wandb": config.log.wandb_project is not None and f"log.wandb_project is {config.log.wandb_project!r}",
    }
    for package, field in wanted.items():
        if field:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise ValueError(f"{field}: {package} is not installed: {_EXTRA}, or leave the field out") from error


def open_sinks(config: TrainConfig, workdir: Path, start: int) -> list[Sink]:
    """Opens the logs that the config enables; only the first process has any."""
    if jax.process_index():
        return []
    found: list[Sink] = [TensorBoard(workdir, start)] if config.log.tensorboard else []
    return found + ([WandB(workdir, config)] if config.log.wandb_project is not None else [])
