"""Checkpoints: state, data position, config, code version and checksums in one atomic, asynchronous Orbax step.

A step's folder appears under its name only when it is complete. What is in it is checked on the way back: every array
against a checksum that was made of it on the device, every text against a hash. Folders that do not pass are moved to
`workdir/damaged`, never removed, and only when an older one did pass.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import sf_jax
from sf_jax.config import TrainConfig, difference, from_dict, to_dict
from sf_jax.distributed import first_told
from sf_jax.files import reason_of
from sf_jax.messages import quoted
from sf_jax.training.fingerprint import measure, shapes_of

# A run may be continued with other values of these; every other field is part of what is computed.
FREE_FIELDS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "accumulate",
    "on_nonfinite",
    "mesh",
    "data.dir",
    "log",
    "grace_seconds",
    "offload_teacher",
    "vae_weights",
)
# Orbax's name for the folder of a step that is not complete.
_UNFINISHED = ".orbax-checkpoint-tmp"
# After a save has failed: for how long nothing must have been written any more, and when to give up, in seconds.
_QUIET_SECONDS, _QUIET_AT_LATEST = 1.0, 10.0


def code_version() -> str:
    """The version of this package and a hash of its source files."""
    digest = hashlib.sha256()
    root = Path(sf_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{sf_jax.__version__}+{digest.hexdigest()[:12]}"


def plain(config: TrainConfig) -> dict:
    """A config as JSON gives it back."""
    return json.loads(json.dumps(to_dict(config)))


def _is_field(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def changed_fields(saved: dict, config: TrainConfig) -> list[str]:
    """Fields that differ, as `name: old -> new`, but for `FREE_FIELDS`; fields newer than the run have defaults."""
    with contextlib.suppress(ValueError):  # Fields that this version does not know: compared as they are.
        saved = plain(from_dict(saved))
    lines = difference(saved, plain(config))
    # Long rollouts go through the VAE; otherwise it only shows samples.
    free = tuple(name for name in FREE_FIELDS if name != "vae_weights" or not config.rollout_frames)
    return [line for line in lines if not _is_field(line.split(":")[0], free)]


def open_manager(workdir: Path, config: TrainConfig) -> ocp.CheckpointManager:
    """The checkpoints of a working directory, without what an interrupted save has left."""
    folder = (workdir / "checkpoints").resolve()
    # Orbax's own clean-up is a thread that nothing waits for: a run that ends early would end in its traceback.
    remove_unfinished(folder)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.keep_checkpoints,
        create=True,
        enable_async_checkpointing=True,
        save_root_metadata=False,
        # Otherwise every step's own metadata is read now, and a damaged one ends the run here.
        lightweight_initialize=True,
    )
    return ocp.CheckpointManager(folder, options=options)


def remove_unfinished(folder: Path) -> bool:
    """Removes what saves that did not finish have left, which was never a checkpoint; returns whether there was any."""
    found = list(folder.glob(f"*{_UNFINISHED}*")) if jax.process_index() == 0 else []
    for unfinished in found:
        shutil.rmtree(unfinished, ignore_errors=True)
    return bool(found)


def remove_failed(folder: Path) -> None:
    """As `remove_unfinished`, just after a save has failed: TensorStore's threads go on, and make its folders anew."""
    began = quiet_since = time.monotonic()
    while (now := time.monotonic()) < min(quiet_since + _QUIET_SECONDS, began + _QUIET_AT_LATEST):
        if remove_unfinished(folder):
            quiet_since = now
        time.sleep(0.05)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Keeps what Orbax prints of a failed save off the terminal: the failure is raised where it is waited for.

    When an array cannot be written, Orbax closes its event loop under those that are still being written. What becomes
    of them is printed by asyncio, when it forgets their tasks, and by TensorStore's threads, when they find the loop
    closed: as late as the process ends, so that they are silenced for good where the block raises.
    """
    with contextlib.ExitStack() as undo:
        for logger in map(logging.getLogger, ("absl", "asyncio")):
            logger.addFilter(_not_orbax)
            undo.callback(logger.removeFilter, _not_orbax)
        undo.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            yield
        except BaseException:
            undo.pop_all()
            raise


def _not_orbax(record: logging.LogRecord) -> bool:
    """Whether a line of a log is not Orbax's, and not about something that it has started."""
    text = f"{record.pathname} {record.msg} {record.args}"
    if record.exc_info:
        text += "".join(traceback.format_exception(*record.exc_info))
    return not any(mark in text for mark in (f"{os.sep}orbax{os.sep}checkpoint{os.sep}", _UNFINISHED))


def _unraisable(hook: Callable, raised: "sys.UnraisableHookArgs") -> None:
    """Leaves out what TensorStore's threads raise, which name no object: the outcome of a write, and nobody to tell."""
    closed = isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"
    if not (closed and raised.object is None):
        hook(raised)


