"""The server: messages, media, access control, and sessions of the shipped student in this process."""

import asyncio
import contextlib
import io
import json
import time
from concurrent.futures import CancelledError
from fractions import Fraction

import av
import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from sf_jax.server import engine, media, protocol
from sf_jax.server.app import make_app
from sf_jax.server.guard import Guard, Rules
from sf_jax.server.launch import Launch, Model, service_of
from sf_jax.server.metrics import make_metrics
from sf_jax.server.protocol import RequestError
from sf_jax.server.sessions import Outbox

PROMPT = "a 7 moving left, fast"
INTERACTION = {"type": "session.interaction", "interaction": {"event_id": "a", "event": {"prompt": "a 2 moving up"}}}


def start(**fields):
    return {"type": "session.start", "prompt": PROMPT, "seed": 5, **fields}


@pytest.fixture(scope="module")
def service():
    return service_of(Model(), Launch(), fps=60.0, scale=2, slots=2, waiting=1, mode="swap")


@pytest.fixture(scope="module")
def client(service):
    with TestClient(make_app(service)) as client:
        assert service.engine.ready.wait(300) and service.engine.error is None
        yield client


@contextlib.contextmanager
def session(client, **fields):
    """A WebSocket that has sent session.start."""
    # On exit, the client cancels tasks that still run.
    with contextlib.suppress(CancelledError), client.websocket_connect("/v1/realtime/video") as socket:
        socket.send_json(start(**fields))
        yield socket


def until(socket, kind):
    """Messages up to and including the first of a type; binary ones as bytes."""
    messages = []
    while not messages or not isinstance(messages[-1], dict) or messages[-1]["type"] != kind:
        message = socket.receive()
        if message["type"] == "websocket.close":
            raise WebSocketDisconnect(message["code"])
        messages.append(message["bytes"] if message.get("bytes") is not None else json.loads(message["text"]))
    return messages


def chunks(messages):
    """Pairs of metadata and bytes."""
    pairs = zip(messages[:-1], messages[1:], strict=True)
    return [(a, b) for a, b in pairs if isinstance(a, dict) and a["type"] == "video.chunk_metadata"]


def decoded(data):
    with av.open(io.BytesIO(data)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def closed_with(socket, code):
    with pytest.raises(WebSocketDisconnect) as closed:
        while True:
            message = socket.receive()
            if message["type"] == "websocket.close":
                raise WebSocketDisconnect(message["code"])
    assert closed.value.code == code


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("nothing", "invalid_json", "the message is not JSON"),
        ("[" * 9000, "invalid_json", "the message is not JSON"),
        ('{"type": "session.start", "prompt": "a", "fps": NaN}', "invalid_json", "NaN is not a number"),
        ('"text"', "invalid_message", "the message: "),
        ("{}", "invalid_message", "type"),
        ({"type": "session.begin"}, "invalid_message", "session.start"),
        ({"type": "session.start"}, "invalid_message", "prompt: field required"),
        (start(prompt=" "), "invalid_message", "prompt: must not be empty"),
        (start(prompt="a" * 2001), "invalid_message", "prompt: string should have at most 2000"),
        (start(prompt="a\x00b"), "invalid_message", "prompt: must not have control characters"),
        ('{"type": "session.start", "prompt": "\\ud800"}', "invalid_message", "prompt: "),
        (start(seed=-1), "invalid_message", "seed: must be greater than or equal to 0"),
        (start(seed="7"), "invalid_message", "seed: must be a valid integer"),
        (start(seed=True), "invalid_message", "seed: must be a valid integer"),
        (start(fps=1e9), "invalid_message", "fps: must be less than or equal to 60"),
        (start(format="gif"), "invalid_message", "format: must be 'm4s' or 'jpeg'"),
        (start(num_frames=0), "invalid_message", "num_frames: "),
        (start(color="red"), "invalid_message", "color: extra inputs are not permitted"),
        ({"type": "session.interaction"}, "invalid_message", "interaction: field required"),
        ({"type": "session.interaction", "interaction": {"event": {}}}, "invalid_message", "event.prompt"),
        (" " * 20_000, "too_large", "the message has 20000 characters: at most 16384"),
    ],
)
def test_messages_that_are_wrong_are_refused(text, code, message):
    with pytest.raises(RequestError) as refused:
        protocol.parse(text if isinstance(text, str) else json.dumps(text))
    assert refused.value.code == code and message in str(refused.value), str(refused.value)
    assert len(str(refused.value)) <= protocol.ERROR_LENGTH


