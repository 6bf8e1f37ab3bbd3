"""Checkpoints: state, data position, config, code version and checksums in one atomic, asynchronous Orbax step.

A step's folder gets its name only when it is complete. Restoring verifies its contents: every array against a checksum
computed on the device before saving, all text against a hash. Folders that fail are moved to `workdir/damaged`, never
deleted, and only if an older one passes.
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

# Fields that may change when a run resumes; all others affect the results.
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
# In the names of Orbax's folders of unfinished steps.
_UNFINISHED = ".orbax-checkpoint-tmp"
# Seconds without writes before a failed save is cleaned up, and the timeout.
_QUIET_SECONDS, _QUIET_AT_LATEST = 1.0, 10.0


def code_version() -> str:
    """The version of this package and a hash of its source files."""
    digest = hashlib.sha256()
    root = Path(sf_jax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"{sf_jax.__version__}+{digest.hexdigest()[:12]}"


def plain(config: TrainConfig) -> dict:
    """A config after a round trip through JSON."""
    return json.loads(json.dumps(to_dict(config)))


def _is_field(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def changed_fields(saved: dict, config: TrainConfig) -> list[str]:
    """Fields that differ, as `name: old -> new`, except `FREE_FIELDS`; fields newer than the run have defaults."""
    with contextlib.suppress(ValueError):  # fields that this version does not know are compared unchanged
        saved = plain(from_dict(saved))
    lines = difference(saved, plain(config))
    # Long rollouts use the VAE; otherwise only samples do.
    free = tuple(name for name in FREE_FIELDS if name != "vae_weights" or not config.rollout_frames)
    return [line for line in lines if not _is_field(line.split(":")[0], free)]


def open_manager(workdir: Path, config: TrainConfig) -> ocp.CheckpointManager:
    """Opens the checkpoints of a workdir, after removing leftovers of interrupted saves."""
    folder = (workdir / "checkpoints").resolve()
    # Orbax cleans up in a thread that nothing waits for, so a run that ends early would print its traceback.
    remove_unfinished(folder)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=config.keep_checkpoints,
        create=True,
        enable_async_checkpointing=True,
        save_root_metadata=False,
        # Otherwise Orbax reads every step's metadata here, and damaged metadata ends the run.
        lightweight_initialize=True,
    )
    return ocp.CheckpointManager(folder, options=options)


def remove_unfinished(folder: Path) -> bool:
    """Removes leftovers of unfinished saves, which were never checkpoints; returns whether there were any."""
    found = list(folder.glob(f"*{_UNFINISHED}*")) if jax.process_index() == 0 else []
    for unfinished in found:
        shutil.rmtree(unfinished, ignore_errors=True)
    return bool(found)


def remove_failed(folder: Path) -> None:
    """`remove_unfinished` right after a failed save: repeats it, as TensorStore's threads still recreate folders."""
    began = quiet_since = time.monotonic()
    while (now := time.monotonic()) < min(quiet_since + _QUIET_SECONDS, began + _QUIET_AT_LATEST):
        if remove_unfinished(folder):
            quiet_since = now
        time.sleep(0.05)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Hides what Orbax prints about a failed save; the failure is raised where the save is awaited.

    When an array cannot be written, Orbax closes its event loop while other writes are in flight. asyncio prints about
    their tasks when it destroys them, and TensorStore's threads do when they find the loop closed. That can happen as
    late as process exit, so the filters stay in place if the block raises.
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
    """Whether a log record is neither from Orbax nor about a save that it started."""
    text = f"{record.pathname} {record.msg} {record.args}"
    if record.exc_info:
        text += "".join(traceback.format_exception(*record.exc_info))
    return not any(mark in text for mark in (f"{os.sep}orbax{os.sep}checkpoint{os.sep}", _UNFINISHED))


def _unraisable(hook: Callable, raised: "sys.UnraisableHookArgs") -> None:
    """Ignores 'Event loop is closed' raised without an object in TensorStore's threads after a failed save."""
    closed = isinstance(raised.exc_value, RuntimeError) and str(raised.exc_value) == "Event loop is closed"
    if not (closed and raised.object is None):
        hook(raised)


