"""`python -m sf_jax.serve` in a separate process, and clients for it."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request

import websockets


@dataclasses.dataclass
class Server:
    """A running server.

    Attributes:
      process: its process.
      address: host and port, such as "127.0.0.1:8000".
      token: the token it requires, or None.
      started: seconds from the start of the process until it was ready.
    """

    process: subprocess.Popen
    address: str
    token: str | None
    started: float

    def get(self, path, **headers):
        """Body of a GET."""
        request = urllib.request.Request(f"http://{self.address}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    def metric(self, name):
        """Value of a metric."""
        return float(re.search(rf"^sf_jax_{name} (\S+)$", self.get("/metrics"), re.MULTILINE)[1])

    def resources(self):
        """Open files, threads and resident bytes of the process."""
        folder = f"/proc/{self.process.pid}"
        with open(f"{folder}/statm") as file:
            pages = int(file.read().split()[1])
        return len(os.listdir(f"{folder}/fd")), len(os.listdir(f"{folder}/task")), pages * os.sysconf("SC_PAGESIZE")

    def connect(self, **options):
        """A WebSocket to it."""
        return websockets.connect(f"ws://{self.address}/v1/realtime/video", max_size=None, compression=None, **options)


@contextlib.contextmanager
def running(*flags, env=None):
    """Context manager for a ready server, which ends with the block."""
    command = [sys.executable, "-m", "sf_jax.serve", "--port=0", *flags]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}))
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                break
        else:
            raise AssertionError(f"the server ended: {lines}")
        address, token = re.match(r"serving http://([^/]+)/(?:\?token=(\S+))?", lines[0]).groups()
        yield Server(process, address, token, time.monotonic() - began)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        process.stdout.close()


@dataclasses.dataclass
class Watched:
    """A client's record of its session: payloads, their arrival times, metadata, and how it ended."""

    payloads: list = dataclasses.field(default_factory=list)
    times: list = dataclasses.field(default_factory=list)
    metadata: list = dataclasses.field(default_factory=list)
    done: dict | None = None
    error: dict | None = None
    code: int | None = None

    @property
    def intervals(self):
        """Seconds between chunks."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


async def watch(server, seconds=None, pause=0.0, record=None, **fields):
    """Watches a session until it ends or `seconds` have passed; a `pause` between chunks makes the client slow.

    The caller may pass its own `record`, to follow the session while it runs.
    """
    seen, until = record or Watched(), None if seconds is None else time.monotonic() + seconds
    options = {"max_queue": 1, "sock": small_socket(server)} if pause else {}
    async with server.connect(**options) as ws:
        await ws.send(json.dumps({"type": "session.start", "prompt": "a 7 moving left, fast"} | fields))
        try:
            while until is None or time.monotonic() < until:
                timeout = None if until is None else max(0.01, until - time.monotonic())
                message = await asyncio.wait_for(ws.recv(), timeout)
                if isinstance(message, bytes):
                    seen.payloads.append(message)
                    seen.times.append(time.monotonic())
                    await asyncio.sleep(pause)
                    continue
                message = json.loads(message)
                if message["type"] == "video.chunk_metadata":
                    seen.metadata.append(message)
                elif message["type"] == "session.done":
                    seen.done = message
                elif message["type"] == "error":
                    seen.error = message
        except TimeoutError:
            pass
        except websockets.ConnectionClosed as closed:
            seen.code = closed.rcvd.code if closed.rcvd else 1006  # RFC 6455: without a close frame
    return seen


async def reached(condition, seconds=120.0):
    """Waits until `condition()` holds; fails after `seconds`, which only a hang should take."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        await asyncio.sleep(0.05)


async def drop(server, seconds):
    """A client that drops its connection without closing it every 5 seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        async with server.connect() as ws:
            await ws.send(json.dumps({"type": "session.start", "prompt": "a 1 moving up"}))
            try:
                async with asyncio.timeout(min(5.0, max(0.1, until - time.monotonic()))):
                    async for _ in ws:
                        pass
            except (TimeoutError, websockets.ConnectionClosed):
                pass
            ws.transport.abort()


async def trickle(server, pause, seconds):
    """A client on a slow network, which empties its small buffer at long intervals; returns the bytes of each read."""
    loop, client = asyncio.get_running_loop(), vanish(server)
    sizes, until = [], time.monotonic() + seconds
    client.setblocking(False)
    with client:
        while time.monotonic() < until:
            await asyncio.sleep(pause)
            sizes.append(len(await asyncio.wait_for(loop.sock_recv(client, 2**16), 10.0)))
    return sizes


def small_socket(server):
    """A connection with a tiny receive buffer, like a slow network."""
    host, port = server.address.rsplit(":", 1)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    return client


def vanish(server, **fields):
    """Starts a session on a socket that never answers or reads again; returns the socket."""
    client = small_socket(server)
    key = base64.b64encode(os.urandom(16)).decode()
    lines = [
        "GET /v1/realtime/video HTTP/1.1",
        f"Host: {server.address}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    client.sendall("\r\n".join([*lines, "", ""]).encode())
    assert b"101" in client.recv(4096)
    text = json.dumps({"type": "session.start", "prompt": "a 7"} | fields).encode()
    mask = b"\x01\x02\x03\x04"
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(text))
    client.sendall(struct.pack("!BB", 0x81, 0x80 | len(text)) + mask + masked)
    return client
