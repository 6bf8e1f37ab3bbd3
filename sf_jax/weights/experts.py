"""Tells the experts of Wan2.2 and the transformers of other tasks, which have the shapes of Wan2.1's text-to-video.

Only names and the files beside them tell: https://huggingface.co/Wan-AI/Wan2.2-T2V-A14B has two transformers of
Wan2.1-T2V-14B's shapes, each of which denoises one half of the way alone.
"""

import re
from pathlib import Path

from sf_jax import strict_json

_FOLDERS = ("high_noise_model", "low_noise_model", "transformer_2")
_FILES = re.compile(r"(high|low)[-_. ]?noise|wan[-_. ]?2[-_.]2.*a14b|a14b[-_. ](high|low)", re.IGNORECASE)
# Pipelines of diffusers whose transformer does another task.
_PIPELINES = re.compile(r"ImageToVideo|VACE|Animate|SpeechToVideo")
_ONLY = "Wan2.1's text-to-video models and what was distilled from them are supported"


def refuse_other_transformers(path: Path) -> None:
    """Refuses a transformer that its name or the files around it call an expert, or one of another task.

    Args:
      path: its file, the index of its shards or their folder.

    Raises:
      ValueError: with what tells so.
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
    """A JSON object; empty where there is none, which whoever needs it says."""
    try:
        stored = strict_json.read(path, None, finite=False)
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
