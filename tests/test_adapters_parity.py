"""Merged weights equal those of diffusers' `load_lora_weights` + `fuse_lora` and of peft's `merge_and_unload`."""

import copy
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sf_jax.options import LoraConfig
from sf_jax.training import lora
from sf_jax.weights import adapter_export, mapping
from sf_jax.weights.adapter_list import Lora
from sf_jax.weights.adapters import opened
from sf_jax.weights.folders import read_config
from sf_jax.weights.networks import load_network
from sf_jax.weights.recognize import entries_of
from tests.helpers import relative

EXTRA = "needs the [parity] extra"
torch = pytest.importorskip("torch", reason=EXTRA)
diffusers = pytest.importorskip("diffusers", reason=EXTRA)
peft = pytest.importorskip("peft", reason=EXTRA)

TOLERANCE = 1e-5
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 72,
    "num_layers": 2,
}
# Official layer -> (outputs, inputs); layers of the blocks are listed without "blocks.N.".
ATTENTION = {f"{kind}_attn.{part}": (48, 48) for kind in ("self", "cross") for part in "qkvo"}
BLOCK = ATTENTION | {"ffn.0": (72, 48), "ffn.2": (48, 72)}
TOP = {
    "text_embedding.0": (48, 20),
    "text_embedding.2": (48, 48),
    "time_embedding.0": (48, 16),
    "time_embedding.2": (48, 48),
    "time_projection.1": (288, 48),
    "head.head": (64, 48),
}
BLOCKS = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
RANK = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(diffusers' transformer with random weights, the folder it was saved to)."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**SIZES).eval().requires_grad_(False)
    for value in model.parameters():
        value += 0.1 * torch.randn_like(value)
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return model, folder


def pipeline(model):
    """A diffusers pipeline with a copy of the transformer, which can load adapters."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.WanPipeline(None, None, None, scheduler, copy.deepcopy(model))


def fused(model, adapters) -> dict[str, np.ndarray]:
    """diffusers' weights after fusing adapters [(argument of `load_lora_weights`, scale)]."""
    pipe = pipeline(model)
    names = [f"adapter{i}" for i in range(len(adapters))]
    for name, (source, _) in zip(names, adapters, strict=True):
        pipe.load_lora_weights(source, adapter_name=name)
    pipe.set_adapters(names, [scale for _, scale in adapters])
    pipe.fuse_lora(components=["transformer"], adapter_names=names)
    pipe.unload_lora_weights()
    return {name: value.numpy() for name, value in pipe.transformer.state_dict().items()}


def ours(folder, *loras) -> dict[str, np.ndarray]:
    """Our weights after merging adapters, with diffusers' names."""
    config = read_config(folder / "config.json")
    _, params = load_network(folder, "transformer", config, "float32", loras=loras)
    return mapping.to_tensors(entries_of("transformer", config, "diffusers"), params)


def assert_equal_changes(result, expected, model, at_least):
    """Compares the changes (the weights alone would hide them); at least `at_least` tensors must have changed."""
    changed = 0
    for name, value in model.state_dict().items():
        before = value.numpy()
        assert relative(result[name], expected[name]) <= TOLERANCE, name
        if not np.array_equal(expected[name], before):
            changed += 1
            assert relative(result[name] - before, expected[name] - before) <= 1e-4, name
        else:
            np.testing.assert_array_equal(result[name], before, name)
    assert changed >= at_least


def pairs(layers, down="lora_A", up="lora_B", rank=RANK, seed=0):
    """Random pairs for layers {name: (outputs, inputs)}, as name -> tensor."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (outputs, inputs) in layers.items():
        tensors[f"{name}.{down}.weight"] = rng.normal(0, 0.3, (rank, inputs)).astype(np.float32)
        tensors[f"{name}.{up}.weight"] = rng.normal(0, 0.3, (outputs, rank)).astype(np.float32)
    return tensors


def renamed(tensors, prefix, separator="."):
    names = (name.split(".lora")[0].split(".alpha")[0].split(".diff")[0] for name in tensors)
    return {
        prefix + layer.replace(".", separator) + name[len(layer) :]: value
        for (name, value), layer in zip(tensors.items(), names, strict=True)
    }


def alphas(layers, value=10.0):
    return {f"{name}.alpha": np.asarray(value, np.float32) for name in layers}


def lightx2v():
    """Pairs with alpha in the blocks, plus differences."""
    rng = np.random.default_rng(1)
    tensors = pairs(BLOCKS | {"time_projection.1": (288, 48)}, "lora_down", "lora_up") | alphas(BLOCKS, 2.0)
    tensors |= {f"{name}.diff_b": rng.normal(size=shape[0]).astype(np.float32) for name, shape in BLOCKS.items()}
    tensors |= {"time_projection.1.diff_b": rng.normal(size=288).astype(np.float32)}
    tensors |= {"head.head.diff": rng.normal(size=(64, 48)).astype(np.float32)}
    tensors |= {"head.head.diff_b": rng.normal(size=64).astype(np.float32)}
    return renamed(tensors, "diffusion_model.")


FILES = {
    "comfy": lambda: renamed(pairs(BLOCKS | TOP), "diffusion_model."),
    "comfy down and up": lambda: renamed(pairs(BLOCKS, "lora_down", "lora_up") | alphas(BLOCKS), "diffusion_model."),
    "kohya": lambda: renamed(pairs(BLOCKS, "lora_down", "lora_up") | alphas(BLOCKS), "lora_unet_", "_"),
    "lightx2v": lightx2v,
    "one layer": lambda: pairs({"transformer.blocks.1.attn2.to_k": (48, 48)}),
}


@pytest.mark.parametrize("name", list(FILES))
def test_files_of_every_kind_give_the_weights_of_diffusers(name, base, tmp_path):
    model, folder = base
    tensors = FILES[name]()
    save_file(tensors, tmp_path / "adapter.safetensors")
    expected = fused(model, [({name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, 0.7)])
    result = ours(folder, Lora(tmp_path / "adapter.safetensors", 0.7))
    assert_equal_changes(result, expected, model, 1 if name == "one layer" else 20)


LINEAR = r".*(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2|linear_1|linear_2|time_proj|proj_out)"
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 4, "target_modules": LINEAR},
    "alpha": {"r": 4, "lora_alpha": 12, "target_modules": LINEAR},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": LINEAR,
        "rank_pattern": {"attn1.to_q": 2, r"^blocks\.1\.attn2\.to_(k|v)": 3, "proj_out": 5},
        "alpha_pattern": {"to_q": 1, r"blocks.0.ffn.*": 9},
    },
    "rank-stabilized": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["to_q", "ffn.net.2"]},
    "biases": {"r": 2, "lora_alpha": 8, "lora_bias": True, "target_modules": ["to_v", "proj_out"]},
    "convolution": {"r": 3, "lora_alpha": 6, "target_modules": ["patch_embedding", "to_k"]},
}


def marked(names, fast):
    """Test parameters, marked slow except those in `fast`."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


def adapted(model, name):
    """A copy of the transformer with a random peft adapter."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    model.add_adapter(peft.LoraConfig(**CONFIGS[name]), adapter_name="default")
    for key, value in model.named_parameters():
        if "lora_" in key:
            value.data = 0.3 * torch.randn_like(value)
    return model


@pytest.mark.parametrize("name", marked(CONFIGS, fast=("plain", "patterns")))
def test_files_that_diffusers_writes(name, base, tmp_path):
    model, folder = base
    source = adapted(model, name)
    layers = peft.get_peft_model_state_dict(source, adapter_name="default")
    metadata = source.peft_config["default"].to_dict()
    diffusers.WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    expected = fused(model, [(str(tmp_path), 1.3)])
    assert_equal_changes(ours(folder, Lora(tmp_path, 1.3)), expected, model, 4)
    # Without a pipeline, names have no prefix.
    source.save_lora_adapter(tmp_path / "bare")
    assert_equal_changes(ours(folder, Lora(tmp_path / "bare", 1.3)), expected, model, 4)


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("patterns", True),
        pytest.param("patterns", False, marks=pytest.mark.slow),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("rank-stabilized", "biases", "convolution")),
    ],
)
def test_folders_that_peft_writes(name, safe, base, tmp_path):
    model, folder = base
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**CONFIGS[name]))
    torch.manual_seed(2)
    for key, value in wrapped.named_parameters():
        if "lora_" in key:
            value.data = 0.3 * torch.randn_like(value)
    wrapped.save_pretrained(tmp_path, safe_serialization=safe)
    expected = {key: value.numpy() for key, value in wrapped.merge_and_unload().state_dict().items()}
    for path in (tmp_path, tmp_path / f"adapter_model.{'safetensors' if safe else 'bin'}"):
        assert_equal_changes(ours(folder, Lora(path)), expected, model, 4)


def test_checkpoints_of_longlive(base, tmp_path, recwarn):
    model, folder = base
    tensors = {name: torch.from_numpy(value) for name, value in pairs(BLOCKS).items()}
    lora = {f"base_model.model.{name}": value for name, value in tensors.items()}
    critic = {name: value + 1 for name, value in lora.items()}
    torch.save({"step": 3000, "generator_lora": lora, "critic_lora": critic}, tmp_path / "lora.pt")
    expected = fused(model, [({f"diffusion_model.{name}": value for name, value in tensors.items()}, 1.0)])
    assert_equal_changes(ours(folder, Lora(tmp_path / "lora.pt")), expected, model, 20)
    # The adapter only, with peft's adapter name and FSDP's wrappers.
    named = {
        name.replace(".weight", ".default.weight").replace("blocks.", "_fsdp_wrapped_module.blocks."): value
        for name, value in lora.items()
    }
    torch.save(named, tmp_path / "alone.pt")
    assert not [warning for warning in recwarn if "is of peft" in str(warning.message)]
    assert_equal_changes(ours(folder, Lora(tmp_path / "alone.pt")), expected, model, 20)


def test_several_adapters_add_up_each_with_its_scale(base, tmp_path):
    model, folder = base
    kohya = renamed(pairs(BLOCKS, "lora_down", "lora_up", seed=5) | alphas(BLOCKS), "lora_unet_", "_")
    comfy = renamed(pairs(BLOCKS | TOP, rank=3, seed=6), "diffusion_model.")
    files = [(kohya, 0.4), (comfy, -0.9)]
    loras = []
    for i, (tensors, scale) in enumerate(files):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        loras.append(Lora(tmp_path / f"{i}.safetensors", scale))
    sources = [({n: torch.from_numpy(np.array(v)) for n, v in tensors.items()}, scale) for tensors, scale in files]
    assert_equal_changes(ours(folder, *loras), fused(model, sources), model, 26)


def test_adapters_that_change_their_base_are_refused(base, tmp_path):
    _, folder = base
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})}
    tensors = pairs({"transformer.blocks.0.attn1.to_q": (48, 48)})
    for field, value, message in (
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights 'pissa_niter_4'"),
        ("use_dora", True, "has use_dora"),
        ("peft_type", "LOHA", "peft's kind 'LOHA'"),
        ("r", 8, "blocks.0.attn1.to_q has rank 4, its header .* says 8"),
    ):
        values = json.loads(header["lora_adapter_metadata"]) | {f"transformer.{field}": value}
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(values)})
        with pytest.raises(ValueError, match=message):
            ours(folder, Lora(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("naming", adapter_export.NAMINGS)
@pytest.mark.parametrize("again", [None, *adapter_export.NAMINGS])
def test_diffusers_loads_the_files_that_we_write(naming, again, base, tmp_path):
    model, folder = base
    config = read_config(folder / "config.json")
    lora_config = LoraConfig(RANK, 10.0)
    _, params = load_network(folder, "transformer", config, "float32")
    adapters = lora.init_adapters(params, lora_config, jax.random.key(0))
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), adapters)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    trained = adapter_export.TrainedAdapters(config, RANK, 10.0, adapter_export.Base("base", "0"), 1, adapters)
    adapter_export.write_trained(file, trained, naming)
    if again is not None:  # an adapter file with other names
        with opened([Lora(file)]) as (adapter,):
            adapter_export.write_adapter(tmp_path / "again.safetensors", adapter, again)
        file = tmp_path / "again.safetensors"
    expected = mapping.to_tensors(
        entries_of("transformer", config, "diffusers"), lora.merge(params, adapters, lora_config)
    )
    result = fused(model, [(str(file), 1.0)])
    assert_equal_changes(result, expected, model, 20)
