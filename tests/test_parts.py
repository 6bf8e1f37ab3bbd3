"""Wan's parts named separately: without a model folder, or replacing one of its parts."""

import dataclasses
import shutil
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sf_jax.inference import batch
from sf_jax.inference.job import Job
from sf_jax.inference.layers import Videos
from sf_jax.inference.load import WanOptions, causal_header, find_wan, load_pipeline, wan_pipeline
from sf_jax.inference.text_encoder import Umt5TextEncoder
from sf_jax.rollout import RolloutConfig
from sf_jax.training import stages
from sf_jax.weights import transformer, umt5
from sf_jax.weights.package import Package, read_header, save_package
from tests.helpers import random_params
from tests.wan_folder import MODEL, TEXT, make_folder

PROMPT = ("a cat in the snow",)
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model folder."""
    return make_folder(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture
def named(folder):
    """The options that name each of its parts."""
    return {
        "transformer": folder / "diffusion_pytorch_model.safetensors",
        "vae": folder / "Wan2.1_VAE.safetensors",
        "text_encoder": folder / TEXT_FILE,
        "tokenizer": folder / "google" / "umt5-xxl" / "tokenizer.json",
        "dtype": "float32",
    }


def test_parts_one_by_one_are_the_model_of_the_folder(folder, named):
    whole = wan_pipeline(folder, WanOptions(dtype="float32"))
    parts = load_pipeline(**named)
    assert parts.transformer.config == whole.transformer.config and parts.sampling == whole.sampling
    jax.tree.map(
        np.testing.assert_array_equal, (parts.params, parts.decoder.params), (whole.params, whole.decoder.params)
    )
    np.testing.assert_array_equal(parts.text_encoder.encode(PROMPT), whole.text_encoder.encode(PROMPT))
    # The tiny decoder is recognized by its tensors, and a causal student works with the other parts.
    tiny = find_wan(None, WanOptions(folder / "student.safetensors", **named | {"vae": folder / "taew2_1.safetensors"}))
    assert tiny.tiny_vae == folder / "taew2_1.safetensors" and tiny.vae is None
    # Replaces one part of a folder.
    other = find_wan(folder, WanOptions(transformer=folder / "student.safetensors"))
    assert other.transformer == folder / "student.safetensors" and other.vae == folder / "Wan2.1_VAE.safetensors"


def test_parts_have_contact_sheets_of_their_own(named, folder, tmp_path, monkeypatch):
    styles = []
    sampling = types.SimpleNamespace(frames=9, height=32, width=32)
    pipe = types.SimpleNamespace(sampling=sampling, describe=str, chunks=lambda *rest, **options: iter(()))
    monkeypatch.setattr(batch, "_wan", lambda *rest: (pipe, None))
    monkeypatch.setattr(
        batch, "_write", lambda pipe, style, videos, *rest: styles.append((style.sheet, len(videos))) or []
    )
    monkeypatch.setattr(batch.jax, "local_devices", lambda: [0, 1])
    flags = {name: str(value) for name, value in named.items()} | {"checkpoint": str(folder / "student.safetensors")}
    batch.run(Job(PROMPT, **flags, num_samples=2, out=str(tmp_path)))
    assert styles == [(None, 2)]


def test_generate_takes_the_parts_of_a_model(named, folder, tmp_path):
    flags = {name: str(value) for name, value in named.items()} | {"checkpoint": str(folder / "student.safetensors")}
    job = Job(PROMPT, **flags)
    files = find_wan(job.model, job.wan_options())
    assert job.is_wan and files.tokenizer == named["tokenizer"] and files.folder is None
    with pytest.raises(ValueError, match=r"model is missing, and without it so are --text_encoder, --tokenizer"):
        find_wan(None, WanOptions(**{name: named[name] for name in ("transformer", "vae")}))
    with pytest.raises(ValueError, match="vae is given without model"):
        Job(PROMPT, vae="tiny")
    with pytest.raises(ValueError, match="text_encoder .*none.safetensors does not exist"):
        find_wan(folder, WanOptions(text_encoder=folder / "none.safetensors"))
    with pytest.raises(ValueError, match="videos is 480: it must be a Videos"):
        WanOptions(videos=480)
    with pytest.raises(ValueError, match="videos.frames is 0: it must be a whole number, at least 1"):
        Videos(frames=0)
    with pytest.raises(ValueError, match="Wan2.1_VAE.safetensors: a transformer is needed; this seems to be: VAE"):
        find_wan(folder, WanOptions(transformer=folder / "Wan2.1_VAE.safetensors"))
    with pytest.raises(ValueError, match="a vae or tiny_vae is needed; this seems to be: text encoder"):
        find_wan(folder, WanOptions(vae=folder / TEXT_FILE))


def test_heads_that_shapes_do_not_tell_need_a_config(named, tmp_path):
    shutil.copy(named["transformer"], tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="has dim 32, no multiple of 128: its heads are told by a config.json beside it"
    ):
        load_pipeline(**named | {"transformer": tmp_path / "a.safetensors"})


def test_comfyui_text_encoder_in_scaled_float8(named, folder, tmp_path):
    entries = mapping_entries("transformers")
    official = load_file(folder / TEXT_FILE)
    tensors = {theirs.name: official[ours.name] for ours, theirs in zip(mapping_entries("official"), entries[1:])}
    file, products = dict(tensors), dict(tensors)
    for name, value in tensors.items():
        if "SelfAttention." in name and value.ndim == 2 and "bias" not in name or "DenseReluDense" in name:
            scale = np.float32(np.abs(value).max() / 448)
            file[name] = (value / scale).astype(ml_dtypes.float8_e4m3fn)
            file[name.removesuffix(".weight") + ".scale_weight"] = np.asarray(scale)
            products[name] = file[name].astype(np.float32) * scale
    file |= {"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn), "spiece_model": np.zeros(7, np.uint8)}
    save_file(file, tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
    save_file(products, tmp_path / "products.safetensors")

    def encoded(name):
        files = find_wan(folder, WanOptions(text_encoder=tmp_path / name))
        return Umt5TextEncoder(files, "float32").encode(PROMPT)

    np.testing.assert_array_equal(encoded("umt5_xxl_fp8_e4m3fn_scaled.safetensors"), encoded("products.safetensors"))


def mapping_entries(naming):
    """The name map of the small text encoder."""
    return umt5.entries(TEXT, naming)


def test_files_of_rcm_must_be_told_how_they_generate(named, folder, tmp_path):
    tensors = transformer.to_official(random_params(MODEL, 2), MODEL)
    kernel = tensors["patch_embedding.weight"]
    tensors["patch_embedding.weight"] = kernel.reshape(kernel.shape[0], -1)
    path = tmp_path / "Causal_rCM_c3-3_step4.safetensors"
    save_file({f"net.{name}": np.asarray(value) for name, value in tensors.items()}, path)
    fields = {"prompts": PROMPT, "model": str(folder), "checkpoint": str(path), "out": str(tmp_path), "frames": 9}
    with pytest.raises(ValueError, match="is of NVlabs/rcm and does not say .*: give --chunk and --denoising_steps"):
        batch.run(Job(**fields))
    with pytest.raises(ValueError, match="give chunk and steps, as a rollout"):
        load_pipeline(folder, path)
    Job(**fields, chunk=3, denoising_steps=(1000, 750, 500, 250)).check_naming("rcm")
    # Except for the first, our steps equal rcm's times 15/16, 5/6, 5/8 (rcm/inference/wan2pt1_t2v_causal_infer.py).
    assert RolloutConfig().timesteps[1:] == pytest.approx((937.5, 2500 / 3, 625.0))
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.warns(UserWarning, match="many steps are right for its teacher alone"):
        find_wan(folder, WanOptions(transformer=shutil.copy(path, tmp_path / "t.safetensors")))


def package_file(path, kind="student", **sizes):
    """Writes a file like sf_jax.train's, with any suffix."""
    path.parent.mkdir(exist_ok=True)
    config = dataclasses.replace(MODEL, **sizes)
    package = Package(kind, config, RolloutConfig(chunk=1), 9, (4, 6), 5.0, 1.0, random_params(config, 3))
    save_package(path.with_suffix(".safetensors"), package)
    return path.with_suffix(".safetensors").rename(path)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.SAFETENSORS", "0a1b2c"])
