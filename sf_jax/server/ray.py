"""The same app on Ray Serve: one address, with as many replicas on the machines of a cluster as the load needs."""

import os
import signal
import threading
from typing import Any

import ray
from ray import serve
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from sf_jax.server import protocol
from sf_jax.server.app import make_app
from sf_jax.server.launch import Launch, Model, service_of

APP = "sf_jax"
# Ray Serve imports its proxies' middleware from here, if this is set when the cluster starts.
PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# Ray kills a proxy that takes longer to start, in seconds; the 5 s of Ray are short on a busy machine.
PROXY_READY, PROXY_READY_SECONDS = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60"


def deployment(
    model: Model, launch: Launch, options: dict[str, Any], replicas: tuple[int, int], accelerator: str = "none"
) -> serve.Application:
    """A deployment whose replicas each load the model and have their own slots.

    A WebSocket stays with the replica that accepted it. Ray Serve adds and removes replicas to keep three quarters of
    their slots in use on average. A replica drains before it is removed, and is replaced if its engine fails.

    Args:
      model: the model to play.
      launch: who may use it; host and port are those of Ray Serve's proxies.
      options: options of `service_of`.
      replicas: minimum and maximum number.
      accelerator: "GPU" or "TPU" gives each replica as many of them as the model's mesh needs (one without a mesh);
        "none" gives it a CPU core.
    """
    slots, waiting = options.get("slots", 4), options.get("waiting", 16)

    class Replica:
        def __init__(self):
            self._service = service_of(model, launch, **options)

        def __serve_build_asgi_app__(self):
            return make_app(self._service, wait=True)

        def check_health(self):
            if self._service.engine.error is not None:
                raise RuntimeError("the engine has failed") from self._service.engine.error

    resources = {
        "GPU": {"num_gpus": model.devices},
        "TPU": {"num_cpus": 1, "resources": {"TPU": model.devices}},
        "none": {"num_cpus": 1},
    }[accelerator]
    least, most = replicas
    scaling = {"num_replicas": least}
    if most > least:
        target = max(1.0, 0.75 * slots)
        scaling = {
            "autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}
        }
    decorated = serve.deployment(
        name=APP,
        ray_actor_options=resources,
        max_ongoing_requests=slots + waiting + 8,  # includes requests that are answered at once
        graceful_shutdown_timeout_s=launch.drain + 10,
        graceful_shutdown_wait_loop_s=1.0,
        **scaling,
    )
    return decorated(serve.ingress()(Replica)).bind()


class ComeBack:
    """ASGI middleware of the proxies: closes WebSockets whose replica is gone with 1012, so that clients reconnect."""

    def __init__(self, app: ASGIApp):
        """Wraps the proxy."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request or WebSocket."""
        if scope["type"] != "websocket":
            return await self.app(scope, receive, send)
        is_open = is_gone = False

        async def counted_receive():
            nonlocal is_gone
            message = await receive()
            is_gone = is_gone or message["type"] == "websocket.disconnect"
            return message

        async def counted_send(message):
            nonlocal is_open
            if is_open and message["type"].startswith("http."):
                return  # the proxy's response if the replica is gone
            if message["type"] in ("websocket.accept", "websocket.close"):
                is_open = message["type"] == "websocket.accept"
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        finally:
            if is_open and not is_gone:
                await send({"type": "websocket.close", "code": protocol.RESTART})


def proxy_middlewares() -> list[Middleware]:
    """The middleware that `PROXY_CALLBACK` names."""
    return [Middleware(ComeBack)]


def _join_or_start() -> bool:
    """Joins this machine's Ray cluster; without one, starts one that only this machine can reach."""
    os.environ.setdefault(PROXY_CALLBACK, f"{__name__}.proxy_middlewares")
    os.environ.setdefault(PROXY_READY, PROXY_READY_SECONDS)
    try:
        ray.init(address="auto", ignore_reinit_error=True)
        return True
    except ConnectionError:
        ray.init(_node_ip_address="127.0.0.1", include_dashboard=False)
        return False


def serve_on_ray(
    model: Model, launch: Launch, options: dict[str, Any], replicas: tuple[int, int], accelerator: str
) -> None:
    """Joins the Ray cluster, or starts one on this machine, and serves until the process is asked to stop."""
    joined = _join_or_start()
    serve.start(http_options={"host": launch.host, "port": launch.port, "location": "EveryNode"})
    try:
        serve.run(deployment(model, launch, options, replicas, accelerator), name=APP)
    except RuntimeError as error:
        raise ValueError(f"the replicas cannot start: {' '.join(str(error).split())[-500:]}") from error
    print(f"serving http://{launch.host}:{launch.port}/{launch.query}", flush=True)
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    asked.wait()
    if joined:
        serve.delete(APP)
    else:
        serve.shutdown()
    print("ended", flush=True)
