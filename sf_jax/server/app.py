"""The ASGI app: the page, the WebSocket, the REST API, health checks and metrics."""

import asyncio
import contextlib
import dataclasses
import secrets
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib import resources
from typing import Annotated

from fastapi import FastAPI, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp

from sf_jax.inference.prompt_change import MODES
from sf_jax.server import engine, media, protocol
from sf_jax.server.guard import Guard, Rules
from sf_jax.server.protocol import RequestError
from sf_jax.server.sessions import Connection, Limits, Playback, check_ready, frame_size

ENCODERS = 2  # threads
FRAGMENTS = 4  # maximum number of a video's chunks that wait for a slow client
STATUS = {"busy": 503, "starting": 503, "internal": 500, "generation_failed": 500, "shutdown": 503}
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


@dataclasses.dataclass(frozen=True)
class Service:
    """The configuration of the app.

    Attributes:
      engine: generates the chunks.
      playback: how they are shown.
      limits: limits on what a client may request.
      rules: access rules.
      name: name of the model.
      examples: prompts that the page suggests.
    """

    engine: engine.Engine
    playback: Playback
    limits: Limits = Limits()
    rules: Rules = Rules()
    name: str = "sf_jax"
    examples: tuple[str, ...] = ()


class Problem(BaseModel):
    """The reason why a request was rejected."""

    code: str
    message: str


class ProblemBody(BaseModel):
    """The body of an error response."""

    error: Problem


class VideoRequest(BaseModel):
    """A request for a whole video."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: Annotated[str, Field(min_length=1, max_length=protocol.MAX_PROMPT)]
    num_frames: Annotated[int, Field(ge=1, le=protocol.MAX_FRAMES)] = 48
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    fps: Annotated[float, Field(ge=1, le=60, allow_inf_nan=False)] | None = None

    _checked = field_validator("prompt")(protocol.checked_prompt)


def make_app(service: Service, wait: bool = False) -> ASGIApp:
    """Makes the app, which starts and stops the engine together with the server.

    Args:
      service: the app's configuration.
      wait: whether to accept no requests before the engine is ready; the server then fails to start if the engine does.
    """
    encoders = ThreadPoolExecutor(ENCODERS, "encoder")

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        if wait:
            await asyncio.to_thread(service.engine.ready.wait)
            if service.engine.error is not None:
                raise service.engine.error
        yield
        await asyncio.to_thread(service.engine.close, 10.0)
        encoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="sf_jax", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service, app.state.encoders = service, encoders
    _add_page(app)
    _add_health(app, service)
    _add_video(app, service, encoders)
    return Guard(app, service.rules, service.engine.metrics.refused)


def _add_page(app: FastAPI) -> None:
    """Serves the page's files by fixed routes, so that no path comes from a client."""
    for route, (name, kind) in PAGE.items():
        content = (resources.files("sf_jax.server") / "page" / name).read_bytes()
        app.get(route, include_in_schema=False)(_constant(content, kind))


