#!/usr/bin/env bash
# The first minutes on a machine with a GPU: tests, benchmarks, the streaming table, a profile, within 9 minutes.
#
#   bash benchmarks/gpu_hour.sh                          # Wan2.1-T2V-1.3B with random weights
#   bash benchmarks/gpu_hour.sh --official=FOLDER        # a clone of the official code beside it
#   bash benchmarks/gpu_hour.sh --small                  # small networks, on the CPU, in 2 minutes
#
# --out=FOLDER (out/gpu_hour) gets gpu_hour.json and gpu_hour.md, written again after every part; --seconds=N is the
# limit of all, installation included (540).
# A Python that has what is needed is used as it is: PYTHON, else .venv, else the one in PATH. Where none has, .venv is
# set up with JAX for the GPU; nothing that is installed is installed again.
set -euo pipefail

small=0 seconds=540 out="out/gpu_hour" official=""
for arg in "$@"; do
  case "$arg" in
    --small) small=1 ;;
    --seconds=*) seconds="${arg#*=}" ;;
    --out=*) out="$(mkdir -p -- "${arg#*=}" && cd -- "${arg#*=}" && pwd -P)" ;;
    --official=*) official="$(cd -- "${arg#*=}" && pwd -P)" ;;
    -h | --help)
      sed -n '2,12s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *)
      printf 'unknown argument: %s\n' "$arg" >&2
      exit 2
      ;;
  esac
done
[[ "$seconds" =~ ^[0-9]+$ ]] || { printf 'error: --seconds=%s is no whole number\n' "$seconds" >&2; exit 2; }

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../launch/common.sh"
((small)) && export JAX_PLATFORMS=cpu

# Whether a Python runs this package's tests on the device that is wanted.
complete() {
  command -v "$1" >/dev/null 2>&1 || return 1
  "$1" - "$small" >/dev/null 2>&1 <<'PYTHON'
import sys

import pytest  # noqa: F401
import jax

import sf_jax.inference.load  # noqa: F401

sys.exit(sys.argv[1] == "0" and jax.default_backend() != "gpu")
PYTHON
}

python=""
for candidate in ${PYTHON:+"$PYTHON"} "$VENV_PYTHON" python3; do
  if complete "$candidate"; then
    python="$candidate"
    break
  fi
done
if [[ -z "$python" ]]; then
  extras="test"
  ((small)) || extras+="$(accelerator_extra)"
  setup_venv "$extras"
  python="$VENV_PYTHON"
  complete "$python" || die "JAX sees no GPU here: look at nvidia-smi, or try --small on the CPU"
fi
if [[ -n "$official" ]] && ! "$python" -c 'import torch, diffusers, einops' >/dev/null 2>&1; then
  say "installing what the official code needs"
  "$python" -m pip install --disable-pip-version-check --no-input --quiet 'torch>=2.10' diffusers transformers \
    accelerate einops easydict || say "that failed: the official code is left out"
  "$python" -c 'import torch, diffusers, einops' >/dev/null 2>&1 || official=""
fi
say "using $("$python" -c 'import sys; print(sys.executable)')"
arguments=(--out="$out" --seconds="$((seconds - SECONDS))")
((small)) && arguments+=(--small)
[[ -n "$official" ]] && arguments+=(--official="$official")
exec "$python" -m benchmarks.gpu_hour "${arguments[@]}"
