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

from tests.server_process import Server, Watched, reached, watch

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


def test_two_replicas(server):
    async def scenario():
        alone = await watch(server, seed=3, format="jpeg", num_frames=48, fps=60)
        records, tasks = [Watched() for _ in range(2 * SLOTS)], []
        for record in records:
            tasks.append(asyncio.create_task(watch(server, record=record, seed=3, format="jpeg")))
            await reached(lambda: record.payloads)  # noqa: B023
            await asyncio.sleep(0.4)  # lets the router see it
        # None of them ends, so none waited for a slot: each replica plays two.
        await reached(lambda: all(len(record.payloads) > 16 for record in records))
        ids = replicas(server.address.rsplit(":", 1)[1])
        os.kill(ids[0], signal.SIGKILL)
        await reached(lambda: sum(task.done() for task in tasks) == SLOTS)
        ended = [task.done() for task in tasks]
        counts = [len(record.payloads) for record in records]
        await reached(
            lambda: all(
                end or len(record.payloads) > count + 16
                for record, count, end in zip(records, counts, ended, strict=True)
            )
        )
        assert [task.done() for task in tasks] == ended
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return alone, records, ids, ended, await watch(server, num_frames=12)

    alone, records, ids, ended, last = asyncio.run(scenario())
    assert len(ids) == 2 and alone.done["reason"] == last.done["reason"] == "completed"
    for record, end in zip(records, ended, strict=True):
        assert record.payloads[:16] == alone.payloads
        assert record.code == (1012 if end else None)
