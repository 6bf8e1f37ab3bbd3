#!/usr/bin/env bash
# VBench as Self Forcing reports it: videos of the rewritten prompts, named by VBench's own prompts, and their scores.
#
#   bash launch/vbench.sh lists                      fetch the lists of prompts and check them
#   bash launch/vbench.sh generate FLAGS             5 videos per prompt; FLAGS are those of sf_jax.generate
#   bash launch/vbench.sh score                      run VBench's 16 dimensions, if it is installed
#   bash launch/vbench.sh all FLAGS                  all three
#
# Before FLAGS:  --folder=FOLDER   folder for all files (runs/vbench)
#                --limit=N         only the first N prompts, to try it out
#                --samples=N       videos per prompt (5)
#                --prompts=FILE --names=FILE   other lists, with one prompt or name per line
#                --dry-run         print the commands without running them
#
# Existing files are kept, so a stopped run resumes. FLAGS must match those of the folder. Prompts: docs/results/protocol.md.
# VBENCH=/path/to/vbench names the program, if VBench has its own environment (it needs an older PyTorch).
# PYTHON=/path/to/python chooses the interpreter of a new .venv.
set -euo pipefail

usage() {
  sed -n '2,17p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
  exit "$1"
}

step="${1:-}"
case "$step" in
  -h | --help) usage 0 ;;
  lists | generate | score | all) shift ;;
  *) usage 2 ;;
esac
from="$PWD"

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
absolute() { case "$1" in /*) printf '%s\n' "$1" ;; *) printf '%s\n' "$from/$1" ;; esac; }

folder="runs/vbench" limit="" samples=5 prompts="" names="" dry_run=0
flags=()
for argument in "$@"; do
  case "$argument" in
    --folder=*) folder="${argument#*=}" ;;
    --limit=*) limit="${argument#*=}" ;;
    --samples=*) samples="${argument#*=}" ;;
    --prompts=*) prompts="${argument#*=}" ;;
    --names=*) names="${argument#*=}" ;;
    --dry-run) dry_run=1 ;;
    -*)
      # like absl: one dash or two, with the value after "=" or in the next argument
      name="${argument#-}" name="${name#-}" name="${name%%=*}"
      case "$name" in
        out | num_samples | vbench_names | novbench_names | if_exists | flagfile)
          die "$argument: the protocol sets it; see bash launch/vbench.sh --help"
          ;;
        folder | limit | samples | prompts | names | dry-run | dry_run)
          die "$argument: write --folder=, --limit=, --samples=, --prompts= and --names= with their value, or --dry-run"
          ;;
      esac
      flags+=("$argument")
      ;;
    *) flags+=("$argument") ;;
  esac
done

[[ -z "$limit" || "$limit" =~ ^[1-9][0-9]*$ ]] || die "--limit=$limit: it must be a number, 1 or more"
[[ "$samples" =~ ^[1-9][0-9]*$ ]] || die "--samples=$samples: it must be a number, 1 or more"
[[ -z "$prompts" && -z "$names" || -n "$prompts" && -n "$names" ]] || die "--prompts and --names: give both or none"
folder="$(absolute "$folder")"
videos="$folder/videos" origin=""
dimensions=(subject_consistency background_consistency temporal_flickering motion_smoothness dynamic_degree
  aesthetic_quality imaging_quality object_class multiple_objects human_action color spatial_relationship scene
  appearance_style temporal_style overall_consistency)

# Both at the commits that docs/results/protocol.md names.
SELF_FORCING=https://raw.githubusercontent.com/guandeh17/Self-Forcing/33593df3e81fa3ec10239271dd2c100facac6de1/prompts/vbench
VBENCH_INFO=https://raw.githubusercontent.com/Vchitect/VBench/45e79ec14e69a2187202c675d2dbce1a71843d53/vbench/VBench_full_info.json

run() {
  if ((dry_run)); then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# fetch URL SHA256: downloads a file to the folder and checks its hash.
fetch() {
  local path="$folder/${1##*/}"
  if [[ -f "$path" ]] && sha256sum --check --status <<<"$2  $path"; then return 0; fi
  run mkdir -p -- "$folder"
  run curl --fail --silent --show-error --location --output "$path.part" "$1" ||
    die "cannot fetch $1: put the file at $path yourself"
  ((dry_run)) && return 0
  sha256sum --check --status <<<"$2  $path.part" || die "$1 is not the file of docs/results/protocol.md: its hash is another"
  mv -- "$path.part" "$path"
}

