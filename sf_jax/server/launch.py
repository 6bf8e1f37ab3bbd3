"""Runs the app on uvicorn: address, signals and shutdown."""

import dataclasses
import functools
import logging
import socket
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

from sf_jax.inference.layers import FACTOR, Videos
from sf_jax.inference.load import load_pipeline
from sf_jax.inference.pipeline import VideoPipeline
from sf_jax.parallel.mesh import mesh_sizes, video_devices
from sf_jax.server import protocol
from sf_jax.server.app import Service, make_app
from sf_jax.server.engine import Engine
from sf_jax.server.guard import Rules
from sf_jax.server.metrics import make_metrics
from sf_jax.server.sessions import Limits, Playback
from sf_jax.weights.package import captions_of

DIGITS_EXAMPLES = {
    "full": ("a 7 moving left, fast", "a 2 moving up", "a 5 moving down and right, slowly", "a 0 moving right"),
    "undirected": ("a 7 moving, fast", "a 2 moving", "a 5 moving, slowly", "a 0 moving"),
}
WAN_EXAMPLES = (
    "A red fox walks through fresh snow in a birch forest, soft morning light.",
    "Waves roll onto a black beach under a stormy sky, seen from above.",
    "A paper boat drifts down a rain-filled street, city lights in the water.",
)
# Relative positions are not limited to 1024 frames, and equal those of training until the window is full.
WAN_WINDOW = {"window": 21, "sink": 3, "positions": "relative"}
RECEIVED_BURST, RECEIVED_RATE = 2**16, 2**15  # bytes that a WebSocket's client may send at once, and per second
UNSENT = 2**12  # bytes that may wait in the kernel, and as many in the process, for a slow viewer
PING, PONG = 3.0, 6.0  # seconds between pings, and until a client that does not answer is disconnected
PATIENCE = 5  # how many times that long a client that has data to read may take for its answer
STALLED = 30.0  # seconds until the kernel disconnects an HTTP client that receives nothing
FAILED = 1.0  # seconds in which viewers hear that the engine has failed
LINGER = 8.0  # seconds in which a client receives what a WebSocket's end leaves unsent


@dataclasses.dataclass(frozen=True)
class Launch:
    """The server's address, and who may use it.

    Attributes:
      host: address to listen on.
      port: port to listen on; 0 picks a free one.
      token: token that requests need; None requires none.
      hosts: names under which browsers may reach it; None allows any.
      origins: origins of other pages that may use it.
      proxies: proxies whose X-Forwarded-For is trusted.
      drain: seconds for which streams continue after SIGTERM.
      show_token: whether to print the token in the address, for a newly generated one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    drain: float = 20.0
    show_token: bool = False

    @property
    def query(self) -> str:
        """Query string of the printed address."""
        if self.token is None:
            return ""
        return f"?token={urllib.parse.quote(self.token, safe='') if self.show_token else '...'}"


@dataclasses.dataclass(frozen=True)
class Model:
    """The model that the server plays.

    Attributes:
      folder: Wan's model folder; None plays moving digits.
      checkpoint: a few-step student; None is the shipped one of moving digits.
      options: options of `load_pipeline`, for Wan.
      rollout: fields of `RolloutConfig` that differ from the model's.
      size: `height` and `width`, if they differ from the model's.
      narrow: `quantize` and `cache_dtype` of `load_pipeline`.
    """

    folder: str | None = None
    checkpoint: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    rollout: dict[str, Any] = dataclasses.field(default_factory=dict)
    size: dict[str, int] = dataclasses.field(default_factory=dict)
    narrow: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        """Validates what needs no file."""
        if self.folder is None and self.options:
            raise ValueError(f"{min(self.options)} is given without model: it is for Wan")
        if self.folder is not None and self.checkpoint is None:
            raise ValueError("checkpoint is missing: the network of a model folder is bidirectional and cannot stream")
        if self.rollout.get("window", 1) < 1:
            raise ValueError(f"window is {self.rollout['window']}: a chunk must see at least itself")
        self.devices  # noqa: B018 (validates the mesh)

    @property
    def devices(self) -> int:
        """Number of devices that a replica needs."""
        sizes = mesh_sizes(self.options["mesh"]) if "mesh" in self.options else {}
        return sizes.get("data", 1) * video_devices(sizes)

    def load(self, slots: int = 1) -> VideoPipeline:
        """Loads the pipeline, for so many streams at once."""
        if self.folder is None:
            pipe = load_pipeline(self.checkpoint, **self.narrow)
            if pipe.rollout is None:
                raise ValueError(
                    f"checkpoint is {self.checkpoint}: a bidirectional network cannot stream, give a causal one"
                )
            return pipe.with_rollout(**self.rollout).with_sampling(**self.size)
        window = self.rollout.get("window", WAN_WINDOW["window"])
        sizes = mesh_sizes(self.options["mesh"]) if "mesh" in self.options else {}
        videos = Videos(-(-slots // sizes.get("data", 1)), 1 + FACTOR * (window - 1), **self.size)
        options = self.options | self.narrow | {"videos": videos}
        pipe = load_pipeline(self.folder, checkpoint=self.checkpoint, keep_text_encoder=True, **options)
        window = WAN_WINDOW if pipe.rollout.window is None else {}
        return pipe.with_rollout(**window | self.rollout).with_sampling(**self.size)


def service_of(
    model: Model,
    launch: Launch,
    *,
    fps: float | None = None,
    scale: int | None = None,
    lifetime: float = 3600.0,
    **options,
) -> Service:
    """The service for a model; `options` are those of `Engine`."""
    digits = model.folder is None
    fps, scale = fps or (12.0 if digits else 16.0), scale or (16 if digits else 1)
    # the settings that the shipped student follows best (docs/streaming.md)
    if digits and not {"mode", "context_timestep", "fade"} & set(options):
        options = {"mode": "swap", "fade": 0.4} | options
    return Service(
        engine=Engine(functools.partial(model.load, options.get("slots", 4)), make_metrics(), **options),
        playback=Playback(fps, scale),
        limits=Limits(lifetime=lifetime),
        rules=Rules(launch.token, launch.origins, launch.hosts),
        name="moving digits" if digits else Path(model.folder).name,
        examples=DIGITS_EXAMPLES[captions_of(model.checkpoint)] if digits else WAN_EXAMPLES,
    )


class _WebSocket(WebSocketsSansIOProtocol):
    """Aborts connections that send more than messages and control frames can need, before parsing.

    A slow viewer, who has chunks to read before a ping, gets `PATIENCE` times as long to answer it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._bytes = protocol.RateLimit(RECEIVED_BURST, RECEIVED_RATE)
        self._reads, self._waits = False, 0

    def connection_made(self, transport) -> None:
        """Initializes a client's connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT, low=3 * UNSENT // 4)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux would also disconnect slow clients whose small buffer it fills
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)

    async def run_asgi(self) -> None:
        """Runs the app; afterwards, a client that reads nothing cannot keep the connection."""
        await super().run_asgi()
        self.loop.call_later(LINGER, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Handles bytes from the client."""
        if self._bytes.allows(time.monotonic(), len(data)):
            super().data_received(data)
        else:
            self.transport.abort()

    def resume_writing(self) -> None:
        """Handles the client having read what waited for it."""
        super().resume_writing()
        self._reads = True

    def send_keepalive_ping(self) -> None:
        """Sends a ping."""
        self._reads, self._waits = False, 1
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        """Handles a ping that was not answered in time: waits on while the client reads what was sent before."""
        reads = self._reads or not self.writable.is_set()
        if not reads or self._waits == PATIENCE or self.close_sent or self.transport.is_closing():
            super().keepalive_timeout()
            if self.transport.get_write_buffer_size():  # closing would wait until the client has read it
                self.transport.abort()
            return
        self._reads, self._waits = False, self._waits + 1
        self.pong_timer = self.loop.call_later(self.ping_timeout, self.keepalive_timeout)

    def shutdown(self) -> None:
        """Closes the connection at the server's end."""
        try:
            super().shutdown()
        except InvalidState:  # the client is closing it
            self.transport.close()


