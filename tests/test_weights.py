"""Weight files: exact round trips, and one clear line for everything else."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sf_jax.models import tiny_vae, umt5, vae, wan
from sf_jax.weights import load, mapping, transformer
from sf_jax.weights import recognize as recognize_module
from sf_jax.weights.files import open_tensors
from sf_jax.weights.recognize import NAMINGS, entries_of, recognize
from sf_jax.weights.safetensors_io import write_safetensors
from sf_jax.weights.tensors import TensorFile, empty_aligned
from tests.forked import run_command
from tests.helpers import SMALL

CONFIGS = {
    "transformer": SMALL,
    "vae": vae.VaeConfig(dim=4, z_dim=4, mean=(0.0,) * 4, std=(1.0,) * 4),
    "tiny_vae": tiny_vae.TinyVaeConfig(z_dim=4, widths=(8, 8, 4, 4), blocks=1),
    "umt5": umt5.Umt5Config(vocab=24, dim=16, dim_attn=8, dim_ffn=12, num_heads=2),
}
KINDS = [(kind, naming) for kind, namings in NAMINGS.items() for naming in namings]
BF16 = np.dtype(ml_dtypes.bfloat16)
MANIFESTS = Path(__file__).parent / "manifests"
TORCH = "reading and writing .pt files needs PyTorch"


param_shapes_of = functools.cache(recognize_module.param_shapes_of)


def network(kind: str, naming: str, dtype="float32"):
    """(map, a tree of our shapes, random tensors) of a small network; with dtype "mixed", matrices are bfloat16."""
    entries, like = entries_of(kind, CONFIGS[kind], naming), param_shapes_of(kind, CONFIGS[kind])
    rng, tensors, tied = np.random.default_rng(0), {}, {}
    for entry, (name, shape) in zip(entries, mapping.file_shapes(entries, like).items(), strict=True):
        kept = {"mixed": BF16 if len(shape) > 1 else np.float32}.get(dtype, dtype)
        tensors[name] = tied.setdefault((entry.path, entry.layer), rng.normal(size=shape).astype(kept))
    return entries, like, tensors


def in_memory(tensors: dict) -> TensorFile:
    shapes = {name: value.shape for name, value in tensors.items()}
    return TensorFile("memory", shapes, {name: value.dtype for name, value in tensors.items()}, tensors.__getitem__)


def described(shapes: dict, dtype=BF16) -> TensorFile:
    """A file with only names and shapes, no data."""

    def read(name):
        raise AssertionError(f"{name} was read")

    return TensorFile("described", shapes, dict.fromkeys(shapes, dtype), read)


def assert_same(ours, theirs: dict):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        assert ours[name].tobytes() == value.tobytes(), name


def manifest(name: str) -> dict:
    """Name -> shape of a real file; the manifests list the blocks of the transformers once."""
    stored = json.loads((MANIFESTS / f"{name}.json").read_text())
    tensors = dict(stored["tensors"])
    for block in range(stored.get("blocks", 0)):
        tensors |= {f"blocks.{block}.{name}": shape for name, shape in stored["block"].items()}
    return {name: tuple(shape) for name, shape in tensors.items()}


def shards(folder: Path, tensors: dict, count: int = 3) -> Path:
    """Writes a folder of shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        write_safetensors(folder / file, in_memory({name: tensors[name] for name in names[i::count]}))
        weight_map |= dict.fromkeys(names[i::count], file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def convert(*arguments, **options):
    return run_command("sf_jax.convert", *arguments, **options)


# Round trips


@pytest.mark.parametrize(("kind", "naming"), KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", BF16, "mixed"])
def test_file_to_params_to_file_keeps_every_byte(kind, naming, dtype, tmp_path):
    entries, like, tensors = network(kind, naming, dtype)
    write_safetensors(tmp_path / "a.safetensors", in_memory(tensors))
    with open_tensors(tmp_path / "a.safetensors") as stored:
        assert_same(stored, tensors)
        params = load.load_params(entries, stored, like, kind)
    jax.tree.map(np.testing.assert_array_equal, params, mapping.to_params(entries, tensors, like, kind))
    write_safetensors(tmp_path / "b.safetensors", load.file_tensors(entries, params))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(("kind", "naming"), [names for names in KINDS if len(NAMINGS[names[0]]) > 1])
def test_names_to_other_names_and_back_keep_every_byte(kind, naming):
    entries, _, tensors = network(kind, naming, "mixed")
    other = entries_of(kind, CONFIGS[kind], next(n for n in NAMINGS[kind] if n != naming))
    there = load.translated(entries, other, in_memory(tensors))
    assert set(there) == {entry.name for entry in other} and there.shapes != in_memory(tensors).shapes
    assert_same(load.translated(other, entries, there), tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", BF16, "mixed"])
def test_written_files_are_those_of_the_safetensors_library(dtype, tmp_path):
    tensors = network("transformer", "official", dtype)[2] | {
        "number": np.float32(3),
        "empty": np.zeros((0, 3), "int8"),
    }
    tensors = {name: np.asarray(value) for name, value in tensors.items()}
    write_safetensors(tmp_path / "ours.safetensors", in_memory(tensors), {"format": "pt"})
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    with open_tensors(tmp_path / "theirs.safetensors") as stored:
        assert_same(stored, tensors)
        assert stored.metadata == {"format": "pt"}


def test_types_of_layers_that_differ_are_widened():
    entries, like, tensors = network("transformer", "official", BF16)
    tensors["blocks.1.ffn.0.bias"] = tensors["blocks.1.ffn.0.bias"].astype(np.float32) + 1e-4
    params = load.load_params(entries, in_memory(tensors), like, "transformer")
    assert params["blocks"]["ffn_in"]["bias"].dtype == np.float32 and params["head"]["bias"].dtype == BF16
    assert params["blocks"]["ffn_in"]["bias"][1].tobytes() == tensors["blocks.1.ffn.0.bias"].tobytes()
    jax.tree.map(np.testing.assert_array_equal, params, mapping.to_params(entries, tensors, like, "transformer"))


def test_large_matrices_are_turned_in_tiles():
    source = np.random.default_rng(0).normal(size=(300, 131)).astype(BF16)
    for dtype in (BF16, np.dtype(np.float32)):
        target = np.empty((131, 300), dtype)
        load._copy(source.T, target)
        np.testing.assert_array_equal(target, source.T.astype(dtype))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU's device memory is host memory")
def test_a_cpu_takes_host_arrays_over():
    host = empty_aligned((33, 5), np.float32)
    assert jax.device_put(host, may_alias=True).unsafe_buffer_pointer() == host.ctypes.data


# Names


@pytest.mark.parametrize(
    ("name", "kind", "naming", "config", "title"),
    [
        ("wan2.1-t2v-1.3b.official", "transformer", "official", wan.wan_1_3b(), "transformer of Wan2.1-T2V-1.3B"),
        ("wan2.1-t2v-1.3b.diffusers", "transformer", "diffusers", wan.wan_1_3b(), "transformer of Wan2.1-T2V-1.3B"),
        ("wan2.1-t2v-14b.official", "transformer", "official", wan.wan_14b(), "transformer of Wan2.1-T2V-14B"),
        ("wan2.1-t2v-14b.diffusers", "transformer", "diffusers", wan.wan_14b(), "transformer of Wan2.1-T2V-14B"),
        ("wan2.1-vae.official", "vae", "official", vae.wan_vae(), "VAE of Wan2.1"),
        ("wan2.1-vae.diffusers", "vae", "diffusers", vae.wan_vae(), "VAE of Wan2.1"),
        ("umt5-xxl-encoder.official", "umt5", "official", umt5.umt5_xxl(), "text encoder UMT5-XXL"),
        ("umt5-xxl-encoder.transformers", "umt5", "transformers", umt5.umt5_xxl(), "text encoder UMT5-XXL"),
    ],
)
def test_real_files_are_recognized_and_map_in_both_directions(name, kind, naming, config, title):
    shapes = manifest(name)
    guess = recognize(shapes)
    assert (guess.kind, guess.naming, guess.config, guess.title) == (kind, naming, config, title)
    entries, like = entries_of(kind, config, naming), param_shapes_of(kind, config)
    load.check(entries, described(shapes), like, kind)
    assert mapping.file_shapes(entries, like) == shapes
    other = next(n for n in NAMINGS[kind] if n != naming)
    there = load.translated(entries, entries_of(kind, config, other), described(shapes))
    assert there.shapes == manifest(name.replace(naming, other))


def test_wrappers_and_prefixes_are_taken_off_and_names_that_meet_refused():
    entries, like, tensors = network("transformer", "official")
    for wrapper in ("model.", "model.diffusion_model.", "_orig_mod.", "model._fsdp_wrapped_module."):
        wrapped = {wrapper + n.replace("attn.", "attn._checkpoint_wrapped_module."): v for n, v in tensors.items()}
        assert_same(load.normalized(in_memory(wrapped), tensors), tensors)
        assert recognize(in_memory(wrapped).shapes).kind == "transformer"
    both = {f"model.{name}": value for name, value in tensors.items()} | {"head.head.bias": tensors["head.head.bias"]}
    with pytest.raises(ValueError, match="69 names begin with 'model.', others do not"):
        load.load_params(entries, in_memory(both), like, "transformer")
    with pytest.raises(ValueError, match=r"1 unexpected \['model.other'\]"):
        load.load_params(entries, in_memory(tensors | {"model.other": np.zeros(1)}), like, "transformer")


def test_the_encoder_of_a_tiny_vae_is_left_out():
    entries, like, tensors = network("tiny_vae", "official")
    whole = in_memory(tensors | {"encoder.0.weight": np.zeros((4, 3, 3, 3), np.float32)})
    assert recognize(whole.shapes).config == CONFIGS["tiny_vae"]
    jax.tree.map(
        np.testing.assert_array_equal,
        load.load_params(entries, whole, like, "tiny VAE"),
        mapping.to_params(entries, tensors, like, "tiny VAE"),
    )


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("wan2.1-vae.official", "seems to be: VAE of Wan2.1, official names"),
        ("wan2.1-t2v-14b.official", "must be .1536,.*transformer of Wan2.1-T2V-14B, official names"),
        ("wan2.1-t2v-1.3b.diffusers", "transformer of Wan2.1-T2V-1.3B, diffusers names"),
        ("umt5-xxl-encoder.official", "text encoder UMT5-XXL, official names"),
        ({"blocks.0.cross_attn.k_img.weight": (5120, 5120)}, "image-to-video transformer .* not supported"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (8, 8)}, "adapter .LoRA: .* give it as lora"),
        ({"blocks.3.self_attn.q.weight": (8, 8)}, "part of a transformer: give the folder or the index"),
        ({"a": (1,)}, r"file of another kind \(1 tensors: a\)"),
    ],
)
def test_other_files_are_refused_with_what_they_are(shapes, message):
    shapes = manifest(shapes) if isinstance(shapes, str) else shapes
    config = wan.wan_1_3b()
    with pytest.raises(ValueError, match=message) as refusal:
        entries, like = transformer.entries(config), wan.param_shapes(config)
        load.load_params(entries, described(shapes), like, "transformer of Wan2.1-T2V-1.3B")
    assert len(str(refusal.value)) < 1500 and "\n" not in str(refusal.value)


