"""Runs a command; user errors exit non-zero with a one-line message."""

import codecs
import contextlib
import io
import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn

from absl import app, flags, logging

from sf_jax import __version__, backend, compilation, usage
from sf_jax.files import local_path
from sf_jax.weights import hub

SMALLER = "use smaller batches, fewer or smaller frames, or more devices"
LONGEST = 1000  # maximum number of characters in an error message
TERMINATED, INTERRUPTED, _BROKEN_PIPE = 143, 130, 141  # exit codes: SIGTERM, Ctrl-C, SIGPIPE
_ENDS = {signal.SIGTERM: (TERMINATED, "SIGTERM"), signal.SIGINT: (INTERRUPTED, "Ctrl-C")}
_SECONDS_TO_UNWIND, _SECONDS_TO_NEXT = 5, 0.1

flags.disclaim_key_flags()  # flags that `define_path` defines belong to the calling command


class _PathParser(flags.ArgumentParser):
    """Parses local paths; see `files.local_path`."""

    syntactic_help = "a path of this machine"

    def parse(self, argument: str) -> str:
        """The checked path, with `~` expanded."""
        return local_path(argument)

    def flag_type(self) -> str:
        """The type's name in --help."""
        return "path"


class _WeightsParser(_PathParser):
    """Parses local paths and names on the Hugging Face hub."""

    syntactic_help = "a path of this machine, or a name of the Hugging Face hub"

    def parse(self, argument: str) -> str:
        """The path or name."""
        return hub.weights_path(argument)