def _digest(parts: dict) -> str:
    """A hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_about(folder: Path) -> dict:
    """What a checkpoint says of itself: config, code, data position, log, and the shapes and checksums of its arrays.

    Raises:
      ValueError: if it cannot be read or was changed since it was written.
    """
    try:
        about = ocp.JsonCheckpointHandler().restore(folder / "about", args=ocp.args.JsonRestore())
        digest = about.pop("digest")
    except Exception as error:  # Damaged files make Orbax raise nearly anything.
        raise ValueError(f"what it says of itself cannot be read: {reason_of(error)}") from error
    if digest != _digest(about):
        raise ValueError("what it says of itself was changed after it was written")
    return about


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Finished steps, newest first; what has another name than a step's folder is none (see `other_names`)."""
    return sorted(((int(path.name), path) for path in folder.glob("*") if _is_step(path)), reverse=True)


def _is_step(path: Path) -> bool:
    name = path.name
    return name.isdecimal() and name == str(int(name)) and path.is_dir() and not path.is_symlink()


def other_names(folder: Path) -> list[str]:
    """Names in the folder of checkpoints that are none of a step, hidden and unfinished ones left out."""
    paths = (path for path in folder.glob("*") if not path.name.startswith(".") and _UNFINISHED not in path.name)
    return sorted(path.name for path in paths if not _is_step(path))


class SaveError(OSError):
    """A checkpoint cannot be written; the message names the last good one."""