# Devices

SHARDED = """
import jax
import numpy as np
from sf_jax.config import MeshConfig
from sf_jax.training import sharding
from sf_jax.weights import load
from sf_jax.weights.files import open_tensors
from tests.test_weights import network
import sys

assert len(jax.devices()) == 8
entries, like, _ = network("transformer", "official")
mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
with open_tensors(sys.argv[1]) as stored:
    plain = load.load_params(entries, stored, like, "transformer")
    reads = []
    counted = stored.renamed({name: name for name in stored})
    read, counted._read = counted._read, lambda name: reads.append(name) or read(name)
    shardings = sharding.tree_shardings(like, mesh)
    split = load.load_params(entries, counted, like, "transformer", shardings=shardings)
assert sorted(reads) == sorted(stored), "each tensor is read once"
jax.tree.map(np.testing.assert_array_equal, plain, split)
assert jax.tree.all(jax.tree.map(lambda array, wanted: array.sharding == wanted, split, shardings))
kernel = split["blocks"]["ffn_in"]["kernel"]
print(kernel.sharding.shard_shape(kernel.shape), jax.jit(lambda x: (x * 2).sum())(kernel) == 2 * np.sum(kernel))
"""


def test_eight_devices_get_their_shards(tmp_path):
    tensors = network("transformer", "official")[2]
    write_safetensors(tmp_path / "a.safetensors", in_memory(tensors))
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2, 16, 24)"), done.stdout


