"""Recognizes Wan2.2's experts and transformers of other tasks whose shapes equal those of Wan2.1's text-to-video.

Only their names and the files next to them differ: https://huggingface.co/Wan-AI/Wan2.2-T2V-A14B has two transformers
with the shapes of Wan2.1-T2V-14B, one for high and one for low noise levels.
"""

import re
from pathlib import Path

from sf_jax import strict_json

_FOLDERS = ("high_noise_model", "low_noise_model", "transformer_2")
_FILES = re.compile(r"(high|low)[-_. ]?noise|wan[-_. ]?2[-_.]2.*a14b|a14b[-_. ](high|low)", re.IGNORECASE)
# Diffusers pipelines whose transformer is for another task.
_PIPELINES = re.compile(r"ImageToVideo|VACE|Animate|SpeechToVideo")
_ONLY = "Wan2.1's text-to-video models and what was distilled from them are supported"


def refuse_other_transformers(path: Path) -> None:
    """Raises if its name or the files around it mark a transformer as an expert or as one for another task.

    Args:
      path: its file, the index of its shards or their folder.

    Raises:
      ValueError: naming the evidence.
    """
    path = path.absolute()
    folder = path if path.is_dir() else path.parent
    model = folder.parent
    if _FILES.search(path.name) or folder.name in _FOLDERS:
        name = path.name if _FILES.search(path.name) else folder.name
        raise ValueError(f"{path} is one of the two experts of Wan2.2-A14B (by the name {name}): {_ONLY}")
    if path != folder and not path.name.startswith("diffusion_pytorch_model"):
        return
    if folder.name == "transformer":
        other = next((name for name in _FOLDERS if (model / name).is_dir()), None)
        index = _table(model / "model_index.json")
        if other is not None or index.get("transformer_2") not in (None, [None, None]) or index.get("boundary_ratio"):
            there = other or "model_index.json"
            raise ValueError(f"{path} is one of the two experts of Wan2.2-A14B ({there} is beside it): {_ONLY}")
        if _PIPELINES.search(str(index.get("_class_name"))):
            raise ValueError(f"{path} is of a {index['_class_name']} (model_index.json): {_ONLY}")
    task = _table(folder / "config.json").get("model_type", "t2v")
    if task in ("i2v", "ti2v", "flf2v", "vace", "s2v", "animate"):
        raise ValueError(f"{path} has the model_type {task!r} (config.json beside it): {_ONLY}")


def _table(path: Path) -> dict:
    """A JSON object; empty if it cannot be read, which later readers report."""
    try:
        stored = strict_json.read(path, None, finite=False)
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
