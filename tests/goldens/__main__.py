"""Runs every case of a folder of recorded numbers: `python -m tests.goldens DIR [FILE PREFIX ...]`.

Prints a line per quantity (name, relative error, tolerance, pass or FAIL) and exits with 1 if one fails. A file that no
case reads yet is printed as missing.
"""

import pathlib
import sys

import jax

from tests.goldens import cases, cases_gan, cases_inference, cases_networks, cases_training
from tests.goldens.folder import Folder, Result

# file name -> the function that compares it
CASES = {**cases.CASES, **cases_inference.CASES, **cases_networks.CASES, **cases_training.CASES, **cases_gan.CASES}


def run(path, prefixes=(), report=print) -> tuple[int, int, list[str]]:
    """Runs the cases of a folder; returns the numbers of passed and failed quantities and the missing files."""
    folder = Folder(path)
    passed = failed = 0
    missing = []
    for file in folder.files:
        if prefixes and not file.startswith(tuple(prefixes)):
            continue
        if file not in CASES:
            missing.append(file)
            report(f"{file:34s} {'(no case yet)':58s} missing")
            continue
        for result in _results(file, folder):
            name = f"{file.removesuffix('.npz'):34s} {result.name:58s}"
            if result.error is None:
                missing.append(f"{file}: {result.name}")
                report(f"{name} missing: {result.note}")
                continue
            passed, failed = passed + result.passed, failed + (not result.passed)
            verdict = "pass" if result.passed else "FAIL"
            report(f"{name} {result.error:9.2e} {result.tolerance:8.0e} {verdict} {result.note}".rstrip())
    return passed, failed, missing


def _results(file, folder):
    """The results of one file; an exception is a failed result, and the other files go on."""
    try:
        yield from CASES[file](folder)
    except Exception as error:  # whatever it is, the report must name it
        yield Result("(stopped)", float("nan"), 0.0, f"{type(error).__name__}: {str(error)[:200]}")


def main(arguments: list[str]) -> int:
    """Command line: a folder, optionally followed by prefixes of the files to run."""
    if not arguments or not (pathlib.Path(arguments[0]) / "config.json").exists():
        print(
            "usage: python -m tests.goldens DIR [FILE PREFIX ...], where DIR holds config.json",
            file=sys.stderr,
        )
        return 2
    with jax.default_matmul_precision("highest"):
        passed, failed, missing = run(arguments[0], arguments[1:])
    print(f"{passed} passed, {failed} failed; {len(missing)} missing: {', '.join(missing) or 'none'}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
