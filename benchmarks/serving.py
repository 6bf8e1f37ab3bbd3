"""The server under load: startup time, time to the first chunk, time between chunks, and leaked resources.

  python -m benchmarks.serving                  # twice: the first start fills the cache of compiled programs

Starts `python -m sf_jax.serve` with 6 slots in a separate process. Prints the seconds until it is ready, and the
seconds from a prompt to its first chunk (median and maximum of 10 sessions). Then runs 8 clients for `--seconds`: 4
regular ones, one that reads slowly, one that drops its connection every 5 s, and 2 that arrive when all slots are
taken. For each client, prints the number of chunks, and the median and longest interval between two. Finally prints the
server's open files, threads and memory, before and after. The machine should be idle.
"""

import argparse
import asyncio
import statistics
import time

from tests.server_process import drop, running, watch


async def first_chunks(server, count: int) -> list[float]:
    """Seconds from a new connection to its first chunk."""
    times = []
    for _ in range(count):
        began = time.monotonic()
        seen = await watch(server, num_frames=3)
        times.append(seen.times[0] - began)
    return times


async def load(server, seconds: float):
    """Runs the clients; returns them by kind."""
    tasks = {f"regular {i}": asyncio.create_task(watch(server, seconds)) for i in range(4)}
    tasks["slow"] = asyncio.create_task(watch(server, seconds, pause=0.6))
    await asyncio.sleep(0.5)
    dropper = asyncio.create_task(drop(server, seconds))
    await asyncio.sleep(0.5)
    tasks |= {f"waiting {i}": asyncio.create_task(watch(server, seconds)) for i in range(2)}
    seen = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
    await dropper
    return seen


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    with running("--slots=6", "--waiting=4") as server:
        print(f"ready after {server.started:.1f} s")
        times = asyncio.run(first_chunks(server, 10))
        print(f"first chunk after {statistics.median(times):.3f} s, at most {max(times):.3f} s")
        before = server.resources()
        seen = asyncio.run(load(server, args.seconds))
        print(f"{'client':12s}{'chunks':>8s}{'median':>9s}{'longest':>9s}{'ratio':>7s}{'left out':>10s}")
        for name, one in seen.items():
            intervals = one.intervals[3:]
            if len(intervals) < 2:
                print(f"{name:12s}{len(one.payloads):8d}")
                continue
            usual, most = statistics.median(intervals), max(intervals)
            dropped = one.metadata[-1]["dropped"]
            print(f"{name:12s}{len(one.payloads):8d}{usual:9.3f}{most:9.3f}{most / usual:7.2f}{dropped:10d}")
        until = time.monotonic() + 15
        while server.metric("streams") and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(1)
        for name, a, b in zip(("files", "threads", "MiB"), before, server.resources(), strict=True):
            scale = 2**20 if name == "MiB" else 1
            print(f"{name}: {a / scale:.0f} before, {b / scale:.0f} after")


if __name__ == "__main__":
    main()
