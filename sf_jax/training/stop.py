"""Graceful stop: SIGTERM (preemption, SLURM, TPU VMs) and Ctrl-C end a run after a step, with a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from sf_jax.training.checkpoint import Checkpoints

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}  # after a checkpoint was saved
UNSAVED_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}  # with nothing new to save; the shell's convention

_SECONDS_TO_UNWIND = 5  # until a process with nothing to save is forced to exit


class Stopped(SystemExit):
    """Raised when a run has stopped on request; carries the process's exit code."""


class StopRequest:
    """Tracks whether the run has been asked to stop.

    With several processes, JAX's preemption service catches SIGTERM on any of them and determines the step after which
    all of them stop.

    Attributes:
      busy: whether there is something to save; otherwise a signal ends the run at once, with an error code.
    """

    def __init__(self):
        """Starts without a request."""
        self.busy = False
        self._signal: signal.Signals | None = None
        self._since = 0.0

    def take(self, number: int, frame=None) -> None:
        """Handles a signal."""
        del frame
        asked = signal.Signals(number)
        if self._signal == asked == signal.SIGINT:
            raise KeyboardInterrupt  # A second Ctrl-C stops at once.
        if self._signal is None:
            self._signal, self._since = asked, time.monotonic()
        if not self.busy:
            reason = "ended before there was anything new to save; the same command goes on from where it was"
            print(f"error: {asked.name}: {reason}", file=sys.stderr, flush=True)
            raise Stopped(UNSAVED_CODES[asked])

    def wanted(self, step: int) -> bool:
        """Whether to stop after `step`; every process must call this after every step."""
        if self._signal is None and jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.take(signal.SIGTERM)
        return self._signal is not None

    def finish(self, checkpoints: Checkpoints, step: int, grace: float) -> Stopped:
        """Waits for the checkpoint of `step` until `grace` seconds after the signal at most, and prints the result."""
        name, began = self._signal.name, time.monotonic()
        if not checkpoints.wait(max(0.0, self._since + grace - began)):
            told = f"{name}: step {step} was not saved within {grace:g} s (grace_seconds); {checkpoints.newest_text()}"
            print(f"error: {told}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)  # The save's threads would otherwise keep the process alive until it is killed.
        print(
            f"{name}: saved step {step} in {checkpoints.save_seconds:.1f} s, {time.monotonic() - self._since:.1f} s "
            f"after the signal (grace_seconds: {grace:g}); the same command goes on from there",
            flush=True,
        )
        return Stopped(EXIT_CODES[self._signal])


def _pass_on(number: int, frame) -> None:
    """Turns the first Ctrl-C into SIGTERM; the second stops at once."""
    del number, frame
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM and Ctrl-C while the block runs; only in the main thread, as Python requires."""
    request = StopRequest()
    ends: list[threading.Timer] = []

    def take(number: int, frame) -> None:
        if not request.busy and not ends:
            # Libraries swallow exceptions in their callbacks, and wait for compilations, so this forces an exit.
            ends.append(threading.Timer(_SECONDS_TO_UNWIND, os._exit, (UNSAVED_CODES[number],)))
            ends[0].daemon = True
            ends[0].start()
        request.take(number, frame)

    hook = sys.unraisablehook

    def unraisable(swallowed) -> None:
        if not isinstance(swallowed.exc_value, (Stopped, KeyboardInterrupt)):
            hook(swallowed)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    if jax.process_count() > 1:  # JAX's service handles SIGTERM, so Ctrl-C is passed on as SIGTERM
        handlers = {signal.SIGINT: _pass_on}
    else:
        handlers = dict.fromkeys(EXIT_CODES, take)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    sys.unraisablehook = unraisable
    try:
        yield request
    finally:
        for end in ends:
            end.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
