"""benchmarks/gpu_hour.sh on a CPU with small networks: its report, and parts that fail."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_hour
from benchmarks.gpu_hour import Part
from benchmarks.gpu_table import Case, cases


def test_parts_that_fail_or_take_too_long_are_named(tmp_path):
    lines = tmp_path / "lines.jsonl"
    case = {"chunk": 3, "window": "21", "numbers": "fp8", "batch": 16}
    lines.write_text(json.dumps({"case": case, "left": "too little | memory"}) + '\n{"case": {"chunk"')
    ran = [
        gpu_hour.run(Part("slow", ("-c", "import time; time.sleep(60)"), 60, lines), 0.5),
        gpu_hour.run(Part("wrong", ("-c", "raise SystemExit(3)"), 60), 60),
        gpu_hour.run(Part("no folder", ("-c", ""), 60, skip="none was given"), 60),
    ]
    assert [part["status"] for part in ran] == [
        "not finished within 0 s",
        "failed (exit 3)",
        "left out: none was given",
    ]
    assert len(ran[0]["results"]) == 1
    about = {"devices": 1, "device": "a card", "driver": "a driver"}
    report = {"about": about, "versions": {"jax": "1"}, "commit": None, "small": False, "parts": ran}
    text = gpu_hour.markdown(report)
    assert "# 1 x a card (a driver)" in text and "| wrong | failed (exit 3) | 0 |" in text
    assert "| 3 | 21 | fp8 | 16 | too little / memory | | | | | | |" in text


def test_the_limits_fit_into_nine_minutes_and_no_setting_is_forgotten(tmp_path):
    args = type("Arguments", (), {"small": False, "out": tmp_path, "official": "there"})
    assert sum(part.seconds for part in gpu_hour.parts(args)) <= 540
    assert all("tests/test_gpu.py" in part.command for part in gpu_hour.parts(args)[:1])
    asked = cases("bf16")
    assert len(asked) == len(set(asked)) == 2 * 2 * 2 * 3 and asked[0] == Case()


def test_wrong_flags_end_in_one_line():
    for flag, message in (("--other", "unknown argument: --other"), ("--seconds=x", "is no whole number")):
        done = subprocess.run(["bash", "benchmarks/gpu_hour.sh", flag], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_small_form_fills_both_files(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    command = ["bash", "benchmarks/gpu_hour.sh", "--small", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu_hour.json").read_text())
    status = {part["part"]: part["status"] for part in report["parts"]}
    missing = "left out: no folder of the official code was given (--official=FOLDER)"
    assert list(status.values()) == ["done"] * 4 + [missing] * 2, done.stdout
    results = [result for part in report["parts"] for result in part["results"]]
    rows = [result for result in results if "case" in result]
    assert len(rows) == 3 and all(row["fps"][name] > 0 for row in rows for name in ("none", "tiny", "wan"))
    assert any(result["profile"]["kernels"] for result in results if "profile" in result)
    assert "| 1 | 21 | f32 | 1 |" in (tmp_path / "gpu_hour.md").read_text()
