"""How every command starts: mistakes of its user end in one line and a non-zero exit, whatever finds them."""

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
LONGEST = 1000  # characters of an error message
TERMINATED, INTERRUPTED, _BROKEN_PIPE = 143, 130, 141  # exit codes: SIGTERM, Ctrl-C, SIGPIPE
_ENDS = {signal.SIGTERM: (TERMINATED, "SIGTERM"), signal.SIGINT: (INTERRUPTED, "Ctrl-C")}
_SECONDS_TO_UNWIND, _SECONDS_TO_NEXT = 5, 0.1

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
        return hub.weights_path(argument)


def define_weights(
    name: str, default: str | None, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines a flag that is a path of weights, or their name on the hub; see `weights.hub`."""
    return flags.DEFINE(_WeightsParser(), name, default, help, flag_values, flags.ArgumentSerializer())


class _Printed(flags.BooleanFlag):
    """A flag such as --version: prints a text and ends the process without an error."""

    def __init__(self, name: str, text: Callable[[], str], help: str, short_name: str | None = None):
        self._text = text
        super().__init__(name, False, help, short_name=short_name, allow_override=True)

    def parse(self, argument: str | bool | None) -> None:
        """Prints the text, unless the flag is set to false."""
        super().parse(argument)
        if self.value:
            print(self._text())
            sys.exit(0)


def define_path(
    name: str, default: str | None, help: str, flag_values: flags.FlagValues = flags.FLAGS
) -> flags.FlagHolder:
    """Defines a flag that is a path: "~" is understood, addresses such as gs://bucket are refused."""
    return flags.DEFINE(_PathParser(), name, default, help, flag_values, flags.ArgumentSerializer())


def run(
    main: Callable[[], None],
    required: Sequence[str] = (),
    smaller: str = SMALLER,
    groups: Mapping[str, Sequence[str]] | None = None,
    more_help: Callable[[Sequence[str]], str] | None = None,
) -> None:
    """Reads the flags and calls `main`.

    Args:
      main: the command; what it raises of ValueError, OSError and FloatingPointError is meant for the user.
      required: flags that must be given.
      smaller: what to do where the memory of a device does not suffice, for the message.
      groups: titles of --help and the flags under each; flags that are in none come under a title of their own.
      more_help: (arguments of the command line) -> what --help adds.
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
        except RecursionError:  # absl compares an unknown name with all others, letter by letter
            fail("a name on the command line is too long: flags look like --name=value")
        # Config files and fields that are not there raise nearly anything.
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
            lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
            fail(lines[-1] if lines else type(error).__name__)
        except SyntaxError as error:  # of a config file
            fail(f"{error.filename}, line {error.lineno}: {error.msg}")
        for name in flags.FLAGS:
            value = flags.FLAGS[name].value
            if isinstance(value, float) and not math.isfinite(value):  # absl's bounds let NaN through
                fail(f"flag --{name}={value}: it must be a finite number")
        if len(rest) > 1:
            fail(f'unexpected argument {rest[1]!r}: flags look like --name=value, texts need quotes ("...")')
        return rest

    def guarded(_):
        logging.set_verbosity(logging.WARNING)
        compilation.keep_compiled()
        with errors_in_one_line(smaller), ended_by_signals():
            backend.check_xla_flags()
            main()

    app.run(guarded, flags_parser=parse)


def escape_output() -> None:
    """Lets stdout show what its encoding lacks with backslashes: names of files may hold any bytes."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        return
    raw_bytes = stream.errors == "surrogateescape" and codecs.lookup(stream.encoding).name == "utf-8"
    if stream.errors in ("strict", "surrogateescape") and not raw_bytes:
        stream.reconfigure(errors="backslashreplace")


def versions() -> str:
    """What --version prints."""
    from importlib import metadata

    return f"sf_jax {__version__} (JAX {metadata.version('jax')}, Python {platform.python_version()})"


def one_line(text: str) -> str:
    """A message in one line of at most `LONGEST` printable characters; of longer ones the middle is left out."""
    if len(text) > 4 * LONGEST:
        text = f"{text[: 2 * LONGEST]} {text[-2 * LONGEST :]}"
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in " ".join(text.split()))
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def fail(text: str) -> NoReturn:
    """Ends the process with an error message of one line."""
    sys.exit(f"error: {one_line(text)}")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C unwind the stack, without a traceback, so that temporary files and child processes go."""
    codes: list[int] = []

    def unwind(number, frame):
        del frame
        code, name = _ENDS[number]
        if not codes:
            codes.append(code)
            print(f"error: ended by {name}", file=sys.stderr, flush=True)
            # Libraries swallow what is raised in their callbacks, and wait for programs that they compile.
            _start_timer(_SECONDS_TO_UNWIND, os._exit, code)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)

    hook = sys.unraisablehook

    def unraisable(swallowed) -> None:
        if not codes or not isinstance(swallowed.exc_value, (KeyboardInterrupt, SystemExit)):
            hook(swallowed)
            return
        number = signal.SIGINT if isinstance(swallowed.exc_value, KeyboardInterrupt) else signal.SIGTERM
        _start_timer(_SECONDS_TO_NEXT, _raise_in_main_thread, number)  # outside of the callback

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
        os._exit(codes[0])  # XLA's threads may be compiling, and Python's own end would crash under them


def _raise_in_main_thread(number: int) -> None:
    """Sends this process a signal that ends what its main thread waits for, where the system can."""
    if hasattr(signal, "pthread_kill"):  # not on Windows
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        signal.raise_signal(number)


def _start_timer(seconds: float, function: Callable, *arguments) -> None:
    """Calls a function later, unless the process ends before."""
    timer = threading.Timer(seconds, function, arguments)
    timer.daemon = True
    timer.start()


@contextlib.contextmanager
def errors_in_one_line(smaller: str = SMALLER) -> Iterator[None]:
    """Ends the process with one line for what is meant for the user; other errors are bugs, and keep their traceback.

    Args:
      smaller: as in `run`.
    """
    try:
        yield
    except BrokenPipeError:  # who read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
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
        problem = backend.start_problem(error)
        if problem is not None:
            fail(problem)
        if "RESOURCE_EXHAUSTED" not in str(error) or not _of_jax(error):
            raise
        fail(f"a device has not enough memory ({str(error).splitlines()[0][:200]}): {smaller}")


def _of_jax(error: BaseException) -> bool:
    """Whether JAX's runtime raised it."""
    from jax.errors import JaxRuntimeError  # here, as not every command needs JAX

    return isinstance(error, JaxRuntimeError)


def _check_jax_settings() -> None:
    """Ends the process where the environment has a setting that JAX refuses, which it reads when it is imported."""
    if not any(name.startswith("JAX_") for name in os.environ):
        return
    try:
        import jax  # noqa: F401
    except ValueError as error:
        fail(f"JAX does not take a variable of the environment ({error}): correct or unset it")


_check_jax_settings()  # here, as the commands import JAX after this module and before `run`
