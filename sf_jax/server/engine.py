"""The engine: one thread that owns the devices, admits sessions, steps their streams in one batch, changes prompts.

Everything here runs in that thread. Other threads put commands into its queue and receive events through
`Session.send`.
"""

import dataclasses
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.inference.prompt_change import check_change
from sf_jax.inference.stream import Stream
from sf_jax.server.metrics import Metrics
from sf_jax.server.protocol import Interaction, RequestError

log = logging.getLogger(__name__)
REPORT_SECONDS = 0.1  # maximum delay of a viewer's reported position


@dataclasses.dataclass(frozen=True)
class Position:
    """A session's place in the queue for a slot; 0 is next."""

    place: int


@dataclasses.dataclass(frozen=True)
class Started:
    """The session has a slot."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Frames of a session.

    Attributes:
      index: index of the chunk, from 0.
      frames: uint8 [m, h, w, c].
      seconds: duration of the step, which all streams share.
      ahead: number of chunks that the viewer has not played yet, including this one.
      started, active, completed: ids of the interactions that begin with it, affect it, and end with it.
    """

    index: int
    frames: np.ndarray
    seconds: float
    ahead: float
    started: tuple[str, ...] = ()
    active: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Failed:
    """A client's request failed; `ends` is whether this ends the session."""

    error: RequestError
    ends: bool


@dataclasses.dataclass(frozen=True)
class Ended:
    """The session has ended: "completed", "stopped", "lifetime" or "shutdown"."""

    reason: str


@dataclasses.dataclass(eq=False)
class Session:
    """A video that a client watches.

    Attributes:
      request_id: its name.
      prompt: the first prompt.
      seed: seed of its noise.
      fps: frames per second of playback.
      num_frames: its length; None is endless.
      send: receives events in the engine's thread; must not block.
      wants_more: whether the client can take another chunk; None generates in real time.
      lifetime: seconds after which it ends.
      buffer: seconds to generate ahead of `position`, if the viewer reports it; None assumes playback in real time.
      position: seconds that the viewer has played, as reported.
      has_room: whether its connection can take another chunk; None is always.
    """

    request_id: str
    prompt: str
    seed: int
    fps: float
    num_frames: int | None
    send: Callable[[Any], None]
    wants_more: Callable[[], bool] | None = None
    lifetime: float = math.inf
    buffer: float | None = None
    position: float = 0.0
    has_room: Callable[[], bool] | None = None
    asked: float = dataclasses.field(default_factory=time.monotonic)
    admitted: float | None = None
    stream: int | None = None
    chunks: int = 0
    frames: int = 0
    clock: float | None = None  # time at which its first frame was played, shifted by pauses and underruns
    paused_at: float | None = None
    last: float | None = None  # when its last chunk was generated
    interaction: tuple[str, int] | None = None  # id of the current one, and chunks until it is complete
    begins: bool = False  # whether that interaction has not affected a chunk yet
    over: bool = False

    def lead(self, now: float) -> float:
        """Seconds of video that the viewer has not played yet."""
        if self.buffer is not None:
            return self.frames / self.fps - self.position
        return self._real_lead(now)

    def _real_lead(self, now: float) -> float:
        """The same, assuming playback in real time."""
        if self.clock is None:
            return 0.0
        return self.frames / self.fps - ((self.paused_at or now) - self.clock)

    def due(self, now: float, ahead: float) -> float:
        """Seconds until the next chunk is due, so that `ahead` seconds are ready; infinity while paused."""
        if self.paused_at is not None or (self.has_room is not None and not self.has_room()):
            return math.inf
        if self.wants_more is not None:
            return 0.0 if self.wants_more() else math.inf
        if self.buffer is None:
            return self.lead(now) - ahead
        # a viewer that reports playing faster than real time gets no extra chunks
        return max(0.0, self._real_lead(now) - self.buffer - ahead) if self.lead(now) < self.buffer else math.inf