def test_messages_that_are_right():
    message = protocol.parse(json.dumps(start(num_frames=12, fps=24, prompt=" a 7 ")))
    assert (message.prompt, message.num_frames, message.fps, message.format) == ("a 7", 12, 24, "m4s")
    assert protocol.parse(json.dumps(INTERACTION)).interaction.transition_chunks == 0
    assert protocol.parse('{"type": "session.ping"}').type == "session.ping"


def test_a_rate_lets_bursts_through_and_no_more():
    rate = protocol.RateLimit(burst=3, rate=2.0)
    assert [rate.allows(10.0) for _ in range(4)] == [True, True, True, False]
    assert rate.allows(10.5) and not rate.allows(10.6) and rate.allows(11.1)


def test_fragments_are_one_video():
    frames = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8).repeat(8, 1).repeat(8, 2)
    frames = media.enlarged(frames, 1)
    parts = [media.fragment(frames[i : i + 3], Fraction(12), i, i // 3) for i in (0, 3)]
    assert parts[0][0] == parts[1][0]
    assert parts[1] == media.fragment(frames[3:], Fraction(12), 3, 1)
    for whole, first in ((parts[0][0] + parts[0][1] + parts[1][1], 0), (parts[1][0] + parts[1][1], 3)):
        with av.open(io.BytesIO(whole)) as file:
            assert file.streams.video[0].codec_context.name == "h264"
            seen = list(file.decode(video=0))
        assert [frame.pts * frame.time_base for frame in seen] == [Fraction(i, 12) for i in range(first, 6)]
        for frame, expected in zip(seen, frames[first:], strict=True):
            assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - expected).mean() < 4
    files = media.jpegs(frames)
    assert len(files) == 6 and all(file.startswith(b"\xff\xd8") for file in files)


def test_a_cut_in_the_picture_loses_no_frames():
    frames = np.zeros((12, 64, 64, 3), np.uint8)
    frames[3:7], frames[7:] = 255, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for fps in (1, 4, 8, 16):
        assert len(decoded(b"".join(media.fragment(frames, Fraction(fps), 0, 0)))) == 12


def test_a_slow_viewer_gets_the_newest_chunks():
    def chunk(index, **ids):
        return engine.Chunk(index, np.zeros((1, 2, 2, 1), np.uint8), 0.1, 1.0, **ids)

    async def scenario():
        dropped = []
        box = Outbox(2, lambda: dropped.append(1))
        box.put({"type": "session.pong"})
        box.put(chunk(0, started=("a",), active=("a",), completed=("a",)))
        for index in range(1, 5):
            box.put(chunk(index))
        items = [await box.get() for _ in range(3)]
        assert items[0] == {"type": "session.pong"}
        assert [(item.index, item.started, item.completed) for item in items[1:]] == [(3, ("a",), ("a",)), (4, (), ())]
        assert box.dropped == len(dropped) == 3
        for _ in range(300):
            box.put({"type": "session.pong"})
        assert box.flooded

    asyncio.run(scenario())


def asked(rules, requests):
    """Statuses of requests to an app, behind a guard, that reads the whole body."""

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})

    async def scenario():
        guarded = Guard(app, rules, make_metrics().refused)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://sf:8000") as http:
            return [await http.request(**{"method": "GET", "url": "/"} | request) for request in requests]

    return asyncio.run(scenario())