def _constant(content: bytes, kind: str):
    async def respond() -> Response:
        return Response(content, media_type=kind)

    return respond


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", responses={500: {"model": ProblemBody}})
    async def alive() -> dict[str, str]:
        """Reports that the process is alive; 500 if the engine has failed, so that it must be restarted."""
        if service.engine.error is not None:
            check_ready(service.engine)
        return {"status": "alive"}

    @app.get("/readyz", responses={500: {"model": ProblemBody}, 503: {"model": ProblemBody}})
    async def ready() -> dict[str, str]:
        """Reports readiness: weights loaded and all programs compiled; 503 before that, and while the server drains."""
        check_ready(service.engine)
        if service.engine.draining:
            raise RequestError("shutdown", "the server is shutting down")
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/info", responses={500: {"model": ProblemBody}, 503: {"model": ProblemBody}})
    async def info() -> dict:
        """Describes the model and the settings of this server."""
        check_ready(service.engine)
        pipe, (height, width) = service.engine.pipe, frame_size(service.engine, service.playback)
        return {
            "model": service.name,
            "description": pipe.describe(),
            "width": width,
            "height": height,
            "fps": service.playback.fps,
            "chunk_frames": pipe.rollout.chunk * pipe.temporal_factor,
            "mime_type": media.CODEC,
            "modes": [mode for mode in MODES if mode != "recache" or pipe.rollout.context != "noisy"],
            "default": {name: getattr(service.engine, name) for name in ("mode", "context_timestep", "fade")},
            "slots": service.engine.slots,
            "examples": list(service.examples),
            "max_prompt": protocol.MAX_PROMPT,
            "lifetime": service.limits.lifetime,
        }

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        content = {"error": {"code": code, "message": str(error.detail)}}
        return JSONResponse(content, error.status_code, error.headers)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        headers = {}
        status = STATUS.get(error.code, 400)
        if status == 503:
            headers["retry-after"] = str(service.engine.retry_after())
        if request.url.path not in ("/healthz", "/readyz"):  # probes do not count as requests
            service.engine.metrics.refused.labels(error.code).inc()
        return JSONResponse({"error": {"code": error.code, "message": str(error)}}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        service.engine.metrics.refused.labels("invalid_request").inc()
        text = protocol.explain(error.errors())[: protocol.ERROR_LENGTH]
        return JSONResponse({"error": {"code": "invalid_request", "message": text}}, 422)


def _add_video(app: FastAPI, service: Service, encoders: ThreadPoolExecutor) -> None:
    @app.websocket("/v1/realtime/video")
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await Connection(socket, service.engine, service.playback, service.limits, encoders).run()

    refusals = {status: {"model": ProblemBody} for status in (400, 401, 403, 413, 422, 429, 500, 503)}

    @app.post(
        "/v1/videos",
        response_class=StreamingResponse,
        responses={200: {"content": {"video/mp4": {}}, "description": "Fragmented MP4, H.264"}, **refusals},
    )
    async def video(request: VideoRequest, http: Request) -> StreamingResponse:
        """Generates a whole video, and streams it during generation."""
        check_ready(service.engine)
        if request.num_frames > service.limits.video_frames:
            most = service.limits.video_frames
            raise RequestError("too_long", f"num_frames is {request.num_frames}: at most {most} are made")
        return await _video(request, http, service, encoders)


async def _video(
    request: VideoRequest, http: Request, service: Service, encoders: ThreadPoolExecutor
) -> StreamingResponse:
    """Waits for the first chunk, so that an error can still set the status, then streams all chunks."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue()

    def send(event):
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(events.put_nowait, event)

    session = engine.Session(
        request_id=f"video-{uuid.uuid4().hex}",
        prompt=request.prompt,
        seed=secrets.randbelow(2**31) if request.seed is None else request.seed,
        fps=float(request.fps or service.playback.fps),
        num_frames=request.num_frames,
        send=send,
        wants_more=lambda: events.qsize() < FRAGMENTS,
        lifetime=service.limits.lifetime,
    )
    service.engine.submit(session)
    try:
        first = await _first_chunk(events, http)
    except BaseException:
        service.engine.end(session)
        raise
    fps = Fraction(session.fps).limit_denominator(1000)

    async def fragments() -> AsyncIterator[bytes]:
        chunk, done = first, 0
        try:
            while chunk is not None:
                pixels = media.enlarged(chunk.frames, service.playback.scale)
                arguments = (media.fragment, pixels, fps, done, chunk.index)
                begin, part = await loop.run_in_executor(encoders, *arguments)
                yield begin + part if chunk.index == 0 else part
                done += len(chunk.frames)
                service.engine.wake()
                chunk = await _next_chunk(events)
        finally:
            service.engine.end(session)

    headers = {"x-request-id": session.request_id, "x-seed": str(session.seed)}
    return StreamingResponse(fragments(), media_type="video/mp4", headers=headers)


async def _first_chunk(events: asyncio.Queue, http: Request) -> engine.Chunk:
    """The first chunk, unless the client disconnects while waiting for a slot."""
    task = asyncio.create_task(_next_chunk(events))
    try:
        while not (await asyncio.wait({task}, timeout=1.0))[0]:
            if await http.is_disconnected():
                raise RequestError("gone", "the client has disconnected")
        return task.result()
    finally:
        task.cancel()


async def _next_chunk(events: asyncio.Queue) -> engine.Chunk | None:
    """The next chunk; None at the end.

    Raises:
      RequestError: if the video ended early or failed.
    """
    while True:
        match await events.get():
            case engine.Chunk() as chunk:
                return chunk
            case engine.Failed(error, _):
                raise error
            case engine.Ended("completed"):
                return None
            case engine.Ended(reason):
                raise RequestError(reason, f"the video ended early: {reason}")
