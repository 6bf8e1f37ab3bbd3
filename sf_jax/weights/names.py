"""What wrappers and containers put around the names of a network's tensors."""

import re
from collections.abc import Iterable

# What FSDP, activation checkpointing, `torch.compile` and Fabric put anywhere in a name.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_forward_module.")
# Parts of the networks themselves; whatever else all names begin with belongs to a wrapper.
_OWN = ("blocks", "encoder", "decoder", "downsamples", "upsamples")
# Counters, markers and tokenizers that are stored beside the weights.
_BESIDE = re.compile(r"(^|\.)(accum_\w+|_extra_state|n_averaged|spiece_model|scaled_fp8)$")
# Kind of a network -> the prefixes that it has in files of several networks, as ComfyUI writes them.
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
# What users call the networks of such a file -> their kind.
NETWORK_PARTS = {"transformer": "transformer", "vae": "vae", "text_encoder": "umt5"}


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Takes off what wrappers put around the names of one network.

    A prefix such as DDP's `module.`, `model.` or `net.` goes only where all names have it.

    Args:
      names: The names in a file.

    Returns:
      The file's name -> the bare name; what is no weight (counters, markers, a tokenizer) is left out.
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
    """The wrappers that all names begin with."""
    prefix = ""
    while names:
        first = names[0][len(prefix) :].partition(".")[0]
        longer = f"{prefix}{first}."
        if first in _OWN or first.isdigit() or not all(name.startswith(longer) for name in names):
            break
        prefix = longer
    return prefix


def networks_of(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The networks of a file of several, such as ComfyUI's all-in-one checkpoints.

    Args:
      names: The names in the file.

    Returns:
      Kind of the network ("transformer", "vae", "umt5") -> its bare name -> the file's name; empty for one network.
    """
    bare, found = bare_names(names), {}
    for kind, prefixes in _CONTAINERS.items():
        for prefix in prefixes:
            inside = {text[len(prefix) :]: name for name, text in bare.items() if text.startswith(prefix)}
            if inside:
                found[kind] = inside
                break
    return found if len(found) > 1 else {}
