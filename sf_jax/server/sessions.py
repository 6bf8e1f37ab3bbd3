"""WebSocket connections: their messages from first to last, and the queue of those to send."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from fractions import Fraction
from typing import Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from sf_jax.server import engine, media, protocol
from sf_jax.server.protocol import RequestError, SessionInteraction, SessionPlayback, SessionStart

log = logging.getLogger(__name__)
REMEMBERED = 256  # number of a session's interactions whose ids are remembered
CONTROLS = 256  # maximum number of messages queued for a client that does not read
CLOSING = 5.0  # seconds for a client to receive the last messages
SENDING = 8.0  # seconds for a client to receive one message
WAITING_CHUNKS = 8  # maximum number of chunks queued for a viewer that reports its position


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on what a client may request.

    Attributes:
      lifetime: maximum seconds of a session.
      start_timeout: seconds until the first message.
      queued_chunks: maximum number of chunks queued for a slow viewer; older ones are dropped.
      burst, rate: messages at once, and per second.
      prompt_burst, prompt_rate: prompt changes at once, and per second.
      video_frames: maximum number of frames of a video from `POST /v1/videos`.
    """

    lifetime: float = 3600.0
    start_timeout: float = 10.0
    queued_chunks: int = 2
    burst: float = 40
    rate: float = 20
    prompt_burst: float = 5
    prompt_rate: float = 1
    video_frames: int = 960


@dataclasses.dataclass(frozen=True)
class Playback:
    """How frames are shown.

    Attributes:
      fps: frames per second, if the client does not set it.
      scale: enlargement factor of the pixels.
    """

    fps: float
    scale: int = 1


class Outbox:
    """Queue of control messages and chunks to send; drops the oldest chunks if there are too many.

    Attributes:
      limit: maximum number of queued chunks.
      chunks: number of queued chunks.
      dropped: number of dropped chunks.
    """

    def __init__(self, queued_chunks: float, on_drop: Callable[[], None]):
        """Creates an empty queue of at most `queued_chunks` chunks; calls `on_drop` for each dropped one."""
        self._items: deque = deque()
        self.limit, self._on_drop = queued_chunks, on_drop
        self._there = asyncio.Event()
        self.chunks = self.dropped = 0  # a number, as the engine's thread also reads it

    def put(self, item: Any) -> None:
        """Adds a message or an event of the engine; must run in the event loop's thread."""
        self._items.append(item)
        self.chunks += isinstance(item, engine.Chunk)
        if self.chunks > self.limit:
            oldest, next_ = [one for one in self._items if isinstance(one, engine.Chunk)][:2]
            self._items.remove(oldest)
            # the next chunk also reports the interactions that the dropped one would have reported
            ids = {
                name: tuple(dict.fromkeys(getattr(oldest, name) + getattr(next_, name)))
                for name in ("started", "completed")
            }
            self._items[self._items.index(next_)] = dataclasses.replace(next_, **ids)
            self.chunks -= 1
            self.dropped += 1
            self._on_drop()
        self._there.set()

    @property
    def flooded(self) -> bool:
        """Whether the client does not read its messages."""
        return len(self._items) > CONTROLS

    async def get(self) -> Any:
        """Returns the next item."""
        while not self._items:
            self._there.clear()
            await self._there.wait()
        item = self._items.popleft()
        self.chunks -= isinstance(item, engine.Chunk)
        return item


