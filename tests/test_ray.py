"""Two replicas on Ray Serve: streams spread over both, and one survives the other's end."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error

import pytest

from tests.server_process import Server, watch

pytest.importorskip("ray.serve", reason="ray is not installed: pip install -e '.[ray]'")
pytestmark = pytest.mark.slow
SLOTS = 2


def replicas(port):
    """Process ids of the replicas behind the server on a port."""
    ids = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline") as file:
                command = file.read()
            with open(f"/proc/{name}/environ") as file:
                environment = file.read()
        except OSError:
            continue
        if command.startswith("ray::ServeReplica") and f"SF_JAX_TEST={port}\0" in environment:
            ids.append(int(name))
    return ids


@pytest.fixture(scope="module")
def server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sf_jax.serve", "--ray", "--replicas=2", f"--slots={SLOTS}", f"--port={port}"]
    process = subprocess.Popen(command, env=os.environ | {"SF_JAX_TEST": str(port), "RAY_DISABLE_IMPORT_WARNING": "1"})
    server = Server(process, f"127.0.0.1:{port}", None, 0.0)
    try:
        ready, until = 0, time.monotonic() + 240
        while ready < 8:  # both replicas answer in turn
            assert process.poll() is None and time.monotonic() < until
            try:
                server.get("/readyz")
                ready += 1
            except (urllib.error.URLError, OSError):
                ready = 0
                time.sleep(1)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


async def _streams(server, count, seconds):
    tasks = []
    for _ in range(count):
        tasks.append(asyncio.create_task(watch(server, seconds, seed=3, format="jpeg")))
        await asyncio.sleep(0.4)  # lets the router see the previous one
    return tasks


def test_two_replicas(server):
    async def scenario():
        alone = await watch(server, seed=3, format="jpeg", num_frames=48, fps=60)
        together = await asyncio.gather(*await _streams(server, 4, 8))
        tasks = await _streams(server, 4, 12)
        ids = replicas(server.address.rsplit(":", 1)[1])
        await asyncio.sleep(2)
        os.kill(ids[0], signal.SIGKILL)
        return alone, together, ids, await asyncio.gather(*tasks)

    alone, together, ids, broken = asyncio.run(scenario())
    assert len(ids) == 2 and alone.done["reason"] == "completed"
    for seen in together:  # no stream waited for a slot: two on each replica
        assert seen.payloads[:16] == alone.payloads and len(seen.payloads) > 16
    ended = [seen for seen in broken if seen.code is not None]
    assert len(ended) == 2 and {seen.code for seen in ended} == {1012}
    for seen in broken:
        assert seen.payloads[:10] == alone.payloads[:10]
        assert seen in ended or len(seen.payloads) > 24
    assert asyncio.run(watch(server, num_frames=12)).done["reason"] == "completed"
