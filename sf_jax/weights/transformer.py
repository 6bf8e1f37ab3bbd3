"""Name maps of the transformer: official Wan2.1 / Self Forcing names and diffusers' names."""

from collections.abc import Iterable, Mapping

import numpy as np

from sf_jax.models.wan import WanConfig
from sf_jax.weights import mapping
from sf_jax.weights.mapping import LINEAR, SAME, Entry, Layout
from sf_jax.weights.names import bare_names

# (ours, official, diffusers) for layers with weight and bias, outside the blocks and in each block.
_TOP = (
    ("patch_embedding", "patch_embedding", "patch_embedding"),
    ("text_in", "text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_out", "text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_in", "time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_out", "time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection", "time_projection.1", "condition_embedder.time_proj"),
    ("head", "head.head", "proj_out"),
)
_ATTENTIONS = (("self_attn", "attn1"), ("cross_attn", "attn2"))
_BLOCK = (
    *(
        (f"{ours}.{part}", f"{ours}.{part}", f"{theirs}.{'to_out.0' if part == 'o' else f'to_{part}'}")
        for ours, theirs in _ATTENTIONS
        for part in ("q", "k", "v", "o")
    ),
    ("ffn_in", "ffn.0", "ffn.net.0.proj"),
    ("ffn_out", "ffn.2", "ffn.net.2"),
)
# The same for single tensors.
_BLOCK_SINGLE = (
    *(
        (f"{ours}.norm_{part}.scale", f"{ours}.norm_{part}.weight", f"{theirs}.norm_{part}.weight")
        for ours, theirs in _ATTENTIONS
        for part in ("q", "k")
    ),
    ("norm3.scale", "norm3.weight", "norm2.weight"),
    ("norm3.bias", "norm3.bias", "norm2.bias"),
    ("modulation", "modulation", "scale_shift_table"),
)


def naming_of(names: Iterable[str]) -> str:
    """The naming of a transformer's tensors, "official" or "diffusers"; wrappers in the names are allowed."""
    return "diffusers" if any("condition_embedder." in name for name in names) else "official"


def _patch_embedding(config: WanConfig) -> Layout:
    """Theirs is a convolution [dim, C, 1, ph, pw], ours a kernel [ph*pw*C, dim] over patches."""
    inner = (*config.patch, config.channels, config.dim)
    return Layout(
        lambda x: np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, x.shape[0]),
        lambda x: np.moveaxis(x.reshape(inner), (-1, -2), (0, 1)),
    )


def _linear_patch_embedding(config: WanConfig) -> Layout:
    """Theirs is NVlabs/rcm's linear layer [dim, C*1*ph*pw], with inputs in the order of the convolution's weights."""
    convolution, window = _patch_embedding(config), (config.channels, *config.patch)
    return Layout(
        lambda x: convolution.ours(x.reshape(x.shape[0], *window)),
        lambda x: convolution.theirs(x).reshape(config.dim, -1),
    )


def entries(config: WanConfig, naming: str = "official") -> list[Entry]:
    """The map of a transformer; `naming` is "official", "diffusers", or "rcm": official with a linear patch embedding.

    Source of "rcm": NVlabs/rcm, rcm/networks/wan2pt1.py.
    """
    column = {"official": 1, "diffusers": 2, "rcm": 1}[naming]
    embedding = _linear_patch_embedding(config) if naming == "rcm" else _patch_embedding(config)
    found = []
    for row in _TOP:
        layout = embedding if row[0] == "patch_embedding" else LINEAR
        found.append(Entry(f"{row[column]}.weight", (row[0], "kernel"), None, layout))
        found.append(Entry(f"{row[column]}.bias", (row[0], "bias")))
    found.append(Entry(("head.modulation", "scale_shift_table")[column - 1], ("head_modulation",)))
    for layer in range(config.num_layers):
        for row in _BLOCK:
            path = ("blocks", *row[0].split("."))
            found.append(Entry(f"blocks.{layer}.{row[column]}.weight", (*path, "kernel"), layer, LINEAR))
            found.append(Entry(f"blocks.{layer}.{row[column]}.bias", (*path, "bias"), layer, SAME))
        for row in _BLOCK_SINGLE:
            found.append(Entry(f"blocks.{layer}.{row[column]}", ("blocks", *row[0].split(".")), layer))
    return found


def from_official(tensors: Mapping[str, np.ndarray], config: WanConfig, params: dict) -> dict:
    """Our parameter tree, float32 numpy, from official tensors; wrapper prefixes are allowed (see `to_params`)."""
    tensors = {bare: tensors[name] for name, bare in bare_names(tensors).items()}
    return mapping.to_params(entries(config), tensors, params, "transformer", np.float32)


def to_official(params: dict, config: WanConfig) -> dict[str, np.ndarray]:
    """Official tensors from our parameter tree (or from a tree of gradients)."""
    return mapping.to_tensors(entries(config), params)
