"""JAX's backend: faster settings for some CPUs, and messages, before XLA kills the process, if it cannot start."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jaxlib

# For Intel CPUs with AVX-512: products by Eigen instead of YNNPACK, and loops with whole registers (docs/wan.md).
# An unknown flag would kill the process, so only with these versions of jaxlib, and without plugins for other devices.
_INTEL_FLAGS = (
    "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_REDUCE",
    "--xla_cpu_prefer_vector_width=512",
)
_TRIED_JAXLIB = ("0.10.2", "0.12.0.1")
_PLUGINS = ("libtpu", "jax_plugins")
# Parses XLA_FLAGS as a backend does, in a child process: an unknown flag kills the process that parses it.
_READ_FLAGS = "from jaxlib import xla_client as x; x._xla.CompileOptions().executable_build_options.debug_options"
_SECONDS = 60
# Messages of JAX and its GPU and TPU plugins if a backend cannot start or does not fit the machine.
_START = re.compile(
    r"unable to initialize backend|is not in the list of known backends|unknown backend|no backend|"
    r"driver version is insufficient|cuda driver|cuInit|(?:TPU|TFRT) initialization failed|already in use by process",
    re.IGNORECASE,
)
# Messages that mean the same before a backend runs, and anything afterwards.
_EARLY = re.compile(r"CUDA_ERROR|cudaError|hipError|libtpu", re.IGNORECASE)


def set_cpu_flags(environ: os._Environ | dict[str, str] = os.environ, cpu_info: Path = Path("/proc/cpuinfo")) -> None:
    """Sets `XLA_FLAGS` for CPUs on which other settings than XLA's own were measured to be faster.

    Leaves the variable as it is if it is set, even to nothing, if a backend has already started, and if JAX may use
    another device.
    """
    if "XLA_FLAGS" in environ or _started() or jaxlib.__version__ not in _TRIED_JAXLIB:
        return
    plugins = any(importlib.util.find_spec(name) for name in _PLUGINS)
    if environ.get("JAX_PLATFORMS", "" if plugins else "cpu") != "cpu":
        return
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return
    if "GenuineIntel" in text and re.search(r"^flags\b.*\bavx512f\b", text, re.MULTILINE):
        environ["XLA_FLAGS"] = " ".join(_INTEL_FLAGS)


def check_xla_flags(environ: os._Environ | dict[str, str] = os.environ) -> None:
    """Validates `XLA_FLAGS`, as an invalid value kills the process as soon as JAX starts.

    Raises:
      ValueError: if it is invalid; quotes XLA's message.
    """
    value = environ.get("XLA_FLAGS", "").strip()
    if not value or _started():
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _READ_FLAGS], env=dict(environ), capture_output=True, timeout=_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return  # JAX reports the problem
    if done.returncode == 0:
        return
    output = done.stderr.decode(errors="replace")
    for pattern in (
        r"(Unknown flags?) in XLA_FLAGS: ?(.*)",
        r"(Couldn't interpret value .*? for flag) (.*)\.",
        r"(Could not open file) (\".*?\")",
    ):
        if match := re.search(pattern, output):
            raise ValueError(
                f"XLA_FLAGS is {value!r}: XLA says: {match[1]} {match[2].strip()}; correct or unset this variable of "
                "the environment"
            )


def _started() -> bool:
    """Whether a backend is already running, and has thus parsed its flags."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(getattr(bridge, "_backends", None))


def start_problem(error: BaseException) -> str | None:
    """The message for the user if JAX's backend cannot start; None if the error has another cause."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError):  # raised by JAX if JAX_PLATFORMS names a GPU and no plugin is installed
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        if frame is None or not frame.tb_frame.f_code.co_filename.endswith("xla_bridge.py"):
            return None
        text = "JAX has no such backend"
    elif not _START.search(text) and (_started() or not _EARLY.search(text)):
        return None
    text = re.sub(r"\s*\(set JAX_PLATFORMS=.*?\)", "", text)
    extras = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}
    extra = next((extras[name] for name in re.split(r"\W+", platforms.lower()) if name in extras), None)
    install = f", or install JAX for it: pip install 'sf_jax[{extra}]'" if extra else ""
    if platforms:
        return f"JAX_PLATFORMS is {platforms!r} and this machine cannot be used so ({text}): set it to cpu{install}"
    return f"JAX cannot use the device of this machine ({text}): update its driver, or set JAX_PLATFORMS=cpu"
