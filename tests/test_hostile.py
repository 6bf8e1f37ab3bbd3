"""Malicious or accidentally harmful files: each gives a one-line error, in little time and memory."""

import json
import struct
import time

import pytest

from sf_jax import messages, strict_json
from sf_jax.config import from_dict
from sf_jax.data import captions, shards
from sf_jax.inference import scenes, stream_files
from sf_jax.inference import tokenizer as tokenizers
from sf_jax.models import attention, text, tiny_vae, umt5, vae, wan
from sf_jax.rollout import RolloutConfig
from sf_jax.weights import folders, package
from sf_jax.weights.files import open_tensors
from sf_jax.weights.recognize import recognize
from tests import wan_folder
from tests.helpers import random_params, refused
from tests.test_shards import make, plan

DEEP = "[" * 100_000


def safetensors(path, shapes, metadata=None, numbers=b""):
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return path


# JSON


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP, "nested deeper than 64 levels"),
        ("[" * 900 + "]" * 900, "nested deeper than 64 levels"),
        ('{"a": ' * 70 + "1" + "}" * 70, "nested deeper than 64 levels"),
        ('{"a": Infinity}', "the number Infinity"),
        ('{"a": NaN}', "the number NaN"),
        ('{"a": 1e999}', "the number '1e999'"),
        (f'{{"a": 1{"0" * 5000}}}', "at most 64 bits"),
        ('"abc"', "it holds a text, it must hold an object"),
        ("3", "it holds a number"),
        ("null", "it holds null"),
        ("[]", "it holds a list"),
        ("{", "Expecting"),
        (b"\xff{}", "no text in UTF-8"),
    ],
)
def test_json_is_read_within_limits(content, message, tmp_path):
    assert message in refused(strict_json.parse, content)
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refused(strict_json.read, tmp_path / "a.json")


def test_json_within_the_limits(tmp_path):
    value = {"a": [1, 2.5, -(2**63), 2**64 - 1, None, True, {"b": "\u2028"}]}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(value), encoding="utf-8")
    assert strict_json.read(tmp_path / "a.json") == value
    assert strict_json.parse('{"a": -Infinity}', finite=False) == {"a": -float("inf")}  # diffusers writes this
    assert "longer than 10 bytes" in refused(strict_json.read, tmp_path / "a.json", max_bytes=10)


@pytest.mark.parametrize("content", [DEEP, '{"a": ' * 100 + "1" + "}" * 100])
def test_deep_json_in_every_file(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' + content)
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(content)
    for read in (
        lambda: folders.read_config(path),
        lambda: folders.read_solver(tmp_path),
        lambda: open_tensors(path),
        lambda: scenes.read_schedule(path),
        lambda: captions.read_prompts(tmp_path / "rows.jsonl"),
        lambda: tokenizers.load_tokenizer(tmp_path),
        lambda: package._parse(path, content),
    ):
        refused(read)


def test_deep_json_in_data_folders(tmp_path):
    folder = tmp_path / "data"
    shards.write(plan(folder), make)
    for name in (shards.RECIPE, shards.INFO, shards.FEATURES, shards.DIGESTS):
        good = (folder / name).read_text()
        (folder / name).write_text(DEEP)
        assert name in refused(shards.open_records, folder, "things")
        (folder / name).write_text(good)
    assert len(shards.open_records(folder, "things")) == 10


def test_deep_json_in_a_saved_stream(tmp_path):
    path = safetensors(tmp_path / "s.safetensors", {}, {"format": stream_files.FORMAT, "spec": DEEP, "host": "{}"})
    assert "is damaged (it is nested" in refused(stream_files.read, path, None, None, None)


# messages


def test_what_is_quoted_is_cut():
    long = "x" * 10_000_000
    assert messages.quoted("a b") == "'a b'" and messages.shortened("a\n b") == "a b"
    assert (
        len(messages.quoted(long)) < 90 and len(messages.quoted([long])) < 90 and len(messages.shortened(long)) <= 160
    )
    embedding = text.WordEmbedding()
    assert "unknown word 'xxx" in refused(embedding.encode, [long])
    assert "allowed: at most 10" in refused(embedding.encode, ["a " * 1_000_000])
    assert "kind is 'xxx" in refused(from_dict, {"stage": long})[:200].replace("stage is", "kind is")
    assert "unknown config key xxx" in refused(from_dict, {long: 1})


def test_rows_of_tables_are_cut(tmp_path):
    path = tmp_path / "p.jsonl"
    for row in ({"prompt": [1] * 1_000_000}, {"x" * 1_000_000: "a"}):
        path.write_text(json.dumps(row))
        refused(captions.read_prompts, path)


# sizes


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        (wan.WanConfig, {"num_layers": 10**9}, "num_layers is 1000000000: it must be at most 1000"),
        (wan.WanConfig, {"dim": 10**9}, "dim is 1000000000: it must be at most 65536"),
        (wan.WanConfig, {"num_heads": "x"}, "num_heads is 'x': it must be a whole number"),
        (wan.WanConfig, {"text_len": 10**9}, "text_len is 1000000000: it must be at most"),
        (wan.WanConfig, {"patch": (1, 10**6, 1)}, "must be at most 64"),
        (wan.WanConfig, {"eps": float("inf")}, "eps is inf"),
        (wan.WanConfig, {"eps": float("nan")}, "eps is nan"),
        (wan.WanConfig, {"eps": 0.0}, "eps is 0.0"),
        (umt5.Umt5Config, {"num_layers": 10**9}, "num_layers is 1000000000: it must be at most"),
        (umt5.Umt5Config, {"vocab": 10**9}, "vocab is 1000000000: it must be at most"),
        (umt5.Umt5Config, {"eps": float("nan")}, "eps is nan"),
        (vae.VaeConfig, {"dim": 10**9}, "dim is 1000000000: it must be at most"),
        (vae.VaeConfig, {"dim": 0}, "dim is 0: it must be at least 1"),
        (vae.VaeConfig, {"dim_mult": (1,) * 100, "temporal_downsample": (True,) * 99}, "at most 6 numbers"),
        (vae.VaeConfig, {"num_res_blocks": 10**6}, "num_res_blocks is 1000000: it must be at most"),
        (tiny_vae.TinyVaeConfig, {"blocks": 10**9}, "blocks is 1000000000: it must be at most"),
        (tiny_vae.TinyVaeConfig, {"widths": (10**9, 1, 1, 1)}, "at most 16384 and 16"),
        (RolloutConfig, {"shift": float("nan")}, "shift is nan"),
        (RolloutConfig, {"shift": 1e30}, "shift is 1e[+]30: it must be at most 1000"),
        (RolloutConfig, {"chunk": 10**12}, "chunk is 1000000000000: at most 1024 latent frames"),
        (RolloutConfig, {"window": 10**12}, "window is 1000000000000: at most 1024 latent frames"),
    ],
)
def test_sizes_of_networks_are_bounded(kind, sizes, message):
    with pytest.raises(ValueError, match=message):
        kind(**sizes)


