"""The cases of the VAE and the text encoder."""

from collections.abc import Iterator

import jax
import numpy as np
from safetensors.numpy import load_file

from sf_jax.models import umt5
from sf_jax.weights import mapping
from sf_jax.weights import umt5 as umt5_weights
from tests.goldens.folder import Folder, Result, relative


def t5(folder: Folder) -> Iterator[Result]:
    """12: the text encoder's raw output, its prompt embeddings with zeros after the end, and its bucket table."""
    arrays, meta = folder.arrays("12_t5.npz")
    tensors = load_file(folder.path / "weights_t5.safetensors")
    config = umt5_weights.umt5_config_of({name: value.shape for name, value in tensors.items()})
    sizes = ("vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")
    differ = [name for name in sizes if getattr(config, name) != meta[name]]
    yield Result("sizes", float(len(differ)), 0.0, f"sizes that differ: {differ}" if differ else "")
    model = umt5.Umt5Encoder(config)
    like = umt5.param_shapes(config)
    params = mapping.to_params(umt5_weights.entries(config), tensors, like, "text encoder", np.float32)
    for name, method in (("raw", "__call__"), ("prompt_embeds", "embed")):
        run = jax.jit(
            lambda params, ids, mask, method=method: model.apply({"params": params}, ids, mask, method=method)
        )
        for case in ("a", "b"):
            if f"{case}_{name}" in arrays:
                ids, mask = (arrays[f"{case}_{key}"].astype(np.int32) for key in ("ids", "mask"))
                ours = run(params, ids, mask)
                yield Result(f"{case} {name}", relative(ours, arrays[f"{case}_{name}"]))
    for key in sorted(key for key in arrays if key.startswith("rel_bucket_L")):
        table = umt5.position_buckets(len(arrays[key]), config.num_buckets, config.max_distance)
        yield Result(key, float((table != arrays[key]).sum()), 0.0, "pairs that differ")
