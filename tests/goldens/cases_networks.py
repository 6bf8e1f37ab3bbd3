"""The cases of the VAE and the text encoder."""

from collections.abc import Iterator

import jax
import numpy as np

from sf_jax.models import streaming, umt5
from sf_jax.models import vae as vae_model
from sf_jax.weights import mapping
from sf_jax.weights import umt5 as umt5_weights
from sf_jax.weights import vae as vae_weights
from tests.goldens.folder import Folder, Result, channels_last, relative


def t5(folder: Folder) -> Iterator[Result]:
    """12: the text encoder's raw output, its prompt embeddings with zeros after the end, and its bucket table."""
    arrays, meta = folder.arrays("12_t5.npz")
    tensors = folder.tensors("weights_t5.safetensors")
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


def vae(folder: Folder) -> Iterator[Result]:
    """11: latents of a video and of its first frame, and pixels of latents, whole and by chunks."""
    arrays, _ = folder.arrays("11_vae.npz")
    tensors = folder.tensors("weights_vae.safetensors")
    config = vae_weights.vae_config_of({name: value.shape for name, value in tensors.items()})
    model, like = vae_model.WanVae(config), vae_model.param_shapes(config)
    params = mapping.to_params(vae_weights.entries(config), tensors, like, "video VAE", np.float32)
    encode, decode = (
        jax.jit(lambda params, x, method=method: model.apply({"params": params}, x, method=method))
        for method in ("encode", "decode")
    )
    video = np.moveaxis(arrays["video"], 1, -1)
    latents = encode(params, video)
    yield Result("latents", relative(latents, channels_last(arrays["latent"])))
    first = encode(params, video[:, :1])
    yield Result("latents of the first frame", relative(first, channels_last(arrays["latent_first_frame_only"])))
    pixels = np.asarray(decode(params, channels_last(arrays["z"])))
    yield Result("pixels", relative(pixels, channels_last(arrays["decoded_unclamped"])))
    again = np.clip(decode(params, latents), -1, 1)
    yield Result("pixels of the latents, clipped", relative(again, channels_last(arrays["decode_roundtrip"])))
    step = jax.jit(lambda params, cache, z: model.apply({"params": params}, cache, z, method="decode_chunk"))
    z, parts = channels_last(arrays["z"]), []
    cache = streaming.empty_decode_cache(model, z.shape[0], *z.shape[2:4])
    for start, stop in ((0, 1), (1, 3), (3, z.shape[1])):
        cache, part = step(params, cache, z[:, start:stop])
        parts.append(np.asarray(part))
    differ = float((np.concatenate(parts, axis=1) != pixels).sum())
    yield Result("pixels by chunks", differ, 0.0, "values that differ from those of the whole decode")


CASES = {"11_vae.npz": vae, "12_t5.npz": t5}
