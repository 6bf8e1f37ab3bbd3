"""Files for ComfyUI: its published detection rules recognize Wan2.1 by the names and shapes of every published size."""

import dataclasses

import numpy as np
import pytest

from sf_jax.models import umt5, wan
from sf_jax.weights import export
from tests.test_weights import described, manifest


def comfy_kind(shapes) -> dict | str:
    """ComfyUI's result for a file, by the rules of its model_detection.py and sd.py."""
    if "head.modulation" in shapes:
        prefixed = sum(name.startswith("model.diffusion_model.") for name in shapes)
        assert prefixed == 0, "files of one network have no prefix"
        assert not any(part in name for name in shapes for part in ("img_emb", "vace_", "control_adapter"))
        dim = shapes["head.modulation"][-1]
        return {
            "dim": dim,
            "out_dim": shapes["head.head.weight"][0] // 4,
            "num_heads": dim // 128,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "num_layers": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
            "in_dim": shapes["patch_embedding.weight"][1],
        }
    if "decoder.middle.0.residual.0.gamma" in shapes:
        return "Wan 2.2 VAE" if "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes else "Wan 2.1 VAE"
    wi = shapes.get("encoder.block.23.layer.1.DenseReluDense.wi_1.weight")
    return "umt5_xxl" if wi and wi[-1] == 4096 and "shared.weight" in shapes and "spiece_model" in shapes else "unknown"


@pytest.mark.parametrize("naming", ["official", "diffusers"])
@pytest.mark.parametrize(("size", "config"), [("1.3b", wan.wan_1_3b()), ("14b", wan.wan_14b())])
def test_comfyui_recognizes_the_transformers(size, config, naming):
    written = export.read_network(described(manifest(f"wan2.1-t2v-{size}.{naming}")), "comfy")
    kind = comfy_kind(written.tensors.shapes)
    assert kind == {
        "dim": config.dim,
        "out_dim": 16,
        "num_heads": config.num_heads,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "in_dim": 16,
    }
    assert not export.comfy_notes(written)


@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_comfyui_recognizes_the_vae(naming):
    written = export.read_network(described(manifest(f"wan2.1-vae.{naming}")), "comfy")
    assert comfy_kind(written.tensors.shapes) == "Wan 2.1 VAE" and not export.comfy_notes(written)


@pytest.mark.parametrize("naming", ["official", "transformers"])
def test_comfyui_recognizes_the_text_encoder_and_finds_its_tokenizer(naming):
    written = export.read_network(described(manifest(f"umt5-xxl-encoder.{naming}")), "comfy")
    written = export.with_tokenizer(export.without_tied(written), b"\x0a\x01x")
    assert comfy_kind(written.tensors.shapes) == "umt5_xxl" and not export.comfy_notes(written)
    assert written.config == dataclasses.replace(umt5.umt5_xxl(), dtype=written.config.dtype)
    assert (
        written.tensors["spiece_model"].dtype == np.uint8 and written.tensors["spiece_model"].tobytes() == b"\x0a\x01x"
    )
    assert "encoder.embed_tokens.weight" not in written.tensors
