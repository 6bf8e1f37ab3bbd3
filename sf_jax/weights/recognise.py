"""Tells what a weight file is from the names and shapes of its tensors, for conversion and for messages."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from sf_jax.models import tiny_vae as tiny_vae_model
from sf_jax.models import umt5 as umt5_model
from sf_jax.models import vae as vae_model
from sf_jax.models import wan
from sf_jax.weights import transformer, umt5, vae
from sf_jax.weights.mapping import Entry

# kind -> the namings its files come in.
NAMINGS = {
    "transformer": ("official", "diffusers"),
    "vae": ("official", "diffusers"),
    "tiny_vae": ("official",),
    "umt5": ("official", "transformers"),
}
# A part of a name -> what the file is, of which nothing can be loaded.
_UNSUPPORTED = (
    (
        r"\blora_|[._]lora[._]|\.(diff|diff_b|diff_m)$",
        "adapter (LoRA: changes to a network, not its weights): give it as lora, beside the network that it changes",
    ),
    (
        r"k_img|img_emb\.|image_embedder|add_k_proj",
        "image-to-video transformer (k_img, img_emb), which is not supported",
    ),
    (r"vace_", "VACE transformer, which is not supported"),
    (r"scaled_fp8|\.scale_weight$", "transformer in scaled float8, which is not supported"),
    (r"_cls_pred_branch|_gan_ca_blocks|_register_tokens", "critic with the heads of a GAN, which is not supported"),
    (r"^visual\.|vision_model\.", "image encoder (CLIP), which is not needed"),
    (r"^decoder\.block\.\d+\.layer", "whole UMT5, of which only the encoder is needed"),
)
_HEAD_DIM = 128


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a weight file seems to be.

    Attributes:
      kind: "transformer", "vae", "tiny_vae", "umt5", "package" (written by sf_jax) or "unknown".
      title: the same for people, such as "transformer of Wan2.1-T2V-1.3B".
      naming: "official", "diffusers" or "transformers"; None where it is unknown.
      config: the sizes; None where they are unknown.
    """

    kind: str
    title: str
    naming: str | None = None
    config: wan.WanConfig | vae_model.VaeConfig | umt5_model.Umt5Config | tiny_vae_model.TinyVaeConfig | None = None

    @property
    def description(self) -> str:
        """The title with the naming, for the middle of a sentence."""
        return self.title if self.naming is None else f"{self.title}, {self.naming} names"


