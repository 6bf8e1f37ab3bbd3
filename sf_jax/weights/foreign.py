"""Recognizes unsupported weight files of other tools, and names the command that converts them."""

import re
from pathlib import Path

_ORBAX = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint_manifest")
_DEEPSPEED = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+.*\.pt|mp_rank_\d+.*_model_states\.pt")


def title_of_start(start: bytes) -> str | None:
    """Describes a file of an unsupported format from its first bytes; None for all others."""
    if start.startswith(b"GGUF"):
        return (
            "it is a GGUF file (quantized for llama.cpp and ComfyUI-GGUF): give the safetensors it was made from, or "
            "write them with diffusers: WanTransformer3DModel.from_single_file(FILE, "
            "quantization_config=GGUFQuantizationConfig(compute_dtype=torch.bfloat16)).dequantize()"
            ".save_pretrained(FOLDER) (https://huggingface.co/docs/diffusers/quantization/gguf)"
        )
    if start.startswith(b"\x89HDF\r\n"):
        return "it is an HDF5 file, as Keras writes: save it as safetensors"
    return None


def refuse_foreign(path: Path) -> None:
    """Raises for a distributed checkpoint, or a file of one.

    Args:
      path: A file or a folder.

    Raises:
      ValueError: With its format and the command that converts it.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_file():
        if path.suffix == ".distcp":
            raise ValueError(_distributed(path, folder))
        if _DEEPSPEED.fullmatch(path.name):
            raise ValueError(_deepspeed(path, folder))
        return
    inside = sorted(path.iterdir())
    distributed = next((child for child in [path, *inside] if child.is_dir() and any(child.glob("*.distcp"))), None)
    if distributed is not None:
        raise ValueError(_distributed(path, distributed))
    for child in [path, *inside]:
        if child.is_dir() and any(_DEEPSPEED.fullmatch(file.name) for file in child.iterdir()):
            raise ValueError(_deepspeed(path, path if child != path else path.parent))
    if any((path / name).exists() for name in _ORBAX) or any(path.glob("*/.zarray")) or any(path.glob("*/_METADATA")):
        raise ValueError(
            f"{path} is a checkpoint of Orbax (TensorStore): of a run of sf_jax.train give its weights with python -m "
            "sf_jax.convert --from=WORKDIR; others restore with Orbax and save as safetensors"
        )


def refuse_gguf(folder: Path) -> None:
    """Raises if a folder without supported weights contains a GGUF file.

    Raises:
      ValueError: With the file's name and what to do.
    """
    file = next((path for path in sorted(folder.iterdir()) if path.suffix.lower() == ".gguf"), None)
    if file is not None:
        raise ValueError(f"{file} is no weight file: {title_of_start(b'GGUF')}")


def _distributed(path: Path, folder: Path) -> str:
    return (
        f"{path} is a distributed checkpoint of PyTorch (.distcp, as FSDP writes): convert it with python -m "
        f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} OUTPUT.pt"
    )


def _deepspeed(path: Path, folder: Path) -> str:
    return (
        f"{path} is a checkpoint of DeepSpeed, in one file for each process: convert it with the script in its folder, "
        f"python zero_to_fp32.py {folder if path.is_dir() else folder.parent} OUTPUT"
    )
