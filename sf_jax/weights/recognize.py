"""Recognizes a weight file by the names and shapes of its tensors, for conversion and for messages."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

from sf_jax.models import tiny_vae as tiny_vae_model
from sf_jax.models import umt5 as umt5_model
from sf_jax.models import vae as vae_model
from sf_jax.models import wan
from sf_jax.weights import transformer, umt5, vae
from sf_jax.weights.mapping import Entry
from sf_jax.weights.names import NETWORK_PARTS, bare_names, networks_of

# kind -> the namings of its files.
NAMINGS = {
    "transformer": ("official", "diffusers", "rcm"),
    "vae": ("official", "diffusers"),
    "tiny_vae": ("official",),
    "umt5": ("official", "transformers"),
}
# Tensors that Wan2.1's text-to-video network lacks -> the network that has them; the first match counts.
_OTHER_NETWORKS = (
    (r"to_gate_compress", "FastWan transformer with sparse attention"),
    (r"attn_op\.local_attn|\bproj_l\.", "TurboDiffusion transformer with sparse-linear attention"),
    (r"vace_", "VACE transformer"),
    (r"casual_audio_encoder|causal_audio_encoder|audio_injector", "speech-to-video transformer (Wan2.2-S2V)"),
    (r"face_adapter|pose_patch_embedding|motion_encoder|face_encoder", "character animation transformer (Wan-Animate)"),
    (
        r"audio_cross_attn|audio_proj|audio_model\.|audio_modulation",
        "transformer driven by sound (HuMo, MultiTalk, Ovi)",
    ),
    (r"control_adapter|cam_encoder|camera_|cam_injector", "transformer with camera control"),
    (r"ref_conv|ref_adapter|ref_patch|ref_embedder", "transformer with reference images (Fun-Control, Lynx)"),
    (r"dwpose_embedding|randomref_embedding|pose_encoder|pose_guider", "transformer with pose control (UniAnimate)"),
    (r"action_model|action_preprocess|mouse_|keyboard_", "world model with actions (Matrix-Game)"),
    (r"fps_embedding|fps_projection", "SkyReels-V2 transformer"),
    (r"LQ_proj_in|lq_proj", "upscaling transformer (FlashVSR)"),
    (
        r"k_img|img_emb\.|image_embedder|add_k_proj",
        "image-to-video transformer (k_img, img_emb: Wan2.1-I2V, MAGREF, Phantom-I2V, SkyReels-A2)",
    ),
    (r"_cls_pred_branch|_gan_ca_blocks|_register_tokens", "critic with the heads of a GAN"),
)
# Part of a name -> the unsupported kind of file.
_UNSUPPORTED = (
    (
        r"\blora_|[._]lora[._]|\.(diff|diff_b|diff_m)$",
        "adapter (LoRA: changes to a network, not its weights): give it as lora, beside the network that it changes",
    ),
    *((pattern, f"{title}, another network, which is not supported") for pattern, title in _OTHER_NETWORKS),
    (r"^visual\.|vision_model\.", "image encoder (CLIP), which is not needed"),
    (r"^decoder\.block\.\d+\.layer", "whole UMT5, of which only the encoder is needed"),
)
_OTHER_CHANNELS = {48: "Wan2.2-TI2V-5B", 36: "an image-to-video model", 32: "a model with reference or control videos"}
HEAD_DIM = 128  # for every size of Wan
_PATCH = (1, 2, 2)


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a weight file seems to be.

    Attributes:
      kind: "transformer", "vae", "tiny_vae", "umt5", "package" (written by sf_jax) or "unknown".
      title: human-readable description, such as "transformer of Wan2.1-T2V-1.3B".
      naming: "official", "diffusers", "rcm" or "transformers"; None if unknown.
      config: the sizes; None if unknown.
      is_other: whether its tensor names show that it is something unsupported.
    """

    kind: str
    title: str
    naming: str | None = None
    config: wan.WanConfig | vae_model.VaeConfig | umt5_model.Umt5Config | tiny_vae_model.TinyVaeConfig | None = None
    is_other: bool = False

    @property
    def description(self) -> str:
        """The title and naming, for use inside a sentence."""
        return self.title if self.naming is None else f"{self.title}, {self.naming} names"


def recognize(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> Guess:
    """Recognizes a file.

    A transformer's shapes do not determine its number of heads. It is assumed to be dim / 128, as in every size of Wan,
    or 1 if that is not an integer.

    Args:
      shapes: name -> shape; wrappers in the names are allowed.
      metadata: the strings of a safetensors header.
    """
    if "sf_jax" in (metadata or {}):
        return Guess("package", "package of sf_jax", transformer.naming_of(shapes))
    networks = networks_of(shapes)
    if networks:
        parts = [part for part, kind in NETWORK_PARTS.items() if kind in networks]
        return Guess(
            "unknown", f"file of several networks (all-in-one: {', '.join(parts)}): say which with part", is_other=True
        )
    for pattern, title in _UNSUPPORTED:
        name = next((name for name in shapes if re.search(pattern, name)), None)
        if name is not None:
            return Guess("unknown", f"{title} ({name})", is_other=True)
    shapes = {bare: tuple(shapes[name]) for name, bare in bare_names(shapes).items()}
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


@functools.lru_cache(maxsize=16)  # tracing a network takes seconds
def param_shapes_of(kind: str, config) -> dict:
    """Shapes and types of a network's parameters; do not modify the result, as it is cached."""
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
    if len(embedding) == 2 and naming == "official" and embedding[1] % math.prod(_PATCH) == 0:
        naming, embedding = "rcm", (embedding[0], embedding[1] // math.prod(_PATCH), *_PATCH)
    if len(embedding) != 5 or any(len(shape) != 2 for shape in matrices):
        raise ValueError("a transformer with misshaped tensors")
    dim, channels, patch = embedding[0], embedding[1], embedding[2:]
    outputs = matrices[3][0]
    if outputs != channels * math.prod(patch):
        other = f" ({_OTHER_CHANNELS[channels]})" if channels in _OTHER_CHANNELS else ""
        title = f"transformer with {channels} channels in and other outputs{other}, which is not supported"
        return Guess("unknown", title)
    layers = {found[1] for found in (re.match(r"blocks\.(\d+)\.", name) for name in shapes) if found}
    sizes = {
        "dim": dim,
        "ffn_dim": matrices[2][0],
        "num_heads": dim // HEAD_DIM if dim % HEAD_DIM == 0 else 1,
        "num_layers": len(layers),
        "text_dim": matrices[0][1],
        "freq_dim": matrices[1][1],
        "channels": channels,
        "patch": patch,
    }
    config = wan.wan_1_3b(**sizes)
    names = {wan.wan_1_3b(): "Wan2.1-T2V-1.3B", wan.wan_14b(): "Wan2.1-T2V-14B"}
    if channels == 48:
        return Guess("unknown", "transformer of Wan2.2-TI2V-5B (48 channels), whose VAE is not supported")
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
