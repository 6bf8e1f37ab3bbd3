"""The command line as a whole: help, versions, console script, odd values, signals, platforms other than this one."""

import ast
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absl import flags

from configs import digits, wan_distill
from sf_jax import backend, cli, command, config_help, files, usage
from sf_jax.config import TrainConfig
from sf_jax.data import moving_digits
from sf_jax.inference import lengths, names
from sf_jax.inference.job import Job, video_names
from sf_jax.server.launch import Launch, Model, service_of
from sf_jax.training import stop
from sf_jax.weights.package import load_package, save_package, shipped_path


def run(*arguments, **env):
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | env, timeout=120)


def is_one_line(text):
    return text.startswith("error: ") and len(text.splitlines()) == 1 and len(text) <= command.LONGEST + 10


# The fast test tries every eighth line of a command; the slow ones try all.
@pytest.mark.parametrize(
    ("name", "every"),
    [("generate", 8), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in cli.COMMANDS)],
)
def test_odd_command_lines_end_in_one_line(name, every, folder):
    done = run("-m", "tests.odd_lines", name, folder.parent, every)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) >= 25
    bad = [
        (outcome["arguments"], outcome["code"], outcome["error"][-500:])
        for outcome in outcomes
        if outcome["code"] == 0 or not is_one_line(outcome["error"])
    ]
    assert not bad, "\n".join(map(str, bad))


def test_the_console_script_lists_and_names_its_commands(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        cli.main(arguments)
        text = capsys.readouterr().out
        assert all(f"\n  {name:10}" in text for name in cli.COMMANDS)
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("sf_jax 0.1.0 (JAX ")
    with pytest.raises(SystemExit, match="error: sf-jax has no command 'genrate': did you mean generate?"):
        cli.main(["genrate"])


def test_help_groups_flags_and_keeps_those_that_no_group_has():
    values = flags.FlagValues()
    flags.DEFINE_string("prompt", None, "What to show", values)
    flags.DEFINE_integer("frames", 48, "Frames", flag_values=values)
    flags.DEFINE_enum("vae", None, ["wan", "tiny"], "Decoder", values)
    command.define_path("lora", None, "An adapter", values)

    def main():
        """Not run."""

    main.__module__ = next(iter(values.flags_by_module_dict()))
    text = usage.describe(main, values, {"What to show": ("prompt", "frames"), "Wan": ("vae", "nothing")})
    parts = text.split("\n\n")
    assert "What to show:\n  --prompt=TEXT" in text and "--frames=NUMBER           Frames (default: 48)" in text
    assert any(part.startswith("Wan:") and "--vae=wan|tiny" in part and "Decoder" in part for part in parts)
    assert any(part.startswith("Other flags:") and "--lora=PATH" in part for part in parts)


def test_help_ends_without_an_error():
    done = run("-m", "sf_jax", "generate", "--frames=9", "--help")
    assert done.returncode == 0 and not done.stderr
    assert all(f"\n{title}:\n" in done.stdout for title in ("What to show", "Moving digits and Wan", "Wan", "Files"))
    assert "--run_with_pdb" not in done.stdout and "usage: sf-jax generate" in done.stdout


def test_a_prompt_is_not_dropped_for_another():
    done = run("-m", "sf_jax", "generate", "--prompt=a 7", "--prompt=a 2")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: prompt is given more than once: write the prompts to a file")


def test_the_whole_help_ends_without_an_error(capsys):
    def main():
        """Not run."""

    before = set(flags.FLAGS)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["generate", "--helpfull"])
            patch.setattr(command.app, "run", lambda guarded, flags_parser: flags_parser(sys.argv))
            command.run(main)
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
    assert end.value.code == 0 and "--verbosity" in capsys.readouterr().out


