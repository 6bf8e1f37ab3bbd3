"""Where the parts of a model are: names alone, so that folders and repositories of the hub are looked through alike."""

import re
from collections.abc import Collection

# What is looked for, the first that is there is taken; the official folder's names stand before those of diffusers.
_FILES = {
    "transformer": (),
    "vae": ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors"),
    "text_encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "models_t5_umt5-xxl-enc-bf16.safetensors"),
    "tiny_vae": ("taew2_1.safetensors", "taew2_1.pth"),
}
# Without suffix: .safetensors or .bin, in one file or in shards, of any variant.
_STEMS = {
    "transformer": ("diffusion_pytorch_model", "transformer/diffusion_pytorch_model"),
    "vae": ("vae/diffusion_pytorch_model",),
    "text_encoder": ("text_encoder/model", "text_encoder/pytorch_model"),
    "tiny_vae": (),
}
TOKENIZERS = ("google/umt5-xxl", "tokenizer")
PARTS = (*_FILES, "tokenizer")
# Small files that say what a model is.
DESCRIPTIONS = (
    "model_index.json",
    "config.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
)
# Files of an adapter's folder, as peft and diffusers name them; the first that is there is taken.
ADAPTER_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
STEM_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
# Variants that are the same numbers in another type, the best first.
_PRECISIONS = ("bf16", "fp32", "fp16")


def places(part: str) -> tuple[str, ...]:
    """What is looked for, for messages."""
    if part == "tokenizer":
        return TOKENIZERS
    return (*_FILES[part], *(f"{stem}.safetensors" for stem in _STEMS[part]))


def find_part(names: Collection[str], part: str) -> str | None:
    """The file, index or (of the tokenizer) folder of a part of a model.

    Args:
      names: Paths of the model's files, relative to its folder.
      part: One of `PARTS`.

    Raises:
      ValueError: If there are several variants, of which none is plain.
    """
    if part == "tokenizer":
        return next((folder for folder in TOKENIZERS if any(name.startswith(f"{folder}/") for name in names)), None)
    file = next((name for name in _FILES[part] if name in names), None)
    return file or next((file for stem in _STEMS[part] if (file := find_stem(names, stem))), None)


def find_stem(names: Collection[str], stem: str) -> str | None:
    """The file, or the index of shards, of a network.

    Plain files come before variants (`model.bf16.safetensors`), safetensors before PyTorch's .bin, shards before one
    file. Of several variants that are precisions, bfloat16 is taken, else float32, else float16.

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
    """A network's file with all that belongs to it: the shards of an index, the files of a tokenizer's folder."""
    if file in TOKENIZERS:
        return [name for name in names if name.startswith(f"{file}/") and name.endswith((".json", ".model"))]
    match = re.fullmatch(r"(.+)\.(safetensors|bin)\.index(\.\w+)?\.json", file)
    if match is None:
        return [file]
    stem, suffix, variant = re.escape(match[1]), match[2], re.escape(match[3] or "")
    shard = rf"{stem}(?:{variant}-\d+-of-\d+|-\d+-of-\d+{variant})\.{suffix}"
    return [file, *(name for name in names if re.fullmatch(shard, name))]


def model_files(names: Collection[str], parts: Collection[str]) -> list[str]:
    """All files that the parts of a model need, and the small ones that say what it is.

    Args:
      names: Paths of the model's files, relative to its folder.
      parts: Of `PARTS`; those that are not there are left out.

    Raises:
      ValueError: See `find_part`.
    """
    files = [name for name in DESCRIPTIONS if name in names]
    for part in parts:
        file = find_part(names, part)
        files += [] if file is None else files_of(names, file)
    return list(dict.fromkeys(files))
