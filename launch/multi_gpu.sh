#!/usr/bin/env bash
# Trains on the GPUs of one machine.
#
#   bash launch/multi_gpu.sh [--processes=N] --config=configs/wan_distill.py:1_3b --config.accumulate=8 \
#     --workdir=runs/wan [more flags]
#
# Creates .venv with JAX for the machine's GPUs, then starts `python -m sf_jax.train` with all other flags. One process
# drives all GPUs. --processes=N starts N processes with an equal share each, which helps if one Python process cannot
# keep all GPUs busy. Process 0 prints to the terminal, the others to WORKDIR/process_K.log. SIGTERM and Ctrl-C reach all
# processes: they save a checkpoint, from which the same command resumes. If one process fails, the others are killed.
# `accumulate` divides the batch of 64 videos into parts: on 8 GPUs each then computes one video at a time.
# PYTHON=/path/to/python chooses the interpreter of a new .venv.
set -euo pipefail

usage() {
  sed -n '2,13p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
  exit "$1"
}

processes=1
workdir=""
arguments=()
while (($#)); do
  case "$1" in
    --processes=*) processes="${1#*=}" ;;
    -h | --help) usage 0 ;;
    --workdir=*)
      workdir="${1#*=}"
      arguments+=("$1")
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
((${#arguments[@]})) || usage 2

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

[[ "$processes" =~ ^[1-9][0-9]*$ ]] || die "--processes=$processes: it must be a number, 1 or more"
train=("$VENV_PYTHON" -m sf_jax.train "${arguments[@]}")
if ((processes == 1)); then
  setup_venv "test$(accelerator_extra)"
  exec "${train[@]}"
fi

[[ -n "$workdir" ]] || die "--processes=$processes needs --workdir=FOLDER, for the outputs of the processes"
if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
  gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)"
elif command -v nvidia-smi >/dev/null 2>&1; then
  gpus="$(nvidia-smi --list-gpus | grep -c .)" || die "nvidia-smi finds no GPU"
else
  die "--processes=$processes: there is no nvidia-smi, so no GPUs to share"
fi
((gpus % processes == 0)) || die "--processes=$processes: it must divide the $gpus GPUs"
setup_venv "test$(accelerator_extra)"
mkdir -p -- "$workdir"

port="$("$VENV_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
export SF_JAX_COORDINATOR="localhost:$port" SF_JAX_NUM_PROCESSES="$processes"
share=$((gpus / processes))
running=()
# shellcheck disable=SC2329 # called by the trap
pass_on() {
  say "SIG$1: passed on to the processes"
  kill -s "$1" -- "${running[@]}" 2>/dev/null || true
}
# JAX's processes agree on a step to stop after when one gets SIGTERM, so Ctrl-C is passed on as SIGTERM.
trap 'pass_on TERM' TERM INT
for ((k = 0; k < processes; k++)); do
  devices="$(seq -s, $((k * share)) $((k * share + share - 1)))"
  # Separate process groups: the terminal's Ctrl-C reaches only this script.
  if ((k == 0)); then
    SF_JAX_PROCESS_ID=0 SF_JAX_LOCAL_DEVICES="$devices" setsid "${train[@]}" &
  else
    SF_JAX_PROCESS_ID="$k" SF_JAX_LOCAL_DEVICES="$devices" setsid "${train[@]}" \
      >"$workdir/process_$k.log" 2>&1 </dev/null &
  fi
  running+=("$!")
done

# `wait -n` also returns after a signal, so this checks the processes themselves.
status=0
while ((${#running[@]})); do
  wait -n "${running[@]}" || true
  left=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    rc=0
    wait "$pid" || rc=$?
    ((rc == 0 || status != 0)) || status=$rc
  done
  running=("${left[@]}")
  if ((status != 0 && ${#running[@]})); then
    say "a process ended with exit code $status: ending the others (outputs: $workdir/process_*.log)" >&2
    kill -KILL -- "${running[@]}" 2>/dev/null || true
  fi
done
exit "$status"
