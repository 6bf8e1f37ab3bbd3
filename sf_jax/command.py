"""How every command starts: mistakes of its user end in one line and a non-zero exit, whatever finds them."""

import contextlib
import os
import platform
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import app, flags, logging

from sf_jax.files import local_path
from sf_jax.weights import hub

SMALLER = "use smaller batches, fewer or smaller frames, or more devices"


flags.disclaim_key_flags()  # flags that `define_path` defines are those of the command


class _PathParser(flags.ArgumentParser):
    """Reads paths of this machine; see `files.local_path`."""

    syntactic_help = "a path of this machine"

    def parse(self, argument: str) -> str:
        """The path."""
        return local_path(argument)

    def flag_type(self) -> str:
        """What --help calls it."""
        return "path"


class _WeightsParser(_PathParser):
    """Reads paths of this machine and names of the Hugging Face hub."""

    syntactic_help = "a path of this machine, or a name of the Hugging Face hub"

    def parse(self, argument: str) -> str:
        """The path or name."""
        return argument if hub.is_address(argument) else local_path(argument)


def define_weights(
    name: str, default: str | None, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines a flag that is a path of weights, or their name on the hub; see `weights.hub`."""
    return flags.DEFINE(_WeightsParser(), name, default, help, flag_values, flags.ArgumentSerializer())


def define_path(
    name: str, default: str | None, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines a flag that is a path: "~" is understood, addresses such as gs://bucket are refused."""
    return flags.DEFINE(_PathParser(), name, default, help, flag_values, flags.ArgumentSerializer())


def run(main: Callable[[], None], required: Sequence[str] = (), smaller: str = SMALLER) -> None:
    """Reads the flags and calls `main`.

    Args:
      main: the command; what it raises of ValueError, OSError and FloatingPointError is meant for the user.
      required: flags that must be given.
      smaller: what to do where the memory of a device does not suffice, for the message.
    """

    def parse(arguments):
        flags.mark_flags_as_required(list(required))
        try:
            rest = flags.FLAGS(arguments)
        # Config files and fields that are not there raise nearly anything.
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
            lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
            sys.exit(f"error: {lines[-1] if lines else type(error).__name__}")
        if len(rest) > 1:
            sys.exit(f'error: unexpected argument {rest[1]!r}: flags look like --name=value, texts need quotes ("...")')
        return rest

    def guarded(_):
        logging.set_verbosity(logging.WARNING)
        keep_compiled_programs()
        with errors_in_one_line(smaller):
            main()

    app.run(guarded, flags_parser=parse)


def keep_compiled_programs() -> None:
    """Lets all commands share compiled programs on disk, unless `JAX_COMPILATION_CACHE_DIR` names another place.

    The folder is one of the user's cache folder and of this kind of processor: programs compiled for a CPU run on no
    other, and home folders are shared. `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = caches / "sf_jax" / f"compiled-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return
    if not os.access(folder, os.W_OK):
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    for name, value in settings.items():
        if name.upper() in os.environ:
            continue
        os.environ[name.upper()] = str(value)  # for a JAX that is not imported yet, and for child processes
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name, value)


def _processor() -> str:
    """A short name of this machine's processor and of what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    except OSError:  # no Linux
        names = [platform.processor()]
    return f"{platform.machine()}-{zlib.crc32(''.join(names).encode()):08x}"


@contextlib.contextmanager
def errors_in_one_line(smaller: str = SMALLER) -> Iterator[None]:
    """Ends the process with one line for what is meant for the user; other errors are bugs, and keep their traceback.

    Args:
      smaller: as in `run`.
    """
    try:
        yield
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except RuntimeError as error:
        from jax.errors import JaxRuntimeError  # here, as not every command needs JAX

        if not isinstance(error, JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: a device has not enough memory ({str(error).splitlines()[0][:200]}): {smaller}")
