"""Run by `gpu_hour.sh`: tests, tables and a profile in turn, each with a time limit; writes a JSON file and a table.

  python -m benchmarks.gpu_hour --out=out/gpu_hour --seconds=500                      # on a GPU, 1.3B
  python -m benchmarks.gpu_hour --out=out/gpu_hour --official=official                # plus the official code
  JAX_PLATFORMS=cpu python -m benchmarks.gpu_hour --out=out/gpu_hour --small          # small networks, for a CPU

Every part is a separate process, so a crash does not affect the others. Both output files are rewritten when a part
ends, and they list the parts that did not finish.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch")
TAIL = 12  # number of lines kept from a part's output
# The settings of `gpu_table`, in its order.
COLUMNS = ("chunk", "window", "numbers", "batch")
DECODERS = ("none", "tiny", "wan")


@dataclasses.dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
      name: title.
      command: arguments of Python.
      seconds: time limit.
      results: file of JSON lines that it writes; None if it writes none.
      skip: reason for skipping it; None runs it.
      environ: additional environment variables.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    results: Path | None = None
    skip: str | None = None
    environ: dict = dataclasses.field(default_factory=dict)


def parts(args: argparse.Namespace) -> list[Part]:
    """All parts in order; with the official code their limits exceed the total time, which then cuts the last ones."""
    small = ["--small"] if args.small else []
    few = ["--repeats=1"] if args.small else ["--repeats=3"]
    files = sorted(str(path) for path in Path("tests").glob("test_*.py") if "mark.gpu" in path.read_text())
    lines = {name: args.out / f"{name}.jsonl" for name in ("streaming", "table", "official", "vs_official")}
    for path in lines.values():
        path.unlink(missing_ok=True)
    folder = f"--official={args.official}"
    missing = None if args.official else "no folder of the official code was given (--official=FOLDER)"
    most = ["--most=3"] if args.small else []
    table = ["-m", "benchmarks.gpu_table", *small, *few, *most, f"--jsonl={lines['table']}"]
    streaming = ["-m", "benchmarks.streaming", *small, *few, f"--json={lines['streaming']}"]
    streaming += ["--rows=none"] if args.small else []
    tests = ["-m", "pytest", "-q", "-rs", "-m", "gpu", *files]
    kept = ["-m", "pytest", "-q", "-m", "not slow", "tests/test_compilation.py", "-k", "program or places or damaged"]
    official = ["-m", "benchmarks.official_speed", folder, *small, *few, f"--jsonl={lines['official']}"]
    beside = ["-m", "benchmarks.vs_official", folder, "--size=embedded", "--row=rollout", *few]
    return [
        Part("tests of the GPU paths", tuple(tests), 75),
        Part("tests of kept programs", tuple(kept), 30),
        Part("benchmarks.streaming", tuple(streaming), 100, lines["streaming"]),
        Part("streaming table and profile", (*table, "--seconds=150"), 210, lines["table"]),
        Part("official code on this device", tuple(official), 60, lines["official"], missing),
        Part(
            "benchmarks.vs_official, CPU",
            (*beside, f"--json={lines['vs_official']}"),
            60,
            lines["vs_official"],
            missing,
            {"JAX_PLATFORMS": "cpu"},
        ),
    ]


def run(part: Part, limit: float) -> dict:
    """Runs a part; kills its process and all child processes at the time limit."""
    if part.skip is not None:
        return {"part": part.name, "status": f"left out: {part.skip}", "seconds": 0.0, "results": []}
    began, environ = time.monotonic(), os.environ | part.environ
    process = subprocess.Popen(
        [sys.executable, *part.command],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        status = "done" if process.returncode == 0 else f"failed (exit {process.returncode})"
        if process.returncode == 5 and "pytest" in part.command:
            status = "failed: no test was found"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = f"not finished within {limit:.0f} s"
    lines = part.results.read_text().splitlines() if part.results is not None and part.results.is_file() else []
    results = [json.loads(line) for line in lines if line.endswith("}")]  # the last line may be incomplete
    tail = output.splitlines()[-TAIL:]
    return {
        "part": part.name,
        "status": status,
        "seconds": time.monotonic() - began,
        "results": results,
        "output": tail,
    }


def device() -> dict:
    """Describes the device in a separate process, so that this one leaves the device memory to the parts."""
    code = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind, jax.device_count()]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: JAX has no device here: {done.stderr.strip().splitlines()[-1]}")
    backend, kind, count = json.loads(done.stdout.splitlines()[-1])
    return {"platform": backend, "device": kind, "devices": count, "driver": _driver()}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict:
    """Versions of the installed packages."""
    known = {}
    for name in PACKAGES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = None
    return known | {"python": platform.python_version()}


def markdown(report: dict) -> str:
    """The report as tables."""
    about = report["about"]
    title = f"{about['devices']} x {about['device']}" + (f" ({about['driver']})" if about["driver"] else "")
    known = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    size = "small networks" if report["small"] else "Wan2.1-T2V-1.3B, 480x832"
    lines = [f"# {title}", "", f"{size}, random weights; {known}; commit {report['commit']}.", ""]
    lines += ["| part | status | s |", "|---|---|---:|"]
    lines += [f"| {part['part']} | {part['status']} | {part['seconds']:.0f} |" for part in report["parts"]]
    results = [result for part in report["parts"] for result in part["results"]]
    lines += ["", *_streaming(results), *_table(results), *_profile(results)]
    for result in results:
        if "official_fps" in result:
            frames = f"{result['frames']} latent frames on {result['device']}"
            lines += [f"The official code, denoising alone, {frames}: {result['official_fps']:.2f} FPS.", ""]
        if "difference" in result:
            ours, theirs = (sorted(result["seconds"][side])[0] for side in ("ours", "theirs"))
            lines += [f"{result['what']}, float32 on the CPU: ours {ours:.3f} s, theirs {theirs:.3f} s.", ""]
    return "\n".join(lines)


def _streaming(results: list[dict]) -> list[str]:
    """The results of `benchmarks.streaming`."""
    rows = [result for result in results if "first_frame_s" in result]
    if not rows:
        return []
    lines = ["Whole videos, frames on the host (`benchmarks.streaming`):", ""]
    lines += ["| decoder | FPS | s to the first frame | s a chunk |", "|---|---:|---:|---:|"]
    for row in rows:
        cells = (row["decoder"], f"{row['fps']:.2f}", f"{row['first_frame_s']:.3f}", f"{row['chunk_s']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _table(results: list[dict]) -> list[str]:
    """The streaming table."""
    rows = [result for result in results if "case" in result]
    if not rows:
        return []
    lines = [
        "FPS of all videos together at a full cache, and seconds to a video's first frames (`benchmarks.gpu_table`):",
        "",
    ]
    names = [*COLUMNS, *(f"FPS, {name}" for name in DECODERS), *(f"first, {name}" for name in DECODERS), "GiB"]
    lines += [f"| {' | '.join(names)} |", f"|{'---|' * 4}{'---:|' * 7}"]
    for row in rows:
        cells = [str(row["case"][name]) for name in COLUMNS]
        if "left" in row:
            lines.append(f"| {' | '.join(cells)} | {re.sub(r'[|]', '/', row['left'])} |" + " |" * 6)
            continue
        cells += [f"{row['fps'][name]:.1f}" for name in DECODERS]
        cells += [f"{row['first_s'][name]:.3f}" for name in DECODERS]
        cells.append("-" if row["gib"] is None else f"{row['gib']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _profile(results: list[dict]) -> list[str]:
    """The slowest kernels."""
    profiles = [result["profile"] for result in results if "profile" in result]
    if not profiles:
        return []
    whole = profiles[0]["all_kernels_s"]
    lines = [
        "Kernels of the first setting that take longest, two calls:",
        "",
        "| kernel | ms | share |",
        "|---|---:|---:|",
    ]
    for row in profiles[0]["kernels"]:
        name = row["kernel"].replace("|", "/")
        lines.append(f"| `{name}` | {row['seconds'] * 1e3:.2f} | {row['seconds'] / max(whole, 1e-12):.0%} |")
    return [*lines, ""]


def main() -> None:
    """Runs the parts and writes the report after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_hour"))
    parser.add_argument("--official", type=Path, default=None, help="folder of the official code")
    parser.add_argument("--seconds", type=float, default=500, help="for all parts together")
    parser.add_argument("--small", action="store_true", help="small networks, for a CPU")
    args = parser.parse_args()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    report = {"about": device(), "versions": versions(), "commit": git.stdout.strip() or None, "small": args.small}
    if report["about"]["platform"] == "cpu" and not args.small:
        raise SystemExit("error: JAX sees no GPU here: install the driver and jax[cuda12], or give --small")
    report["parts"] = []
    for part in parts(args):
        left = args.seconds - (time.monotonic() - began)
        limit = min(part.seconds, left)
        print(f"{part.name}: at most {max(limit, 0):.0f} s", flush=True)
        if limit < 5 and part.skip is None:
            part = dataclasses.replace(part, skip="no time was left")
        report["parts"].append(run(part, limit))
        print(f"{part.name}: {report['parts'][-1]['status']}", flush=True)
        report["seconds"] = time.monotonic() - began
        for name, text in (("json", json.dumps(report, indent=1)), ("md", markdown(report))):
            unfinished = args.out / f"gpu_hour.{name}.part"
            unfinished.write_text(text)
            unfinished.replace(args.out / f"gpu_hour.{name}")
    print((args.out / "gpu_hour.md").read_text())
    print(f"wrote {args.out}/gpu_hour.json and .md in {report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