lists() {
  if [[ -z "$prompts" ]]; then
    fetch "$SELF_FORCING/all_dimension.txt" f9b50654f81ab732b9235d5bb91f0c3a4d152fac19249ce3a3a9185b2d80d8c3
    fetch "$SELF_FORCING/all_dimension_extended.txt" c78f1ad32974503efaa8cc935347ace88f3a8b571adde6687bc8425bbf417cf3
    fetch "$VBENCH_INFO" 5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd
    prompts="$folder/all_dimension_extended.txt" names="$folder/all_dimension.txt"
  else
    prompts="$(absolute "$prompts")" names="$(absolute "$names")"
    [[ -f "$prompts" && -f "$names" ]] || die "--prompts=$prompts --names=$names: one of them does not exist"
    run mkdir -p -- "$folder"
  fi
  if ! ((dry_run)); then origin="$(describe_origin)"; fi
  if [[ -n "$limit" ]]; then
    first "$prompts" "$folder/first_prompts.txt"
    first "$names" "$folder/first_names.txt"
    prompts="$folder/first_prompts.txt" names="$folder/first_names.txt"
  fi
}

# first LIST FILE: writes the first lines of a list to a file.
first() {
  if ((dry_run)); then
    printf 'head -n %q -- %q >%q\n' "$limit" "$1" "$2"
  else
    head -n "$limit" -- "$1" >"$2"
  fi
}

# Everything that the videos depend on; not --limit, which does not change the videos of the first prompts.
describe_origin() {
  local argument
  printf '%s\n' "--samples=$samples" "prompts: $(cksum <"$prompts")" "names: $(cksum <"$names")"
  for argument in ${flags[@]+"${flags[@]}"}; do printf '%s\n' "$argument"; done | sort
  for argument in ${flags[@]+"${flags[@]}"}; do
    argument="${argument#-*=}"
    if [[ "$argument" != [/-]* && -e "$from/$argument" ]]; then
      printf 'in %s\n' "$from"
      return
    fi
  done
}

# Rejects a folder whose videos were made with other flags.
check_origin() {
  local record="$folder/generated_by.txt"
  if [[ -f "$record" && "$(<"$record")" == "$origin" ]]; then return 0; fi
  if compgen -G "$videos/*.mp4" >/dev/null; then
    die "the videos in $videos are not of these flags ($record has theirs): give another --folder"
  fi
  printf '%s\n' "$origin" >"$record"
}

generate() {
  lists
  if ! ((dry_run)); then
    check_origin
    setup_venv "convert$(accelerator_extra)"
  fi
  run cd -- "$from" # paths in flags are relative to it
  run env PYTHONSAFEPATH=1 "$VENV_PYTHON" -m sf_jax.generate --prompts="$prompts" --names="$names" --vbench_names \
    --num_samples="$samples" --if_exists=skip --out="$videos" ${flags[@]+"${flags[@]}"}
  run cd -- "$REPO_ROOT"
}

# Rejects a folder whose scores are of other videos.
check_scores() {
  local record="$folder/scores/scored.txt" scored
  scored="$({
    ls -1 -- "$videos"
    if [[ -f "$folder/generated_by.txt" ]]; then cat -- "$folder/generated_by.txt"; fi
  } | cksum)"
  if [[ -f "$record" && "$(<"$record")" == "$scored" ]]; then return 0; fi
  if compgen -G "$folder/scores/*/*_eval_results.json" >/dev/null; then
    die "the scores in $folder/scores are of other videos than there are now: remove that folder, or give another --folder"
  fi
  mkdir -p -- "$folder/scores"
  printf '%s\n' "$scored" >"$record"
}

score() {
  local program="${VBENCH:-vbench}" dimension
  local -a info=()
  case "$program" in */*) program="$(absolute "$program")" ;; esac
  if ! ((dry_run)); then
    [[ -d "$videos" ]] || die "there are no videos in $videos: bash launch/vbench.sh generate makes them"
    command -v "$program" >/dev/null 2>&1 || die "VBench is not installed: in an environment of its own, pip install torch
  torchvision --index-url https://download.pytorch.org/whl/cu121, pip install vbench==0.1.5 and
  pip install detectron2@git+https://github.com/facebookresearch/detectron2.git; then VBENCH=/path/to/its/bin/vbench"
    check_scores
  fi
  if [[ -f "$folder/VBench_full_info.json" ]]; then info=(--full_json_dir "$folder/VBench_full_info.json"); fi
  for dimension in "${dimensions[@]}"; do
    if compgen -G "$folder/scores/$dimension/*_eval_results.json" >/dev/null; then continue; fi
    say "VBench: $dimension"
    run "$program" evaluate --videos_path "$videos" --dimension "$dimension" --output_path "$folder/scores/$dimension/" \
      ${info[@]+"${info[@]}"}
    ((dry_run)) && continue
    # VBench exits with 0 even if it failed
    compgen -G "$folder/scores/$dimension/*_eval_results.json" >/dev/null || die "VBench wrote no result for $dimension: see above"
  done
  say "scores are in $folder/scores; their weighted means: VBench's scripts/cal_final_score.py (docs/results/protocol.md)"
}

case "$step" in
  lists) lists ;;
  generate) generate ;;
  score) score ;;
  all)
    generate
    score
    ;;
esac
