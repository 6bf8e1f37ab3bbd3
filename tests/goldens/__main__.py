"""Runs every case of a folder of recorded numbers: `python -m tests.goldens DIR [FILE PREFIX ...]`.

Prints a line per quantity (name, relative error, tolerance, pass or FAIL) and exits with 1 if one fails. A file that no
case reads yet is printed as missing.
"""

import pathlib
import sys

import jax

from tests.goldens.cases import CASES
from tests.goldens.folder import Folder


def run(path, prefixes=(), report=print) -> tuple[int, int, list[str]]:
    """Runs the cases of a folder; returns the numbers of passed and failed quantities and the missing files."""
    folder = Folder(path)
    passed = failed = 0
    missing = []
    for file in sorted(p.name for p in pathlib.Path(path).glob("*.npz")):
        if prefixes and not file.startswith(tuple(prefixes)):
            continue
        if file not in CASES:
            missing.append(file)
            report(f"{file:34s} {'(no case yet)':58s} missing")
            continue
        for result in CASES[file](folder):
            passed, failed = passed + result.passed, failed + (not result.passed)
            verdict = "pass" if result.passed else "FAIL"
            report(
                f"{file.removesuffix('.npz'):34s} {result.name:58s} {result.error:9.2e} "
                f"{result.tolerance:8.0e} {verdict} {result.note}".rstrip()
            )
    return passed, failed, missing


def main(arguments: list[str]) -> int:
    """Command line: a folder, optionally followed by prefixes of the files to run."""
    if not arguments or not (pathlib.Path(arguments[0]) / "config.json").exists():
        print(
            "usage: python -m tests.goldens DIR [FILE PREFIX ...], where DIR holds config.json",
            file=sys.stderr,
        )
        return 2
    jax.config.update("jax_default_matmul_precision", "highest")
    passed, failed, missing = run(arguments[0], arguments[1:])
    print(f"{passed} passed, {failed} failed; {len(missing)} files without a case: {', '.join(missing) or 'none'}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
