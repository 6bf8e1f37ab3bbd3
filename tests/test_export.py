"""Weights for other programs: folders for diffusers, the official code and ComfyUI, and their model cards."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors

from sf_jax.config import MeshConfig
from sf_jax.inference.load import causal_header, load_pipeline
from sf_jax.inference.tokenizer import load_tokenizer
from sf_jax.models import umt5, vae, wan
from sf_jax.rollout import RolloutConfig
from sf_jax.training import sharding, stages
from sf_jax.weights import export, export_folder, model_configs
from sf_jax.weights.adapter_list import parse_loras
from sf_jax.weights.export_folder import Source, Target, write_folder
from sf_jax.weights.files import open_tensors
from sf_jax.weights.folders import find_model, read_config, read_solver
from sf_jax.weights.networks import load_network
from sf_jax.weights.package import Package, load_package, read_header, save_package
from tests.helpers import SMALL, random_params, relative
from tests.test_weights import assert_same, convert, network
from tests.wan_folder import MODEL, WORDS, make_folder

EXTRA = "needs the [parity] extra"
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
ROLLOUT = RolloutConfig(steps=(1000, 500), shift=3.0, chunk=2, window=6, sink=2, positions="relative")


def unigram() -> tokenizers.Tokenizer:
    """A tokenizer like UMT5's: a SentencePiece unigram model with `</s>` after every text."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS)]
    made = tokenizers.Tokenizer(models.Unigram(words, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made


def student(path: Path, kind: str = "student", **changes) -> Path:
    """Writes a file like sf_jax.train's, with the sizes of the model folder."""
    save_package(path, Package(kind, MODEL, ROLLOUT, 6, (4, 4), 3.0, 1.0, random_params(MODEL, 3), **changes))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """An official model folder with a tokenizer like UMT5's and a student."""
    folder = make_folder(tmp_path_factory.mktemp("export") / "wan")
    unigram().save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    (folder / "google" / "umt5-xxl" / "spiece.model").write_bytes(b"\x0a\x07a model")
    (folder / "LICENSE.txt").write_text("the license of the base")
    (folder / "taew2_1.safetensors").unlink()
    student(folder / "student.safetensors")
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(source, tmp_path_factory) -> Path:
    """The same model in diffusers' layout, with a sharded transformer and VAE."""
    folder = tmp_path_factory.mktemp("diffusers") / "pipeline"
    write_folder(Source(source), Target(folder, "diffusers", shard_bytes=200_000))
    return folder


def inventory(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Folders


def test_a_pipeline_folder_has_the_files_that_diffusers_writes(pipeline_folder, source):
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    # Wan-AI/Wan2.1-T2V-1.3B-Diffusers has these classes.
    assert index == {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    assert read_config(pipeline_folder / "transformer" / "config.json") == read_config(source / "config.json")
    assert read_solver(pipeline_folder) == ("unipc", 8.0), "what generate takes for the official folder"
    assert (pipeline_folder / "LICENSE.txt").read_text() == "the license of the base"
    assert (pipeline_folder / "tokenizer" / "tokenizer.json").read_bytes() == (
        source / "google" / "umt5-xxl" / "tokenizer.json"
    ).read_bytes()
    assert not list(pipeline_folder.rglob("*.tmp"))


def test_shards_hold_each_tensor_once_and_no_more_than_the_limit(pipeline_folder):
    folder = pipeline_folder / "vae"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert list(files) == [
        f"diffusion_pytorch_model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert {name: file for file, held in files.items() for name in held} == index["weight_map"]
    sizes = [sum(value.nbytes for value in held.values()) for held in files.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(size <= 200_000 or len(held) == 1 for size, held in zip(sizes, files.values(), strict=True))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2KiB", 2048), ("7", 7), ("1gib", 2**30)]
)
def test_sizes(text, size):
    assert export.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5TB", "5 G B", "1e3MB", "nan", "9" * 40])
def test_no_sizes(text):
    with pytest.raises(ValueError, match="max_shard_size is .*such as 5GB"):
        export.parse_size(text)


def test_official_to_diffusers_and_back_keeps_every_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr(export_folder, "_has_torch", lambda: False)
    write_folder(Source(source), Target(tmp_path / "there", "diffusers"))
    written = write_folder(Source(tmp_path / "there"), Target(tmp_path / "back", "official"))
    assert any("PyTorch is not installed" in note for note in written.notes)
    before, after = inventory(source), inventory(tmp_path / "back")
    weights = {name for name in before if name.endswith(".safetensors") and name != "student.safetensors"}
    for name in weights:
        assert_same(load_file(tmp_path / "back" / name), load_file(source / name))
    # The tokenizer's config is new: the source has none.
    added = {"google/umt5-xxl/tokenizer_config.json"}
    assert set(after) == set(before) - {"student.safetensors"} | added
    find_model(tmp_path / "back")
    assert read_config(tmp_path / "back" / "config.json") == read_config(source / "config.json")


def test_a_student_takes_the_place_of_the_transformer_and_its_header_stays(source, tmp_path):
    checkpoint = source / "student.safetensors"
    written = write_folder(Source(source, checkpoint), Target(tmp_path / "out", "diffusers"))
    path = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert read_header(path) == read_header(checkpoint)
    assert read_solver(tmp_path / "out") == ("unipc", 3.0)
    assert any("this transformer is causal" in note for note in written.notes)
    pipes = [
        load_pipeline(folder, file, dtype="float32", vae="none")
        for folder, file in ((source, checkpoint), (tmp_path / "out", path))
    ]
    assert pipes[0].rollout == pipes[1].rollout and pipes[1].rollout.steps == (1000, 500)
    jax.tree.map(np.testing.assert_array_equal, pipes[0].params, pipes[1].params)


def test_training_starts_from_a_student_under_the_names_of_diffusers(source, tmp_path):
    write_folder(Source(source / "student.safetensors"), Target(tmp_path / "out", "diffusers", shard_bytes=60_000))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    (ours, header), (theirs, same) = (
        stages._load(str(path), dataclasses.replace(MODEL, remat="none"), "init_weights", "float32", mesh)
        for path in (
            source / "student.safetensors",
            tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json",
        )
    )
    assert header.kind == "student" and header == same
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_folder_whose_transformer_is_a_student_is_no_bidirectional_model(source, tmp_path):
    write_folder(Source(source, source / "student.safetensors"), Target(tmp_path / "out", "diffusers"))
    with pytest.raises(ValueError, match=r"is a causal student \(its header says so\): give it as checkpoint"):
        load_pipeline(tmp_path / "out", dtype="float32")


def test_one_network_gets_a_folder_of_its_own(source, tmp_path):
    write_folder(Source(source / "student.safetensors"), Target(tmp_path / "out", "diffusers", np.dtype(np.float16)))
    assert sorted(inventory(tmp_path / "out")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert read_config(tmp_path / "out" / "config.json").num_heads == MODEL.num_heads
    tensors = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float16)}
    write_folder(Source(tmp_path / "out"), Target(tmp_path / "back", "official"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_heads"] == MODEL.num_heads


def test_adapters_are_merged_into_a_folders_transformer(source, tmp_path):
    kernel = load_file(source / "student.safetensors")["blocks.0.self_attn.q.weight"]
    rng = np.random.default_rng(0)
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((2, MODEL.dim), (MODEL.dim, 2)))
    names = (f"diffusion_model.blocks.0.self_attn.q.lora_{side}.weight" for side in "AB")
    save_file(dict(zip(names, (down, up), strict=True)), tmp_path / "lora.safetensors")
    loras = tuple(parse_loras([f"{tmp_path}/lora.safetensors:0.5"]))
    write_folder(Source(source, source / "student.safetensors", None, loras), Target(tmp_path / "out", "diffusers"))
    path = tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"
    written = load_file(path)["blocks.0.attn1.to_q.weight"]
    np.testing.assert_allclose(written, kernel + 0.5 * up @ down, rtol=0, atol=1e-6)
    assert read_header(path) == read_header(source / "student.safetensors")


def test_a_checkpoint_with_other_heads_is_refused(source, tmp_path):
    other = dataclasses.replace(MODEL, num_heads=4)
    save_package(
        tmp_path / "a.safetensors", Package("student", other, ROLLOUT, 6, (4, 4), 3.0, 1.0, random_params(MODEL))
    )
    with pytest.raises(
        ValueError, match=r"has 4 heads and eps 1e-06 \(its header\): the model folder's config.json says 2"
    ):
        write_folder(Source(source, tmp_path / "a.safetensors"), Target(tmp_path / "out", "diffusers"))


def test_the_header_is_followed_in_shards(source, tmp_path):
    write_folder(Source(source / "student.safetensors"), Target(tmp_path / "out", "diffusers", shard_bytes=60_000))
    index = tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json"
    for path in (tmp_path / "out", index):
        assert causal_header(path) == read_header(source / "student.safetensors")
    student(tmp_path / "teacher.safetensors", "teacher")
    write_folder(Source(tmp_path / "teacher.safetensors"), Target(tmp_path / "wrong", "official", shard_bytes=60_000))
    with pytest.raises(ValueError, match=r"is a bidirectional network \(its header says so\)"):
        causal_header(tmp_path / "wrong")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "transformers"}, "to is 'transformers': for a model folder it must be one of official, diffusers"),
        ({"checkpoint": "Wan2.1_VAE.safetensors"}, "Wan2.1_VAE.safetensors: a transformer is needed; this is a VAE"),
        ({"checkpoint": "missing.pt"}, "missing.pt does not exist"),
        ({"part": "critic"}, "part is 'critic': it chooses a network of --checkpoint"),
        ({"path": "diffusion_pytorch_model.safetensors", "checkpoint": "student.safetensors"}, "for a model folder"),
        (
            {"path": "Wan2.1_VAE.safetensors", "layout": "official"},
            "the official code has a folder for the transformer",
        ),
        ({"path": "Wan2.1_VAE.safetensors", "layout": "comfy"}, "one network for ComfyUI is one file"),
        ({"path": "Wan2.1_VAE.safetensors", "layout": "transformers"}, "it must be one of official, diffusers, comfy"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(change, message, source, tmp_path):
    paths = {name: source / change[name] for name in ("path", "checkpoint") if name in change}
    with pytest.raises(ValueError, match=message):
        write_folder(
            Source(paths.get("path", source), paths.get("checkpoint"), change.get("part")),
            Target(tmp_path / "out", change.get("layout", "diffusers")),
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_stays_as_it_is(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="it holds notes.txt; give a new folder, or empty this one"):
        write_folder(Source(source), Target(tmp_path, "diffusers"))
    before = inventory(source)
    with pytest.raises(ValueError, match="it is the input"):
        write_folder(Source(source), Target(source, "official"))
    with pytest.raises(ValueError, match="there is a file of that name"):
        write_folder(Source(source), Target(tmp_path / "notes.txt", "official"))
    assert inventory(source) == before and inventory(tmp_path) == {"notes.txt": b"mine"}


def test_a_write_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(model_configs, "pipeline_index", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_folder(Source(source), Target(tmp_path / "out", "diffusers"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="the disk is full"):
        write_folder(Source(source), Target(tmp_path / "empty", "diffusers"))
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_a_disk_that_is_too_small_is_told_before_the_work(source, tmp_path, monkeypatch):
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr(export_folder.shutil, "disk_usage", lambda _: usage(10))
    with pytest.raises(OSError, match=r"0.0 GB are needed, 0.0 GB are free"):
        write_folder(Source(source), Target(tmp_path / "out", "diffusers"))
    assert not (tmp_path / "out").exists()


def test_sizes_that_nothing_tells_are_not_guessed(tmp_path):
    tensors = network("transformer", "official")[2]  # dim 32, not a multiple of the head size 128
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="nothing says how many heads it has; put the model's config.json beside it"):
        write_folder(Source(tmp_path / "a.safetensors"), Target(tmp_path / "out", "diffusers"))
    config = model_configs.config_of("transformer", SMALL, {}, official=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_folder(Source(tmp_path / "a.safetensors"), Target(tmp_path / "out", "diffusers"))
    assert read_config(tmp_path / "out" / "config.json").num_heads == SMALL.num_heads


def test_long_conversions_show_bytes(source, capsys, monkeypatch):
    monkeypatch.setattr(export, "_LONG", 1)
    with open_tensors(source / "student.safetensors") as tensors:
        written = export.read_network(tensors, "diffusers")
        with export.progress([written]) as (counted,):
            for name in counted.tensors:
                counted.tensors[name]
    assert "100%" in capsys.readouterr().err


# ComfyUI


def test_a_folder_for_comfyui_has_its_three_folders(source, tmp_path):
    written = write_folder(Source(source, source / "student.safetensors"), Target(tmp_path / "out", "comfy"))
    names = {str(path.relative_to(tmp_path / "out")) for path in written.files}
    student_file = "diffusion_models/student.safetensors"
    text_file = "text_encoders/umt5_xxl_fp32.safetensors"
    assert names == {student_file, "vae/wan_2.1_vae.safetensors", text_file, "LICENSE.txt"}
    assert any("ComfyUI takes eps 1e-06, freq_dim 256" in note for note in written.notes), "toy sizes are told of"
    assert_same(load_file(tmp_path / "out" / student_file), load_file(source / "student.safetensors"))
    assert read_header(tmp_path / "out" / student_file) == read_header(source / "student.safetensors")
    assert load_file(tmp_path / "out" / text_file)["spiece_model"].tobytes() == b"\x0a\x07a model"
    with open_tensors(tmp_path / "out" / text_file) as tensors:
        again = export.read_network(tensors, "official")
        assert_same(again.tensors, load_file(source / "models_t5_umt5-xxl-enc-bf16.safetensors"))


def test_a_text_encoder_without_a_tokenizer_is_refused_for_comfyui(source, tmp_path):
    with pytest.raises(
        ValueError, match="there is no spiece.model in .*: ComfyUI's text encoders hold their tokenizer"
    ):
        export_folder.read_spiece(export_folder.spiece_folders(tmp_path / "a.safetensors"))
    folders = export_folder.spiece_folders(source / "models_t5_umt5-xxl-enc-bf16.safetensors")
    assert export_folder.read_spiece(folders) == b"\x0a\x07a model"


# The command


def test_convert_writes_a_folder_with_a_card_and_refuses_to_write_over_it(source, tmp_path):
    options = [f"--input={source}", f"--checkpoint={source}/student.safetensors", f"--output={tmp_path}/out-1.3B"]
    done = convert(*options, "--to=diffusers", "--max_shard_size=5GB", "--dtype=bfloat16", "--base_model=a/b")
    assert done.returncode == 0, done.stderr
    assert "-> diffusers: wrote" in done.stdout and "note: this transformer is causal" in done.stdout
    tensors = load_file(tmp_path / "out-1.3B" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    text = (tmp_path / "out-1.3B" / "README.md").read_text()
    assert text.startswith('---\nbase_model: "a/b"') and "| chunk | 2 |" in text
    before = inventory(tmp_path)
    done = convert(*options, "--to=official")
    assert done.returncode == 1 and "it holds" in done.stderr and len(done.stderr.splitlines()) == 1
    assert inventory(tmp_path) == before


def test_convert_writes_config_and_card_beside_a_file(source, tmp_path):
    output = tmp_path / "diffusion_pytorch_model.safetensors"
    done = convert(f"--input={source}/student.safetensors", f"--output={output}", "--to=diffusers", "--license=mit")
    assert done.returncode == 0, done.stderr
    assert sorted(inventory(tmp_path)) == ["README.md", "config.json", output.name]
    assert json.loads((tmp_path / "config.json").read_text())["attention_head_dim"] == MODEL.head_dim
    assert "The weights: mit." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=DIR/out"], "a folder: say whose with --to=official, diffusers or comfy"),
        SLOW(["--output=DIR/out.safetensor"], "the name of a file must end in .safetensors"),
        (["--output=SOURCE/student.safetensors"], "it is a file of the input"),
        SLOW(["--output=DIR/a.safetensors", "--checkpoint=x.pt"], "checkpoint is x.pt: it is for a folder as output"),
        SLOW(["--output=DIR/out", "--to=comfy", "--max_shard_size=1GB"], "reads single files"),
        SLOW(["--output=DIR/a.safetensors", "--license=a b"], "license is 'a b'"),
        SLOW(["--output=DIR/a.safetensors", "--base_model=x"], "OWNER/NAME"),
        SLOW(["--output=DIR/a.pt", "--to=comfy"], "files for ComfyUI are .safetensors"),
    ],
)
def test_convert_answers_a_wrong_command_line_in_one_line(arguments, message, source, tmp_path):
    before = inventory(source)
    arguments = [text.replace("DIR", str(tmp_path)).replace("SOURCE", str(source)) for text in arguments]
    done = convert(f"--input={source}", *arguments)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert inventory(source) == before and not list(tmp_path.iterdir())


def test_convert_imports_neither_tfds_nor_orbax():
    code = (
        "import sys, sf_jax.convert; print([m for m in ('orbax', 'tensorflow_datasets', 'grain') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# The real libraries


def to_torch(x: np.ndarray):
    """[B, F, H, W, C] to PyTorch's [B, C, F, H, W]."""
    return pytest.importorskip("torch", reason=EXTRA).from_numpy(np.moveaxis(x, -1, 1).copy())


@pytest.fixture(scope="module")
def libraries():
    """(torch, diffusers, transformers)."""
    return tuple(pytest.importorskip(name, reason=EXTRA) for name in ("torch", "diffusers", "transformers"))


def test_diffusers_opens_the_folder_and_has_the_same_numbers(libraries, pipeline_folder, source):
    torch, diffusers, transformers = libraries
    pipe = diffusers.WanPipeline.from_pretrained(pipeline_folder)
    assert pipe.scheduler.config.flow_shift == 8.0 and isinstance(pipe.tokenizer, transformers.T5TokenizerFast)
    with open_tensors(source / "diffusion_pytorch_model.safetensors") as tensors:
        assert_same(
            {name: value.numpy() for name, value in pipe.transformer.state_dict().items()},
            dict(export.read_network(tensors, "diffusers").tensors),
        )
    ours = load_tokenizer(source)
    texts = ["a cat in the snow", "dog", ""]
    ids = pipe.tokenizer(texts, padding="max_length", max_length=512, truncation=True).input_ids
    np.testing.assert_array_equal(ids, ours.encode(texts)[0])
    video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=2, output_type="np").frames
    assert video.shape == (1, 5, 16, 16, 3) and np.isfinite(video).all()
    theirs = transformers.AutoTokenizer.from_pretrained(pipeline_folder / "tokenizer")
    assert theirs(texts[0]).input_ids == pipe.tokenizer(texts[0]).input_ids


def test_a_pipeline_of_diffusers_to_official_and_back_keeps_every_byte(libraries, source, tmp_path):
    torch, diffusers, transformers = libraries
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48}
    config = transformers.UMT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    unigram().save(str(tokenizer / "tokenizer.json"))
    pipe = diffusers.WanPipeline(
        tokenizer=transformers.T5TokenizerFast.from_pretrained(tokenizer, extra_ids=0),
        text_encoder=transformers.UMT5EncoderModel(config).eval(),
        vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, num_res_blocks=1),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        transformer=diffusers.WanTransformer3DModel(num_layers=2, **sizes),
    )
    pipe.save_pretrained(tmp_path / "in")
    written = write_folder(Source(tmp_path / "in"), Target(tmp_path / "official", "official"))
    assert (tmp_path / "official" / "Wan2.1_VAE.pth").is_file(), "PyTorch is there"
    assert any("give --solver=unipc --shift=5" in note for note in written.notes)
    write_folder(Source(tmp_path / "official"), Target(tmp_path / "back", "diffusers"))
    before, after = inventory(tmp_path / "in"), inventory(tmp_path / "back")
    for name in before:
        if name.endswith(".safetensors") or name == "tokenizer/tokenizer.json":
            assert after[name] == before[name], name
    assert set(after) == set(before)
    again = diffusers.WanPipeline.from_pretrained(tmp_path / "back")
    x, t, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([500]), torch.randn(1, 7, 16)
    with torch.no_grad():
        pairs = [
            (model.transformer(x, t, text).sample, model.text_encoder(torch.tensor([[4, 5, 1]])).last_hidden_state)
            for model in (pipe, again)
        ]
    for ours, theirs in zip(*pairs, strict=True):
        assert relative(ours.numpy(), theirs.numpy()) <= 1e-5
    for name in ("transformer", "vae", "text_encoder"):
        kept, written = (json.loads(held[f"{name}/config.json"]) for held in (before, after))
        kept["torch_dtype"] = kept.get("dtype")  # the older key, which all versions of transformers read
        assert {key: kept.get(key) for key in written} == written, name


@pytest.mark.slow
def test_what_diffusers_opens_gives_the_numbers_of_the_source(libraries, source, pipeline_folder, tmp_path):
    torch, diffusers, _ = libraries
    write_folder(Source(source / "student.safetensors"), Target(tmp_path / "out", "diffusers", shard_bytes=60_000))
    pipe = diffusers.WanPipeline.from_pretrained(
        pipeline_folder, transformer=diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "out").eval()
    )
    rng = np.random.default_rng(0)
    x, text = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 3, 4, 4, 16), (1, 9, 16)))
    ids, mask = load_tokenizer(source, 24).encode(["a cat in the snow"])
    mean, std = (np.float32(getattr(pipe.vae.config, f"latents_{name}")) for name in ("mean", "std"))
    with torch.no_grad():
        theirs = [
            pipe.transformer(to_torch(x), torch.tensor([500]), torch.from_numpy(text)).sample.movedim(1, -1),
            pipe.vae.decode(to_torch(x * std + mean)).sample.movedim(1, -1),
            pipe.text_encoder(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state[:, : mask.sum()],
        ]
    params = load_package(source / "student.safetensors").params
    (vae_config, vae_params), (text_config, text_params) = (
        load_network(source / f"{name}.safetensors", kind)
        for name, kind in (("Wan2.1_VAE", "vae"), ("models_t5_umt5-xxl-enc-bf16", "umt5"))
    )
    with jax.default_matmul_precision("highest"):
        layout, t = wan.bidirectional_layout(3), np.float32([[500.0]])
        ours = [
            wan.WanTransformer(MODEL).apply({"params": params}, x, t, text, layout),
            np.clip(vae.WanVae(vae_config).apply({"params": vae_params}, x, method="decode"), -1, 1),
            umt5.Umt5Encoder(text_config).apply({"params": text_params}, ids, mask)[:, : mask.sum()],
        ]
    for name, value, reference in zip(("transformer", "vae", "text encoder"), ours, theirs, strict=True):
        assert relative(value, reference.numpy()) <= 1e-5, name
