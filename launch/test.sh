#!/usr/bin/env bash
# Sets up .venv, then runs every check: ruff, shellcheck, the fast tests, the slow tests.
#
#   bash launch/test.sh          everything except what --parity, --all and --exhaustive add
#   bash launch/test.sh --fast   without the slow tests
#   bash launch/test.sh --parity also what needs PyTorch, diffusers and transformers
#   bash launch/test.sh --all    also what needs libtpu, Ray, selenium (1 GB more to install in all); tests the page
#                                if Chromium and its driver are installed (Debian: chromium, chromium-driver)
#   bash launch/test.sh --exhaustive   --all, and the slow tests that are similar to another slow test
#
# PYTHON=/path/to/python chooses the interpreter of a new .venv.
# Tests run on the CPU unless JAX_PLATFORMS is set.
set -euo pipefail

fast_only=0
slow_tests="slow and not exhaustive"
extras="test"
for arg in "$@"; do
  case "$arg" in
    --fast) fast_only=1 ;;
    --parity) extras="test,parity" ;;
    --all) extras="test,parity,aot,ray,browser" ;;
    --exhaustive) extras="test,parity,aot,ray,browser" slow_tests="slow" ;;
    -h | --help)
      printf 'usage: bash launch/test.sh [--fast | --parity | --all | --exhaustive]\n'
      exit 0
      ;;
    *)
      printf 'unknown argument: %s\nusage: bash launch/test.sh [--fast | --parity | --all | --exhaustive]\n' "$arg" >&2
      exit 2
      ;;
  esac
done

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
export JAX_PLATFORMS="${JAX_PLATFORMS-cpu}"

# Runs one part and prints how long it took. The first failing part ends the script.
part() {
  local name="$1" started=$SECONDS rc=0
  shift
  say "== $name"
  "$@" || rc=$?
  if ((rc != 0)); then
    say "== $name FAILED (exit $rc) after $((SECONDS - started)) s" >&2
    exit "$rc"
  fi
  say "== $name: $((SECONDS - started)) s"
}

# The last part of a run: replaces this shell, so that pytest's summary line, with the time, is the last output.
last_part() {
  say "== $1 (the last part; $SECONDS s so far)"
  shift
  exec "$@"
}

part "set-up" setup_venv "$extras"
part "ruff check" "$VENV_PYTHON" -m ruff check .
part "ruff format" "$VENV_PYTHON" -m ruff format --check .
part "shellcheck" "$VENV_DIR/bin/shellcheck" -x launch/*.sh launch/slurm.sbatch benchmarks/*.sh .ci/run

# Two processes: most of a test is single-threaded compilation. All tests use XLA's quick compilation, except that the
# rollout and DMD are compared with the official code once more fully optimized, with XLA's own flags. The cache of
# compiled programs serves runs that are killed and restarted, and tests that do so.
quick=(env JAX_DISABLE_MOST_OPTIMIZATIONS=1 "JAX_COMPILATION_CACHE_DIR=$PWD/.pytest_cache/compiled"
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5)
# Where there is a choice (JAX 0.10, not 0.12), XLA's older code for fused operations compiles 2.8 times faster.
older="${XLA_FLAGS:-} --xla_cpu_use_fusion_emitters=false"
if env "XLA_FLAGS=$older" "$VENV_PYTHON" -c "import jax; jax.devices()" > /dev/null 2>&1; then
  quick+=("XLA_FLAGS=$older")
fi
tests=("$VENV_PYTHON" -m pytest -q -rs -n 2 --dist worksteal)
fast=("${quick[@]}" "${tests[@]}" -m "not slow")
slow=("${quick[@]}" "${tests[@]}" -m "$slow_tests")
official=("${tests[@]}" -m slow tests/test_goldens.py -k "05_rollout or 07_dmd")

if ((fast_only)); then
  last_part "fast tests" "${fast[@]}"
fi
part "fast tests" "${fast[@]}"
part "slow tests" "${slow[@]}"
last_part "optimized programs against the official code" "${official[@]}"