# The command


def test_convert_renames_and_says_so(tmp_path):
    tensors = network("transformer", "official", "mixed")[2]
    shards(tmp_path / "in", tensors)
    done = convert(f"--input={tmp_path}/in", f"--output={tmp_path}/there.safetensors", "--to=diffusers")
    assert done.returncode == 0, done.stderr
    assert "2 layers" in done.stdout and f"{len(tensors)} tensors, official -> diffusers" in done.stdout
    assert_same(load_file(tmp_path / "there.safetensors"), network("transformer", "diffusers", "mixed")[2])
    options = [f"--output={tmp_path}/back.safetensors", "--to=official", "--dtype=bfloat16"]
    done = convert(f"--input={tmp_path}/there.safetensors", *options)
    assert done.returncode == 0, done.stderr
    assert_same(load_file(tmp_path / "back.safetensors"), {n: v.astype(BF16) for n, v in tensors.items()})


@pytest.mark.slow
def test_convert_reads_and_writes_torch(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    tensors = network("transformer", "official", "mixed")[2]
    write_safetensors(tmp_path / "a.safetensors", in_memory(tensors))
    options = [f"--input={tmp_path}/a.safetensors", f"--output={tmp_path}/b.pt", "--part=generator_ema"]
    done = convert(*options)
    assert done.returncode == 0, done.stderr
    held = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(held) == ["generator_ema"] and set(held["generator_ema"]) == {f"model.{name}" for name in tensors}
    done = convert(f"--input={tmp_path}/b.pt", f"--output={tmp_path}/c.safetensors")
    assert done.returncode == 0 and "(generator_ema)" in done.stdout, done.stderr
    assert_same(load_file(tmp_path / "c.safetensors"), tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=none.safetensors"], "none.safetensors does not exist"),
        (["--input=VAE", "--to=transformers"], "to is 'transformers': for a VAE of dim 4"),
        (["--input=VAE", "--part=critic"], "part is 'critic': .* is a single state dict"),
        (["--input=OTHER"], "this is a file of another kind"),
    ],
)
def test_convert_refuses_in_one_line_and_leaves_nothing(arguments, message, tmp_path):
    inputs = {"VAE": network("vae", "official")[2], "OTHER": {"a": np.zeros(3)}}
    for name, tensors in inputs.items():
        if any(name in argument for argument in arguments):
            write_safetensors(tmp_path / name, in_memory(tensors))
            arguments = [argument.replace(name, f"{tmp_path}/{name}") for argument in arguments]
    done = convert(*arguments, f"--output={tmp_path}/out/a.safetensors")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )
    assert message.split(" .* ")[0] in done.stderr and not any((tmp_path / "out").iterdir())


def test_guess_of_a_package_and_of_odd_heads():
    assert recognize({}, {"sf_jax": "{}"}).kind == "package"
    shapes = mapping.file_shapes(transformer.entries(SMALL), wan.param_shapes(SMALL))
    assert dataclasses.replace(recognize(shapes).config, num_heads=2, text_len=3, remat="none") == SMALL
