"""Adapters: merging into weights, error messages for unsupported ones, and export of trained ones."""

import dataclasses
import json

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sf_jax import convert
from sf_jax.config import from_dict
from sf_jax.inference.job import Job
from sf_jax.inference.load import WanOptions, find_wan, load_pipeline, wan_pipeline
from sf_jax.models import layers, wan
from sf_jax.options import LoraConfig
from sf_jax.training import loop, lora
from sf_jax.training.step import new_state
from sf_jax.weights import adapter_export, adapters, transformer
from sf_jax.weights.adapter_list import Lora, as_loras, parse_loras
from sf_jax.weights.files import open_tensors
from sf_jax.weights.networks import load_network
from sf_jax.weights.package import load_package, shipped_path
from tests.helpers import SMALL, random_params, relative, tree_relative
from tests.test_training import small_config
from tests.wan_folder import MODEL, make_folder

BF16 = ml_dtypes.bfloat16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(official tensors, their file)."""
    tensors = transformer.to_official(random_params(), SMALL)
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(tensors, path)
    return tensors, path


def pair(layer="blocks.0.self_attn.q", outputs=32, inputs=32, prefix="diffusion_model.", rank=2):
    rng = np.random.default_rng(0)
    names = (f"{prefix}{layer}.lora_down.weight", f"{prefix}{layer}.lora_up.weight")
    shapes = ((rank, inputs), (outputs, rank))
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in zip(names, shapes, strict=True)}


def merged(path, *loras, config=SMALL, dtype=None):
    with open_tensors(path) as stored, adapters.merged(stored, loras, config, wide=dtype is not None) as tensors:
        return {name: np.array(tensors[name]) for name in tensors}


def written(tmp_path, tensors, metadata=None, name="adapter.safetensors"):
    save_file(tensors, tmp_path / name, metadata)
    return Lora(tmp_path / name)


# What to merge


def test_the_command_line_names_files_and_scales(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.safetensors", "v1:2"):
        (tmp_path / name).touch()
    flags = ["x.safetensors", "y.safetensors:0.5,z.pt:-1", "dir/w.pt:1e-2", "a,b.safetensors:2", "v1:2", "v1:2:3"]
    assert [(str(lora.path), lora.scale) for lora in parse_loras(flags)] == [
        ("x.safetensors", 1.0),
        ("y.safetensors", 0.5),
        ("z.pt", -1.0),
        ("dir/w.pt", 0.01),
        ("a,b.safetensors", 2.0),
        ("v1:2", 1.0),
        ("v1:2", 3.0),
    ]
    there = tmp_path / "there.safetensors"
    there.touch()
    assert parse_loras([f"{there}:0.8,{there},y:2"]) == (Lora(there, 0.8), Lora(there), Lora("y", 2.0))
    assert as_loras([("x", 0.5), "y:2", tmp_path / "z"]) == (Lora("x", 0.5), Lora("y", 2.0), Lora(tmp_path / "z"))
    for text, message in (
        ("x.safetensors:strong", "behind its last colon must be a number"),
        ("x:nan", "x has the scale nan"),
        ("x:inf", "must be a finite number"),
        ("x:", "behind its last colon"),
        ("", "give FILE or FILE:SCALE"),
        ("x,,y", "give FILE or FILE:SCALE"),
        (":0.5", "give FILE or FILE:SCALE"),
        ("C:\\loras\\x.safetensors", "a path of Windows"),
        ("C:\\loras\\x.safetensors:0.5", "a path of Windows"),
        ("gs://bucket/x.safetensors", "is an address"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_loras([text])
    for value in ("x", [3], [("x", "strong")], [("x", True)]):
        with pytest.raises(ValueError, match="loras|scale"):
            as_loras(value)


# Numbers


def test_norms_modulation_biases_and_the_patch_embedding_are_changed(base, tmp_path):
    tensors, path = base
    rng = np.random.default_rng(3)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    down, up = normal(2, 4, 1, 2, 2), normal(32, 2, 1, 1, 1)
    changes = {
        "diffusion_model.blocks.1.diff_m": normal(1, 6, 32),
        "diffusion_model.head.diff_m": normal(1, 2, 32),
        "diffusion_model.blocks.0.modulation.diff": normal(6, 32),
        "diffusion_model.blocks.0.norm3.diff": normal(32),
        "diffusion_model.blocks.0.norm3.diff_b": normal(32),
        "lora_unet_blocks_1_self_attn_norm_q.w_norm": normal(32),
        "diffusion_model.blocks.0.ffn.0.diff": normal(48, 32),
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
        "diffusion_model.patch_embedding.diff_b": normal(32),
    }
    expected = dict(tensors)
    for name, change in {
        "blocks.1.modulation": changes["diffusion_model.blocks.1.diff_m"],
        "head.modulation": changes["diffusion_model.head.diff_m"],
        "blocks.0.modulation": changes["diffusion_model.blocks.0.modulation.diff"][None],
        "blocks.0.norm3.weight": changes["diffusion_model.blocks.0.norm3.diff"],
        "blocks.0.norm3.bias": changes["diffusion_model.blocks.0.norm3.diff_b"],
        "blocks.1.self_attn.norm_q.weight": changes["lora_unet_blocks_1_self_attn_norm_q.w_norm"],
        "blocks.0.ffn.0.weight": changes["diffusion_model.blocks.0.ffn.0.diff"],
        "patch_embedding.weight": np.einsum("orxyz,rcuvw->ocuvw", up, down),
        "patch_embedding.bias": changes["diffusion_model.patch_embedding.diff_b"],
    }.items():
        expected[name] = expected[name] + np.float32(0.5) * change
    lora = dataclasses.replace(written(tmp_path, changes), scale=0.5)
    result = merged(path, lora)
    assert set(result) == set(expected)
    for name, value in expected.items():
        assert relative(result[name], value) < 1e-6, name


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_narrow_weights_are_widened_for_the_sum_and_rounded_once(dtype, base, tmp_path):
    tensors, _ = base
    narrow = {name: value.astype(BF16) for name, value in tensors.items()}
    save_file(narrow, tmp_path / "base.safetensors")
    change = pair(prefix="lora_unet_", layer="blocks_0_self_attn_q") | {
        "lora_unet_blocks_0_self_attn_q.alpha": np.asarray(3.0, np.float32)
    }
    file = written(tmp_path, change)
    down, up = change["lora_unet_blocks_0_self_attn_q.lora_down.weight"], list(change.values())[1]
    exact = narrow["blocks.0.self_attn.q.weight"].astype(np.float32) + np.float32(1.5) * (up @ down)
    _, params = load_network(tmp_path / "base.safetensors", "transformer", SMALL, dtype, loras=[file])
    result = np.asarray(params["blocks"]["self_attn"]["q"]["kernel"])
    assert result.dtype == (dtype or "bfloat16")
    expected = exact if dtype == "float32" else exact.astype(BF16)
    np.testing.assert_allclose(result[0].T.astype(np.float32), expected.astype(np.float32), rtol=1e-2, atol=1e-6)
    assert np.equal(result[0].T, expected).mean() > 0.99
    np.testing.assert_array_equal(result[1].T, narrow["blocks.1.self_attn.q.weight"].astype(result.dtype))


def test_only_the_changed_tensors_are_touched_and_scale_zero_changes_nothing(base, tmp_path):
    tensors, path = base
    lora = dataclasses.replace(written(tmp_path, pair()), scale=0.0)
    for name, value in merged(path, lora).items():
        np.testing.assert_array_equal(value, tensors[name], name)


# Refusals

NOTHING = {"diffusion_model.blocks.0.self_attn.q.dora_scale": np.ones((32, 1), np.float32)}
REFUSALS = {
    "DoRA": (pair() | NOTHING, r"is DoRA .*cannot be merged .*\.dora_scale"),
    "DoRA of peft": (
        pair() | {"base_model.model.blocks.0.self_attn.q.lora_magnitude_vector": np.ones(32, np.float32)},
        "is DoRA",
    ),
    "LoHa": ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": np.ones((2, 2), np.float32)}, "is LoHa .*hada_w1_a"),
    "LoKr": ({"diffusion_model.blocks.0.self_attn.q.lokr_w1": np.ones((2, 2), np.float32)}, "is LoKr .*lokr_w1"),
    "Tucker": (pair() | {"lora_unet_blocks_0_ffn_0.lora_mid.weight": np.ones((2, 2), np.float32)}, "Tucker core"),
    "image to video": (pair() | pair("blocks.0.cross_attn.k_img"), r"image-to-video network.*k_img\.lora"),
    "image to video, diffusers": (
        pair() | pair("blocks.0.attn2.add_k_proj", prefix="transformer."),
        "image-to-video network.*add_k_proj",
    ),
    "text encoder": (pair() | pair("text_model_encoder", prefix="lora_te_"), "adapter of a text encoder, .*lora_te"),
    "second expert": (pair() | pair("blocks.0.attn1.to_q", prefix="transformer_2."), "two experts"),
    "other network": (pair("single_blocks.0.linear1"), "2 tensors of 2 that belong to no layer of Wan's .*linear1"),
    "a tensor more": (pair() | pair("blocks.0.self_attn.gate"), "2 tensors of 4 that belong to no layer.*gate"),
    "whole weights": (pair() | {"base_model.model.head.head.weight": np.ones((16, 32), np.float32)}, "belong to no"),
    "no adapter": ({"a": np.ones(3, np.float32)}, "is no adapter: it seems to be: file of another kind"),
    "more layers": (pair("blocks.2.ffn.0", 48), "changes 1 tensors that the network does not have.*blocks.2.*2 layers"),
    "14B": (
        pair("blocks.0.self_attn.q", 5120, 5120),
        r"network of other sizes: 1 of its changes.*\(2, 5120\).*for \(32, 32\)",
    ),
    "swapped": (pair("blocks.0.ffn.0", 32, 48), "other sizes"),
    "half": (dict(list(pair().items())[:1]), "without the up matrix"),
    "alpha alone": (
        pair() | {"diffusion_model.blocks.1.ffn.0.alpha": np.ones((), np.float32)},
        "alpha without the down matrix",
    ),
    "twice": (pair() | pair(prefix="transformer."), "changes blocks.0.self_attn.q.weight twice"),
    "two adapters": (
        {
            name.replace(".weight", f".{n}.weight"): v
            for n in "ab"
            for name, v in pair(f"blocks.{n == 'a':d}.ffn.0").items()
        },
        "holds several adapters, a, b",
    ),
    "integers": ({name: value.astype(np.int32) for name, value in pair().items()}, "int32"),
    "alpha 0": (
        pair() | {"diffusion_model.blocks.0.self_attn.q.alpha": np.zeros((), np.float32)},
        "alpha must be one number, not 0",
    ),
    "rank 0": (pair(rank=0), "has no rank"),
    "norm": (pair("blocks.0.norm3"), "other sizes"),
    "not finite": ({name: value * np.nan for name, value in pair().items()}, "is not finite, the file is damaged"),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_what_cannot_be_added_is_refused_by_its_name(case, base, tmp_path):
    tensors, message = REFUSALS[case]
    lora = written(tmp_path, tensors)
    with pytest.raises(ValueError, match=message) as refusal:
        if case == "not finite":  # detected only when the tensors are read
            merged(base[1], lora)
        adapters.check_loras([lora], SMALL)
    text = str(refusal.value)
    assert text.startswith("lora") and str(lora.path) in text and "\n" not in text and len(text) < 600


def test_missing_damaged_and_wrong_files_are_one_line(base, tmp_path):
    (tmp_path / "web.safetensors").write_text("<html>not found")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("none.safetensors", "lora: .*none.safetensors does not exist"),
        ("web.safetensors", "lora: .*it is a web page"),
        ("empty", "lora: .*has no weight file"),
    ):
        with pytest.raises(ValueError, match=message):
            merged(base[1], Lora(tmp_path / path))
    with pytest.raises(ValueError, match="is no adapter: it seems to be: transformer of dim 32"):
        merged(base[1], Lora(base[1]))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "no JSON"),
        ("[]", "no JSON object"),
        ('{"r": 2, "lora_alpha": NaN}', "lora_alpha nan"),
        ('{"r": 2, "lora_alpha": true}', "lora_alpha True"),
        ('{"r": 2}', "lacks lora_alpha"),
        ('{"r": 2, "lora_alpha": 2, "alpha_pattern": []}', None),
        ('{"r": 2, "lora_alpha": 2, "alpha_pattern": [1]}', "must be an object"),
        ('{"r": 2, "lora_alpha": 2, "alpha_pattern": {"(a+)+x": 3}}', "repeats groups"),
        ('{"r": 2, "lora_alpha": 2, "alpha_pattern": {"a[": 3}}', "which is none"),
        ('{"r": 2, "lora_alpha": 2, "init_lora_weights": "olora"}', "init_lora_weights 'olora'"),
    ],
)
def test_damaged_headers_are_one_line(header, message, base, tmp_path):
    lora = written(tmp_path, pair(prefix="transformer."), {"lora_adapter_metadata": header})
    if message is None:
        merged(base[1], lora)
        return
    with pytest.raises(ValueError, match=message):
        merged(base[1], lora)


def test_peft_without_its_config_is_told_and_with_it_scaled(base, tmp_path):
    lora = written(tmp_path, pair(prefix="base_model.model."))
    with pytest.warns(UserWarning, match="is of peft, and no adapter_config.json beside it says its alpha"):
        one = merged(base[1], lora)["blocks.0.self_attn.q.weight"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "peft_type": "LORA"}))
    three = merged(base[1], lora)["blocks.0.self_attn.q.weight"]
    before = base[0]["blocks.0.self_attn.q.weight"]
    assert relative(three - before, 3 * (one - before)) < 1e-5
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6}))
    with pytest.raises(ValueError, match="has rank 2, .*adapter_config.json says 4"):
        merged(base[1], lora)


# Pipelines


def test_digits_take_adapters_and_describe_says_so(tmp_path):
    config = load_package(shipped_path("student")).config
    file = written(tmp_path, pair("blocks.0.self_attn.q", config.dim, config.dim))
    pipe, plain = load_pipeline(loras=[(file.path, 0.5)]), load_pipeline()
    assert "adapter adapter.safetensors (scale 0.5, rank 2, 1 tensors of blocks 0 to 0)" in pipe.describe()
    change = pipe.params["blocks"]["self_attn"]["q"]["kernel"] - plain.params["blocks"]["self_attn"]["q"]["kernel"]
    down, up = load_file(file.path).values()
    assert relative(change[0].T, 0.5 * up @ down) < 1e-5 and not np.any(change[1:])
    with pytest.raises(ValueError, match="of a network of other sizes"):
        load_pipeline(loras=[written(tmp_path, pair(), name="b.safetensors").path])
    with pytest.raises(ValueError, match="loras is 'a.safetensors': it must be a list"):
        WanOptions(loras="a.safetensors")


def test_wan_takes_adapters_and_refuses_them_before_anything_long(tmp_path):
    folder = make_folder(tmp_path / "wan")
    student = str(folder / "student.safetensors")
    file = written(tmp_path, pair("blocks.1.cross_attn.o", MODEL.dim, MODEL.dim))
    job = Job(("a cat",), model=str(folder), checkpoint=student, lora=(dataclasses.replace(file, scale=2.0),))
    options = dataclasses.replace(job.wan_options(), vae="none", dtype="float32")
    pipe = wan_pipeline(folder, options)
    assert "adapter adapter.safetensors (scale 2, rank 2, 1 tensors of blocks 1 to 1)" in pipe.describe()
    with open_tensors(student) as stored:
        before = np.array(stored["blocks.1.cross_attn.o.weight"])
    down, up = load_file(file.path).values()
    kernel = pipe.params["blocks"]["cross_attn"]["o"]["kernel"]
    assert relative(kernel[1].T, before + 2 * up @ down) < 1e-6
    wrong = written(tmp_path, pair("blocks.9.ffn.0", 48), name="wrong.safetensors")
    with pytest.raises(ValueError, match="lora .*wrong.safetensors changes 1 tensors that the network does not have"):
        find_wan(folder, dataclasses.replace(options, loras=(wrong,)))


# Training


def trained(rank=2, alpha=6.0):
    """Adapters as in training, without zeros."""
    config = LoraConfig(rank, alpha)
    start = lora.init_adapters(random_params(), config, jax.random.key(0))
    rng = np.random.default_rng(5)
    return config, jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), start)


@pytest.mark.parametrize("naming", adapter_export.NAMINGS)
def test_trained_adapters_are_written_and_start_another_run(naming, base, tmp_path):
    config, params = trained()
    origin = adapter_export.Base("base.safetensors", "abc")
    file = tmp_path / "adapter.safetensors"
    run = adapter_export.TrainedAdapters(SMALL, 2, 6.0, origin, 30, params)
    adapter_export.write_trained(file, run, naming)
    expected = transformer.to_official(lora.merge(random_params(), params, config), SMALL)
    for name, value in merged(base[1], Lora(file)).items():
        assert relative(value, expected[name]) < 1e-6, name
    with safe_open(file, "np") as stored:
        metadata = stored.metadata()
    about = json.loads(metadata["sf_jax_lora"])
    assert (about["rank"], about["alpha"], about["step"]) == (2, 6.0, 30)
    assert about["base"] | {"network": ""} == {
        "network": "",
        "file": "base.safetensors",
        "digest": "abc",
        "dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
    }
    # A new run restores them exactly, with rank and alpha from the file.
    changes = {"stage": "causal", "model": SMALL, "data": {"height": 4, "width": 4, "frames": 3}}
    changes |= {"rollout": {"chunk": 3}, "init_weights": "base.safetensors"}
    new = lora.resolved(from_dict(changes | {"lora": {"init": str(file)}}))
    assert (new.lora.rank, new.lora.alpha) == (2, 6.0)
    state = new_state(new, random_params(), adapters=lora.read_start(str(file), SMALL))
    jax.tree.map(np.testing.assert_array_equal, state.model.params, params)
    for field, value in (("rank", 4), ("alpha", 2.0)):
        values = {"init": str(file), "rank": 2, "alpha": 6.0} | {field: value}
        with pytest.raises(ValueError, match=f"lora.{field} is {value:g}: lora.init .* has {field} [26]"):
            lora.resolved(from_dict(changes | {"lora": values}))


def test_training_starts_from_what_a_file_has_and_refuses_the_rest(tmp_path):
    config = LoraConfig(2, 2.0)
    file = written(tmp_path, pair("blocks.1.ffn.0", 48))
    fresh = lora.init_adapters(random_params(), config, jax.random.key(0))
    state = lora.with_start(fresh, lora.read_start(str(file.path), SMALL))
    down, up = load_file(file.path).values()
    np.testing.assert_array_equal(state["blocks"]["ffn_in"]["kernel"]["down"][1], down.T)
    np.testing.assert_array_equal(state["blocks"]["ffn_in"]["kernel"]["up"][1], up.T)
    # Adapters missing from the file are initialized as usual: random times zero.
    np.testing.assert_array_equal(
        state["blocks"]["ffn_in"]["kernel"]["down"][0], fresh["blocks"]["ffn_in"]["kernel"]["down"][0]
    )
    assert not np.any(state["blocks"]["ffn_in"]["kernel"]["up"][0])
    for tensors, message in (
        (pair("head.head", 16), "changes head.head.weight, training has adapters of the blocks' matrices alone"),
        (pair() | {"diffusion_model.blocks.0.norm3.diff": np.ones(32, np.float32)}, "changes blocks.0.norm3.weight"),
        (pair() | pair("blocks.1.ffn.0", 48, rank=3), "pairs of rank 2 and alpha 2, and of rank 3 and alpha 3"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.read_start(str(written(tmp_path, tensors).path), SMALL)
    with pytest.raises(ValueError, match="critic_lora.init is a: the adapters of the trained network alone"):
        from_dict({"stage": "causal", "critic_lora": {"init": "a"}})


def test_wan_of_the_published_sizes_is_named_and_mapped():
    assert adapter_export._network(wan.wan_1_3b()) == "Wan2.1-T2V-1.3B"
    shapes = adapters.official_shapes(wan.wan_14b())
    assert len(shapes) == 1095 and shapes["blocks.39.ffn.0.weight"] == (13824, 5120)


# Commands


def run_convert(capsys, **values) -> str:
    """Runs sf_jax.convert in this process; returns its output."""
    with flagsaver.flagsaver():
        flags.FLAGS(["convert", *(f"--{name}={value}" for name, value in values.items())])
        convert.main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_adapters_its_export_and_the_run_that_goes_on_from_it(tmp_path, capsys):
    shipped = str(shipped_path("student"))
    changes = {"teacher_weights": "shipped", "init_weights": shipped, "data_dir": str(tmp_path / "data")}
    changes |= {"model": dataclasses.asdict(load_package(shipped).config)}
    config = small_config("distill", steps=2, generator_every=1, lora={"rank": 2, "alpha": 6.0}, **changes)
    merged_file = loop.train(config, tmp_path / "run")
    file = tmp_path / "adapter.safetensors"
    done = run_convert(capsys, **{"from": tmp_path / "run"}, part="lora", output=file)
    assert "adapters of step 2, rank 2, alpha 6" in done and "digits_student.safetensors -> diffusers" in done
    with safe_open(file, "np") as stored:
        about = json.loads(stored.metadata()["sf_jax_lora"])
    assert about["base"]["file"] == "digits_student.safetensors" and len(about["base"]["digest"]) >= 8
    # The base merged with the adapters equals the run's weights.
    run_convert(capsys, input=shipped, lora=f"{file}:1", output=tmp_path / "merged.safetensors", dtype="float32")
    ours, expected = (load_package(path).params for path in (tmp_path / "merged.safetensors", merged_file))
    assert tree_relative(ours, expected) < 1e-6 < tree_relative(load_package(shipped).params, expected)
    # To kohya's names and back.
    for name, to in (("kohya", "kohya"), ("back", "diffusers")):
        source = file if name == "kohya" else tmp_path / "kohya.safetensors"
        assert f"-> {to}: wrote" in run_convert(capsys, input=source, to=to, output=tmp_path / f"{name}.safetensors")
    back, first = load_file(tmp_path / "back.safetensors"), load_file(file)
    assert set(back) == set(first)
    for key, value in first.items():
        np.testing.assert_array_equal(back[key], value)
    # Training continues from the adapters.
    more = dataclasses.replace(config, lora=LoraConfig(init=str(file)))
    capsys.readouterr()
    loop.train(more, tmp_path / "more")
    assert f"with the adapters {file}" in capsys.readouterr().out
    assert "resuming" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="lora.alpha is 2: lora.init .* has alpha 6"):
        loop.train(dataclasses.replace(config, lora=LoraConfig(2, 2.0, str(file))), tmp_path / "other")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input": "BASE", "lora": "none.safetensors"}, "none.safetensors does not exist"),
        ({"input": "BASE", "lora": "ADAPTER:x"}, "behind its last colon must be a number"),
        ({"input": "BASE", "part": "lora"}, "is no adapter; it is for adapters, and for --from"),
        ({"input": "BASE", "to": "kohya"}, "to is 'kohya'"),
        ({"input": "ADAPTER", "lora": "ADAPTER"}, "is an adapter itself"),
        ({"input": "ADAPTER", "to": "official"}, "to is 'official': for an adapter it must be one of diffusers, kohya"),
        ({"from": "run", "lora": "ADAPTER"}, "merged into the file of --input"),
    ],
)
def test_convert_refuses_in_one_line(values, message, base, tmp_path, capsys):
    file = written(tmp_path, pair())
    texts = {"BASE": base[1], "ADAPTER": file.path}
    for word, path in texts.items():
        values = {name: value.replace(word, str(path)) for name, value in values.items()}
    with pytest.raises(ValueError, match=message):
        run_convert(capsys, output=tmp_path / "out.safetensors", **values)
    assert not (tmp_path / "out.safetensors").exists()


def test_convert_merges(base, tmp_path, capsys):
    file = written(tmp_path, pair())
    done = run_convert(
        capsys, input=base[1], lora=f"{file.path}:0.5", to="diffusers", output=tmp_path / "a.safetensors"
    )
    assert "official -> diffusers + adapter adapter.safetensors (scale 0.5, rank 2" in done
    result = load_file(tmp_path / "a.safetensors")["blocks.0.attn1.to_q.weight"]
    expected = merged(base[1], dataclasses.replace(file, scale=0.5))["blocks.0.self_attn.q.weight"]
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (2, 3, 4, 3)])
def test_gradients_of_dense_layers_equal_autodiff(shape):
    """The backward passes of `layers.linear` and `adapted_linear` are written by hand."""
    keys = jax.random.split(jax.random.key(0), 6)
    sizes = (shape, (3, 6), (6,), (3, 2), (2, 6), (*shape[:-1], 6))
    x, kernel, bias, down, up, weights = (jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))

    def gradients(function, *arguments):
        return jax.grad(lambda *a: (function(*a) * weights).sum(), tuple(range(len(arguments))))(*arguments)

    dense = gradients(layers.linear, x, kernel, bias)
    chex.assert_trees_all_close(dense, gradients(lambda x, k, b: x @ k + b, x, kernel, bias), rtol=1e-5, atol=1e-5)

    adapted = gradients(lambda x, down, up: layers.adapted_linear(x, kernel, bias, down, up), x, down, up)
    expected = gradients(lambda x, down, up: x @ (kernel + down @ up) + bias, x, down, up)
    chex.assert_trees_all_close(adapted, expected, rtol=1e-5, atol=1e-5)
