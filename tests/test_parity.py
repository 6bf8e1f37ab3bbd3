"""Parity with the PyTorch libraries: diffusers' transformer and VAE, transformers' text encoder, and their files.

Small networks with random weights: ours is loaded from the file that the library writes, and both get the same input.
"""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from sf_jax.models.umt5 import Umt5Encoder
from sf_jax.models.vae import WanVae
from sf_jax.models.wan import WanTransformer, bidirectional_layout
from sf_jax.weights import load
from sf_jax.weights.files import open_tensors
from sf_jax.weights.folders import read_config
from sf_jax.weights.networks import load_network
from sf_jax.weights.recognize import entries_of
from sf_jax.weights.torch_io import write_torch
from tests.helpers import relative
from tests.test_weights import assert_same, convert

EXTRA = "needs the [parity] extra"
torch = pytest.importorskip("torch", reason=EXTRA)
diffusers = pytest.importorskip("diffusers", reason=EXTRA)
transformers = pytest.importorskip("transformers", reason=EXTRA)

TOLERANCE = 1e-5
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "text_dim": 40,
    "freq_dim": 64,
    "ffn_dim": 160,
    "num_layers": 2,
}
VAE = {"base_dim": 8, "z_dim": 16, "num_res_blocks": 1}
UMT5 = {"vocab_size": 64, "d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 2, "num_heads": 4}
BUILD = {
    "transformer": lambda: diffusers.WanTransformer3DModel(**TRANSFORMER),
    "vae": lambda: diffusers.AutoencoderKLWan(**VAE),
    "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**UMT5, feed_forward_proj="gated-gelu")),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """kind -> (the library's network, the folder it wrote); all weights are random, so every path has an effect."""

    @functools.cache
    def made(kind):
        torch.manual_seed(0)
        model = BUILD[kind]().eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if value.ndim == 1 or name.endswith("gamma"):  # biases and the scales of norms
                value += 0.1 * torch.randn_like(value)
            else:
                value.normal_(0, value[0].numel() ** -0.5)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return model, folder

    return made


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def to_torch(x: np.ndarray):
    """[B, F, H, W, C] to PyTorch's [B, C, F, H, W]."""
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def from_torch(x) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


def run(model, params, *arguments, **options) -> np.ndarray:
    apply = jax.jit(lambda params, *arguments: model.apply({"params": params}, *arguments, **options))
    with jax.default_matmul_precision("highest"):
        return np.asarray(apply(params, *arguments))


# Outputs


def test_transformer_is_that_of_diffusers(library):
    theirs, folder = library("transformer")
    config, params = load_network(folder, "transformer", read_config(folder / "config.json"))
    x, text, t = normal(2, 3, 8, 12, 16), normal(2, 16, TRANSFORMER["text_dim"]), np.float32([750, 20])
    expected = theirs(to_torch(x), torch.from_numpy(t), torch.from_numpy(text)).sample
    flow = run(WanTransformer(config), params, x, t[:, None], text, bidirectional_layout(x.shape[1]))
    for ours, reference in zip(flow, from_torch(expected), strict=True):
        assert relative(ours, reference) <= TOLERANCE


def test_vae_encodes_as_that_of_diffusers(library):
    theirs, folder = library("vae")
    config, params = load_network(folder, "vae")
    mean, std = (np.float32(getattr(theirs.config, f"latents_{name}")) for name in ("mean", "std"))
    pixels = np.tanh(normal(1, 9, 32, 48, 3))
    expected = (from_torch(theirs.encode(to_torch(pixels)).latent_dist.mean) - mean) / std
    assert relative(run(WanVae(config), params, pixels, method="encode"), expected) <= TOLERANCE


def test_vae_decodes_as_that_of_diffusers(library):
    theirs, folder = library("vae")
    config, params = load_network(folder, "vae")
    mean, std = (np.float32(getattr(theirs.config, f"latents_{name}")) for name in ("mean", "std"))
    latents = normal(1, 3, 4, 6, 16)
    expected = from_torch(theirs.decode(to_torch(latents * std + mean)).sample)
    pixels = run(WanVae(config), params, latents, method="decode")
    inside = np.abs(expected) < 1  # they clip
    assert pixels.shape == expected.shape and inside.mean() > 0.5
    assert relative(pixels[inside], expected[inside]) <= TOLERANCE
    assert relative(np.clip(pixels, -1, 1), expected) <= TOLERANCE


def test_text_encoder_is_that_of_transformers(library):
    theirs, folder = library("umt5")
    config, params = load_network(folder, "umt5")
    # Longer than the distance beyond which all keys share a bucket.
    ids = np.random.default_rng(0).integers(0, UMT5["vocab_size"], (2, 160)).astype(np.int32)
    mask = (np.arange(160) < np.array([[160], [37]])).astype(np.int32)
    expected = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    ours = run(Umt5Encoder(config), params, ids, mask)
    for row, reference, valid in zip(ours, expected, mask > 0, strict=True):
        assert relative(row[valid], reference[valid]) <= TOLERANCE


# Files


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(BUILD))
def test_a_librarys_file_to_official_names_and_back_keeps_every_byte(kind, library, tmp_path):
    theirs, folder = library(kind)
    naming = "transformers" if kind == "umt5" else "diffusers"
    there, back = tmp_path / "official.safetensors", tmp_path / "back.safetensors"
    for source, target, names in ((folder, there, "official"), (there, back, naming)):
        done = convert(f"--input={source}", f"--output={target}", f"--to={names}")
        assert done.returncode == 0, done.stderr
    # A state dict has both names of a tied embedding, but the library's file only one.
    assert_same(load_file(back), {name: value.numpy() for name, value in theirs.state_dict().items()})
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in load_file(back).items()}, strict=True)


