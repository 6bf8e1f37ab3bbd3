"""The JSON files next to weights: `config.json` of the official code, diffusers and transformers, and pipelines."""

from collections.abc import Mapping

import numpy as np

from sf_jax.models.umt5 import Umt5Config
from sf_jax.models.vae import VaeConfig
from sf_jax.models.wan import WanConfig

# Sampling shift of the official 1.3B model, whose folder does not store it.
OFFICIAL_SHIFT = 8.0
# kind -> library and class in a diffusers pipeline.
CLASSES = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "umt5": ("transformers", "UMT5EncoderModel"),
}


def config_of(kind: str, config, dtypes: Mapping[str, np.dtype], official: bool = False) -> dict | None:
    """The `config.json` of a network.

    Args:
      kind: "transformer", "vae" or "umt5".
      config: its sizes.
      dtypes: name -> type of its tensors.
      official: whether to write it for the official code, which has one for the transformer only.

    Returns:
      The file's content; None if this network has no such file.
    """
    if official:
        return _official(config) if kind == "transformer" else None
    if kind == "transformer":
        return _transformer(config)
    if kind == "vae":
        return _vae(config)
    return _text_encoder(config, dtypes) if kind == "umt5" else None


def _official(config: WanConfig) -> dict:
    """The config that `WanModel` of the official code reads."""
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.channels,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.channels,
        "patch_size": list(config.patch),
        "text_dim": config.text_dim,
        "text_len": config.text_len,
    }


def _transformer(config: WanConfig) -> dict:
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.channels,
        "patch_size": list(config.patch),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def _vae(config: VaeConfig) -> dict:
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config.dim,
        "dim_mult": list(config.dim_mult),
        "dropout": 0.0,
        "latents_mean": list(config.mean),
        "latents_std": list(config.std),
        "num_res_blocks": config.num_res_blocks,
        "temperal_downsample": list(config.temporal_downsample),
        "z_dim": config.z_dim,
    }


def _text_encoder(config: Umt5Config, dtypes: Mapping[str, np.dtype]) -> dict:
    names = {np.dtype(dtype).name for dtype in dtypes.values()}
    return {
        "architectures": ["UMT5EncoderModel"],
        "classifier_dropout": 0.0,
        "d_ff": config.dim_ffn,
        "d_kv": config.head_dim,
        "d_model": config.dim,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "umt5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.num_buckets,
        "tie_word_embeddings": True,
        # Older and newer versions of transformers both read this key.
        "torch_dtype": names.pop() if len(names) == 1 else "float32",
        "use_cache": True,
        "vocab_size": config.vocab,
    }


def scheduler_config(shift: float) -> dict:
    """The `scheduler_config.json` of the published pipelines, with the given flow shift."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }


def pipeline_index(scheduler: str, tokenizer: str) -> dict:
    """The `model_index.json` of a text-to-video pipeline; the arguments are class names."""
    return {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": list(CLASSES["umt5"]),
        "tokenizer": ["transformers", tokenizer],
        "transformer": list(CLASSES["transformer"]),
        "vae": list(CLASSES["vae"]),
    }
