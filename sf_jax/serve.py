"""A page and a server for endless video: type a prompt, watch it live, change it while it plays.

    python -m sf_jax.serve
    python -m sf_jax.serve --model=Wan2.1-T2V-1.3B --checkpoint=self_forcing_dmd.pt

Without --model, the shipped student of moving digits. Open the address that it prints. docs/serve.md has the messages,
and how to run it where others can reach it.
"""

import ipaddress
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from absl import flags

from sf_jax import command

_MODEL = flags.DEFINE_string("model", None, "Wan: model folder, official or of diffusers")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Weights of a few-step student (default: the shipped digits)")
_PART = flags.DEFINE_string("part", None, "Network of the checkpoint: generator_ema (default), generator, model")
_VAE = flags.DEFINE_enum("vae", None, ["wan", "tiny"], "Wan: decoder (wan)")
_DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Wan: numbers (bfloat16; float32 on a CPU)")
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
_MEMORY = flags.DEFINE_integer("memory", None, "Bytes that the streams of a device may take (default: what is free)", 1)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; all but this machine's own need a token")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one", 0, 65535)
_TOKEN_FILE = flags.DEFINE_string("token_file", None, "File with the token (default: SF_JAX_TOKEN, or a new one)")
_HOSTS = flags.DEFINE_list("hosts", [], "Names under which a proxy makes the server known; a token is needed then")
_ORIGINS = flags.DEFINE_list("origins", [], "Origins of other pages that may use the server, such as https://a.org")
_PROXIES = flags.DEFINE_list("proxies", [], "Addresses of proxies whose X-Forwarded-For is believed")
_LIFETIME = flags.DEFINE_float("lifetime", 3600.0, "Seconds that a stream may play", 1.0)
_DRAIN = flags.DEFINE_float("drain", 20.0, "Seconds that streams go on behind SIGTERM", 0.0)

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
SHORTEST_TOKEN = 16  # characters
MISSING = "sf_jax.serve needs packages that are not installed ({}): pip install 'sf_jax[serve]'"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token() -> str:
    """The token that was given, or a new one.

    Raises:
      ValueError: if it is too short, or its file cannot be read.
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


def _loader() -> Callable:
    """What loads the pipeline that the flags describe."""
    size = {name: flag.value for name, flag in (("height", _HEIGHT), ("width", _WIDTH)) if flag.value is not None}
    rollout = {"window": _WINDOW.value, "sink": _SINK.value, "positions": _POSITIONS.value}
    rollout = {name: value for name, value in rollout.items() if value is not None}
    if _MODEL.value is None:
        for name in ("part", "vae", "dtype"):
            if flags.FLAGS[name].value is not None:
                raise ValueError(f"{name} is given without model: it is for Wan")

        def load():
            from sf_jax.inference.load import load_pipeline

            return load_pipeline(_CHECKPOINT.value).with_rollout(**rollout).with_sampling(**size)

        return load
    if _CHECKPOINT.value is None:
        raise ValueError("checkpoint is missing: the network of a model folder is bidirectional and cannot stream")

    def load_wan():
        from sf_jax.inference.load import load_pipeline
        from sf_jax.rollout import RolloutConfig

        config = RolloutConfig(**{"context_noise": "none", "window": 21, "sink": 3, "positions": "relative"} | rollout)
        options = {"part": _PART.value, "vae": _VAE.value or "wan", "dtype": _DTYPE.value, "rollout": config}
        pipe = load_pipeline(_MODEL.value, checkpoint=_CHECKPOINT.value, keep_text_encoder=True, **options)
        return pipe.with_sampling(**size)

    return load_wan


def _cache_small_programs() -> None:
    """Keeps all compiled programs, not the slow ones alone: a second start then compiles nothing."""
    import jax

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def main() -> None:
    """Command line: see the module's docstring."""
    try:
        from sf_jax.server.launch import Launch, serve, service_of
    except ModuleNotFoundError as error:
        raise ValueError(MISSING.format(error.name)) from error
    public = bool(_HOSTS.value) or not is_loopback(_HOST.value)
    launch = Launch(
        host=_HOST.value,
        port=_PORT.value,
        token=read_token() if public or _TOKEN_FILE.value or "SF_JAX_TOKEN" in os.environ else None,
        hosts=tuple(_HOSTS.value) + LOOPBACK if _HOSTS.value or not public else None,
        origins=tuple(_ORIGINS.value),
        proxies=tuple(_PROXIES.value),
        drain=_DRAIN.value,
    )
    wan = _MODEL.value is not None
    # what the shipped student follows best (docs/streaming.md)
    mode, timestep = ("swap", None) if wan else ("recache", 400.0)
    service = service_of(
        _loader(),
        launch,
        fps=_FPS.value or (16.0 if wan else 12.0),
        scale=_SCALE.value or (1 if wan else 16),
        slots=_SLOTS.value,
        waiting=_WAITING.value,
        ahead=_AHEAD.value,
        memory=_MEMORY.value,
        lifetime=_LIFETIME.value,
        mode=mode,
        context_timestep=timestep,
        name=Path(_MODEL.value).name if wan else "moving digits",
    )
    _cache_small_programs()
    serve(service, launch)


if __name__ == "__main__":
    command.run(main)
