#!/usr/bin/env bash
# Trains on a Cloud TPU slice of any size, from your own machine with gcloud.
#
#   export TPU_NAME=sf ZONE=us-east5-a ACCELERATOR_TYPE=v5p-128
#   bash launch/tpu_pod.sh create                     create the slice (SPOT=1: a preemptible one)
#   bash launch/tpu_pod.sh install                    copy the committed code to all workers and install it there
#                                                     (EXTRAS=convert: with PyTorch, to read .pt and .pth files)
#   bash launch/tpu_pod.sh mount HOST:/SHARE          mount an NFS share (Filestore) at /mnt/share on all workers
#   bash launch/tpu_pod.sh prepare FLAGS              python -m sf_jax.prepare on all workers, in the background
#   bash launch/tpu_pod.sh train FLAGS                python -m sf_jax.train on all workers, in the background
#   bash launch/tpu_pod.sh log [WORKER]               follow the output of a worker (default: 0)
#   bash launch/tpu_pod.sh stop                       save a checkpoint and end the run
#   bash launch/tpu_pod.sh delete                     delete the slice
#
# Data and --workdir must be on a file system that all workers share: /mnt/share after `mount`.
# `train` with the same flags resumes from the newest checkpoint, also on a new slice (create, install, mount, train),
# even of another size.
# RUNTIME_VERSION is the software version of the VMs; the default depends on ACCELERATOR_TYPE.
# PROJECT and NETWORK default to those of gcloud.
set -euo pipefail

usage() {
  sed -n '2,19p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
  exit "$1"
}

fail() {
  printf '[sf_jax] error: %s\n' "$*" >&2
  exit 1
}

action="${1:-}"
case "$action" in
  -h | --help) usage 0 ;;
  create | install | mount | prepare | train | log | stop | delete) shift ;;
  *) usage 2 ;;
esac
: "${TPU_NAME:?: set it to the name of the slice}" "${ZONE:?: set it to the zone of the slice, such as us-east5-a}"
command -v gcloud >/dev/null || fail "there is no gcloud: https://cloud.google.com/sdk/docs/install"
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

tpu=(gcloud compute tpus tpu-vm)
where=("--zone=$ZONE")
if [[ -n "${PROJECT:-}" ]]; then where+=("--project=$PROJECT"); fi

# on WORKER COMMAND: runs a command on a worker, or on "all".
on() {
  "${tpu[@]}" ssh "$TPU_NAME" "${where[@]}" --worker="$1" --command="$2"
}

# The software version that Google names for each kind of slice.
runtime() {
  case "$ACCELERATOR_TYPE" in
    v4-*) printf 'tpu-ubuntu2204-base' ;;
    v5litepod-*) printf 'v2-alpha-tpuv5-lite' ;;
    v5p-*) printf 'v2-alpha-tpuv5' ;;
    v6e-*) printf 'v2-alpha-tpuv6e' ;;
    *) fail "ACCELERATOR_TYPE is $ACCELERATOR_TYPE: v4-*, v5litepod-*, v5p-* and v6e-* are known; for others set RUNTIME_VERSION" ;;
  esac
}

create() {
  : "${ACCELERATOR_TYPE:?: set it to the kind of slice, such as v5p-128}"
  local version more=()
  version="${RUNTIME_VERSION:-$(runtime)}"
  if [[ -n "${NETWORK:-}" ]]; then more+=("--network=$NETWORK"); fi
  if [[ "${SPOT:-0}" == 1 ]]; then more+=(--spot); fi
  "${tpu[@]}" create "$TPU_NAME" "${where[@]}" --accelerator-type="$ACCELERATOR_TYPE" --version="$version" "${more[@]}"
}

install() {
  local archive
  archive="$(mktemp -d)/sf_jax.tar.gz"
  git diff --quiet HEAD 2>/dev/null || printf '[sf_jax] changes that are not committed are left out\n' >&2
  git archive --format=tar.gz --prefix=sf_jax/ --output="$archive" HEAD
  "${tpu[@]}" scp "$archive" "$TPU_NAME:sf_jax.tar.gz" "${where[@]}" --worker=all
  rm -r -- "${archive%/*}"
  # The images have Python 3.10; Ubuntu 22.04 packages 3.11.
  on all 'set -e
tar -xzf sf_jax.tar.gz
if ! python3.12 -c "import venv" 2>/dev/null && ! python3.11 -c "import venv, ensurepip" 2>/dev/null; then
  sudo apt-get -qq update && sudo apt-get -qq install -y python3.11 python3.11-venv
fi
cd sf_jax && bash -c "source launch/common.sh && setup_venv '"tpu${EXTRAS:+,$EXTRAS}"'"'
}

mount_share() {
  [[ "${1:-}" == *:/* ]] || fail "mount: give HOST:/SHARE, the address of an NFS share"
  local share
  share="$(printf '%q' "$1")"
  on all "set -e
command -v mount.nfs >/dev/null || { sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common; }
sudo mkdir -p /mnt/share
mountpoint -q /mnt/share || sudo mount -t nfs -o hard $share /mnt/share
test -w /mnt/share || sudo chmod 1777 /mnt/share"
}

# background MODULE FLAGS: starts a command on all workers that keeps running after this connection ends.
background() {
  local module="$1" flags
  shift
  (($#)) || fail "${module##*.}: give the flags of python -m $module"
  flags="$(printf ' %q' "$@")"
  on all "cd sf_jax || exit 1
if test -f run.pid && kill -0 \$(cat run.pid) 2>/dev/null; then echo 'a run is under way here: stop it first' >&2; exit 1; fi
SF_JAX_DISTRIBUTED=1 nohup setsid .venv/bin/python -m $module$flags >run.log 2>&1 </dev/null &
echo \$! >run.pid"
  printf '[sf_jax] started; bash launch/tpu_pod.sh log shows what it prints\n'
}

stop() {
  # shellcheck disable=SC2016 # for the workers' shells
  on all 'cd sf_jax && test -f run.pid || exit 0
pid=$(cat run.pid)
kill -TERM $pid 2>/dev/null
while kill -0 $pid 2>/dev/null; do sleep 1; done
tail -n 2 run.log'
}

case "$action" in
  create) create ;;
  install) install ;;
  mount) mount_share "$@" ;;
  prepare | train) background "sf_jax.$action" "$@" ;;
  log) on "${1:-0}" 'tail -n 100 -f sf_jax/run.log' ;;
  stop) stop ;;
  delete) "${tpu[@]}" delete "$TPU_NAME" "${where[@]}" ;;
esac
