"""Locates the parts of a model by file names alone, so that local folders and hub repositories work alike."""

import re
from collections.abc import Collection

# File names by priority: the first that exists is used. Official names come before diffusers' stems.
_FILES = {
    "transformer": (),
    "vae": ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"),
    "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors"),
    "tiny_vae": ("taew2_1.safetensors", "taew2_1.pth"),
}
# Names without suffix: one .safetensors or .bin file or shards, of any variant.
_STEMS = {
    "transformer": ("diffusion_pytorch_model", "transformer/diffusion_pytorch_model"),
    "vae": ("vae/diffusion_pytorch_model",),
    "text_encoder": ("text_encoder/model", "text_encoder/pytorch_model"),
    "tiny_vae": (),
}
TOKENIZERS = ("google/umt5-xxl", "tokenizer")
PARTS = (*_FILES, "tokenizer")
# Small files that describe a model.
DESCRIPTIONS = (
    "model_index.json",
    "config.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
# peft's and diffusers' file names in an adapter's folder; the first that exists is used.
ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
STEM_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
# Variants that differ only in their number type, the best first.
_PRECISIONS = ("bf16", "fp32", "fp16")


def places(part: str) -> tuple[str, ...]:
    """The names tried for a part, for messages."""
    if part == "tokenizer":
        return TOKENIZERS
    return (*_FILES[part], *(f"{stem}.safetensors" for stem in _STEMS[part]))


def find_part(names: Collection[str], part: str) -> str | None:
    """The file, index or (for the tokenizer) folder of a part of a model.

    Args:
      names: Paths of the model's files, relative to its folder.
      part: One of `PARTS`.

    Raises:
      ValueError: If there are several variants and no plain file.
    """
    if part == "tokenizer":
        return next((folder for folder in TOKENIZERS if any(name.startswith(f"{folder}/") for name in names)), None)
    file = next((name for name in _FILES[part] if name in names), None)
    return file or next((file for stem in _STEMS[part] if (file := find_stem(names, stem))), None)


def find_stem(names: Collection[str], stem: str) -> str | None:
    """The file of a network, or the index of its shards.

    Plain files come before variants (`model.bf16.safetensors`), safetensors before PyTorch's .bin, and shards before a
    single file. Among variants that are precisions, bfloat16 comes first, then float32, then float16.

    Args:
      names: Paths of files.
      stem: Path without suffix, such as "vae/diffusion_pytorch_model".

    Raises:
      ValueError: If there are several variants that are not precisions.
    """
    for suffix in ("safetensors", "bin"):
        for name in (f"{stem}.{suffix}.index.json", f"{stem}.{suffix}"):
            if name in names:
                return name
    for suffix in ("safetensors", "bin"):
        variants: dict[str, str] = {}
        for pattern in (rf"{re.escape(stem)}\.{suffix}\.index\.(\w+)\.json", rf"{re.escape(stem)}\.(\w+)\.{suffix}"):
            for name in sorted(names):
                match = re.fullmatch(pattern, name)
                if match:
                    variants.setdefault(match[1], name)
        if len(variants) == 1 or (variants and set(variants) <= set(_PRECISIONS)):
            return next((variants[kind] for kind in _PRECISIONS if kind in variants), min(variants.values()))
        if variants:
            raise ValueError(
                f"has several variants and none without a name: give one of {', '.join(variants.values())}"
            )
    return None


def files_of(names: Collection[str], file: str) -> list[str]:
    """A network's file and the files that belong to it: an index's shards, or the files in a tokenizer's folder."""
    if file in TOKENIZERS:
        return [name for name in names if name.startswith(f"{file}/") and name.endswith((".json", ".model"))]
    match = re.fullmatch(r"(.+)\.(safetensors|bin)\.index(\.\w+)?\.json", file)
    if match is None:
        return [file]
    stem, suffix, variant = re.escape(match[1]), match[2], re.escape(match[3] or "")
    shard = rf"{stem}(?:{variant}-\d+-of-\d+|-\d+-of-\d+{variant})\.{suffix}"
    return [file, *(name for name in names if re.fullmatch(shard, name))]


def model_files(names: Collection[str], parts: Collection[str]) -> list[str]:
    """All files of the given parts of a model, and the small ones that describe it.

    Args:
      names: Paths of the model's files, relative to its folder.
      parts: Some of `PARTS`; missing ones are skipped.

    Raises:
      ValueError: See `find_part`.
    """
    files = [name for name in DESCRIPTIONS if name in names]
    for part in parts:
        file = find_part(names, part)
        files += [] if file is None else files_of(names, file)
    return list(dict.fromkeys(files))
