"""Name map of the discriminator's head: the official `_cls_pred_branch`, `_register_tokens` and `_gan_ca_blocks`."""

from collections.abc import Mapping

import numpy as np

from sf_jax.models.discriminator import DiscriminatorConfig
from sf_jax.weights import mapping
from sf_jax.weights.mapping import LINEAR, Entry


def entries(config: DiscriminatorConfig) -> list[Entry]:
    """The name map of a head."""
    found = [
        Entry("_register_tokens.register_tokens", ("registers",)),
        Entry("_register_tokens.rms_norm.weight", ("register_norm", "scale")),
        Entry("_cls_pred_branch.0.weight", ("classifier_norm", "scale")),
        Entry("_cls_pred_branch.0.bias", ("classifier_norm", "bias")),
    ]
    layers = [("_cls_pred_branch.1", ("classifier_in",), None), ("_cls_pred_branch.3", ("classifier_out",), None)]
    for block in range(len(config.taps)):
        name, path = f"_gan_ca_blocks.{block}", ("register_blocks",)
        layers += [(f"{name}.cross_attn.{part}", (*path, "cross_attn", part), block) for part in "qkvo"]
        layers += [(f"{name}.ffn.0", (*path, "ffn_in"), block), (f"{name}.ffn.2", (*path, "ffn_out"), block)]
        found += [
            Entry(f"{name}.cross_attn.norm_{part}.weight", (*path, "cross_attn", f"norm_{part}", "scale"), block)
            for part in "qk"
        ]
        found.append(Entry(f"{name}.norm3.weight", (*path, "norm3", "scale"), block))
        found.append(Entry(f"{name}.norm3.bias", (*path, "norm3", "bias"), block))
    for name, path, block in layers:
        found.append(Entry(f"{name}.weight", (*path, "kernel"), block, LINEAR))
        found.append(Entry(f"{name}.bias", (*path, "bias"), block))
    return found


def from_official(tensors: Mapping[str, np.ndarray], config: DiscriminatorConfig, params: dict) -> dict:
    """Our parameter tree, float32 numpy, from official tensors; `params` gives the shapes."""
    return mapping.to_params(entries(config), tensors, params, "discriminator", np.float32)


def to_official(params: dict, config: DiscriminatorConfig) -> dict[str, np.ndarray]:
    """Official tensors from our parameter tree (or from a tree of gradients)."""
    return mapping.to_tensors(entries(config), params)