class Checkpoints:
    """The checkpoints of one run. A context manager: leaving it waits for a save that is under way."""

    def __init__(self, workdir: Path, config: TrainConfig):
        """Opens or makes `workdir/checkpoints`."""
        self._workdir, self._config = workdir, config
        try:
            self._manager = open_manager(workdir, config)
        except Exception as error:  # Orbax raises many kinds; the user needs the folder and the reason.
            raise ValueError(f"cannot open {workdir / 'checkpoints'}: {reason_of(error)}") from error
        self._folder = Path(self._manager.directory)
        if jax.process_index() == 0 and (others := other_names(self._folder)):
            names = ", ".join(quoted(name, 40) for name in others[:8]) + ", ..." * (len(others) > 8)
            print(f"{self._folder} holds {names}: no folders of steps, skipped; move them away", flush=True)
        self._saving: tuple[int, float] | None = None
        self._code = code_version()
        self.save_seconds: float | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.ExitStack() as stack:
            if kind is not None:  # The first error is the one to tell.
                stack.enter_context(contextlib.suppress(Exception))
            try:
                self._manager.close()
            except Exception as failure:
                raise self._failed(failure) from failure

    @property
    def newest(self) -> int | None:
        """The newest complete step."""
        found = step_folders(self._folder)
        return found[0][0] if found else None

    def agreed_steps(self) -> list[int]:
        """The complete steps that the first process sees, newest first; every process must ask."""
        steps = [step for step, _ in step_folders(self._folder)]
        if jax.process_count() == 1:
            return steps
        return json.loads(first_told(json.dumps(steps) if jax.process_index() == 0 else None))

    def last_good(self) -> str:
        """The newest complete checkpoint, for messages, after a save under way has ended."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        return self.newest_text()

    def newest_text(self) -> str:
        """The newest complete checkpoint, for messages, at once."""
        step = self.newest
        return (
            "there is no checkpoint yet" if step is None else f"the last good checkpoint is {self._folder / str(step)}"
        )

    def save(self, step: int, state, data_state: dict, log: dict) -> None:
        """Starts saving a step; device memory is copied before this returns, the files are written in the background.

        Args:
          step: iterations done.
          state: the state, on the devices.
          data_state: which data, and the iterator's position in it, as JSON can hold it.
          log: metrics that the log has not written yet.

        Raises:
          FloatingPointError: if the state is not finite; it is not saved.
          OSError: if this save, or the one before it, cannot be written.
        """
        if self._saving is not None and self._saving[0] == step:
            return
        leaves = measure(state)
        bad = [f"{path} ({leaf.nonfinite} of its values)" for path, leaf in leaves.items() if leaf.nonfinite]
        if bad:
            raise FloatingPointError(f"step {step}: {'; '.join(bad[:4])}{' and more' * (len(bad) > 4)} is not finite")
        about = {
            "config": plain(self._config),
            "code": self._code,
            "data": data_state,
            "log": log,
            "leaves": {path: leaf[:3] for path, leaf in leaves.items()},
        }
        about = json.loads(json.dumps(about))
        try:
            self._manager.wait_until_finished()
            self._saving = (step, time.perf_counter())
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about | {"digest": _digest(about)})
            )
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._failed(error) from error

    def check(self) -> None:
        """Raises OSError if the save in the background has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for the save under way, at most so many seconds; False if it is not finished then.

        Raises:
          OSError: if it failed.
        """
        failure = []

        def finish():
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                failure.append(error)

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            return False
        if failure:
            raise self._failed(failure[0]) from failure[0]
        if self._saving is not None:
            self.save_seconds = time.perf_counter() - self._saving[1]
        return True

    def _failed(self, error: Exception) -> SaveError:
        """The error for a save that failed, whose leftovers are removed: they would fill the disk."""
        if isinstance(error, SaveError):
            return error
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        remove_failed(self._folder)
        step = "a step" if self._saving is None else f"step {self._saving[0]}"
        return SaveError(
            f"cannot save {step} in {self._folder} ({reason_of(error)}): {self.last_good()}; "
            "make room or mend the folder, then run the same command again to go on from there"
        )

    def check_config(self, allow_changes: bool = False) -> list[str]:
        """Compares this run's config with that of the newest checkpoint that can be read.

        Returns:
          The fields that differ, which is empty unless `allow_changes`.

        Raises:
          ValueError: naming the fields that differ.
        """
        for step in self.agreed_steps():
            about, unreadable = None, None
            try:
                about = read_about(self._folder / str(step))
            except ValueError as error:
                unreadable = str(error)  # `restore` says so.
            if not first_told(unreadable):
                return self._compare(step, about, allow_changes)
        return []

    def _compare(self, step: int, about: dict, allow_changes: bool) -> list[str]:
        changed = changed_fields(about["config"], self._config)
        fixed = [line for line in changed if line.startswith("stage:")]  # no flag makes one fit another
        if fixed:
            raise ValueError(f"{self._workdir} is the workdir of another stage ({fixed[0]}): use another --workdir")
        if changed and not allow_changes:
            more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
            raise ValueError(
                f"{self._workdir} holds step {step} of a run with another config ({'; '.join(changed[:6])}{more}): "
                "use another --workdir or the old config, or --allow_config_change to go on with the new one"
            )
        return changed

    def restore(self, abstract_state, allow_changes: bool = False):
        """The newest checkpoint that is whole as (step, state, about), or None if there is none at all.

        Args:
          abstract_state: the state as `ShapeDtypeStruct`s that carry shardings; of any mesh.
          allow_changes: whether fields of the config may differ.

        Raises:
          ValueError: if the config or the state's shapes differ, or if none of the checkpoints can be read; nothing is
            changed then.
        """
        faults = []
        for step in self.agreed_steps():
            folder = self._folder / str(step)
            self._check_permissions(folder)
            about, reason = None, None
            try:
                about = read_about(folder)
            except ValueError as error:
                reason = str(error)
            if reason := first_told(reason):
                faults.append((step, reason))
                continue
            self._compare(step, about, allow_changes)
            self._check_leaves(step, about, abstract_state)
            state = None
            try:
                # Not the manager's `restore`: it ends in a barrier, which a process that fails never reaches.
                args = ocp.args.StandardRestore(abstract_state)
                state = ocp.StandardCheckpointHandler().restore(folder / "state", args=args)
            except Exception as error:  # Orbax and TensorStore raise many kinds.
                reason = reason_of(error)
            # A file may be damaged that only one process reads: all must come to the same verdict.
            if reason := first_told(reason):
                faults.append((step, reason))
                continue
            wrong = [path for path, leaf in measure(state).items() if [*leaf[:3]] != about["leaves"][path]]
            if wrong:
                faults.append((step, f"{len(wrong)} arrays are not as they were saved, such as {wrong[0]}"))
                del state  # or the older one would need room beside it
                continue
            self._move_aside(faults, step)
            if about["code"] != self._code:
                print(f"step {step} was saved by {about['code']}, this is {self._code}: numbers may differ", flush=True)
            return step, state, about
        if faults:
            told = "; ".join(f"step {step}: {reason}" for step, reason in faults)
            raise ValueError(
                f"none of the checkpoints in {self._folder} can be read ({told}): nothing was changed; "
                "bring them back from a copy, or use another --workdir to start again"
            )
        return None

    def _check_permissions(self, folder: Path) -> None:
        """Files that may not be read are no damage: moving them aside would lose a good checkpoint."""
        paths = (folder, *folder.rglob("*"))
        closed = (path for path in paths if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)))
        path = next(closed, None)
        if name := first_told(path and path.name):
            raise ValueError(f"checkpoint {folder} cannot be read ({name}: Permission denied): make it readable")

    def _check_leaves(self, step: int, about: dict, abstract_state) -> None:
        """Refuses a state of other shapes, which no flag can make fit."""
        saved = {path: leaf[:2] for path, leaf in about["leaves"].items()}
        wanted = {path: [*leaf] for path, leaf in shapes_of(abstract_state).items()}
        if saved == wanted:
            return
        path = next(path for path in sorted(saved.keys() | wanted.keys()) if saved.get(path) != wanted.get(path))
        here, there = (
            "nothing" if leaf is None else f"{leaf[1]}{leaf[0]}" for leaf in (wanted.get(path), saved.get(path))
        )
        raise ValueError(
            f"{self._workdir} holds step {step} of another model or optimizer ({path} is {there}, this config wants "
            f"{here}): use another --workdir or the old config"
        )

    def _move_aside(self, faults: list[tuple[int, str]], good: int) -> None:
        """Moves damaged steps out of the way and says so."""
        for step, reason in faults:
            target = self._workdir / "damaged" / str(step)
            for i in range(1, 1000):
                if not target.exists():
                    break
                target = target.with_name(f"{step}.{i}")
            if jax.process_index() == 0:
                target.parent.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(target)
                told = f"checkpoint of step {step} is damaged ({reason}): moved to {target}, using step {good}"
                print(told, flush=True)
        if faults:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints moved")
            self._manager.reload()