def recognise(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> Guess:
    """Tells what a file is.

    The number of heads of a transformer does not show in its shapes: it is taken to be dim / 128, which is so for every
    size of Wan, and 1 where that is not whole.

    Args:
      shapes: name -> shape; wrappers in the names are allowed.
      metadata: the strings of a safetensors header.
    """
    if "sf_jax" in (metadata or {}):
        return Guess("package", "package of sf_jax", "official")
    shapes = {transformer.strip_wrappers(name): tuple(shape) for name, shape in shapes.items()}
    for pattern, title in _UNSUPPORTED:
        if any(re.search(pattern, name) for name in shapes):
            return Guess("unknown", title)
    try:
        found = _transformer(shapes) or _umt5(shapes) or _vae(shapes) or _tiny_vae(shapes)
    except (ValueError, KeyError, IndexError) as error:
        return Guess("unknown", f"network of another kind ({error})")
    if found is not None:
        return found
    if any(re.match(r"blocks\.\d+\.(self_attn|attn1)\.", name) for name in shapes):
        return Guess("unknown", "part of a transformer: give the folder or the index of all its shards")
    few = ", ".join(sorted(shapes)[:3])
    return Guess("unknown", f"file of another kind ({len(shapes)} tensors{': ' if few else ''}{few})")


def entries_of(kind: str, config, naming: str) -> Sequence[Entry]:
    """The name map of a network.

    Raises:
      ValueError: if networks of this kind have no such naming.
    """
    if naming not in NAMINGS[kind]:
        raise ValueError(f"names are {naming!r}: a {kind} has {', '.join(NAMINGS[kind])}")
    if kind == "tiny_vae":
        return vae.tiny_entries(config)
    return {"transformer": transformer, "vae": vae, "umt5": umt5}[kind].entries(config, naming)


def param_shapes_of(kind: str, config) -> dict:
    """Shapes and types of the parameters of a network."""
    models = {"transformer": wan, "vae": vae_model, "tiny_vae": tiny_vae_model, "umt5": umt5_model}
    return models[kind].param_shapes(config)


def _transformer(shapes) -> Guess | None:
    if "blocks.0.self_attn.q.weight" in shapes:
        naming, text, time, ffn, head = "official", "text_embedding.0", "time_embedding.0", "ffn.0", "head.head"
    elif "blocks.0.attn1.to_q.weight" in shapes:
        text, time = (f"condition_embedder.{part}_embedder.linear_1" for part in ("text", "time"))
        naming, ffn, head = "diffusers", "ffn.net.0.proj", "proj_out"
    else:
        return None
    needed = [f"{layer}.weight" for layer in ("patch_embedding", text, time, f"blocks.0.{ffn}", head)]
    if not all(name in shapes for name in needed):
        return None
    embedding, *matrices = (shapes[name] for name in needed)
    if len(embedding) != 5 or any(len(shape) != 2 for shape in matrices):
        raise ValueError("a transformer with misshaped tensors")
    dim, channels, patch = embedding[0], embedding[1], embedding[2:]
    outputs = matrices[3][0]
    if outputs != channels * patch[0] * patch[1] * patch[2]:
        return Guess("unknown", f"transformer with {channels} channels in and other outputs, which is not supported")
    layers = {found[1] for found in (re.match(r"blocks\.(\d+)\.", name) for name in shapes) if found}
    sizes = {
        "dim": dim,
        "ffn_dim": matrices[2][0],
        "num_heads": dim // _HEAD_DIM if dim % _HEAD_DIM == 0 else 1,
        "num_layers": len(layers),
        "text_dim": matrices[0][1],
        "freq_dim": matrices[1][1],
        "channels": channels,
        "patch": patch,
    }
    config = wan.wan_1_3b(**sizes)
    names = {wan.wan_1_3b(): "Wan2.1-T2V-1.3B", wan.wan_14b(): "Wan2.1-T2V-14B"}
    other = f"dim {dim}, ffn_dim {config.ffn_dim}, {len(layers)} layers (no size of Wan2.1)"
    return Guess("transformer", f"transformer of {names.get(config, other)}", naming, config)


def _umt5(shapes) -> Guess | None:
    if "blocks.0.attn.q.weight" in shapes:
        naming = "official"
    elif "encoder.block.0.layer.0.SelfAttention.q.weight" in shapes:
        naming = "transformers"
    else:
        return None
    config = umt5.umt5_config_of(shapes)
    sizes = f"dim {config.dim}, {config.num_layers} layers (no size of Wan2.1)"
    same = dataclasses.replace(config, dtype=umt5_model.umt5_xxl().dtype) == umt5_model.umt5_xxl()
    return Guess("umt5", f"text encoder {'UMT5-XXL' if same else f'UMT5 of {sizes}'}", naming, config)


def _vae(shapes) -> Guess | None:
    naming = {"decoder.conv1.weight": "official", "decoder.conv_in.weight": "diffusers"}
    found = next((naming[name] for name in naming if len(shapes.get(name, ())) == 5), None)
    if found is None:
        return None
    config = vae.vae_config_of(shapes)
    sizes = "Wan2.1" if config == vae_model.wan_vae() else f"dim {config.dim} (no size of Wan2.1)"
    return Guess("vae", f"VAE of {sizes}", found, config)


def _tiny_vae(shapes) -> Guess | None:
    if len(shapes.get("decoder.1.weight", ())) != 4:
        return None
    return Guess("tiny_vae", "tiny VAE (TAEHV)", "official", vae.tiny_vae_config_of(shapes))