def _digest(parts: dict) -> str:
    """A hash of JSON-serializable values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_about(folder: Path) -> dict:
    """A checkpoint's description: config, code, data position, log, and the shapes and checksums of its arrays.

    Raises:
      ValueError: if it cannot be read or has changed since it was written.
    """
    try:
        about = ocp.JsonCheckpointHandler().restore(folder / "about", args=ocp.args.JsonRestore())
        digest = about.pop("digest")
    except Exception as error:  # Orbax raises exceptions of many types for damaged files.
        raise ValueError(f"what it says of itself cannot be read: {reason_of(error)}") from error
    if digest != _digest(about):
        raise ValueError("what it says of itself was changed after it was written")
    return about


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """Finished steps, newest first; ignores entries not named like a step (see `other_names`)."""
    return sorted(((int(path.name), path) for path in folder.glob("*") if _is_step(path)), reverse=True)


def _is_step(path: Path) -> bool:
    name = path.name
    return name.isdecimal() and name == str(int(name)) and path.is_dir() and not path.is_symlink()


def other_names(folder: Path) -> list[str]:
    """Names in the checkpoints folder that are not steps, except hidden and unfinished ones."""
    paths = (path for path in folder.glob("*") if not path.name.startswith(".") and _UNFINISHED not in path.name)
    return sorted(path.name for path in paths if not _is_step(path))


class SaveError(OSError):
    """A checkpoint cannot be written; the message names the last good one."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits on exit for a save in progress."""

    def __init__(self, workdir: Path, config: TrainConfig):
        """Opens or creates `workdir/checkpoints`."""
        self._workdir, self._config = workdir, config
        try:
            self._manager = open_manager(workdir, config)
        except Exception as error:  # Orbax raises many types; the user needs the folder and the reason.
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
            if kind is not None:  # The first error is the one to report.
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
        """The complete steps that the first process sees, newest first; every process must call this."""
        steps = [step for step, _ in step_folders(self._folder)]
        if jax.process_count() == 1:
            return steps
        return json.loads(first_told(json.dumps(steps) if jax.process_index() == 0 else None))

    def last_good(self) -> str:
        """A message with the newest complete checkpoint, after waiting for a save in progress."""
        with contextlib.suppress(Exception):
            self._manager.wait_until_finished()
        return self.newest_text()

    def newest_text(self) -> str:
        """A message with the newest complete checkpoint, without waiting."""
        step = self.newest
        return (
            "there is no checkpoint yet" if step is None else f"the last good checkpoint is {self._folder / str(step)}"
        )

    def save(self, step: int, state, data_state: dict, log: dict) -> None:
        """Starts saving a step; copies device memory before it returns, and writes files in the background.

        Args:
          step: number of finished iterations.
          state: the state, on the devices.
          data_state: the data's hashes and the iterator's position, JSON-serializable.
          log: metrics that the log has not written yet.

        Raises:
          FloatingPointError: if the state is not finite; it is not saved.
          OSError: if this save, or the previous one, cannot be written.
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
        """Raises OSError if the background save has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self, seconds: float | None = None) -> bool:
        """Waits at most `seconds` for the save in progress; returns False if it has not finished by then.

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
        """The error for a failed save; removes its leftovers, which would fill the disk."""
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
        """Compares this run's config with that of the newest readable checkpoint.

        Returns:
          The fields that differ; empty unless `allow_changes`.

        Raises:
          ValueError: if fields differ that may not; names them.
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
        fixed = [line for line in changed if line.startswith("stage:")]  # no flag allows another stage
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
        """The newest intact checkpoint as (step, state, about), or None if there are no checkpoints.

        Args:
          abstract_state: the state as `ShapeDtypeStruct`s with shardings, on any mesh.
          allow_changes: whether fields of the config may differ.

        Raises:
          ValueError: if the config or the state's shapes differ, or if none of the checkpoints can be read; no files
            are changed then.
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
                # Not the manager's `restore`, which ends in a barrier that a failing process never reaches.
                args = ocp.args.StandardRestore(abstract_state)
                state = ocp.StandardCheckpointHandler().restore(folder / "state", args=args)
            except Exception as error:  # Orbax and TensorStore raise many types.
                reason = reason_of(error)
            # A damaged file may be one that only one process reads, but all must agree.
            if reason := first_told(reason):
                faults.append((step, reason))
                continue
            wrong = [path for path, leaf in measure(state).items() if [*leaf[:3]] != about["leaves"][path]]
            if wrong:
                faults.append((step, f"{len(wrong)} arrays are not as they were saved, such as {wrong[0]}"))
                del state  # frees its memory before the older one is read
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
        """Raises on files without read permission: they are not damaged, so the checkpoint must not be moved aside."""
        paths = (folder, *folder.rglob("*"))
        closed = (path for path in paths if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)))
        path = next(closed, None)
        if name := first_told(path and path.name):
            raise ValueError(f"checkpoint {folder} cannot be read ({name}: Permission denied): make it readable")

    def _check_leaves(self, step: int, about: dict, abstract_state) -> None:
        """Checks that the state's shapes match; no flag can allow others."""
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
        """Moves damaged steps aside and prints where."""
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
