"""Weight files in every container: shards, pickles, and one clear line for damaged or foreign files."""

import itertools
import json
import os
import struct
import sys

import numpy as np
import pytest

from sf_jax.models import wan
from sf_jax.weights import folders, load
from sf_jax.weights.files import open_tensors
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import TensorFile
from sf_jax.weights.torch_io import write_torch
from tests.test_weights import BF16, TORCH, assert_same, in_memory, network, shards

# PyTorch's files


@pytest.mark.parametrize("dtypes", [("float32",), (BF16, "float16", "float32", "mixed")])
def test_torch_files_keep_every_byte(dtypes, tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    for dtype, part in itertools.product(dtypes, (None, "generator_ema")):
        entries, like, tensors = network("transformer", "official", dtype)
        file = tmp_path / "a.pt"
        wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in tensors.items()}
        write_torch(file, in_memory(wrapped), part)
        held = torch.load(file, weights_only=True)
        assert list(held[part] if part else held) == list(wrapped)
        with open_tensors(file) as stored:
            assert stored.part == part
            params = load.load_params(entries, stored, like, "transformer")
        write_torch(
            tmp_path / "b.pt",
            load.file_tensors(entries, params).renamed({n: w for n, w in zip(wrapped, tensors)}),
            part,
        )
        assert file.read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_torch_checkpoints_of_several_networks(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    parts = {part: {"x": torch.full((2,), i)} for i, part in enumerate(["critic", "generator", "generator_ema"])}

    def number(held, part=None):
        torch.save(held, tmp_path / "a.pt")
        with open_tensors(tmp_path / "a.pt", part) as stored:
            return int(stored["x"][0])

    assert number(parts | {"step": 7}) == 2 and number(parts, "critic") == 0 and number({"model": parts["critic"]}) == 0
    with pytest.raises(ValueError, match="part is 'model': .*a.pt holds critic, generator, generator_ema"):
        number(parts, "model")
    with pytest.raises(ValueError, match="a.pt holds critic, other: say which with part"):
        number({"critic": parts["critic"], "other": parts["generator"]})
    with pytest.raises(ValueError, match="part is 'critic': .*a.pt is a single state dict"):
        number(parts["critic"], "critic")
    with pytest.raises(ValueError, match="a.pt does not hold the tensors of a network: 'y' and 0 more"):
        number({"x": torch.ones(1), "y": 3})


WRAPPERS = ("state_dict", "model_state_dict", "ema", "model_ema", "module", "params", "net", "student_weights")


def test_torch_checkpoints_of_one_network_under_any_name(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    state, file = {"a.weight": torch.full((2,), 7.0)}, tmp_path / "a.pt"

    def opened(held, part=None, **options):
        torch.save(held, file)
        with open_tensors(file, part, **options) as stored:
            assert list(stored) == ["a.weight"] and stored["a.weight"][0] == 7
            return stored.part

    for name in WRAPPERS:
        assert opened({name: state}) is None and opened({name: state}, name) == name
        adam = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
        assert opened({"step": 3, name: {"state_dict": state}, "optimizer": adam}) is None
        assert opened({name: state}, "generator_lora", need_part=False) is None
        with pytest.raises(ValueError, match=f"part is 'generator': .*a.pt holds {name}"):
            opened({name: state}, "generator")
    for beside in ({"step": 3, "epoch": 1}, {"config": {"dim": 3}}, {"global_step": torch.tensor(4)}):
        assert opened(state | beside) is None and opened({"generator": state | beside}) == "generator"
    assert opened({"generator": {"state_dict": state}, "critic": {"state_dict": state}}) == "generator"
    with pytest.raises(ValueError, match="a.pt holds critic: say which with part"):
        opened({"critic": state})
    with pytest.raises(ValueError, match="a.pt holds ema, params: say which with part"):
        opened({"ema": state, "params": state})
    # A network with a known name is not used in place of another one.
    with pytest.raises(ValueError, match="part is 'generator_lora': .*a.pt holds model"):
        opened({"model": state}, "generator_lora", need_part=False)


def test_torch_files_are_told_by_their_content(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    for name, zipped in itertools.product(("a.safetensors", "a", "a.ckpt"), (True, False)):
        torch.save({"x": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        with open_tensors(tmp_path / name) as stored:
            np.testing.assert_array_equal(stored["x"], np.ones(2))


def test_without_torch_its_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ValueError, match=r"a.pth is a PyTorch file, .* pip install 'sf_jax\[convert\]'"):
        open_tensors(tmp_path / "a.pth")


class Malicious:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_with_code_are_refused_and_not_run(zipped, tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    torch.save(
        {"x": torch.ones(2), "y": Malicious(tmp_path / "made")},
        tmp_path / "a.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(ValueError, match="a.pt is refused: it holds more than tensors.*open") as refusal:
        open_tensors(tmp_path / "a.pt")
    assert not (tmp_path / "made").exists() and "\n" not in str(refusal.value)
    torch.load(tmp_path / "a.pt", weights_only=False)["y"].close()
    assert (tmp_path / "made").exists(), "the test's pickle is harmless"


# Damaged files


def safetensors(header, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def entry(start=0, stop=4, dtype="F32", shape=(1,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty; perhaps an unfinished download"),
        (b"abc", "a header of 0 bytes does not fit"),
        (safetensors({"a": entry()}, bytes(3)), "describes 4 bytes of numbers, the file has 3: perhaps an unfinished"),
        (safetensors({"a": entry()}, bytes(5)), "the file has 5: too many"),
        (safetensors({"a": entry()})[:20], "does not fit in its 20 bytes; perhaps an unfinished download"),
        (struct.pack("<Q", 2**62) + b"{}", "a header of 4611686018427387904 bytes does not fit"),
        (safetensors(b'{"a": '), "its header is no JSON"),
        (safetensors(b"\xff\xfe{}"), "its header is no JSON"),
        (safetensors(b"[" * 100_000), "damaged safetensors file"),
        (safetensors([1]), "its header is no JSON object"),
        (safetensors(b'{"a": {}, "a": {}}'), "a name is there twice"),
        (safetensors({"a": entry(), "b": entry(0, 4)}, bytes(8)), "'b' overlaps the tensor before it"),
        (safetensors({"a": entry(), "b": entry(8, 12)}, bytes(12)), "'b' leaves a gap before it"),
        (safetensors({"a": entry(0, 3)}, bytes(3)), r"'a' \(1,\) of F32 needs 4 bytes, its data_offsets are \[0, 3\]"),
        (safetensors({"a": entry(dtype="F4")}, bytes(4)), "'a' has the type 'F4', allowed: F64, F32"),
        (safetensors({"a": entry(shape=(-1,))}, bytes(4)), "the entry of 'a' has no shape and data_offsets"),
        (safetensors({"a": 3}), "the entry of 'a' has no shape and data_offsets"),
        (safetensors({"__metadata__": {"a": 1}}), "its __metadata__ is no table of strings"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "the pointer of git-lfs: fetch the file itself"),
        (b"<!DOCTYPE html><html>", "it is a web page: the download failed"),
    ],
)
def test_damaged_safetensors_are_refused_by_name(content, message, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        open_tensors(file)
    assert "a.safetensors" in str(refusal.value) and "\n" not in str(refusal.value)


def test_other_content_is_told_from_the_beginning(tmp_path):
    for content, message in (
        (b"GGUF" + bytes(40), "it is a GGUF file .*dequantize"),
        (b"MZ" + bytes(40), "starts with b'MZ"),
        (bytes(64), "perhaps an unfinished download"),
    ):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_tensors(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="none.pt does not exist"):
        open_tensors(tmp_path / "none.pt")
    pytest.importorskip("torch", reason=TORCH)
    for content in (b"PK\x03\x04" + bytes(60), b"\x80\x02garbage" + bytes(40)):
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.pt is (no readable PyTorch file|refused)") as refusal:
            open_tensors(tmp_path / "a.pt")
        assert "\n" not in str(refusal.value)


def test_an_unwritable_or_wrong_tensor_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.safetensors"
    write_safetensors(file, in_memory({"a": np.zeros(3)}))
    before = file.read_bytes()
    with pytest.raises(ValueError, match="a is .3,. of float64, announced as .4,. of float32"):
        write_safetensors(file, TensorFile("b", {"a": (4,)}, {"a": np.float32}, lambda name: np.zeros(3)))
    with pytest.raises(ValueError, match="complex64, safetensors files hold F64"):
        write_safetensors(file, in_memory({"a": np.zeros(3, np.complex64)}))
    assert file.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


# Folders


def test_shards_are_one_file_and_a_missing_one_is_named(tmp_path):
    tensors = network("transformer", "official", "mixed")[2]
    index = shards(tmp_path, tensors)
    for path in (tmp_path, index):
        with open_tensors(path) as stored:
            assert_same(stored, tensors)
    second = tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    second.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="lacks 1 of 3 shards: diffusion_pytorch_model-00002-of-00003.safetensors"):
        open_tensors(tmp_path)
    (tmp_path / "kept").rename(second)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ValueError, match="00002-of-00003.safetensors is a damaged .* unfinished download"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../other.safetensors"}}))
    with pytest.raises(ValueError, match="names files of other folders"):
        open_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="index.json is no index of shards"):
        open_tensors(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match="has 3 shards but not their index"):
        open_tensors(tmp_path)
    with pytest.raises(ValueError, match="has no weight file .* its folders parts have some"):
        shards(tmp_path / "model" / "parts", tensors)
        open_tensors(tmp_path / "model")


def test_of_a_model_folder_the_transformer_is_taken(tmp_path):
    _, _, tensors = network("transformer", "official")
    write_safetensors(tmp_path / "official" / "diffusion_pytorch_model.safetensors", in_memory(tensors))
    (tmp_path / "official" / "Wan2.1_VAE.pth").write_bytes(b"PK\x03\x04")
    shards(tmp_path / "diffusers" / "transformer", tensors)
    for place in (tmp_path / "diffusers" / "transformer").iterdir():
        if place.name.endswith("index.json"):
            place.rename(place.with_name("diffusion_pytorch_model.safetensors.index.json"))
    # A single file of another network is not used as the transformer.
    write_safetensors(tmp_path / "diffusers" / "taew2_1.safetensors", in_memory({"decoder.1.weight": np.zeros(1)}))
    for kind in ("official", "diffusers"):
        with open_tensors(tmp_path / kind) as stored:
            assert set(stored) == set(tensors)


OFFICIAL = {
    "dim": 1536,
    "ffn_dim": 8960,
    "num_heads": 12,
    "num_layers": 30,
    "in_dim": 16,
    "out_dim": 16,
    "freq_dim": 256,
}
OFFICIAL |= {"model_type": "t2v", "text_len": 512, "eps": 1e-6, "_class_name": "WanModel"}
DIFFUSERS = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "ffn_dim": 13824,
    "num_layers": 40,
    "in_channels": 16,
}
DIFFUSERS |= {"text_dim": 4096, "freq_dim": 256, "rope_max_seq_len": 1024, "image_dim": None, "added_kv_proj_dim": None}


def test_model_folders_of_both_kinds_are_found(tmp_path):
    folder = tmp_path / "official"
    (folder / "google/umt5-xxl").mkdir(parents=True)
    for file in (
        "diffusion_pytorch_model.safetensors",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "taew2_1.pth",
    ):
        (folder / file).touch()
    (folder / "config.json").write_text(json.dumps(OFFICIAL))
    found = folders.find_model(folder)
    assert found.config == wan.wan_1_3b() and found.vae == folder / "Wan2.1_VAE.pth"
    assert found.tiny_vae == folder / "taew2_1.pth" and found.tokenizer == folder / "google/umt5-xxl"
    folder = tmp_path / "diffusers"
    for file in (
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/tokenizer.json",
    ):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).touch()
    (folder / "transformer/config.json").write_text(json.dumps(DIFFUSERS))
    found = folders.find_model(folder)
    assert found.config == wan.wan_14b() and found.tiny_vae is None and found.tokenizer == folder / "tokenizer"
    assert found.transformer == folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="diffusers lacks: vae .looked for Wan2.1_VAE.pth, .*; tiny_vae .looked for taew2"
    ):
        folders.find_model(folder, ("transformer", "vae", "tiny_vae"))
    with pytest.raises(ValueError, match="model folder .*none does not exist"):
        folders.find_model(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (OFFICIAL | {"model_type": "i2v"}, "model_type is 'i2v', allowed: 't2v'; image-to-video .* not supported"),
        (DIFFUSERS | {"added_kv_proj_dim": 5120}, "added_kv_proj_dim is 5120, .* not supported"),
        (OFFICIAL | {"in_dim": 36}, "36 channels in and 16 out"),
        (OFFICIAL | {"num_heads": 7}, "dim is 1536, num_heads 7"),
        (OFFICIAL | {"ffn_dim": "8960"}, "ffn_dim is '8960', it must be a number above 0"),
        ({"dim": 8}, "config.json lacks ffn_dim, num_heads, .*: it is not the config.json of a Wan2.1 transformer"),
        ([], "holds no table of sizes"),
        ("{", "cannot be read from it"),
        (None, "cannot be read from it"),
    ],
)
def test_sizes_the_network_cannot_have_are_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        folders.read_config(tmp_path / "config.json")
