"""How every command starts: mistakes of its user end in one line and a non-zero exit, whatever finds them."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging


def run(main: Callable[[], None], required: Sequence[str] = ()) -> None:
    """Reads the flags and calls `main`.

    Args:
      main: the command; what it raises of ValueError, OSError and FloatingPointError is meant for the user.
      required: flags that must be given.
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
        try:
            main()
        except (ValueError, FloatingPointError, OSError) as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    app.run(guarded, flags_parser=parse)