def define_weights(
    name: str, default: str | None, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines a flag for weights: a local path, or a name on the hub; see `weights.hub`."""
    return flags.DEFINE(_WeightsParser(), name, default, help, flag_values, flags.ArgumentSerializer())


class _Printed(flags.BooleanFlag):
    """A flag such as --version: prints a text and exits with code 0."""

    def __init__(self, name: str, text: Callable[[], str], help: str, short_name: str | None = None):
        self._text = text
        super().__init__(name, False, help, short_name=short_name, allow_override=True)

    def parse(self, argument: str | bool | None) -> None:
        """Prints the text and exits, unless the flag is set to false."""
        super().parse(argument)
        if self.value:
            print(self._text())
            sys.exit(0)


def define_path(
    name: str, default: str | None, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines a flag for a local path: expands "~" and rejects addresses such as gs://bucket."""
    return flags.DEFINE(_PathParser(), name, default, help, flag_values, flags.ArgumentSerializer())


def run(
    main: Callable[[], None],
    required: Sequence[str] = (),
    smaller: str = SMALLER,
    groups: Mapping[str, Sequence[str]] | None = None,
    more_help: Callable[[Sequence[str]], str] | None = None,
) -> None:
    """Parses the flags and calls `main`.

    Args:
      main: the command. Its ValueErrors, OSErrors and FloatingPointErrors are user errors.
      required: flags that must be given.
      smaller: advice if a device runs out of memory, for the error message.
      groups: section titles of --help and the flags in each; other flags get a section of their own.
      more_help: (command-line arguments) -> text appended to --help.
    """
    escape_output()

    def help_text() -> str:
        text = usage.describe(main, flags.FLAGS, groups or {})
        return f"{text}\n\n{more_help(sys.argv[1:])}" if more_help else text

    def help_xml() -> str:
        text = io.StringIO()
        flags.FLAGS.write_help_in_xml_format(text)
        return text.getvalue()

    def parse(arguments):
        for flag in (
            _Printed("help", help_text, "Show the flags of this command", "h"),
            _Printed("helpshort", help_text, "The same"),
            _Printed("helpfull", flags.FLAGS.get_help, "Show the flags of libraries, too"),
            _Printed("helpxml", help_xml, "The same in XML"),
            _Printed("version", versions, "Show the versions of sf_jax and JAX"),
        ):
            flags.DEFINE_flag(flag)
        flags.mark_flags_as_required(list(required))
        try:
            rest = flags.FLAGS(arguments)
        except RecursionError:  # absl recurses over the letters of an unknown name to find similar flags
            fail("a name on the command line is too long: flags look like --name=value")
        # Invalid config files and unknown fields raise almost any exception.
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
            lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
            fail(lines[-1] if lines else type(error).__name__)
        except SyntaxError as error:  # in a config file
            fail(f"{error.filename}, line {error.lineno}: {error.msg}")
        for name in flags.FLAGS:
            value = flags.FLAGS[name].value
            if isinstance(value, float) and not math.isfinite(value):  # absl's bounds accept NaN
                fail(f"flag --{name}={value}: it must be a finite number")
        if len(rest) > 1:
            fail(f'unexpected argument {rest[1]!r}: flags look like --name=value, texts need quotes ("...")')
        return rest

    def guarded(_):
        logging.set_verbosity(logging.WARNING)
        compilation.keep_compiled()
        with errors_in_one_line(smaller), ended_by_signals():
            backend.check_xla_flags()
            backend.set_cpu_flags()
            main()

    app.run(guarded, flags_parser=parse)


def escape_output() -> None:
    """Makes stdout backslash-escape characters that its encoding lacks, as file names can contain any bytes."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        return
    raw_bytes = stream.errors == "surrogateescape" and codecs.lookup(stream.encoding).name == "utf-8"
    if stream.errors in ("strict", "surrogateescape") and not raw_bytes:
        stream.reconfigure(errors="backslashreplace")


def versions() -> str:
    """The text of --version."""
    from importlib import metadata

    return f"sf_jax {__version__} (JAX {metadata.version('jax')}, Python {platform.python_version()})"


def one_line(text: str) -> str:
    """Shortens a message to one line of at most `LONGEST` printable characters; omits the middle of longer ones."""
    if len(text) > 4 * LONGEST:
        text = f"{text[: 2 * LONGEST]} {text[-2 * LONGEST :]}"
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.split()))
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def fail(text: str) -> NoReturn:
    """Exits with a one-line error message."""
    sys.exit(f"error: {one_line(text)}")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C unwind the stack without a traceback, so that files and processes are cleaned up."""
    codes: list[int] = []

    def unwind(number, frame):
        del frame
        code, name = _ENDS[number]
        if not codes:
            codes.append(code)
            print(f"error: ended by {name}", file=sys.stderr, flush=True)
            # Libraries swallow exceptions in their callbacks, and wait for compilations, so this forces an exit.
            _start_timer(_SECONDS_TO_UNWIND, os._exit, code)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    hook = sys.unraisablehook

    def unraisable(swallowed) -> None:
        if not codes or not isinstance(swallowed.exc_value, (KeyboardInterrupt, SystemExit)):
            hook(swallowed)
            return
        number = signal.SIGINT if isinstance(swallowed.exc_value, KeyboardInterrupt) else signal.SIGTERM
        _start_timer(_SECONDS_TO_NEXT, _raise_in_main_thread, number)  # raises again outside of the callback

    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    main_thread = threading.current_thread() is threading.main_thread()
    ours = [number for number, default in defaults.items() if main_thread and signal.getsignal(number) == default]
    for number in ours:
        signal.signal(number, unwind)
    sys.unraisablehook = unraisable
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not codes:
            print("error: ended by Ctrl-C", file=sys.stderr, flush=True)
            codes.append(INTERRUPTED)
        if isinstance(error, SystemExit) and error.code in (TERMINATED, INTERRUPTED):
            codes.append(error.code)
        if not codes:
            raise
    finally:
        sys.unraisablehook = hook
        for number in ours:
            if signal.getsignal(number) == unwind:
                signal.signal(number, defaults[number])
    if codes:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(codes[0])  # XLA's threads may still be compiling, and would crash a normal exit


def _raise_in_main_thread(number: int) -> None:
    """Sends this process a signal, interrupting what its main thread waits for where the OS supports it."""
    if hasattr(signal, "pthread_kill"):  # not on Windows
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def _start_timer(seconds: float, function: Callable, *arguments) -> None:
    """Calls a function after a delay, unless the process ends first."""
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def errors_in_one_line(smaller: str = SMALLER) -> Iterator[None]:
    """Exits with a one-line message for user errors; other exceptions are bugs and keep their traceback.

    Args:
      smaller: see `run`.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of the output has exited, like `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the final flush of the buffer then succeeds
        sys.exit(_BROKEN_PIPE)
    except (ValueError, FloatingPointError, OSError) as error:
        fail(str(error) or type(error).__name__)
    except ImportError as error:
        if "array_record" not in str(error):
            raise
        fail(str(error))
    except MemoryError as error:
        fail(f"this machine has not enough memory ({str(error) or 'MemoryError'}): {smaller}")
    except (RuntimeError, AssertionError) as error:
        if "RESOURCE_EXHAUSTED" in str(error) and _of_jax(error):
            fail(f"a device has not enough memory ({str(error).splitlines()[0][:200]}): {smaller}")
        problem = backend.start_problem(error)
        if problem is None:
            raise
        fail(problem)


def _of_jax(error: BaseException) -> bool:
    """Whether JAX's runtime raised the error."""
    from jax.errors import JaxRuntimeError  # imported here, as not every command needs JAX

    return isinstance(error, JaxRuntimeError)


def _check_jax_settings() -> None:
    """Exits with an error if the environment has an invalid JAX setting; JAX reads these when it is imported."""
    if not any(name.startswith("JAX_") for name in os.environ):
        return
    try:
        import jax  # noqa: F401
    except ValueError as error:
        fail(f"JAX does not take a variable of the environment ({error}): correct or unset it")


_check_jax_settings()  # at import: the commands import JAX after this module, but before `run`