def test_the_guard():
    token = "0123456789abcdef"
    bearer = {"Authorization": f"Bearer {token}"}
    requests = [
        {},
        {"headers": {"Authorization": "Bearer wrong"}},
        {"headers": {"Authorization": "Bearer \xff".encode("latin-1")}},
        {"headers": bearer},
        {"url": "/?token=wrong"},
        {"url": "/metrics?token=" + token},
        {"url": "/healthz"},
        {"headers": bearer | {"Origin": "https://evil.org"}},
        {"headers": bearer | {"Origin": "null"}},
        {"headers": bearer | {"Origin": "http://sf:8000"}},
        {"headers": bearer | {"Origin": "https://friend.org"}},
        {"headers": bearer, "method": "POST", "content": b"x" * 20_000},
        {"headers": bearer | {"Host": "evil.org"}},
        {"headers": {"Cookie": f"sf_jax_token={token}"}},
        {"headers": {"Cookie": "sf_jax_token=wrong; a=b"}},
        {"headers": {"Cookie": f'a={{"x": 1}}; sf_jax_token={token}'}},
        {"headers": bearer | {"Origin": "http://["}},
    ]
    rules = Rules(token, ("https://friend.org",), ("sf",))
    answers = asked(rules, requests)
    statuses = [401, 401, 401, 200, 401, 401, 200, 403, 403, 200, 200, 413, 421, 200, 401, 200, 403]
    assert [answer.status_code for answer in answers] == statuses
    for answer in answers:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert answer.status_code == 200 or set(answer.json()["error"]) == {"code", "message"}
        assert token not in answer.text
    (login,) = asked(rules, [{"url": f"/?token={token}"}])
    assert login.status_code == 303 and login.headers["location"] == "./"
    assert "HttpOnly" in login.headers["set-cookie"] and "SameSite=Lax" in login.headers["set-cookie"]
    many = asked(Rules(burst=2, rate=0.5), [{"url": "/v1/videos"}] * 3 + [{"url": "/v1/info"}])
    assert [answer.status_code for answer in many] == [200, 200, 429, 200]
    assert many[2].headers["retry-after"] == "2"


def test_the_page_and_what_describes_the_server(client):
    assert "<video" in client.get("/").text and "MediaSource" in client.get("/page.js").text
    assert client.get("/page.css").headers["content-type"].startswith("text/css")
    for path in ("/../setup.py", "/page/index.html", "/static/../../etc/passwd", "/docs"):
        answer = client.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    info = client.get("/v1/info").json()
    assert (info["width"], info["height"], info["chunk_frames"]) == (48, 48, 3)
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert "/v1/videos" in client.get("/openapi.json").json()["paths"]


def test_a_session_is_the_stream(client, digits):
    with session(client, num_frames=12) as socket:
        messages = until(socket, "session.done")
        closed_with(socket, protocol.NORMAL)
    assert messages[0]["type"] == "video.start" and messages[0]["config"]["seed"] == 5
    pairs = chunks(messages)
    assert [a["generation_chunk_index"] for a, _ in pairs] == [0, 1, 2, 3]
    assert all(a["byte_length"] == len(b) and a["num_frames"] == 3 for a, b in pairs)
    assert messages[-1] | {"request_id": ""} == {
        "type": "session.done",
        "request_id": "",
        "chunks": 4,
        "dropped": 0,
        "stopped": False,
        "reason": "completed",
    }
    video = digits(PROMPT, seed=5, frames=12)[0]
    expected = media.fragment(media.enlarged(video[:3], 2), Fraction(60), 0, 0)
    assert len(decoded(b"".join(b for _, b in pairs))) == 12
    seen = np.stack(decoded(b"".join(b for _, b in pairs)))
    assert np.abs(seen[:, ::2, ::2].astype(int) - video).mean() < 3
    assert abs(len(pairs[0][1]) - len(b"".join(expected))) < 200  # up to rounding of the frames
    answer = client.post("/v1/videos", json={"prompt": PROMPT, "num_frames": 12, "seed": 5, "fps": 60})
    assert answer.headers["content-type"] == "video/mp4" and answer.headers["x-seed"] == "5"
    assert answer.content == b"".join(b for _, b in pairs)


def test_changes_have_the_servers_defaults_unless_a_client_says_otherwise(client, service, monkeypatch):
    engine = service_of(Model(), Launch()).engine
    assert (engine.mode, engine.context_timestep, engine.fade) == ("swap", None, 0.4)
    assert service_of(Model(), Launch(), mode="recache").engine.fade == 0
    with pytest.raises(ValueError, match="fade is 0.4: a cut keeps no frames"):
        service_of(Model(), Launch(), mode="cut", fade=0.4)
    monkeypatch.setattr(service.engine, "fade", 0.25)
    assert client.get("/v1/info").json()["default"] == {"mode": "swap", "context_timestep": None, "fade": 0.25}
    changes, stream = [], service.engine._stream
    prompt = stream.prompt

    def recorded(one, text, mode, **options):
        changes.append((mode, options["fade"]))
        prompt(one, text, mode, **options)

    monkeypatch.setattr(stream, "prompt", recorded)
    with session(client) as socket:
        until(socket, "video.chunk_metadata")
        for number, options in enumerate(({}, {"fade": 0.5}, {"mode": "swap"}, {"mode": "cut"})):
            event = {"event_id": str(number), "event": {"prompt": "a 2 moving up"}, **options}
            socket.send_json({"type": "session.interaction", "interaction": event})
            while len(changes) == number:
                until(socket, "video.chunk_metadata")
    assert changes == [("swap", 0.25), ("swap", 0.5), ("swap", 0.0), ("cut", 0.0)]