@pytest.mark.parametrize("frames", [999_999_999_999, 10**23])
def test_frames_are_compared_before_they_are_split(frames):
    assert "at most 1000000" in refused(attention.split_chunks, frames, 3)
    assert "at most 1024 latent frames" in refused(from_dict, {"stage": "teacher", "data": {"frames": frames}})
    assert "at most 1024" in refused(from_dict, {"teacher_weights": "x", "rollout_frames": [frames]})


def test_whole_numbers_that_no_float_can_hold():
    assert "grace_seconds is 1000" in refused(from_dict, {"stage": "teacher", "grace_seconds": 10**400})


def shapes_of(kind) -> dict:
    """Names and shapes in a small network's file."""
    from sf_jax.weights import mapping
    from sf_jax.weights.recognize import entries_of, param_shapes_of

    config = {"transformer": wan_folder.MODEL, "umt5": wan_folder.TEXT, "vae": wan_folder.VAE}.get(
        kind, wan_folder.TINY
    )
    return mapping.file_shapes(entries_of(kind, config, "official"), param_shapes_of(kind, config))


@pytest.mark.parametrize("kind", ["transformer", "umt5", "vae", "tiny_vae"])
def test_names_and_widths_of_absurd_networks(kind, tmp_path):
    shapes = shapes_of(kind)
    assert recognize(shapes).kind == kind
    began = time.monotonic()
    for extra in ("blocks.1000000000.attn.q.weight", f"blocks.{'9' * 200}.x", "decoder.1000000000.conv.weight"):
        guess = recognize(shapes | {extra: (4, 4)})
        assert guess.config is None or guess.config == recognize(shapes).config or kind == "transformer"
    for name in [*shapes][:: max(1, len(shapes) // 12)]:
        for axes in ((0,) * len(shapes[name]), (), (10**9,) * len(shapes[name])):
            guess = recognize(shapes | {name: axes})
            assert guess.kind in (kind, "unknown")
    assert time.monotonic() - began < 20


def test_safetensors_that_announce_too_much(tmp_path):
    path, began = tmp_path / "a.safetensors", time.monotonic()
    text = b"{%s}" % b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(300_000))
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert "more than 100000 tensors" in refused(open_tensors, path)
    assert time.monotonic() - began < 10
    safetensors(path, {"x" * 1_000_000: [0]})
    assert "the name of a tensor has 1000000 characters" in refused(open_tensors, path)
    safetensors(path, {"x": [0] * 1000})
    assert "'x' has 1000 axes" in refused(open_tensors, path)
    text = json.dumps({"x": {"dtype": "F32", "shape": [2] * 4000, "data_offsets": [0, 0]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    refused(open_tensors, path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A file of sf_jax, and its header."""
    path = tmp_path_factory.mktemp("package") / "student.safetensors"
    config = wan.WanConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=1, text_dim=4, freq_dim=4, channels=4)
    rollout = RolloutConfig(window=6)
    made = package.Package("student", config, rollout, 9, (6, 6), 5.0, 3.0, random_params(config, 1))
    package.save_package(path, made)
    assert package.load_package(path).config == config
    return path, json.loads(open_tensors(path).metadata["sf_jax"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "evil"}, "kind is 'evil'"),
        ({"kind": ["student"]}, "kind is"),
        ({"kind": None}, "kind is None"),
        ({"frames": "x"}, "frames is 'x'"),
        ({"frames": -1}, "frames is -1"),
        ({"frames": 10**12}, "frames is 1000000000000"),
        ({"frames": True}, "frames is True"),
        ({"size": [-6, 6]}, "size is"),
        ({"size": [0, 0]}, "size is"),
        ({"size": "ab"}, "size is 'ab'"),
        ({"size": [6]}, "size is"),
        ({"size": [10**9, 6]}, "size is"),
        ({"size": [6] * 100_000}, "size is"),
        ({"shift": "x"}, "shift is 'x'"),
        ({"shift": 0}, "shift is 0"),
        ({"shift": 10**400}, "at most 64 bits"),
        ({"guidance": 1e999}, "Infinity"),
        ({"config.num_layers": 10**9}, "num_layers is 1000000000"),
        ({"config.num_layers": 1000}, "tensors missing"),
        ({"config.dim": 10**9}, "dim is 1000000000"),
        ({"config.dim": 65536}, "patch_embedding.weight is .*16.*: by the sizes in the header"),
        ({"config.ffn_dim": 1 << 20}, "blocks.0.ffn.0.weight is"),
        ({"config.patch": [1, 10**6, 10**6]}, "patch is"),
        ({"config.eps": float("nan")}, "NaN"),
        ({"config": 3}, "must be a group of fields"),
        ({"rollout.steps": [10**9]}, "steps is"),
        ({"rollout.steps": "abc"}, "steps is 'abc'"),
        ({"rollout.window": 10**12}, "window is"),
        ({"rollout.shift": -1}, "shift is -1"),
        ({"x" * 100_000: 1}, "unknown config key xxx"),
    ],
)
def test_headers_of_packages_are_typed_and_bounded(changes, message, packed, tmp_path):
    path, header = packed
    header = json.loads(json.dumps(header))
    for name, value in changes.items():
        group, _, field = name.rpartition(".")
        (header[group] if group else header)[field] = value
    assert_header(path, json.dumps(header), message, tmp_path)


@pytest.mark.parametrize("header", ['"abc"', "3", "null", "[]", DEEP, "{", "{}", '{"kind": ' * 99 + "1" + "}" * 99])
def test_headers_of_packages_that_are_no_objects(header, packed, tmp_path):
    assert_header(packed[0], header, "was made by another version or is damaged", tmp_path)


def test_headers_of_packages_have_a_length(packed, tmp_path):
    assert_header(packed[0], " " * (2 << 20), "its header has 2097152 characters", tmp_path)


def assert_header(path, header, message, folder):
    import re

    with open_tensors(path) as stored:
        tensors = {name: stored[name] for name in stored}
    from safetensors.numpy import save_file

    save_file(tensors, folder / "a.safetensors", {"sf_jax": header})
    assert re.search(message, refused(package.load_package, folder / "a.safetensors"))
    if "missing" not in message and "by the sizes" not in message and ".weight" not in message:
        refused(package.read_header, folder / "a.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000: it must be at most 1000"),
        ({"num_layers": 10**30}, "num_layers is 1000000"),
        ({"dim": 10**9}, "dim is 1000000000"),
        ({"eps": float("inf")}, "eps is inf"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"text_len": 10**9}, "text_len is"),
        ({"ffn_dim": "x" * 100_000}, "ffn_dim is 'xxx"),
        ({"model_type": ["x"] * 100_000}, "model_type is"),
    ],
)
def test_sizes_in_config_json(changes, message, tmp_path):
    config = {"dim": 16, "ffn_dim": 16, "num_heads": 2, "num_layers": 1, "in_dim": 4, "freq_dim": 4, "eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folders.read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert message in refused(folders.read_config, tmp_path / "config.json")


def test_indices_with_long_names(tmp_path):
    path = tmp_path / "a.safetensors.index.json"
    for names in ({"a": "x" * 1_000_000}, {"a" * 1_000_000: "x"}):
        path.write_text(json.dumps({"weight_map": names}))
        assert "longer than 250 characters" in refused(open_tensors, path)