class Engine:
    """Runs the streams of many sessions on one pipeline."""

    def __init__(
        self,
        load: Callable[[], VideoPipeline],
        metrics: Metrics,
        *,
        slots: int = 4,
        waiting: int = 16,
        ahead: float = 2.0,
        memory: int | None = None,
        mode: str = "swap",
        context_timestep: float | None = None,
        fade: float = 0.0,
    ):
        """Creates the thread; nothing is loaded before `start`.

        Args:
          load: loads the pipeline.
          metrics: the metrics to update.
          slots: maximum number of simultaneous streams.
          waiting: maximum number of sessions that wait for a slot.
          ahead: number of chunks to generate ahead of playback.
          memory: see `Stream`.
          mode: mode of a prompt change, if the client does not set it.
          context_timestep: context timestep for that mode.
          fade: fading of old frames for that mode.
        """
        check_change(mode, 0, context_timestep, fade)
        self.mode, self.context_timestep, self.fade = mode, context_timestep, fade
        self._load, self.metrics, self.slots, self.waiting, self.ahead = load, metrics, slots, waiting, ahead
        self._memory = memory
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._queue: deque[Session] = deque()
        self._playing: list[Session] = []
        self._places: dict[Session, int] = {}
        self.pipe: VideoPipeline | None = None
        self.error: BaseException | None = None
        self.ready, self.ended = threading.Event(), threading.Event()
        self.draining = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.slots.set(slots)

    def start(self) -> None:
        """Loads the pipeline and compiles every program; `ready` is set when that is done."""
        self._thread.start()

    def drain(self) -> None:
        """Stops admitting new sessions."""
        self.draining = True

    def end_all(self) -> None:
        """Ends all sessions for a shutdown."""
        self._commands.put(lambda: [self._end(session, "shutdown") for session in [*self._playing, *self._queue]])

    def close(self, timeout: float | None = None) -> None:
        """Ends all sessions and the thread."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def full(self) -> bool:
        """Whether another session would be rejected."""
        return len(self._playing) + len(self._queue) >= self.slots + self.waiting

    @property
    def used(self) -> int:
        """Number of sessions that play or wait."""
        return len(self._playing) + len(self._queue)

    def retry_after(self) -> int:
        """Rough estimate of the seconds after which a retry may succeed."""
        return 5 + 2 * len(self._queue)

    def submit(self, session: Session) -> None:
        """Admits or queues a session; its events arrive through `session.send`."""
        self._commands.put(lambda: self._submit(session))

    def interact(self, session: Session, interaction: Interaction) -> None:
        """Changes a session's prompt from its next chunk on."""
        self._commands.put(lambda: self._interact(session, interaction))

    def pause(self, session: Session, paused: bool) -> None:
        """Pauses or resumes a session."""
        self._commands.put(lambda: self._pause(session, paused))

    def play(self, session: Session, position: float) -> None:
        """Reports how many seconds of its video a viewer has played."""
        self._commands.put(lambda: self._play(session, position))

    def end(self, session: Session, reason: str = "stopped") -> None:
        """Ends a session and frees its slot."""
        self._commands.put(lambda: self._end(session, reason))

    def wake(self) -> None:
        """Makes the engine check `wants_more` and `has_room` again."""
        self._commands.put(lambda: None)

    def _run(self) -> None:
        try:
            self.pipe = self._load()
            self._chunk_frames = self.pipe.rollout.chunk * self.pipe.temporal_factor
            # loads a text encoder that stays in memory before the memory for slots is measured
            self.pipe.text_encoder.encode([""])
            self._stream = self._new_stream()
            self._warm()
            self.ready.set()
            self._serve()
        except BaseException as error:  # reported by those who wait for `ready` or `ended`
            self.error = error
            if self.ready.is_set():
                log.error("the engine ended", exc_info=error)
            for session in [*self._playing, *self._queue]:
                session.over = True
                session.send(Failed(_request_error(RuntimeError(), "internal"), ends=True))
            self._playing.clear()
            self._queue.clear()
        self.ready.set()
        self.ended.set()
        while self.error is not None and self._commanded(None):
            pass  # fails the sessions that are still submitted

    def _serve(self) -> None:
        open_ = True
        while open_:
            open_ = self._commanded(self._wait(time.monotonic()))
            self._admit()
            self._step(time.monotonic())
        for session in [*self._playing, *self._queue]:
            self._end(session, "shutdown")

    def _new_stream(self) -> Stream:
        return Stream(self.pipe, self.slots, memory=self._memory)

    def _warm(self) -> None:
        """Runs every program once, with a full window and with a flushed one."""
        stream, prompt = self._stream, np.zeros((self._text.text_len, self._text.text_dim), np.float32)
        one = stream.join(prompt)
        for _ in range(-(-self.pipe.rollout.window // self.pipe.rollout.chunk)):
            stream.step([one])[one]
        recaches = self.pipe.rollout.context != "noisy"
        for mode, timestep in [("swap", None), *([("recache", None), ("recache", 400.0)] if recaches else [])]:
            stream.prompt(one, prompt, mode, context_timestep=timestep, fade=0.5)
            stream.step([one])[one]
        for mode, timestep in [("recache", None), ("flush", 400.0)] if recaches else [("flush", None)]:
            stream.prompt(one, prompt, "flush")  # takes effect at once; the next prompt replaces it
            stream.prompt(one, prompt, mode, context_timestep=timestep)
            stream.step([one])[one]
        stream.prompt(one, prompt, "cut")
        stream.step([one])[one]
        stream.leave(one)

    @property
    def _text(self):
        return self.pipe.transformer.config

    def _chunk_seconds(self, session: Session) -> float:
        return self._chunk_frames / session.fps

    def _wait(self, now: float) -> float | None:
        """Seconds until the next action; None waits for a command."""
        dues = [s.due(now, self.ahead * self._chunk_seconds(s)) for s in self._playing]
        ends = [s.admitted + s.lifetime - now for s in self._playing]
        least = min(dues + ends, default=math.inf)
        return None if math.isinf(least) else max(0.0, least)

    def _commanded(self, timeout: float | None) -> bool:
        """Executes the queued commands; False if the engine must end."""
        try:
            command = self._commands.get(timeout=timeout) if timeout != 0 else self._commands.get_nowait()
            while True:
                if command is None:
                    return False
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return True

    def _submit(self, session: Session) -> None:
        if session.over:
            return
        if self.error is not None:
            self._fail(session, _request_error(RuntimeError(), "internal"))
            return
        if self.draining:
            self._fail(session, RequestError("shutdown", "the server is shutting down: try again in a minute"))
            return
        if self.full:
            wait = self.retry_after()
            error = RequestError("busy", f"all {self.slots} slots are taken: try again in {wait} s")
            self._fail(session, error)
            return
        self._queue.append(session)

    def _interact(self, session: Session, interaction: Interaction) -> None:
        if session.over:
            return
        name = interaction.event_id or ""
        if session.stream is None:
            error = RequestError("not_started", "the video has not begun: wait for video.start", name)
            session.send(Failed(error, ends=False))
            return
        # The protocol's transition of N chunks ends in the Nth, so 0 and 1 are the same.
        blends = max(0, interaction.transition_chunks - 1)
        if interaction.mode == "cut" and blends:
            count = interaction.transition_chunks
            error = RequestError(
                "invalid_interaction", f"transition_chunks is {count}: a cut is at once, leave it out", name
            )
            session.send(Failed(error, ends=False))
            return
        mode, timestep, fade = interaction.mode, interaction.context_timestep, interaction.fade
        if mode is None:
            mode, timestep = self.mode, self.context_timestep if timestep is None else timestep
            fade = self.fade if fade is None else fade
        try:
            self._stream.prompt(
                session.stream,
                interaction.event.prompt,
                mode,
                transition_chunks=blends,
                context_timestep=timestep,
                fade=fade or 0.0,
            )
        except BaseException as error:  # a tokenizer's panic is not an Exception
            session.send(Failed(_request_error(error, "invalid_interaction", name), ends=False))
            return
        session.interaction = (name, blends + 1)
        session.begins = True

    def _pause(self, session: Session, paused: bool) -> None:
        now = time.monotonic()
        if paused and session.paused_at is None:
            session.paused_at = now
        elif not paused and session.paused_at is not None:
            if session.clock is not None:
                session.clock += now - session.paused_at
            session.paused_at, session.last = None, None

    def _play(self, session: Session, position: float) -> None:
        session.position = max(session.position, min(position, session.frames / session.fps))

    def _end(self, session: Session, reason: str) -> None:
        if not session.over:
            self._forget(session)
            session.send(Ended(reason))

    def _fail(self, session: Session, error: RequestError) -> None:
        if not session.over:
            self._forget(session)
            session.send(Failed(error, ends=True))

    def _forget(self, session: Session) -> None:
        session.over = True
        if session in self._queue:
            self._queue.remove(session)
        if session in self._playing:
            self._playing.remove(session)
        if session.stream is not None and session.stream in self._stream.playing:
            self._stream.leave(session.stream)
        self._places.pop(session, None)

    def _admit(self) -> None:
        while self._queue and self._stream.free:
            session = self._queue.popleft()
            try:
                session.stream = self._stream.join(session.prompt, seed=session.seed)
            except BaseException as error:  # a tokenizer's panic is not an Exception
                self._fail(session, _request_error(error, "invalid_prompt"))
                continue
            self._playing.append(session)
            session.admitted = time.monotonic()
            session.send(Started())
        for place, session in enumerate(self._queue):
            if self._places.get(session) != place:
                self._places[session] = place
                session.send(Position(place))
        self.metrics.streams.set(len(self._playing))
        self.metrics.queue.set(len(self._queue))

    def _step(self, now: float) -> None:
        """Generates the next chunk of the sessions that are due or soon will be."""
        for session in [s for s in self._playing if now - s.admitted > s.lifetime]:
            self._end(session, "lifetime")
        ahead = {s: self.ahead * self._chunk_seconds(s) for s in self._playing}
        if not any(s.due(now, ahead[s]) <= 0 for s in self._playing):
            return
        # one batch for all: includes sessions that are due within half a chunk
        due = [s for s in self._playing if s.due(now, ahead[s]) <= self._chunk_seconds(s) / 2]
        frames = self._stepped(due)
        done = time.monotonic()
        self.metrics.chunk_time.observe(done - now)
        for session, pixels in frames.items():
            self._deliver(session, pixels, done, done - now)

    def _stepped(self, due: list[Session]) -> dict[Session, np.ndarray]:
        """Frames of one step of these sessions; if the step fails for some, only those end."""
        try:
            step = self._stream.step([s.stream for s in due])
            return {s: step[s.stream] for s in due}
        except ValueError as error:  # one of the streams has reached its end
            if len(due) > 1:
                return {s: pixels for one in due for s, pixels in self._stepped([one]).items()}
            self._fail(due[0], _request_error(error, "generation_failed"))
            return {}
        except Exception as error:  # kept no longer than here, as its frames hold the state
            log.error("a step failed", exc_info=error)
            problem = _request_error(error, "generation_failed")
        lost = [s for s in self._playing if s.stream not in self._stream.playing]
        if not lost:  # the state may be lost; there may be no room for both
            self._stream = None
            lost, self._stream = list(self._playing), self._new_stream()
        for session in lost:
            self._fail(session, problem)
        return {}

    def _deliver(self, session: Session, frames: np.ndarray, now: float, seconds: float) -> None:
        count, metrics = len(frames), self.metrics
        if session.num_frames is not None:
            frames = frames[: session.num_frames - session.frames]
        metrics.chunks.inc()
        if session.clock is None:
            session.clock = now
            metrics.first_chunk.observe(now - session.asked)
        elif session.wants_more is None:
            # a reported position is slightly old
            late = (REPORT_SECONDS if session.buffer is not None else 0.0) - session.lead(now)
            if late >= 0:
                session.clock += late
                metrics.underruns.inc()
            else:
                metrics.in_time.inc()
        if session.last is not None and session.wants_more is None:
            metrics.interval.observe(now - session.last)
        session.last, session.frames = now, session.frames + count
        ids = {"started": (), "active": (), "completed": ()}
        if session.interaction is not None:
            name, left = session.interaction
            ids["active"] = (name,)
            ids["started"] = (name,) if session.begins else ()
            ids["completed"] = (name,) if left == 1 else ()
            session.begins, session.interaction = False, None if left == 1 else (name, left - 1)
        ahead = session.lead(now) / self._chunk_seconds(session)
        session.send(Chunk(session.chunks, frames, seconds, ahead, **ids))
        session.chunks += 1
        if session.num_frames is not None and session.frames >= session.num_frames:
            self._end(session, "completed")


def _request_error(error: BaseException, code: str, event_id: str | None = None) -> RequestError:
    """The part of an error that a client may see: its own mistakes, but no internals."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValueError):
        return RequestError(code, " ".join(str(error).split()), event_id)
    log.error("unexpected error", exc_info=error)
    return RequestError("internal", "the server could not do this; its log says why", event_id)