def test_prompts_change_and_are_acknowledged_twice(client):
    with session(client) as socket:
        until(socket, "video.chunk_metadata")
        socket.send_json(INTERACTION)
        messages = until(socket, "session.interaction.queued")
        assert messages[-1]["event_id"] == "a"
        socket.send_json(INTERACTION)  # a retry
        while not any("a" in pair[0]["started_event_ids"] for pair in chunks(messages)):
            messages += until(socket, "video.chunk_metadata") + [socket.receive()["bytes"]]
        applied = [pair[0] for pair in chunks(messages) if pair[0]["active_event_ids"]]
        assert len(applied) == 1 and applied[0]["completed_event_ids"] == ["a"]
        changed = json.loads(json.dumps(INTERACTION))
        changed["interaction"]["event"]["prompt"] = "a 3 moving up"
        socket.send_json(changed)
        assert until(socket, "error")[-1]["code"] == "event_id_conflict"
        for event, code in (
            ({"event_id": "b", "event": {"prompt": "a cat"}}, "invalid_interaction"),
            (
                {"event_id": "c", "event": {"prompt": "a 3"}, "mode": "cut", "transition_chunks": 4},
                "invalid_interaction",
            ),
            ({"event_id": "d", "event": {"prompt": ""}}, "invalid_message"),
        ):
            socket.send_json({"type": "session.interaction", "interaction": event})
            error = until(socket, "error")[-1]
            assert (error["code"], error["event_id"]) == (code, event["event_id"]), error
        event = {"event_id": "e", "event": {"prompt": "a 3"}, "mode": "swap", "transition_chunks": 3}
        socket.send_json({"type": "session.interaction", "interaction": event})
        messages = until(socket, "session.interaction.queued")
        while not any("e" in pair[0]["completed_event_ids"] for pair in chunks(messages)):
            messages += until(socket, "video.chunk_metadata") + [socket.receive()["bytes"]]
        assert sum("e" in pair[0]["active_event_ids"] for pair in chunks(messages)) == 3
        for name, kind in (("ping", "pong"), ("pause", "paused"), ("resume", "resumed")):
            socket.send_json({"type": f"session.{name}"})
            until(socket, f"session.{kind}")
        socket.send_json(start())
        assert until(socket, "error")[-1]["code"] == "already_started"
        socket.send_json({"type": "session.stop"})
        assert until(socket, "session.done")[-1]["reason"] == "stopped"


def test_nothing_comes_while_paused(client):
    with session(client, fps=60) as socket:
        until(socket, "video.chunk_metadata")
        socket.send_json({"type": "session.pause"})
        until(socket, "session.paused")
        time.sleep(0.3)
        socket.send_json({"type": "session.ping"})
        # At most the chunks generated before the pause.
        assert len(chunks(until(socket, "session.pong"))) <= 4


def test_a_viewer_who_tells_where_it_is_is_not_overtaken(client):
    with session(client, fps=60, streaming_buffer_seconds=0.1) as socket:
        messages = until(socket, "video.start")
        for position in (0.0, 0.1, 0.2):
            time.sleep(0.3)
            socket.send_json({"type": "session.playback", "position_seconds": position})
            for _ in range(50):  # a busy machine takes longer
                time.sleep(0.2)
                socket.send_json({"type": "session.ping"})
                messages += until(socket, "session.pong")
                made = sum(a["num_frames"] for a, _ in chunks(messages)) / 60
                if made - position - 0.1 >= -1e-6:
                    break
            assert -1e-6 <= made - position - 0.1 <= 2 * 3 / 60, (position, made)
    with session(client) as socket:
        socket.send_json({"type": "session.playback", "position_seconds": 1.0})
        assert "streaming_buffer_seconds" in until(socket, "error")[-1]["message"]


