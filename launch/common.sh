# Shared set-up for the launch scripts. Source it, then call setup_venv:
#
#   source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
#   setup_venv test            # extras of setup.py, comma-separated
#   "$VENV_PYTHON" -m pytest
#
# Sourcing changes to the repository root and sets REPO_ROOT and VENV_PYTHON.
# PYTHON=/path/to/python chooses the interpreter for a new .venv.
# shellcheck shell=bash

set -euo pipefail

REPO_ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd -- "$REPO_ROOT"

VENV_DIR="$REPO_ROOT/.venv"
VENV_PYTHON="$VENV_DIR/bin/python"

say() { printf '[sf_jax] %s\n' "$*"; }

die() {
  printf '[sf_jax] error: %s\n' "$*" >&2
  exit 1
}

# Prints the version of a Python that runs, such as "3.12", and nothing otherwise.
_python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

_new_enough() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints a Python >= 3.11 that can create virtual environments.
_find_python() {
  local candidate version seen=""
  local -a candidates=(python3.12 python3.11 python3)
  if [[ -n "${PYTHON:-}" ]]; then
    candidates=("$PYTHON")
  fi
  for candidate in "${candidates[@]}"; do
    version="$(_python_version "$candidate")"
    if [[ -z "$version" ]]; then
      seen+="; $candidate: not found or does not run"
    elif ! _new_enough "$candidate"; then
      seen+="; $candidate: is Python $version"
    elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      seen+="; $candidate: has no venv module (Debian/Ubuntu: install python$version-venv)"
    else
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  die "need Python >= 3.11 with venv; name one with PYTHON=/path/to/python (tried ${seen#; })"
}

_make_venv() {
  local python version
  if [[ -x "$VENV_PYTHON" ]] && "$VENV_PYTHON" -c 'import pip' >/dev/null 2>&1; then
    version="$(_python_version "$VENV_PYTHON")"
    _new_enough "$VENV_PYTHON" || die ".venv is Python $version, need >= 3.11: remove .venv and run this again"
    if [[ -n "${PYTHON:-}" && "$(_python_version "$PYTHON")" != "$version" ]]; then
      die ".venv is Python $version, not PYTHON=$PYTHON: remove .venv (or unset PYTHON) and run this again"
    fi
    return 0
  fi
  if [[ -e "$VENV_DIR" ]]; then
    [[ -f "$VENV_DIR/pyvenv.cfg" ]] || die ".venv exists but is no virtual environment: remove it and run this again"
    say "the .venv here does not work, recreating it"
  fi
  python="$(_find_python)" || exit 1 # an error in $(...) ends only the subshell
  say "making .venv with $python (Python $(_python_version "$python"))"
  # --clear: replaces the remains of a broken or interrupted attempt.
  "$python" -m venv --clear "$VENV_DIR" || die "'$python -m venv' failed (see above)"
}

# Prints the extra of JAX's backend for this machine, ",cuda" or ",tpu", and nothing otherwise.
accelerator_extra() {
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    printf ',cuda\n'
  elif compgen -G '/dev/accel*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    printf ',tpu\n'
  fi
}

# Everything that an installation depends on: setup.py, the extras, the location, the top-level packages.
_install_key() {
  {
    cat setup.py
    printf '%s\n' "$1" "$REPO_ROOT"
    for package in sf_jax configs; do
      if [[ -f "$package/__init__.py" ]]; then printf '%s\n' "$package"; fi
    done
  } | cksum
}

# setup_venv [extras]: creates .venv if needed and installs the package there, editable.
# pip runs only if something has changed since the last call, so later calls need no network.
setup_venv() {
  local extras="${1:-test}" key stamp log started=$SECONDS
  stamp="$VENV_DIR/.sf_jax-installed-${extras//,/+}"
  log="$VENV_DIR/sf_jax-install.log"
  _make_venv
  key="$(_install_key "$extras")"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$key" ]]; then
    return 0
  fi
  rm -f -- "$stamp"
  printf '[sf_jax] installing sf_jax[%s] into .venv (minutes the first time) ... ' "$extras"
  if ! "$VENV_PYTHON" -m pip install --disable-pip-version-check --no-input -e ".[$extras]" \
    >"$log" 2>&1 </dev/null; then
    printf 'failed\n'
    tail -n 30 -- "$log" >&2
    die "pip install failed; the whole log is in .venv/${log##*/}"
  fi
  printf '%s\n' "$key" >"$stamp"
  printf 'done in %d s\n' "$((SECONDS - started))"
}