def test_headers_are_read_whatever_the_suffix(name, folder, tmp_path):
    path = package_file(tmp_path / name)
    assert read_header(path).rollout.chunk == 1 and causal_header(path).kind == "student"
    header, official = stages._header_of(path, "teacher_weights")
    assert header.kind == "student" and official
    with pytest.raises(ValueError, match="is a causal student .its header says so.: give it as checkpoint"):
        find_wan(folder, WanOptions(transformer=path))
    with pytest.raises(ValueError, match="is a bidirectional network .its header says so"):
        causal_header(package_file(tmp_path / name, "teacher"))


def test_packages_are_transformers_with_their_own_sizes(folder, named, tmp_path):
    teacher = package_file(tmp_path / "teacher.safetensors", "teacher")
    parts = load_pipeline(**named | {"transformer": teacher})
    assert parts.transformer.config.num_heads == MODEL.num_heads and parts.rollout is None
    student = package_file(tmp_path / "student" / "a.safetensors")
    files = {"transformer": student.parent}
    with pytest.raises(ValueError, match="is a causal student .its header says so.: give it as checkpoint"):
        find_wan(None, WanOptions(**{name: str(value) for name, value in (named | files).items()}))
    rest = {name: named[name] for name in ("vae", "text_encoder", "tokenizer")}
    assert find_wan(None, WanOptions(student.parent, **rest)).config.num_heads == MODEL.num_heads
    # Sizes that do not follow from the shapes.
    for change in ({"num_heads": 4}, {"eps": 1e-5}):
        other = package_file(tmp_path / "other.safetensors", **change)
        (name,) = change
        with pytest.raises(ValueError, match=f"other.safetensors: {name} is .* in its header, .* in the config.json"):
            find_wan(folder, WanOptions(other))


def test_sizes_are_in_the_folder_of_the_transformer(folder, named, tmp_path):
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        shutil.copy(folder / name, tmp_path)
    assert find_wan(folder, WanOptions(transformer=tmp_path)).config.num_heads == MODEL.num_heads
