"""Strips the prefixes that wrappers and containers add to the names of a network's tensors."""

import re
from collections.abc import Iterable

# Inserted anywhere in a name by FSDP, activation checkpointing, `torch.compile` and Fabric.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_forward_module.")
# Top-level modules of the networks; any other common prefix belongs to a wrapper.
_OWN = ("blocks", "encoder", "decoder", "downsamples", "upsamples")
# Counters, markers and tokenizers stored next to the weights.
_BESIDE = re.compile(r"(^|\.)(accum_\w+|_extra_state|n_averaged|spiece_model|scaled_fp8)$")
# Kind of a network -> its prefixes in files with several networks, as ComfyUI writes them.
_CONTAINERS = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("vae.", "first_stage_model."),
    "umt5": (
        "text_encoders.umt5xxl.transformer.",
        "text_encoders.umt5xxl.",
        "text_encoders.",
        "text_encoder.",
        "cond_stage_model.",
    ),
}
# Users' names for the networks of such a file -> their kind.
NETWORK_PARTS = {"transformer": "transformer", "vae": "vae", "text_encoder": "umt5"}


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Strips wrapper prefixes from the tensor names of one network.

    A prefix such as DDP's `module.`, `model.` or `net.` is stripped only if all names have it.

    Args:
      names: The names in a file.

    Returns:
      The file's name -> the bare name; entries that are not weights (counters, markers, a tokenizer) are dropped.
    """
    bare = {}
    for name in names:
        if not _BESIDE.search(name):
            bare[name] = name
            for wrapper in WRAPPERS:
                bare[name] = bare[name].replace(wrapper, "")
    prefix = _common_prefix(list(bare.values()))
    return {name: text[len(prefix) :] for name, text in bare.items()}


def _common_prefix(names: list[str]) -> str:
    """The wrapper prefixes that all names share."""
    prefix = ""
    while names:
        first = names[0][len(prefix) :].partition(".")[0]
        longer = f"{prefix}{first}."
        if first in _OWN or first.isdigit() or not all(name.startswith(longer) for name in names):
            break
        prefix = longer
    return prefix


def networks_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Splits a file with several networks, such as ComfyUI's all-in-one checkpoints.

    Args:
      names: The names in the file.

    Returns:
      Kind of network ("transformer", "vae", "umt5") -> bare name -> the file's name; empty if there is only one.
    """
    bare, found = bare_names(names), {}
    for kind, prefixes in _CONTAINERS.items():
        for prefix in prefixes:
            inside = {text[len(prefix) :]: name for name, text in bare.items() if text.startswith(prefix)}
            if inside:
                found[kind] = inside
                break
    return found if len(found) > 1 else {}
