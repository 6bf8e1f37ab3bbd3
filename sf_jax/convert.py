"""Rewrites a weight file in another number type: `python -m sf_jax.convert --input=A --output=B --dtype=float16`.

This is how the weights that the package ships were made from those that training left.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from sf_jax.files import check_writable
from sf_jax.weights.package import load_package, save_package

_INPUT = flags.DEFINE_string("input", None, "File that sf_jax.train wrote")
_OUTPUT = flags.DEFINE_string("output", None, "File to write")
_DTYPE = flags.DEFINE_enum("dtype", "float16", ["float16", "float32"], "Type of the numbers")


def main(arguments: list[str]) -> None:
    """Command line: see the module's docstring."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    logging.set_verbosity(logging.WARNING)
    try:
        output = Path(_OUTPUT.value)
        check_writable(output.parent, "output")
        save_package(output, load_package(_INPUT.value), _DTYPE.value)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {output}, {output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    flags.mark_flags_as_required(["input", "output"])
    app.run(main)
