#!/usr/bin/env bash
# Downloads Wan2.1-T2V-1.3B and a Self Forcing checkpoint from the Hugging Face hub, and the tiny decoder from GitHub.
#
#   bash launch/download_wan.sh [FOLDER]     default: weights
#
# Downloads about 17 GB for the model (11 GB of it for the text encoder) and 6 GB for the checkpoint.
# Running the script again resumes an interrupted download.
# Without a network, copy the folders by hand (the script prints which files).
# Also installs JAX for the machine's GPU or TPU, if there is one.
# PYTHON=/path/to/python chooses the interpreter of a new .venv.
set -euo pipefail

folder="${1:-weights}"
if [[ "$folder" == -* ]]; then
  sed -n '2,10p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'
  exit 2
fi
folder="$(mkdir -p -- "$folder" && CDPATH='' cd -- "$folder" && pwd -P)"

# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
setup_venv "convert,download$(accelerator_extra)"

if ! "$VENV_PYTHON" - "$folder" <<'PY'
import sys
import urllib.request
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

folder = Path(sys.argv[1])
try:
    snapshot_download("Wan-AI/Wan2.1-T2V-1.3B", local_dir=folder / "Wan2.1-T2V-1.3B", ignore_patterns=["assets/*"])
    hf_hub_download("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt", local_dir=folder)
    tiny = folder / "Wan2.1-T2V-1.3B" / "taew2_1.pth"
    if not tiny.exists():
        unfinished = tiny.with_suffix(".part")
        urllib.request.urlretrieve("https://github.com/madebyollin/taehv/raw/main/taew2_1.pth", unfinished)
        unfinished.rename(tiny)
except Exception as error:  # whatever it is, what to do is the same
    print(f"{type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
    sys.exit(1)
PY
then
  die "the download failed (see above). With a network, run this again: it continues where it stopped. Without one, fetch
  on another machine https://huggingface.co/Wan-AI/Wan2.1-T2V-1.3B (config.json, diffusion_pytorch_model.safetensors,
  Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth, google/umt5-xxl/) into $folder/Wan2.1-T2V-1.3B and
  https://huggingface.co/gdhe17/Self-Forcing (checkpoints/self_forcing_dmd.pt) into $folder/checkpoints; for --vae=tiny
  also https://github.com/madebyollin/taehv (taew2_1.pth) into $folder/Wan2.1-T2V-1.3B"
fi

say "done; next:"
say "$VENV_PYTHON -m sf_jax.generate --model=$folder/Wan2.1-T2V-1.3B \\"
say "  --checkpoint=$folder/checkpoints/self_forcing_dmd.pt --prompt=\"a cat walks through the snow\""
