"""A model folder with the published layout and very small networks with random weights."""

import json
import pathlib

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from sf_jax.models import tiny_vae, umt5, vae, wan
from sf_jax.weights import mapping, transformer
from sf_jax.weights import umt5 as umt5_names
from sf_jax.weights import vae as vae_names
from tests.helpers import random_params

MODEL = wan.WanConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, text_len=512, freq_dim=16, channels=16
)
VAE = vae.wan_vae(dim=4, num_res_blocks=1)
TINY = tiny_vae.TinyVaeConfig()
TEXT = umt5.Umt5Config(
    vocab=16, dim=16, dim_attn=16, dim_ffn=24, num_heads=2, num_layers=1, num_buckets=8, dtype="float32"
)
WORDS = ("a", "cat", "dog", "in", "the", "snow", "runs")


def random_like(shapes: dict) -> dict:
    """Random weights scaled so that signals neither vanish nor explode."""
    rng = np.random.default_rng(0)

    def leaf(shape):
        fan_in = np.prod(shape.shape[:-1]) if len(shape.shape) > 1 else 4.0
        return rng.normal(0, fan_in**-0.5, shape.shape).astype(np.float32)

    return jax.tree.map(leaf, shapes)


def tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer of words, `<pad>` 0, `</s>` 1 and `<unk>` 2, with `</s>` after every text."""
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words["</s>"])]
    )
    return made


def make_folder(folder: pathlib.Path) -> pathlib.Path:
    """Writes the folder, with a student `student.safetensors` in it; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "t2v", "dim": MODEL.dim, "ffn_dim": MODEL.ffn_dim, "num_heads": MODEL.num_heads}
    config |= {"num_layers": MODEL.num_layers, "in_dim": 16, "out_dim": 16, "freq_dim": 16, "text_dim": 16, "eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config | {"text_len": 512}))
    for name, seed in (("diffusion_pytorch_model", 1), ("student", 2)):
        save_file(transformer.to_official(random_params(MODEL, seed), MODEL), folder / f"{name}.safetensors")
    networks = {
        "Wan2.1_VAE": (vae_names.entries(VAE), vae.param_shapes(VAE)),
        "taew2_1": (vae_names.tiny_entries(TINY), tiny_vae.param_shapes(TINY)),
        "models_t5_umt5-xxl-enc-bf16": (umt5_names.entries(TEXT), umt5.param_shapes(TEXT)),
    }
    for name, (entries, shapes) in networks.items():
        save_file(mapping.to_tensors(entries, random_like(shapes)), folder / f"{name}.safetensors")
    (folder / "google" / "umt5-xxl").mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    return folder
