"""Malicious PyTorch files and tokenizers: each gives a one-line error, and no code in them is executed."""

import base64
import json
import os
import pickle
import struct
import sys
import time
import warnings
import zipfile

import numpy as np
import pytest

from sf_jax.inference import tokenizer as tokenizers
from sf_jax.weights import torch_archive, torch_io
from sf_jax.weights.files import open_tensors
from tests import wan_folder
from tests.helpers import refused
from tests.test_weights import TORCH

# PyTorch's files


@pytest.mark.parametrize("version", ["1.13.1", "2.4.0", "2.5.1+cu121", "2.9.1", "x"])
def test_old_versions_of_pytorch_are_refused(version, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    monkeypatch.setattr(sys.modules["torch"], "__version__", version, raising=False)
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04" + bytes(60))
    assert f"PyTorch is {version}, in which" in refused(open_tensors, tmp_path / "a.pt")
    for good in ("2.10.0", "2.13.0+cpu", "3.0"):
        monkeypatch.setattr(sys.modules["torch"], "__version__", good)
        torch_io._import_torch(tmp_path / "a.pt")


class Harmful:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def advice_free(path, message=""):
    """Checks for a one-line error without warnings and without PyTorch's advice on unsafe loading."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = refused(open_tensors, path)
    assert message in text, text
    for word in ("weights_only", "torch.load", "trust", "arbitrary", "PyTorch 2.6"):
        assert word not in text
    return text


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_all_protocols_are_refused_without_advice(protocol, tmp_path, capfd):
    torch = pytest.importorskip("torch", reason=TORCH)
    held = {"w": torch.ones(2), "x": Harmful(tmp_path / "made")}
    for zipped in (True, False):
        torch.save(held, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        advice_free(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"x": Harmful(tmp_path / "made")}, protocol))
    advice_free(tmp_path / "a.pt")
    assert not (tmp_path / "made").exists() and capfd.readouterr() == ("", "")


def test_torchscript_is_called_by_name(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    path = tmp_path / "a.pt"
    path.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(path))
    advice_free(path, "is a TorchScript archive")


def repacked(path, **changes):
    """Rewrites an archive of `torch.save` with other entries (name -> content, None drops it), or compressed."""
    compression = changes.pop("compression", zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.split("/", 1)[1]: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in (entries | changes).items():
            if content is not None:
                archive.writestr(f"a/{name}", content)


def test_numbers_have_the_size_that_is_told(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    path = tmp_path / "a.pt"
    for size in (4, 44):
        torch.save({"v": torch.ones(10), "inner": {"w": torch.ones(1000)}}, path)
        repacked(path, **{"data/0": bytes(size)})
        advice_free(path, "no record of it has so many")
    torch.save({"v": torch.ones(10), "w": torch.ones(1000)[3:]}, path)
    with open_tensors(path) as tensors:
        assert tensors["w"].shape == (997,)


def test_archives_that_are_more_than_they_seem(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason=TORCH)
    path = tmp_path / "a.pt"

    def saved():
        torch.save({"w": torch.ones(1000)}, path)
        return path

    with open_tensors(saved()) as tensors:
        assert tensors["w"].sum() == 1000
    repacked(saved(), compression=zipfile.ZIP_DEFLATED)
    advice_free(path, "is compressed")
    began = time.monotonic()
    repacked(saved(), compression=zipfile.ZIP_DEFLATED, **{"data.pkl": b"\x80\x02" + b"]" * (64 << 20)})
    assert path.stat().st_size < 1_000_000
    advice_free(path, "is compressed")
    repacked(saved(), **{"data.pkl": b"\x80\x02" + b"]" * (20 << 20) + b"."})
    advice_free(path, "at most 16777216 are read")
    repacked(saved(), **{"data.pkl": b"\x80\x02" + b"]0" * 2_000_000 + b"N."})
    advice_free(path, "more than 1000000 instructions")
    repacked(saved(), **{"data.pkl": None})
    advice_free(path, "has no single data.pkl")
    with zipfile.ZipFile(saved(), "a") as archive:
        archive.comment = b"x"
    advice_free(path, "overlap or are hidden")
    saved().write_bytes(path.read_bytes()[:-30])
    advice_free(path, "no readable PyTorch file")
    assert time.monotonic() - began < 30
    monkeypatch.setattr(torch_archive, "MAX_PICKLE", 100)
    torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    advice_free(path, "more than 1000000 instructions or 100 bytes")


def test_tensors_must_have_their_numbers_in_the_file(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    path = tmp_path / "a.pt"
    for tensor, message in (
        (torch.ones(1).expand(100_000, 100_000), "repeats its 4 bytes to 40000000000"),
        (torch.ones(100).as_strided((50, 51), (1, 1)), "repeats its 400 bytes to 10200"),
        (torch.eye(3).to_sparse(), "sparse tensor"),
        (torch.zeros(2, dtype=torch.complex64), "it is of torch.complex64"),
        (torch.ones(2, device="meta"), "device meta"),
        (torch.ones(2).to(torch.float8_e4m3fnuz), "it is of torch.float8_e4m3fnuz"),
    ):
        torch.save({"w": tensor}, path)
        advice_free(path, message)
    base = torch.ones(10_000)
    torch.save({f"w{i}": base for i in range(20)}, path)
    advice_free(path, "share them more than 4 times")
    torch.save({"a": base, "b": base, "c": base[10:20], "d": torch._neg_view(base)[:2]}, path)
    with open_tensors(path) as tensors:  # tied tensors, slices and negated views are fine
        assert len(tensors) == 4 and tensors["c"].shape == (10,) and tensors["d"].tolist() == [-1, -1]
    torch.save({"x" * 1000: base}, path)
    advice_free(path, "has 1000 characters")
    torch.save({3: base}, path)
    advice_free(path, "its key is an int")


def test_quantized_and_nested_tensors_are_called_by_name(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    path = tmp_path / "a.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"w": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.quint8)}, path)
        advice_free(path, "quantized, torch.quint8")
        torch.save({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, path)
        advice_free(path, "nested tensor")


# tokenizers


def tokenizer_with(folder, **changes):
    """Writes a tokenizer.json with some values changed."""
    stored = json.loads(wan_folder.tokenizer().to_str())
    for name, value in changes.items():
        *groups, field = name.split("__")
        group = stored
        for part in groups:
            group = group[part]
        group[field] = {**group[field], **value} if isinstance(group[field], dict) and field == "vocab" else value
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"model__vocab": {"cat": 2**31}},
        {"model__unk_token": "<nope>"},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"model": {"type": "evil"}},
    ],
)
def test_tokenizers_that_panic(changes, tmp_path, capfd):
    assert "is no readable tokenizer" in refused(tokenizers.load_tokenizer, tokenizer_with(tmp_path, **changes))
    assert capfd.readouterr() == ("", "")
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"  # stderr is restored


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(steps, key="normalizers"):
    return {"type": "Sequence", key: steps}


LONGER = replace({"String": "a"}, "a" * 100)
# A character map: 4 bytes with the length of the search tree, the tree, and the replacements.
CHARSMAP = base64.b64encode(struct.pack("<II", 4, 0) + b"a" * 5000 + b"\0").decode()


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": sequence([LONGER] * 6)},
        {"normalizer": sequence([sequence([LONGER]), sequence([sequence([LONGER] * 2)])])},
        {"normalizer": sequence([replace({"Regex": "a|"}, "a" * 30)] * 4)},
        {"normalizer": sequence([{"type": "Prepend", "prepend": "a" * 9_000_000}, replace({"String": "a"}, "aa")])},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
        {"normalizer": sequence([{"type": "NFKC"}] * 100)},
        {"pre_tokenizer": sequence([{"type": "ByteLevel"}] * 30, "pretokenizers")},
        {"normalizer": sequence([{"type": "ByteLevel"}] * 30)},
        {
            "post_processor": sequence(
                [{"type": "TemplateProcessing", "single": [{"Sequence": {}}] * 2}] * 30, "processors"
            )
        },
    ],
)
def test_tokenizers_that_make_texts_longer_and_longer(changes, tmp_path):
    message = refused(tokenizers.load_tokenizer, tokenizer_with(tmp_path, **changes))
    assert "times longer" in message or "has 102 steps" in message


def test_tokenizers_that_make_texts_a_little_longer(tmp_path):
    steps = [{"type": "NFKC"}, replace({"Regex": " {2,}"}, " "), replace({"String": "cat"}, "dog")]
    tokenizer = tokenizers.load_tokenizer(tokenizer_with(tmp_path, normalizer=sequence(steps)))
    assert np.array_equal(*(tokenizer.encode([text])[0] for text in ("a cat", "a dog")))


def test_panics_are_caught_and_interrupts_are_not(tmp_path):
    class PanicException(BaseException):
        pass

    class Backend:
        def __init__(self, error):
            self.error = error

        def encode(self, text):
            raise self.error

    for error in (PanicException("oh"), OverflowError("oh"), Exception("oh")):
        assert "the tokenizer cannot take 'a cat' (oh)" in refused(
            tokenizers.Tokenizer(Backend(error), 4).encode, ["a cat"]
        )
    for error in (KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(error)):
            tokenizers.Tokenizer(Backend(error), 4).encode(["a cat"])


def test_long_prompts_are_cut_before_they_are_tokenized(tmp_path):
    tokenizer = tokenizers.load_tokenizer(tokenizer_with(tmp_path))
    began = time.monotonic()
    whole, _ = tokenizer.encode(["a cat in the snow " * 400])
    ids, mask = tokenizer.encode(["a cat in the snow " * 600_000, " " * 1_000_000 + "a cat", "x" * 10_000_000])
    assert time.monotonic() - began < 5
    assert ids[0].tolist() == whole[0].tolist() and mask[0].sum() == 512
    assert ids[1, :3].tolist() == tokenizer.encode(["a cat"])[0][0, :3].tolist()


def test_numbers_of_tokens_beyond_the_embedding_show(tmp_path):
    assert tokenizers.load_tokenizer(tokenizer_with(tmp_path, model__vocab={"snow": 1000})).vocab == 1001
