"""Runs the package's commands as forks of one process that has already imported their modules.

Imports are most of a command's startup time. Otherwise this equals `python -m MODULE`: every command line is a separate
process with its own arguments, output and exit code. With `subprocess.run` options, such as another environment or
folder, a command runs without a fork.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_IMPORTED = (
    "sf_jax.config_help",
    "sf_jax.evaluation.report",
    "sf_jax.inference.batch",
    "sf_jax.inference.prepare_job",
    "sf_jax.training.ahead",
    "sf_jax.training.loop",
    "sf_jax.weights.adapter_export",
    "sf_jax.weights.export_folder",
)
_SERVER = """
import importlib, json, os, runpy, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    module, arguments, *paths = json.loads(line)
    process = os.fork()
    if not process:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
else:
    sys.exit()
for number, path in enumerate([os.devnull, *paths]):
    os.dup2(os.open(path, os.O_RDWR), number)
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_command(module: str, *arguments, **options) -> subprocess.CompletedProcess:
    """Runs `python -m MODULE ARGUMENTS` and captures its output as text; options are those of `subprocess.run`."""
    arguments = [str(argument) for argument in arguments]
    if options or not hasattr(os, "fork"):
        return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("out", "err")]
        for path in paths:
            path.touch()
        server = _server(
            os.getcwd(), tuple(sorted((k, v) for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"))
        )
        server.stdin.write(json.dumps([module, arguments, *map(str, paths)]) + "\n")
        server.stdin.flush()
        code = server.stdout.readline()
        assert code, f"the process that starts commands has ended: run `python -m {module}` to see why"
        return subprocess.CompletedProcess([module, *arguments], int(code), *(path.read_text() for path in paths))


@functools.lru_cache(maxsize=1)
def _server(folder: str, variables: tuple) -> subprocess.Popen:
    """The process that forks, for a folder and an environment; it ends when this one closes its pipe."""
    command = [sys.executable, "-c", _SERVER, *_IMPORTED]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=folder, env=dict(variables), text=True, **pipes)
