"""Names and shapes of the official Wan2.1 / Self Forcing transformer weights, and the way from and to our parameters.

Official tensors are PyTorch's: linear weights are [out, in], the patch embedding is a convolution [dim, C, 1, 2, 2],
and every block has tensors of its own; ours are [in, out] kernels with the blocks stacked along a leading axis.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from sf_jax.models.wan import WanConfig

# Prefixes that wrappers put in front of (or inside) names.
WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")

_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "text_in",
    "text_embedding.2": "text_out",
    "time_embedding.0": "time_in",
    "time_embedding.2": "time_out",
    "time_projection.1": "time_projection",
    "head.head": "head",
}
_BLOCK_LINEAR = {
    **{f"{a}_attn.{p}": (f"{a}_attn", p) for a in ("self", "cross") for p in ("q", "k", "v", "o")},
    "ffn.0": ("ffn_in",),
    "ffn.2": ("ffn_out",),
}
_BLOCK_OTHER = {
    **{f"{a}_attn.norm_{p}.weight": (f"{a}_attn", f"norm_{p}", "scale") for a in ("self", "cross") for p in "qk"},
    "norm3.weight": ("norm3", "scale"),
    "norm3.bias": ("norm3", "bias"),
    "modulation": ("modulation",),
}


def strip_wrappers(name: str) -> str:
    """Removes the prefixes of FSDP, activation checkpointing and `torch.compile`, and a leading `model.`."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("model.")


def _entries(config: WanConfig):
    """Yields (official name, our path, layer or None, to ours, to official) for every tensor."""

    def same(x):
        return x

    def transposed(x):
        return x.T

    patch_shape = (config.dim, config.channels, *config.patch)

    def patch_in(x):
        return x.transpose(2, 3, 4, 1, 0).reshape(-1, config.dim)

    def patch_out(x):
        return x.reshape(*config.patch, config.channels, config.dim).transpose(4, 3, 0, 1, 2).reshape(patch_shape)

    for official, ours in _TOP.items():
        ways = (patch_in, patch_out) if official == "patch_embedding" else (transposed, transposed)
        yield f"{official}.weight", (ours, "kernel"), None, *ways
        yield f"{official}.bias", (ours, "bias"), None, same, same
    yield "head.modulation", ("head_modulation",), None, same, same
    for layer in range(config.num_layers):
        for official, ours in _BLOCK_LINEAR.items():
            yield (
                f"blocks.{layer}.{official}.weight",
                ("blocks", *ours, "kernel"),
                layer,
                transposed,
                transposed,
            )
            yield f"blocks.{layer}.{official}.bias", ("blocks", *ours, "bias"), layer, same, same
        for official, ours in _BLOCK_OTHER.items():
            yield f"blocks.{layer}.{official}", ("blocks", *ours), layer, same, same


def _check_names(names: set[str], wanted: set[str]) -> None:
    missing, unexpected = sorted(wanted - names), sorted(names - wanted)
    if missing or unexpected:
        raise ValueError(
            f"these are not the weights of this transformer: {len(missing)} tensors missing {missing[:4]}, "
            f"{len(unexpected)} unexpected {unexpected[:4]}"
        )


def from_official(tensors: Mapping[str, np.ndarray], config: WanConfig, params: dict) -> dict:
    """Our parameter tree from official tensors.

    Args:
      tensors: official name -> array; wrapper prefixes are allowed.
      config: sizes of the transformer.
      params: a tree of the right structure and shapes (arrays or `ShapeDtypeStruct`), e.g. from `eval_shape` of `init`.

    Returns:
      A tree like `params` of numpy float32 arrays.

    Raises:
      ValueError: naming the tensors that are missing, unexpected or misshaped.
    """
    tensors = {strip_wrappers(name): value for name, value in tensors.items()}
    _check_names(set(tensors), {entry[0] for entry in _entries(config)})
    flat: dict[tuple, list | np.ndarray] = {}
    for name, path, layer, to_ours, _ in _entries(config):
        value = to_ours(np.asarray(tensors[name], np.float32))
        if layer is None:
            flat[path] = value
        else:
            flat.setdefault(path, []).append(value)
    return _fill(params, flat)


def to_official(params: dict, config: WanConfig, convert: Callable = np.asarray) -> dict[str, np.ndarray]:
    """Official tensors from our parameter tree (or from a tree of gradients)."""
    out = {}
    for name, path, layer, _, to_theirs in _entries(config):
        leaf = params
        for part in path:
            leaf = leaf[part]
        leaf = convert(leaf)
        out[name] = np.ascontiguousarray(to_theirs(leaf if layer is None else leaf[layer]))
    return out


def _fill(params, flat):
    """Puts `flat` (path -> array or list of layers) into the structure of `params`, checking every shape."""
    wrong = []

    def leaf(path, like):
        key = tuple(part.key for part in path)
        value = flat[key]
        value = np.stack(value) if isinstance(value, list) else value
        if value.shape != like.shape:
            wrong.append(f"{'/'.join(key)} is {value.shape}, must be {like.shape}")
        return value

    filled = jax.tree_util.tree_map_with_path(leaf, params)
    if wrong:
        raise ValueError(f"{len(wrong)} tensors have the wrong shape: {'; '.join(wrong[:4])}")
    return filled
