"""Serves endless video on a web page: type a prompt, watch it live, change it while it plays.

    python -m sf_jax.serve
    python -m sf_jax.serve --model=weights/Wan2.1-T2V-1.3B --checkpoint=weights/checkpoints/self_forcing_dmd.pt

Without --model, the server plays the shipped student of moving digits. Open the address that it prints. docs/serve.md
describes the messages, and how to make the server reachable from other machines.
"""

import ipaddress
import os
import secrets
from pathlib import Path

from absl import flags

from sf_jax import command
from sf_jax.io.video_write import check_encoder

_MODEL = command.define_weights("model", None, "Wan: model folder, official or of diffusers, or its name on the hub")
_CHECKPOINT = command.define_weights("checkpoint", None, "Weights of a few-step student (default: the shipped digits)")
_PART = flags.DEFINE_string("part", None, "Network of the checkpoint: generator_ema (default), generator, model")
_VAE = flags.DEFINE_enum("vae", None, ["wan", "tiny"], "Wan: decoder (wan)")
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Wan: numbers (bfloat16; float32 on a CPU)")
_QUANTIZE = flags.DEFINE_enum(
    "quantize", None, ["int8", "fp8"], "Weights of 8 bits, and products where the device has them"
)
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", None, ["bfloat16", "float32", "int8", "fp8"], "Cached keys and values (the network's type)"
)
_MESH = flags.DEFINE_string("mesh", None, "Wan: devices that share a stream, such as tensor:2,context:2 (one device)")
_HEIGHT = flags.DEFINE_integer("height", None, "Rows of pixels (Wan: 480, a multiple of 16)")
_WIDTH = flags.DEFINE_integer("width", None, "Columns of pixels (Wan: 832, a multiple of 16)")
_WINDOW = flags.DEFINE_integer("window", None, "Latent frames that a chunk sees, itself included (Wan: 21)")
_SINK = flags.DEFINE_integer("sink", None, "First latent frames that stay visible in the window (Wan: 3)")
_POSITIONS = flags.DEFINE_enum(
    "positions", None, ["absolute", "relative"], "Absolute positions end a stream at 1024 latent frames (relative)"
)
_FPS = flags.DEFINE_float("fps", None, "Frames per second (digits: 12; Wan: 16)", 1.0, 60.0)
_SCALE = flags.DEFINE_integer("scale", None, "Enlargement of the pixels (digits: 16; Wan: 1)", 1, 32)
_SLOTS = flags.DEFINE_integer("slots", 4, "Streams at once; their memory is taken at the start", 1, 1024)
_WAITING = flags.DEFINE_integer("waiting", 16, "Clients that may wait for a slot; more are refused", 0, 10_000)
_AHEAD = flags.DEFINE_float("ahead", 2.0, "Chunks that are made before they are played", 0.5, 20.0)
_MEMORY = flags.DEFINE_integer(
    "memory", None, "Bytes that the streams of a device may take (default: what is free)", 1, 2**50
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; all but this machine's own need a token")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one", 0, 65535)
_TOKEN_FILE = command.define_path("token_file", None, "File with the token (default: SF_JAX_TOKEN, or a new one)")
_HOSTS = flags.DEFINE_list("hosts", [], "Names under which a proxy makes the server known; a token is needed then")
_ORIGINS = flags.DEFINE_list("origins", [], "Origins of other pages that may use the server, such as https://a.org")
_PROXIES = flags.DEFINE_list("proxies", [], "Addresses of proxies whose X-Forwarded-For is believed")
_LIFETIME = flags.DEFINE_float("lifetime", 3600.0, "Seconds that a stream may play", 1.0, 1e9)
_RAY = flags.DEFINE_bool("ray", False, "Run on Ray Serve: replicas on all machines of its cluster, one address")
_REPLICAS = flags.DEFINE_string("replicas", "1", "With --ray: how many, such as 2, or 1-8 to follow the load")
_ACCELERATOR = flags.DEFINE_enum("accelerator", "none", ["none", "GPU", "TPU"], "With --ray: what a replica has")
_DRAIN = flags.DEFINE_float("drain", 20.0, "Seconds that streams go on after SIGTERM", 0.0, 1e6)
GROUPS = {
    "Model": (
        *("model", "checkpoint", "part", "vae", "dtype", "quantize", "cache_dtype", "mesh"),
        *("height", "width", "window", "sink", "positions"),
    ),
    "Streams": ("fps", "scale", "slots", "waiting", "ahead", "memory", "lifetime", "drain"),
    "Network": ("host", "port", "token_file", "hosts", "origins", "proxies"),
    "Ray": ("ray", "replicas", "accelerator"),
}

SHORTEST_TOKEN = 16  # characters
MISSING = "sf_jax.serve needs packages that are not installed ({}): pip install 'sf_jax[serve]'"


def is_loopback(host: str) -> bool:
    """Whether an address is reachable only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token() -> str:
    """The given token, or a new one.

    Raises:
      ValueError: if it is too short or not printable ASCII, or its file cannot be read.
    """
    token, source = os.environ.get("SF_JAX_TOKEN"), "SF_JAX_TOKEN"
    if _TOKEN_FILE.value is not None:
        source = f"token_file {_TOKEN_FILE.value}"
        try:
            token = Path(_TOKEN_FILE.value).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"token_file: cannot read {_TOKEN_FILE.value} ({error})") from error
    if token is None:
        return secrets.token_urlsafe(24)
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
        raise ValueError(f"{source} must have at least {SHORTEST_TOKEN} printable ASCII characters")
    return token


def _given(**named) -> dict:
    """Values of the flags that are set."""
    return {name: flag.value for name, flag in named.items() if flag.value is not None}


def main() -> None:
    """Command line: see the module's docstring."""
    try:
        from sf_jax.server.guard import host_names, origin_of
        from sf_jax.server.launch import Launch, Model, serve, service_of
    except ModuleNotFoundError as error:
        raise ValueError(MISSING.format(error.name)) from error
    check_encoder()
    public = bool(_HOSTS.value) or not is_loopback(_HOST.value)
    needs_token = public or _TOKEN_FILE.value is not None or "SF_JAX_TOKEN" in os.environ
    launch = Launch(
        host=_HOST.value,
        port=_PORT.value,
        token=read_token() if needs_token else None,
        hosts=host_names(_HOSTS.value, _HOST.value) if _HOSTS.value or not public else None,
        show_token=_TOKEN_FILE.value is None and "SF_JAX_TOKEN" not in os.environ,
        origins=tuple(map(origin_of, _ORIGINS.value)),
        proxies=tuple(_PROXIES.value),
        drain=_DRAIN.value,
    )
    model = Model(
        folder=_MODEL.value,
        checkpoint=_CHECKPOINT.value,
        options=_given(part=_PART, vae=_VAE, dtype=_DTYPE, mesh=_MESH),
        narrow=_given(quantize=_QUANTIZE, cache_dtype=_CACHE_DTYPE),
        rollout=_given(window=_WINDOW, sink=_SINK, positions=_POSITIONS),
        size=_given(height=_HEIGHT, width=_WIDTH),
    )
    options = {"slots": _SLOTS, "waiting": _WAITING, "ahead": _AHEAD, "lifetime": _LIFETIME}
    options = _given(**options, memory=_MEMORY, fps=_FPS, scale=_SCALE)
    if _RAY.value:
        return _serve_on_ray(model, launch, options)
    for name in ("replicas", "accelerator"):
        if flags.FLAGS[name].present:
            raise ValueError(f"{name} is given without ray")
    return serve(service_of(model, launch, **options), launch)


def _serve_on_ray(model, launch, options: dict) -> None:
    try:
        from sf_jax.server.ray import serve_on_ray
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray needs Ray Serve ({error.name} is missing): pip install 'sf_jax[ray]'") from error
    least, _, most = _REPLICAS.value.partition("-")
    if not least.isdecimal() or not (most or least).isdecimal() or not 1 <= int(least) <= int(most or least):
        raise ValueError(f"replicas is {_REPLICAS.value}: it must be a number such as 2, or a range such as 1-8")
    serve_on_ray(model, launch, options, (int(least), int(most or least)), _ACCELERATOR.value)


if __name__ == "__main__":
    command.run(main, groups=GROUPS)