class _Server(uvicorn.Server):
    """Lets streams continue for a while after a request to stop."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain: float):
        super().__init__(config)
        self._engine, self._drain, self._asked = engine, drain, False

    def handle_exit(self, sig: int, frame) -> None:
        """Handles SIGTERM and SIGINT: the first one drains, the second one stops."""
        if self._asked:
            self.should_exit = True
            return
        self._asked = True
        self._engine.drain()
        if self._engine.used:
            print(f"{self._engine.used} streams go on for up to {self._drain:g} s; Ctrl-C again ends now", flush=True)
        threading.Thread(target=self._end, name="drain", daemon=True).start()

    def _end(self) -> None:
        until = time.monotonic() + self._drain
        while self._engine.used and time.monotonic() < until and not self.should_exit:
            time.sleep(0.05)
        if self._engine.used:
            self._engine.end_all()
            time.sleep(0.5)  # lets the clients receive the message
        self.should_exit = True


def serve(service: Service, launch: Launch) -> None:
    """Serves until the process is asked to stop.

    Raises:
      ValueError: if the server cannot listen on the address, or the pipeline cannot be loaded.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    began = time.monotonic()
    listener = _listener(launch)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        make_app(service),
        access_log=False,  # addresses may contain the token
        log_level="warning",
        server_header=False,
        proxy_headers=bool(launch.proxies),
        forwarded_allow_ips=list(launch.proxies),
        ws=_WebSocket,
        ws_max_size=protocol.MAX_MESSAGE,
        ws_ping_interval=PING,
        ws_ping_timeout=PONG,
        ws_per_message_deflate=False,  # video does not compress further
        limit_concurrency=2 * service.rules.connections,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config, service.engine, launch.drain)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving http://{shown}:{port}/{launch.query}", flush=True)

    def watch():
        engine = service.engine
        engine.ready.wait()
        if engine.error is None:
            text = f"ready after {time.monotonic() - began:.1f} s: {engine.slots} slots"
            print(f"{engine.pipe.describe()}\n{text}", flush=True)
        engine.ended.wait()
        if engine.error is not None:
            time.sleep(FAILED)
        server.should_exit = True

    threading.Thread(target=watch, name="watch", daemon=True).start()
    server.run(sockets=[listener])
    if service.engine.error is not None:
        raise service.engine.error
    print("ended", flush=True)


def _listener(launch: Launch) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(launch.host.strip("[]"), launch.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # connections inherit the listener's options
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * STALLED))
        listener.bind(address)
    except OSError as error:
        raise ValueError(f"host {launch.host}, port {launch.port}: cannot listen there ({error.strerror})") from error
    return listener
