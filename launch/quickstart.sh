#!/usr/bin/env bash
# Self Forcing end to end on a plain CPU: data, few-step initialization, distillation, videos, metrics.
# Writes everything to runs/quickstart, or to the folder given as the first argument.
set -euo pipefail

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
setup_venv
python="$VENV_PYTHON"
out="${1:-runs/quickstart}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-}"
began=$SECONDS

part() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - began))"; }

part "1/5 moving digits from scikit-learn's handwritten scans, what the shipped teacher was trained on"
"$python" -m sf_jax.data.moving_digits --data_dir="$out/data"

part "2/5 init: a causal student learns from the shipped teacher's ODE trajectories"
"$python" -m sf_jax.train --config=configs/digits.py:init --workdir="$out/init"

part "3/5 distill: Self Forcing, the student trains on its own rollouts"
"$python" -m sf_jax.train --config=configs/digits.py:distill --workdir="$out/distill" \
  --config.init_weights="$out/init/student.safetensors"

part "4/5 generate: videos four times as long as those of the training"
"$python" -m sf_jax.generate --checkpoint="$out/distill/student.safetensors" --prompt="a 7 moving left, fast" \
  --frames=36 --out="$out/videos" --if_exists=replace

part "5/5 evaluate: before and after, judged by a classifier that saw other scans"
"$python" -m sf_jax.evaluate --checkpoint="$out/init/student.safetensors,$out/distill/student.safetensors" \
  --names=before,after --frames=36 --train_frames=9 --num_samples=128 --out="$out/report"

cat <<EOF

Done in $((SECONDS - began)) s.
  video         $out/videos/a_7_moving_left_fast.mp4
  before/after  $out/report
  weights       $out/distill/student.safetensors
Next: $VENV_PYTHON -m sf_jax.generate --checkpoint=$out/distill/student.safetensors --prompt="a 3 moving up and right, slowly"
EOF