class Connection:
    """A WebSocket and its one session."""

    def __init__(
        self,
        socket: WebSocket,
        engine_: engine.Engine,
        playback: Playback,
        limits: Limits,
        encoders: Executor,
    ):
        """Stores the arguments; nothing is read or sent yet."""
        self.socket, self.engine, self.encoders = socket, engine_, encoders
        self.playback, self.limits = playback, limits
        self.request_id = f"video-{uuid.uuid4().hex}"
        self.outbox = Outbox(limits.queued_chunks, engine_.metrics.dropped.inc)
        self.session: engine.Session | None = None
        self._messages = protocol.RateLimit(limits.burst, limits.rate)
        self._prompts = protocol.RateLimit(limits.prompt_burst, limits.prompt_rate)
        self._interactions: dict[str, str] = {}
        self._frames = self._fragments = self._sent = 0

    async def run(self) -> None:
        """Serves the client until it disconnects or its video ends."""
        code = protocol.NORMAL
        try:
            async with asyncio.timeout(self.limits.start_timeout):
                start = await self._receive()
            self._begin(start)
        except TimeoutError:
            error = RequestError("timeout", f"no session.start within {self.limits.start_timeout:g} s")
            return await self._refuse(error, protocol.POLICY)
        except RequestError as error:
            codes = {"starting": protocol.LATER, "internal": protocol.BROKEN}
            return await self._refuse(error, codes.get(error.code, protocol.POLICY))
        except WebSocketDisconnect:
            return None
        reader, writer = asyncio.create_task(self._read()), asyncio.create_task(self._write())
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done() and not writer.done():  # the client has disconnected, or is rejected
                code = reader.result()
                if code != protocol.NORMAL:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(writer), CLOSING)
            elif not writer.cancelled() and writer.exception() is None:
                code = writer.result()
        finally:
            self.engine.end(self.session)
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            await self._close(code)

    async def _close(self, code: int) -> None:
        if self.socket.client_state == self.socket.application_state == WebSocketState.CONNECTED:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError, TimeoutError):
                await asyncio.wait_for(self.socket.close(code), CLOSING)

    async def _refuse(self, error: RequestError, code: int) -> None:
        self.engine.metrics.refused.labels(error.code).inc()
        with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError, TimeoutError):
            message = error.message()
            if code == protocol.LATER:
                message["retry_after"] = self.engine.retry_after()
            await self._send_json(message)
        await self._close(code)

    async def _receive(self) -> protocol.Message:
        """Receives the client's next message."""
        event = await self.socket.receive()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", protocol.NORMAL))
        if not self._messages.allows(time.monotonic()):
            raise RequestError("too_many_messages", f"more than {self.limits.rate:g} messages a second")
        if event.get("text") is None:
            raise RequestError("invalid_message", "the message is binary: send JSON as text")
        return protocol.parse(event["text"])

    def _begin(self, start: protocol.Message) -> None:
        """Passes the session to the engine."""
        if not isinstance(start, SessionStart):
            raise RequestError("not_started", "the first message must be session.start")
        check_ready(self.engine)
        check_size(start, self.engine, self.playback)
        loop = asyncio.get_running_loop()

        def send(event):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.outbox.put, event)

        self._start, has_room = start, None
        if start.streaming_buffer_seconds is not None:  # generates nothing that such a viewer cannot take
            self.outbox.limit = math.inf

            def has_room():
                return self.outbox.chunks < WAITING_CHUNKS

        self.session = engine.Session(
            request_id=self.request_id,
            prompt=start.prompt,
            seed=secrets.randbelow(2**31) if start.seed is None else start.seed,
            fps=float(start.fps or self.playback.fps),
            num_frames=start.num_frames,
            send=send,
            lifetime=self.limits.lifetime,
            buffer=start.streaming_buffer_seconds,
            has_room=has_room,
        )
        self.engine.submit(self.session)

    async def _read(self) -> int:
        """Handles messages until the client disconnects or is rejected; returns the close code."""
        while True:
            try:
                self._take(await self._receive())
            except WebSocketDisconnect:
                return protocol.NORMAL
            except RequestError as error:
                fatal = error.code == "too_many_messages"
                self.outbox.put(engine.Failed(error, ends=fatal))
                if fatal:
                    return protocol.POLICY
            if self.outbox.flooded:
                return protocol.POLICY

    def _take(self, message: protocol.Message) -> None:
        if isinstance(message, SessionStart):
            raise RequestError("already_started", "a connection has one video: open another for a new one")
        if isinstance(message, SessionInteraction):
            return self._interact(message)
        if isinstance(message, SessionPlayback):
            if self._start.streaming_buffer_seconds is None:
                raise RequestError(
                    "invalid_message", "session.playback needs streaming_buffer_seconds in session.start"
                )
            return self.engine.play(self.session, message.position_seconds)
        name = message.type.removeprefix("session.")
        if name == "ping":
            return self.outbox.put({"type": "session.pong"})
        if name == "stop":
            return self.engine.end(self.session)
        self.engine.pause(self.session, name == "pause")
        return self.outbox.put({"type": f"session.{name}d", "request_id": self.request_id})

    def _interact(self, message: SessionInteraction) -> None:
        """Passes an interaction on once; a repeated one is acknowledged again, but has no effect."""
        interaction = message.interaction
        if interaction.event_id is None:
            interaction = interaction.model_copy(update={"event_id": uuid.uuid4().hex})
        name, content = interaction.event_id, interaction.model_dump_json()
        if self._interactions.get(name, content) != content:
            raise RequestError("event_id_conflict", f"event_id {name} was another interaction", name)
        again = name in self._interactions
        if not again and not self._prompts.allows(time.monotonic()):
            raise RequestError("too_many_prompts", f"more than {self.limits.prompt_rate:g} prompts a second", name)
        self._interactions[name] = content
        if len(self._interactions) > REMEMBERED:
            del self._interactions[next(iter(self._interactions))]
        ids = {"request_id": self.request_id, "event_id": name}
        self.outbox.put({"type": "session.interaction.queued", **ids})
        if not again:
            self.engine.interact(self.session, interaction)

    async def _write(self) -> int:
        """Sends until the session is over; returns the close code."""
        while True:
            event = await self.outbox.get()
            try:
                code = await self._send(event)
            except (WebSocketDisconnect, RuntimeError, OSError, TimeoutError):  # the client has disconnected
                return protocol.NORMAL
            if code is not None:
                return code

    async def _send(self, event: Any) -> int | None:
        match event:
            case engine.Chunk():
                return await self._send_chunk(event)
            case engine.Position(place):
                await self._send_json({"type": "session.queued", "request_id": self.request_id, "position": place + 1})
            case engine.Started():
                await self._send_json(self._started())
            case engine.Failed(error, ends):
                self.engine.metrics.refused.labels(error.code).inc()
                self._interactions.pop(error.event_id, None)  # the client may send it again
                message = error.message(self.request_id)
                if error.code == "busy":
                    message["retry_after"] = self.engine.retry_after()
                await self._send_json(message)
                if ends:
                    codes = {"busy": protocol.LATER, "shutdown": protocol.RESTART, "internal": protocol.BROKEN}
                    return codes.get(error.code, protocol.POLICY)
            case engine.Ended(reason):
                ids = {"request_id": self.request_id, "chunks": self._sent, "dropped": self.outbox.dropped}
                stopped = reason != "completed"
                await self._send_json({"type": "session.done", **ids, "stopped": stopped, "reason": reason})
                return protocol.RESTART if reason == "shutdown" else protocol.NORMAL
            case dict():
                await self._send_json(event)
        return None

    async def _send_json(self, message: dict) -> None:
        async with asyncio.timeout(SENDING):
            await self.socket.send_text(json.dumps(message))

    def _started(self) -> dict:
        """`video.start`, with the resulting settings."""
        start, session = self._start, self.session
        height, width = frame_size(self.engine, self.playback)
        config = {"prompt": start.prompt, "seed": session.seed, "fps": session.fps, "num_frames": session.num_frames}
        config |= {
            "width": width,
            "height": height,
            "mime_type": media.CODEC if start.format == "m4s" else "image/jpeg",
        }
        ids = {"request_id": self.request_id, "format": start.format}
        return {"type": "video.start", **ids, "config": config}

    async def _send_chunk(self, chunk: engine.Chunk) -> int | None:
        """Sends a chunk's metadata, then its bytes; returns the close code if the chunk cannot be encoded."""
        loop = asyncio.get_running_loop()
        try:
            payload, lengths = await loop.run_in_executor(self.encoders, self._encoded, chunk.frames)
        except Exception as error:
            log.error("a chunk could not be encoded", exc_info=error)
            failed = RequestError("internal", "the server could not encode the video; its log says why")
            self.engine.metrics.refused.labels(failed.code).inc()
            await self._send_json(failed.message(self.request_id))
            return protocol.BROKEN
        message = {
            "type": "video.chunk_metadata",
            "request_id": self.request_id,
            "kind": "media",
            "transport_chunk_index": self._sent,
            "generation_chunk_index": chunk.index,
            "num_frames": len(chunk.frames),
            "byte_length": len(payload),
            "started_event_ids": list(chunk.started),
            "active_event_ids": list(chunk.active),
            "completed_event_ids": list(chunk.completed),
            "chunk_seconds": round(chunk.seconds, 4),
            "chunks_ahead": round(chunk.ahead, 2),
            "dropped": self.outbox.dropped,
        }
        if lengths is not None:
            message["frame_lengths"] = lengths
        await self._send_json(message)
        async with asyncio.timeout(SENDING):
            await self.socket.send_bytes(payload)
        self._sent += 1
        if self.session.has_room is not None:
            self.engine.wake()
        return None

    def _encoded(self, frames: np.ndarray) -> tuple[bytes, list[int] | None]:
        """Encoded frames, and the length of each if they are JPEGs."""
        pixels = media.enlarged(frames, self.playback.scale)
        if self._start.format == "jpeg":
            files = media.jpegs(pixels)
            return b"".join(files), [len(file) for file in files]
        fps = Fraction(self.session.fps).limit_denominator(1000)
        first, part = media.fragment(pixels, fps, self._frames, self._fragments)
        begins = self._fragments == 0
        self._frames, self._fragments = self._frames + len(frames), self._fragments + 1
        return (first + part if begins else part), None


def frame_size(engine_: engine.Engine, playback: Playback) -> tuple[int, int]:
    """Height and width of the sent frames."""
    sampling = engine_.pipe.sampling
    return sampling.height * playback.scale, sampling.width * playback.scale


def check_ready(engine_: engine.Engine) -> None:
    """Checks that the weights are loaded and the programs compiled.

    Raises:
      RequestError: if they are not, or if the engine has failed since.
    """
    if engine_.error is not None:
        raise RequestError("internal", "the model has failed; the server's log says why")
    if not engine_.ready.is_set():
        raise RequestError("starting", "the model is not ready yet: try again in a few seconds")


def check_size(start: SessionStart, engine_: engine.Engine, playback: Playback) -> None:
    """Checks that the requested size is the server's.

    Raises:
      RequestError: if it is not; names the server's size.
    """
    for name, size in zip(("height", "width"), frame_size(engine_, playback), strict=True):
        if getattr(start, name) not in (None, size):
            raise RequestError("invalid_message", f"{name} is {getattr(start, name)}: this server makes {size}")