def test_help_of_a_configuration_has_all_variants_and_fields():
    text = config_help.of_arguments(["--workdir=x", "--config=configs/wan_distill.py:gan", "--help"])
    assert all(f"\n  {name}" in text for name in wan_distill.VARIANTS)
    assert "--config.optimizer.lr=2e-06" in text and "(float) peak learning rate" in text
    assert "--config.batch_size=768" in text
    for module in (digits, wan_distill):
        assert all(make.__doc__ for make in module.VARIANTS.values())
    fields = list(config_help.fields_of(TrainConfig(teacher_weights="x")))
    assert len(fields) > 100 and not [name for name, _, _, doc in fields if not doc]
    assert "configs/digits.py has the variants teacher, causal," in config_help.of_arguments(["--help"])
    with pytest.raises(SystemExit, match="error: config is configs/none.py: configs/none.py does not exist"):
        config_help.of_arguments(["--config", "configs/none.py"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n  return 1 / 0", "c.py, line 2: ZeroDivisionError: division by zero"),
        ("raise RuntimeError('no\\nway')", "c.py, line 1: RuntimeError: no way"),
        ("x = 1", "c.py: it has no function get_config"),
        ("def get_config():\n  return 3", "c.py: get_config returns int, it must return a ConfigDict"),
        ("x = 1\0", "c.py: source code .*null bytes"),
        ("def get_config(:", "c.py, line 1: invalid syntax"),
        ("def get_config():\n  raise ValueError('steps is -1')", "c.py: steps is -1"),
    ],
)
def test_configuration_files_that_fail_are_named(text, message, tmp_path):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config_help.ConfigParser().parse(str(path))
    with pytest.raises(SystemExit, match=message):
        config_help.of_arguments([f"--config={path}"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_ENABLE_X64", "maybe"), pytest.param("JAX_PGLE_PROFILING_RUNS", "x", marks=pytest.mark.slow)],
)
def test_settings_that_jax_refuses_are_one_line(name, value):
    done = run("-m", "sf_jax.prepare", **{name: value})
    assert done.returncode == 1 and is_one_line(done.stderr) and name.lower() in done.stderr.lower()


def test_messages_are_one_short_printable_line():
    assert command.one_line("a\n  b\x1b[31m \udcff") == "a b\\x1b[31m \\udcff"
    text = command.one_line("begin " + "x" * 10**7 + " end")
    assert len(text) <= command.LONGEST and text.startswith("begin xx") and text.endswith("xx end") and " ... " in text
    with pytest.raises(SystemExit) as end:
        command.fail("é" * 5000)
    assert is_one_line(end.value.code)


@pytest.mark.parametrize(
    ("encoding", "errors", "shown"),
    [
        ("utf-8", "strict", b"\xc3\xa9 \\udcff"),
        ("utf-8", "surrogateescape", b"\xc3\xa9 \xff"),
        ("ascii", "strict", b"\\xe9 \\udcff"),
        ("ascii", "surrogateescape", b"\\xe9 \\udcff"),
        ("ascii", "replace", b"? ?"),
    ],
)
def test_any_path_can_be_printed(encoding, errors, shown, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdout", stream)
    command.escape_output()
    print("é \udcff", end="", flush=True)
    assert stream.buffer.getvalue() == shown


@pytest.mark.parametrize(
    ("platforms", "error", "message"),
    [
        ("tpu", "Unable to initialize backend 'tpu': no device (set JAX_PLATFORMS='' to choose)", "sf_jax[tpu]"),
        ("rocm", "Unable to initialize backend 'rocm': Backend 'rocm' is not in the list of known", "set it to cpu"),
        ("", "INTERNAL: CUDA driver version is insufficient for CUDA runtime version", "update its driver, or set JAX"),
        ("", "the machine is on fire", None),
    ],
)
def test_machines_that_are_not_there_are_told_in_one_line(platforms, error, message, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    problem = backend.start_problem(RuntimeError(error))
    assert problem is None if message is None else message in problem and "JAX_PLATFORMS=''" not in problem


@pytest.mark.parametrize("platform", ["cuda", pytest.param("nonsense", marks=pytest.mark.slow)])
def test_another_machines_platform_is_one_line(platform, tmp_path):
    done = run("-m", "sf_jax.generate", f"--out={tmp_path}", JAX_PLATFORMS=platform)
    assert done.returncode == 1 and is_one_line(done.stderr) and f"JAX_PLATFORMS is '{platform}'" in done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("--xla_nonsense=1", "Unknown flag --xla_nonsense=1"),
        ("--xla_force_host_platform_device_count=abc", "Couldn't interpret value abc for flag xla_force"),
        ("xla_file", 'Could not open file "xla_file"'),
        ("--xla_force_host_platform_device_count=2", None),
        ("", None),
    ],
)
def test_xla_flags_that_would_end_the_process_are_refused(value, message, monkeypatch):
    monkeypatch.setattr(backend, "_started", lambda: False)
    if message is None:
        backend.check_xla_flags(dict(os.environ) | {"XLA_FLAGS": value})
        return
    with pytest.raises(ValueError, match="XLA_FLAGS is") as error:
        backend.check_xla_flags(dict(os.environ) | {"XLA_FLAGS": value})
    assert message in str(error.value) and "correct or unset this variable" in str(error.value)


def test_signals_before_the_first_step_do_not_end_a_run_as_if_done(capsys):
    request = stop.StopRequest()
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with pytest.raises(stop.Stopped) as end:
            request.take(number)
        assert end.value.code == code
        assert f"error: {number.name}: ended before there was anything new to save" in capsys.readouterr().err


def test_a_run_ends_although_a_library_swallows_the_signal(monkeypatch):
    codes = []
    monkeypatch.setattr(stop, "_SECONDS_TO_UNWIND", 0.01)
    monkeypatch.setattr(stop.os, "_exit", codes.append)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with stop.stop_on_signals():
            with pytest.raises(stop.Stopped):
                signal.raise_signal(number)
            until = time.monotonic() + 10
            while not codes:
                assert time.monotonic() < until
                time.sleep(0.01)
        assert codes.pop() == code


WAITS = """
import sys, time
from sf_jax import command, files
class Waits:
    def __del__(self):  # Python swallows what is raised here, as in JAX's callbacks
        print("ready", flush=True)
        time.sleep(60)
def main():
    with files.replacing(sys.argv[1]) as path:
        path.write_bytes(b"half")
        if sys.argv[2:]:
            Waits()
        print("ready", flush=True)
        time.sleep(60)
command.app.run = lambda guarded, flags_parser: guarded(None)
command.run(main)
"""


@pytest.mark.parametrize(
    ("number", "code", "more"), [(signal.SIGTERM, 143, []), (signal.SIGINT, 130, []), (signal.SIGINT, 130, ["swallow"])]
)
def test_signals_leave_no_half_written_file(number, code, more, tmp_path):
    line = [sys.executable, "-c", WAITS, str(tmp_path / "file"), *more]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code and is_one_line(err) and not list(tmp_path.iterdir())


def test_a_lock_goes_with_its_process(tmp_path):
    code = (
        f"from sf_jax import files; from pathlib import Path\nwith files.locked(Path({str(tmp_path)!r}), 'workdir'):\n"
    )
    line = [sys.executable, "-c", code + "    print('ready', flush=True); import time; time.sleep(60)"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(ValueError, match="workdir is .*: another run is using it"), files.locked(tmp_path, "workdir"):
        pass
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while True:
        try:
            with files.locked(tmp_path, "workdir"):
                return
        except ValueError:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_used_without(error, tmp_path, monkeypatch):
    def acquire(self):
        raise error

    monkeypatch.setattr(files.FileLock, "acquire", acquire)
    entered = False
    with files.locked(tmp_path, "workdir"):
        entered = True
    assert entered and not list(tmp_path.iterdir())  # no marker that would outlive a killed process


def test_names_are_valid_on_every_system():
    assert [names.plain_name(text, 180) for text in ("CON", "nul.", "com1", "Lpt²", "a: b?", "...")] == [
        *("con_", "nul_", "com1_", "lpt²_", "a_b", "video")
    ]
    assert names.vbench_name("a/b\n\x1b[31m: c?") == "a b  [31m: c?"
    with pytest.raises(ValueError, match="has ':', which no file name of Windows may have"):
        names.vbench_name("a: b", windows=True)


def test_the_default_and_example_prompts_are_captions_that_the_network_knows(tmp_path):
    undirected = tmp_path / "undirected.safetensors"
    save_package(undirected, dataclasses.replace(load_package(shipped_path("student")), captions="undirected"))
    script = """
import sys
from absl import flags
from sf_jax import generate
flags.FLAGS(sys.argv)
print(generate.job().prompts)
"""
    for path, captions, default in (
        (undirected, "undirected", "a 3 moving, slowly"),
        ("student", "full", "a 3 moving up and right, slowly"),
    ):
        known = moving_digits.all_captions(captions)
        assert default in known and set(service_of(Model(checkpoint=str(path)), Launch()).examples) <= set(known)
        done = subprocess.run(
            [sys.executable, "-c", script, f"--checkpoint={path}"], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == f"('{default}',)"


def test_names_and_prompts_are_told_apart():
    job = Job(prompts=("a 7 moving left", "a 2 moving up"), names=("seven", "two"), num_samples=2)
    assert video_names(job) == ["seven-0", "seven-1", "two-0", "two-1"]
    assert job.video_prompts() == ["a 7 moving left"] * 2 + ["a 2 moving up"] * 2
    with pytest.raises(ValueError, match="names is a list of 1, prompts one of 2: every prompt needs a name"):
        Job(prompts=("a 7 moving left", "a 2 moving up"), names=("seven",))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": 999999999999}, "num_samples is 999999999999: it must be at most 100000"),
        ({"num_samples": 50_001}, "with 2 prompts these are 100002 videos, at most 100000"),
        ({"frames": 10**12}, "frames is 1000000000000: it must be at most 100000"),
        ({"frames": 0}, "frames is 0: it must be at least 1"),
        ({"steps": 10**9}, "steps is 1000000000: it must be at most 1000"),
        ({"scale": 9000}, "scale is 9000: it must be at most 8192"),
        ({"guidance": 1e308}, r"guidance is 1e\+308: it must be at most 1000"),
        ({"prompts": ("snow " * 10**5,)}, "prompt 1 has 500000 characters: it must have at most 100000"),
    ],
)
def test_amounts_have_limits_that_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Job(**{"prompts": ("a 7", "a 2")} | fields)


def test_files_have_a_largest_size():
    lengths.check_scale(12, 24, 24, 10_000)
    with pytest.raises(ValueError, match="scale is 12: for 100000 frames of 24x24 it must be at most 6"):
        lengths.check_scale(12, 24, 24, 100_000)
    with pytest.raises(ValueError, match="scale is 10: for 1 frames of 480x832 it must be at most 9"):
        lengths.check_scale(10, 480, 832)


# Modules missing from Python on Windows; array_record has no build for it.
MODULES = "fcntl resource pwd grp termios tty pty syslog crypt readline curses array_record uvloop"
NAMES = {
    "os": """
    fork forkpty getuid geteuid getgid getpgid killpg setsid uname sync nice sched_getaffinity chown fchmod wait3 mkfifo
    statvfs sysconf getloadavg O_DIRECTORY O_NOFOLLOW O_NONBLOCK posix_spawn pread
    """,
    "signal": "SIGHUP SIGKILL SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGQUIT alarm setitimer pthread_sigmask",
    "socket": "AF_UNIX TCP_NOTSENT_LOWAT SO_REUSEPORT",
}


def test_no_module_names_what_windows_lacks():
    for path in Path("sf_jax").rglob("*.py"):
        text = path.read_text()
        tree = ast.parse(text)
        imports = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        imports += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not {name.partition(".")[0] for name in imports} & set(MODULES.split()), path
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
        bad = [node.attr for node in used if node.attr in NAMES.get(node.value.id, "").split()]
        assert not [name for name in bad if f'hasattr(socket, "{name}")' not in text], path


HIDDEN = f"""
import builtins, importlib, os, pkgutil, signal, socket, sys
modules = {MODULES.split()}
names = dict(zip((os, signal, socket), {list(NAMES.values())}))
"""
# Libraries for this system need these names, so they are imported first; only our code runs without them.
WINDOWS = (
    HIDDEN
    + """
import jax, numpy, flax, optax, grain, orbax.checkpoint, tensorflow_datasets, sklearn, av, matplotlib.pyplot
import filelock, concurrent.futures, multiprocessing, subprocess, tempfile, uvicorn, fastapi, av, PIL.Image, tokenizers
for name in list(sys.modules):
    if name.partition(".")[0] in modules:
        del sys.modules[name]
importer = builtins.__import__
def hidden(name, globals=None, *rest, **options):
    if name.partition(".")[0] in modules and (globals or {}).get("__name__", "").startswith("sf_jax"):
        raise ImportError(f"no module {name} on Windows")
    return importer(name, globals, *rest, **options)
builtins.__import__ = hidden
class Without:
    def __init__(self, module, names):
        self.__dict__["module"], self.__dict__["names"] = module, names.split()
    def __getattr__(self, name):
        if name in self.names:
            raise AttributeError(f"{self.module.__name__}.{name} on Windows")
        return getattr(self.module, name)
import sf_jax
from absl import flags
for info in pkgutil.walk_packages(sf_jax.__path__, "sf_jax."):
    if info.name in ("sf_jax.__main__", "sf_jax.server.ray"):
        continue
    importlib.import_module(info.name)
    for flag in [f for n, f in flags.FLAGS.flags_by_module_dict().items() if n.startswith("sf_jax.")]:
        for one in flag:
            delattr(flags.FLAGS, one.name)
for name, module in list(sys.modules.items()):
    if name.startswith("sf_jax"):
        for other, missing in names.items():
            if getattr(module, other.__name__, None) is other:
                setattr(module, other.__name__, Without(other, missing))
from sf_jax.inference import batch
from sf_jax.inference.job import Job
with sf_jax.files.locked(sf_jax.files.check_writable(sys.argv[1]), "out"):
    for path in batch.run(Job(prompts=("a 7 moving left",), frames=9, out=sys.argv[1])):
        assert path.stat().st_size
print("made")
"""
)


@pytest.mark.slow
def test_every_module_and_the_digits_do_without_what_windows_lacks(tmp_path):
    done = run("-c", WINDOWS, tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("made\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_sigterm_while_a_run_starts_does_not_end_as_if_done(tmp_path):
    line = [sys.executable, "-m", "sf_jax.train", "--config=configs/digits.py:distill", f"--workdir={tmp_path}/run"]
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline().startswith("distill on ") and process.stdout.readline() == "starting from init\n"
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "error: SIGTERM: ended before there was anything new to save" in err
    assert "Traceback" not in err and "Fatal" not in err and not (tmp_path / "run" / "student.safetensors").exists()
