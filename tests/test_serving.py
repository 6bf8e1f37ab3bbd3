"""The server as a process: load, hostile clients, signals, and the page in a real browser."""

import asyncio
import json
import random
import signal
import time
import urllib.error
import urllib.request

import pytest
import websockets

from tests.server_process import Watched, drop, reached, running, trickle, vanish, watch

pytestmark = pytest.mark.slow
SLOTS = 6
SECONDS = 12  # benchmarks/serving.py runs for 60


@pytest.fixture(scope="module")
def server():
    with running(f"--slots={SLOTS}", "--waiting=4", "--scale=4") as server:
        yield server


def test_many_clients(server):
    async def scenario():
        # JPEGs, as their bytes depend only on the pixels
        alone = await watch(server, seed=3, format="jpeg", num_frames=12 * SECONDS // 2, fps=60)
        before = server.resources()
        regular = [watch(server, SECONDS, seed=3, format="jpeg") for _ in range(4)]
        slow = Watched()
        reading = asyncio.create_task(watch(server, pause=1.5, record=slow, seed=3))
        waiting = [watch(server, SECONDS, seed=3) for _ in range(2)]
        tasks = [asyncio.create_task(one) for one in regular]
        await asyncio.sleep(0.5)
        tasks += [asyncio.create_task(one) for one in [drop(server, SECONDS), *waiting]]
        results = await asyncio.gather(*tasks)
        await reached(lambda: slow.code or slow.metadata[-1]["dropped"] > 0)  # it gets recent chunks, not all
        count, code = len(slow.payloads), slow.code
        # for longer than the answer to a ping may take
        await reached(lambda: slow.code or len(slow.payloads) > count + 7)
        assert slow.code == code is None
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        return alone, before, results, slow

    alone, before, results, slow = asyncio.run(scenario())
    regular, waited = results[:4], results[5:]
    counts = [len(seen.payloads) for seen in regular]
    assert min(counts) > SECONDS and max(counts) - min(counts) <= 4, counts  # all are served alike
    count = min(len(alone.payloads), *counts)
    for seen in regular:
        assert seen.payloads[:count] == alone.payloads[:count]
    last = slow.metadata[-1]
    assert last["dropped"] <= last["generation_chunk_index"] - len(slow.payloads) + 1, (last, len(slow.payloads))
    assert sum(len(seen.payloads) for seen in waited) > 0  # the slot of the dropping client
    asyncio.run(reached(lambda: server.metric("streams") == server.metric("queue") == 0))
    after = server.resources()
    assert after[0] <= before[0] + 2 and after[1] <= before[1] + 2, (before, after)
    assert after[2] <= before[2] * 1.05 + 30 * 2**20, (before, after)


def test_a_slow_network_is_no_reason_to_disconnect(server):
    async def scenario():
        return await asyncio.gather(*[trickle(server, pause, 20.0) for pause in (2.0, 4.5, 5.0)])

    for sizes in asyncio.run(scenario()):
        assert min(sizes) > 0 and sum(sizes) > 10_000, sizes  # 0 is the end
    asyncio.run(reached(lambda: server.metric("streams") == 0, 30.0))


def _malformed(rng):
    good = {"type": "session.interaction", "interaction": {"event": {"prompt": "a 2 moving up"}}}
    text = json.dumps(good)
    kind = rng.randrange(9)
    if kind == 0:
        return "".join(rng.choice('{}[]":,\\u0aé\x00') for _ in range(rng.randrange(1, 300)))
    if kind == 1:
        place = rng.randrange(len(text))
        return text[:place] + rng.choice(["", "\x00", '"', "}", "NaN", "1e999", "null"]) + text[place + 1 :]
    if kind == 2:
        return rng.randbytes(rng.randrange(200))
    if kind == 3:
        return json.dumps({"type": rng.choice(["session.start", "session.end", "", None, 3]), "prompt": "a" * 10_000})
    if kind == 4:
        return "[" * rng.randrange(1, 10_000)
    if kind == 5:
        good["interaction"][rng.choice(["mode", "event_id", "transition_chunks", "event"])] = rng.choice(
            [[], -1, {}, 1e300]
        )
        return json.dumps(good)
    if kind == 6:
        good["interaction"]["event"]["prompt"] = rng.choice(
            ["../../etc/passwd", "\ud800", "a " * 400, "<script>", "%s%n"]
        )
        return json.dumps(good)
    if kind == 7:
        return json.dumps({"type": "session.playback", "position_seconds": rng.choice([-1, 1e308, "0", None])})
    return json.dumps({"type": "session.pause", "extra": "x" * rng.randrange(10_000)})


def test_malformed_messages_disturb_nobody(server):
    rng = random.Random(0)

    async def hostile(count):
        refused = 0
        while count:
            sent = min(count, 30)
            count -= sent
            async with server.connect() as ws:
                errors, whole = 0, False
                try:
                    await ws.send(json.dumps({"type": "session.start", "prompt": "a 3"}))
                    for _ in range(sent):
                        await ws.send(_malformed(rng))
                    await ws.send(json.dumps({"type": "session.stop"}))
                    async for message in ws:
                        errors += isinstance(message, str) and json.loads(message)["type"] == "error"
                        whole = whole or (isinstance(message, str) and '"session.done"' in message)
                except websockets.ConnectionClosed:
                    pass
                refused += errors if whole else sent  # too much at once: the server closed the connection
        return refused

    async def floods():
        for _ in range(5):
            async with server.connect() as ws:
                try:
                    await ws.send(json.dumps({"type": "session.start", "prompt": "a 3"}))
                    for _ in range(500):
                        await ws.send('{"type": "session.ping"}')
                    async for _ in ws:
                        pass
                except websockets.ConnectionClosed as closed:
                    assert closed.rcvd is None or closed.rcvd.code == 1008
            async with server.connect() as ws:
                try:
                    await ws.send("x" * 100_000)
                    await ws.recv()
                except websockets.ConnectionClosed as closed:
                    assert closed.rcvd is None or closed.rcvd.code in (1008, 1009)

    async def scenario():
        good = asyncio.create_task(watch(server, seed=9, num_frames=240, format="jpeg"))
        refused = await hostile(1000)
        await floods()
        return refused, await good, await watch(server, seed=9, num_frames=240, fps=60, format="jpeg")

    refused, good, alone = asyncio.run(scenario())
    assert refused >= 900 and server.process.poll() is None
    assert good.done["reason"] == "completed" and good.done["dropped"] == 0
    assert good.payloads == alone.payloads
    assert server.get("/readyz")


def test_control_frames_are_no_way_round_the_rates(server):
    async def scenario():
        good = Watched()
        watching = asyncio.create_task(watch(server, record=good))
        await reached(lambda: len(good.payloads) > 3)
        flood = vanish(server)
        began = time.monotonic()
        try:
            for _ in range(200):
                flood.sendall(b"\x89\x80\x01\x02\x03\x04" * 10_000)  # empty pings
                await asyncio.sleep(0)
        except OSError:
            pass
        else:
            raise AssertionError("the flood was taken")
        assert time.monotonic() - began < 30
        flood.close()
        count = len(good.payloads)
        await reached(lambda: len(good.payloads) > count + 8)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return good

    good = asyncio.run(scenario())
    assert max(good.intervals[3:]) < 3.0  # nobody else waits while the server reads pings


def test_a_vanished_client_frees_its_slot(server):
    # Some of them have buffers that their streams fill.
    sockets = [vanish(server, format="jpeg" if i % 2 else "m4s", fps=60 if i % 2 else 12) for i in range(SLOTS)]
    asyncio.run(reached(lambda: server.metric("streams") == SLOTS))
    asyncio.run(reached(lambda: server.metric("streams") == 0, 30.0))
    for client in sockets:
        client.close()


def test_the_server_ends_although_a_client_is_closing_its_connection():
    with running() as server:
        client = vanish(server, format="jpeg", fps=60)
        asyncio.run(reached(lambda: server.metric("streams") == 1))
        time.sleep(2)  # until the client's buffers are full
        client.sendall(b"\x88\x82\x00\x00\x00\x00\x03\xe8")  # a close frame, whose answer the client does not read
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        time.sleep(1)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        client.close()


def test_rest_by_its_description(server):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    import hypothesis
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_url(f"http://{server.address}/openapi.json")
    strategy = schema.include(path="/v1/videos").as_strategy()

    @hypothesis.given(case=strategy)
    @hypothesis.settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    def calls(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("num_frames"), int):
            case.body["num_frames"] = min(case.body["num_frames"], 2000)
        answer = case.call()
        while answer.status_code == 429:  # rate-limited
            time.sleep(1)
            answer = case.call()
        # Requests that fit the schema may still contain a word unknown to the model.
        case.validate_response(answer, excluded_checks=[checks.positive_data_acceptance])

    calls()


def test_a_token_is_needed_where_others_can_reach_it():
    with running("--host=0.0.0.0", env={"SF_JAX_TOKEN": "a-token-of-enough-characters"}) as server:
        assert server.token == "..."  # a given token is not printed
        server.token = "a-token-of-enough-characters"
        server.address = server.address.replace("0.0.0.0", "127.0.0.1")
        for path in ("/", "/v1/info", "/metrics"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                server.get(path)
            assert refused.value.code == 401
            server.get(path, Authorization=f"Bearer {server.token}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.get("/v1/info", Authorization=f"Bearer {server.token}", Origin="https://evil.org")
        assert refused.value.code == 403

        async def scenario():
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with server.connect():
                    pass
            assert refused.value.response.status_code == 403
            headers = {"Authorization": f"Bearer {server.token}"}
            with pytest.raises(websockets.InvalidStatus) as refused:
                async with server.connect(additional_headers=headers, origin="https://evil.org"):
                    pass
            assert refused.value.response.status_code == 403
            async with server.connect(additional_headers=headers) as ws:
                await ws.send(json.dumps({"type": "session.start", "prompt": "a 3"}))
                assert json.loads(await ws.recv())["type"] == "video.start"
                server.process.send_signal(signal.SIGTERM)  # drains: the stream continues
                for _ in range(10):
                    await ws.recv()
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    async with server.connect(additional_headers=headers) as late:
                        await late.send(json.dumps({"type": "session.start", "prompt": "a 3"}))
                        while True:
                            await late.recv()
                assert closed.value.rcvd.code == 1012
                await ws.send(json.dumps({"type": "session.stop"}))
                async for _ in ws:
                    pass

        asyncio.run(scenario())
        assert server.process.wait(20) == 0