@pytest.mark.parametrize("kind", list(BUILD))
def test_variants_shards_and_bin_files_are_those_of_the_plain_file(kind, library, tmp_path):
    model, folder = library(kind)
    bin_ = {"safe_serialization": False}
    if kind == "umt5":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")  # transformers no longer writes .bin files
    ways = [{"variant": "fp16"}, {"variant": "bf16", "max_shard_size": "30KB"}, {"max_shard_size": "30KB"}]
    ways += [] if kind == "umt5" else [bin_, bin_ | {"max_shard_size": "30KB"}, bin_ | {"variant": "fp32"}]
    plain = load_file(next(folder.glob("*.safetensors")))
    for i, way in enumerate([None, *ways]):
        there = tmp_path / str(i)
        if way is not None:
            model.save_pretrained(there, **way)
        elif kind == "umt5":
            there = tmp_path
        else:
            continue
        assert len(list(there.glob("*-of-*"))) > 1 or "max_shard_size" not in (way or {}), way
        with open_tensors(there) as stored:
            assert_same({name: stored[name] for name in plain}, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_fsdp_to_parameters_and_back_keeps_every_bit(dtype, library, tmp_path):
    _, folder = library("transformer")
    config = read_config(folder / "config.json")
    diffusers_names, official = (entries_of("transformer", config, names) for names in ("diffusers", "official"))
    with open_tensors(folder) as stored:
        renamed = load.translated(diffusers_names, official, stored)
        tensors = {name: torch.from_numpy(renamed[name].copy()).to(getattr(torch, dtype)) for name in renamed}
    wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in tensors.items()}
    torch.save({"generator_ema": wrapped, "step": 3}, tmp_path / "in.pt")
    _, params = load_network(tmp_path / "in.pt", "transformer", config)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
    write_torch(tmp_path / "out.pt", load.file_tensors(official, params), "generator_ema")
    (part, written), *others = torch.load(tmp_path / "out.pt", weights_only=True).items()
    assert part == "generator_ema" and not others and set(written) == set(tensors)
    for name, value in tensors.items():
        integer = torch.int32 if dtype == "float32" else torch.int16
        assert written[name].dtype == value.dtype and torch.equal(written[name].view(integer), value.view(integer)), (
            name
        )