def test_errors_of_one_stream_are_its_own(client, service):
    with session(client, num_frames=9) as good:
        for fields, code in (({"prompt": "a cat"}, "invalid_prompt"), ({"width": 7}, "invalid_message")):
            with session(client, **fields) as bad:
                assert until(bad, "error")[-1]["code"] == code
                closed_with(bad, protocol.POLICY)
        assert until(good, "session.done")[-1]["reason"] == "completed"
    with client.websocket_connect("/v1/realtime/video") as socket:
        socket.send_bytes(b"\x00")
        assert until(socket, "error")[-1]["code"] == "invalid_message"
        closed_with(socket, protocol.POLICY)
    with client.websocket_connect("/v1/realtime/video") as socket:
        socket.send_json({"type": "session.ping"})
        assert until(socket, "error")[-1]["code"] == "not_started"
    with session(client) as socket:
        for _ in range(60):
            socket.send_json({"type": "session.ping"})
        assert until(socket, "error")[-1]["code"] == "too_many_messages"
        closed_with(socket, protocol.POLICY)


def test_clients_wait_for_a_slot_or_are_refused(client):
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(session(client)) for _ in range(2))
        for socket in (first, second):
            until(socket, "video.start")
        with session(client, num_frames=3) as third:
            assert until(third, "session.queued")[-1]["position"] == 1
            with session(client) as fourth:
                error = until(fourth, "error")[-1]
                assert error["code"] == "busy" and error["retry_after"] > 0
                closed_with(fourth, protocol.LATER)
            answer = client.post("/v1/videos", json={"prompt": PROMPT})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            first.send_json({"type": "session.stop"})
            assert until(third, "session.done")[-1]["reason"] == "completed"
    metrics = client.get("/metrics").text
    assert 'sf_jax_refused_total{code="busy"} 2.0' in metrics
    assert "sf_jax_slots 2.0" in metrics and "sf_jax_first_chunk_seconds_count" in metrics


def test_a_stream_among_others_has_the_same_bytes(client):
    def played(socket):
        return b"".join(b for _, b in chunks(until(socket, "session.done")))

    with session(client, num_frames=15, format="jpeg") as socket:
        alone = played(socket)
    with session(client, prompt="a 3 moving up") as other:
        until(other, "video.start")
        with session(client, num_frames=15, format="jpeg") as socket:
            assert played(socket) == alone


@pytest.mark.slow
def test_wan_is_ready_when_its_text_encoder_is(folder):
    options = {"vae": "tiny", "dtype": "float32"}
    rollout, size = {"window": 9, "sink": 3}, {"height": 32, "width": 48}
    model = Model(str(folder), str(folder / "student.safetensors"), options, rollout, size)
    service = service_of(model, Launch(), slots=1, waiting=1)
    with TestClient(make_app(service)) as client:
        assert service.engine.ready.wait(300) and service.engine.error is None
        encoder = service.engine.pipe.text_encoder
        assert encoder._embedder is not None and service.engine.pipe.rollout.positions == "relative"
        with session(client, prompt="a cat in the snow", num_frames=33, fps=60) as socket:
            until(socket, "video.chunk_metadata")
            changed = json.loads(json.dumps(INTERACTION))
            changed["interaction"]["event"]["prompt"] = "a dog runs"
            socket.send_json(changed)
            messages = until(socket, "session.done")
        assert sum(a["num_frames"] for a, _ in chunks(messages)) >= 12
        for i in range(100):
            encoder.encode([f"a cat {i}"])
        assert len(encoder._embeddings) == 64


def test_an_engine_that_fails_says_so(monkeypatch):
    service = service_of(Model(), Launch(), slots=1, waiting=1)
    with TestClient(make_app(service)) as client:
        assert service.engine.ready.wait(300)

        def broken(*_):
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(service.engine._stream, "step", broken)
        monkeypatch.setattr(service.engine, "_new_stream", broken)
        with session(client) as socket:
            assert until(socket, "error")[-1]["code"] == "internal"
            closed_with(socket, protocol.BROKEN)
        assert service.engine.ended.wait(10)
        assert client.get("/readyz").status_code == client.get("/healthz").status_code == 500
        with session(client) as socket:
            assert until(socket, "error")[-1]["code"] == "internal"  # not "starting", after which clients try again
            closed_with(socket, protocol.BROKEN)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, "prompt: field required"),
        ({"prompt": "a 7", "num_frames": 10**6}, 400, "num_frames is 1000000: at most 960"),
        ({"prompt": "a cat"}, 400, "unknown word 'cat'"),
        ({"prompt": "a 7", "seed": 2**40}, 422, "seed: "),
        ({"prompt": "a 7", "path": "/etc/passwd"}, 422, "path: extra inputs"),
        ([1], 422, ""),
        ({"prompt": "a" * 20_000}, 413, "larger than 16384 bytes"),
    ],
)
def test_videos_that_are_wrong_are_refused(client, body, status, message):
    answer = client.post("/v1/videos", json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
