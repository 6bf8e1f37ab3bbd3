"""Maps tensor names of adapter files to Wan's transformer, and recognizes adapters that cannot be applied.

Adapter files put many prefixes (`transformer.`, `diffusion_model.`, `base_model.model.`, `lora_unet_`) in front of the
official or diffusers' layer names. The names have dots, or underscores after kohya's prefixes.
"""

import dataclasses
import functools
import re

from sf_jax.models.wan import wan_1_3b
from sf_jax.weights import transformer
from sf_jax.weights.names import WRAPPERS

# Part of a name -> the kind of adapter; the first match counts.
_OTHER_KINDS = (
    (r"dora_scale|lora_magnitude_vector", "DoRA (weights that are normalized anew)"),
    (r"hada_", "LoHa (an elementwise product)"),
    (r"lokr_", "LoKr (Kronecker products)"),
    (r"\boft_|[._]oft_|boft_", "OFT (rotations of the weights)"),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$|glora", "GLoRA (changes that depend on the weights)"),
    (r"lora_mid", "LoCon with a Tucker core"),
    (r"\.set_weight$", "a set of whole weights"),
)
_OTHER_NETWORKS = (
    (r"^lora_te|text_encoder|text_model|clip_[lg]\b|umt5|t5xxl", "an adapter of a text encoder"),
    (
        r"[._][kv]_img\b|[._][kv]_img_|add_[kv]_proj|img_emb|image_embedder|norm_k_img|norm_added_k",
        "an adapter of an image-to-video network",
    ),
    (r"vace", "an adapter of a VACE network"),
    (r"^transformer_2\.", "an adapter of two experts (Wan2.2-A14B)"),
)
_WRAPPERS = re.compile("|".join(map(re.escape, WRAPPERS)))
_PREFIXES = re.compile(
    r"^(?:(?:base_model|module|model|generator|pipe|dit|unet|net|transformer|diffusion_model)\.)+(?=.)"
)
_KOHYA = re.compile(r"^(?:lora_unet|lora_transformer|lora_dit|lycoris)_+")
_MATRIX = re.compile(
    r"(?P<layer>.+?)[._](?:lora|lora_linear_layer)[._](?P<side>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.(?P<part>weight|bias)$"
)
_OTHER = re.compile(r"(?P<layer>.+)\.(?P<kind>alpha|lora_alpha|diff|diff_b|diff_m|w_norm|b_norm)$")
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up"}
# Ending of a name -> the role, and the possible endings of the official tensor's name.
_KINDS = {
    "alpha": ("alpha", (".weight",)),
    "lora_alpha": ("alpha", (".weight",)),
    "diff": ("difference", (".weight", "")),
    "w_norm": ("difference", (".weight",)),
    "diff_b": ("difference", (".bias",)),
    "b_norm": ("difference", (".bias",)),
    "diff_m": ("difference", (".modulation", ".scale_shift_table")),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """The role of a tensor in an adapter file.

    Attributes:
      tensor: official name of the network's tensor that it changes.
      role: "down", "up" or "alpha" (of a pair of matrices), "bias" (added along with a pair) or "difference" (added).
      layer: the file's name for the layer without prefixes, which the patterns of peft's configs match.
      adapter: peft's name of the adapter, if the tensor's name contains it.
    """

    tensor: str
    role: str
    layer: str
    adapter: str | None = None


def place_of(name: str) -> Place | None:
    """The place of an adapter file's tensor; None if Wan's text-to-video transformer has no such layer."""
    name = _WRAPPERS.sub("", name)
    match = _MATRIX.match(name)
    if match is not None:
        side, is_bias = _SIDES[match["side"]], match["part"] == "bias"
        if is_bias and side == "down":
            return None
        role, endings = ("bias", (".bias",)) if is_bias else (side, (".weight",))
        return _place(match["layer"], role, endings, match["adapter"])
    match = _OTHER.match(name)
    return None if match is None else _place(match["layer"], *_KINDS[match["kind"]])


def is_adapter_name(name: str) -> bool:
    """Whether only adapter files have tensors of this name."""
    return bool(
        _MATRIX.match(name) or _OTHER.match(name) or any(re.search(pattern, name) for pattern, _ in _OTHER_KINDS)
    )


def unsupported(name: str) -> str | None:
    """The kind of adapter that has this tensor name if it cannot be applied; else None."""
    return next((title for pattern, title in (*_OTHER_KINDS, *_OTHER_NETWORKS) if re.search(pattern, name)), None)


def layer_names(tensor: str) -> tuple[str, str]:
    """The official and diffusers' name of the layer with the official tensor `LAYER.weight`."""
    pattern, number = _pattern(tensor.removesuffix(".weight"))
    return tuple(name.replace("#", number) for name in (pattern, _diffusers_layers()[pattern]))


def _place(layer: str, role: str, endings: tuple[str, ...], adapter: str | None = None) -> Place | None:
    kohya = _KOHYA.match(layer)
    if kohya is not None:
        dotted, number = _pattern(layer[kohya.end() :])
        layer = _underscored_layers().get(dotted, dotted).replace("#", number)
    else:
        layer = _PREFIXES.sub("", layer)
    pattern, number = _pattern(layer)
    tensors = _official_tensors()
    for ending in endings:
        official = tensors.get(pattern + ending)
        if official is not None:
            return Place(official.replace("#", number), role, layer, adapter)
    return None


def _pattern(layer: str) -> tuple[str, str]:
    """A layer's name with "#" in place of the block number, and that number."""
    match = re.match(r"blocks([._])(\d+)(?=[._]|$)", layer)
    if match is None:
        return layer, ""
    return f"blocks{match[1]}#{layer[match.end() :]}", str(int(match[2]))


@functools.cache
def _official_tensors() -> dict[str, str]:
    """Official and diffusers' tensor names with "#" in place of the block number -> the official name."""
    config = wan_1_3b(num_layers=1)
    official = {(entry.path, entry.layer): entry.name for entry in transformer.entries(config)}
    names = {}
    for naming in ("official", "diffusers"):
        for entry in transformer.entries(config, naming):
            names[_pattern(entry.name)[0]] = _pattern(official[entry.path, entry.layer])[0]
    return names


@functools.cache
def _diffusers_layers() -> dict[str, str]:
    """Official layer name -> diffusers' layer name."""
    layers = {}
    for name, official in _official_tensors().items():
        if name.endswith(".weight") and official.endswith(".weight"):
            layers[official.removesuffix(".weight")] = name.removesuffix(".weight")
    return layers


@functools.cache
def _underscored_layers() -> dict[str, str]:
    """Layer names with underscores in place of dots -> layer names."""
    layers = {name.removesuffix(".weight") for name in _official_tensors() if name.endswith(".weight")}
    return {layer.replace(".", "_"): layer for layer in layers}
