"""Weights written by other tools: wrappers, quantizations, several networks in a file, variants, other networks."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sf_jax.messages import with_article
from sf_jax.models import wan
from sf_jax.weights import folders, load, mapping, places, transformer
from sf_jax.weights.export import read_network
from sf_jax.weights.files import open_tensors
from sf_jax.weights.networks import describe_network, load_network
from sf_jax.weights.recognize import param_shapes_of, recognize
from tests.test_weights import CONFIGS, TORCH, assert_same, in_memory, network

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("kind", ["transformer", "vae", "tiny_vae", "umt5"])
def test_wrappers_go_where_all_names_have_them(kind):
    tensors = network(kind, "official")[2]
    nestings = ("module.", "module._orig_mod.model.", "_forward_module.net.", "ema.", "a.b._fsdp_wrapped_module.")
    for wrapper in nestings:
        wrapped = {wrapper + name: value for name, value in tensors.items()}
        beside = {f"{wrapper}accum_iteration": np.zeros(()), "n_averaged": np.zeros(()), "spiece_model": np.zeros(9)}
        assert_same(load.normalized(in_memory(wrapped | beside), tensors), tensors)
        assert recognize(in_memory(wrapped | beside).shapes).kind == kind
    first = next(iter(tensors))
    half = {name if name == first else f"module.{name}": value for name, value in tensors.items()}
    assert first in load.normalized(in_memory(half), tensors) and len(set(half) & set(tensors)) == 1


def scaled(value: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float8 values, their scales, and their product in float32; `shape` is that of the scales."""
    scale = np.random.default_rng(0).uniform(0.001, 0.1, shape).astype(np.float32)
    blocks = scale.reshape(shape[:2] if len(shape) > 1 else (*shape, *[1] * (2 - len(shape))))
    spread = np.kron(blocks, np.ones([size // part for size, part in zip(value.shape, blocks.shape)], np.float32))
    stored = (value / spread).astype(E4M3)
    return stored, scale, stored.astype(np.float32) * spread


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1), (1, 6), (4, 3), (8, 3, 1)])
def test_scaled_float8_is_the_stored_number_times_its_scale(suffix, shape, tmp_path):
    value = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)
    stored, scale, product = scaled(value, shape)
    file = {"a.weight": stored, f"a.{suffix}": scale, "a.input_scale": np.ones(1, np.float32), "b.bias": value[0]}
    save_file(
        file | {"scaled_fp8": np.zeros(2, E4M3), "a.comfy_quant": np.zeros(9, np.uint8)}, tmp_path / "a.safetensors"
    )
    with open_tensors(tmp_path / "a.safetensors") as tensors:
        assert tensors.dtypes["a.weight"] == np.float32
        assert_same({name: tensors[name] for name in ("a.weight", "b.bias")}, {"a.weight": product, "b.bias": value[0]})
    with pytest.raises(ValueError, match=f"holds scaled float8 .such as a.{suffix}.*sf_jax.convert --input"):
        open_tensors(tmp_path / "a.safetensors", scaled=False)


def test_blocks_of_128_may_be_cut_and_other_scales_are_refused(tmp_path):
    value = np.ones((200, 130), E4M3)
    scale = np.arange(1, 5, dtype=np.float32).reshape(2, 2)
    save_file({"a.weight": value, "a.weight_scale_inv": scale}, tmp_path / "a.safetensors")
    with open_tensors(tmp_path / "a.safetensors") as tensors:
        got = tensors["a.weight"]
    assert got[127, 127] == 1 and got[127, 128] == 2 and got[128, 0] == 3 and got[199, 129] == 4
    faults = [
        ({"a.weight_scale": np.ones((3, 2), np.float32)}, r"a.weight_scale is \(3, 2\): no scale of a weight"),
        ({"b.weight_scale": scale}, "b.weight_scale is the scale of b.weight, which is not there"),
        ({"a.weight_scale": np.ones((2, 2), np.uint8)}, "is quantized with MXFP8"),
    ]
    for scales, message in faults:
        save_file({"a.weight": value} | scales, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=message):
            open_tensors(tmp_path / "a.safetensors")
    save_file({"a.weight": value, "a.weight_scale": np.full((), np.nan, np.float32)}, tmp_path / "a.safetensors")
    with open_tensors(tmp_path / "a.safetensors") as tensors, pytest.raises(ValueError, match="not finite"):
        tensors["a.weight"]


def test_scaled_float8_without_its_scales_is_refused(tmp_path):
    for prefix in ("", "text_encoders.umt5xxl.transformer."):
        marker = {f"{prefix}scaled_fp8": np.zeros(0, E4M3)}
        save_file({f"{prefix}a.weight": np.ones((2, 2), E4M3)} | marker, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="marked as scaled float8 .*scaled_fp8. but has no scales"):
            open_tensors(tmp_path / "a.safetensors")
        save_file({f"{prefix}a.weight": np.ones((2, 2), np.float16)} | marker, tmp_path / "a.safetensors")
        open_tensors(tmp_path / "a.safetensors").close()  # float16 now; the marker is no weight


@pytest.mark.parametrize(
    ("names", "title"),
    [
        (["a.weight", "a.SCB"], "bitsandbytes' int8"),
        (["a.weight", "a.weight.quant_state.bitsandbytes__nf4", "a.weight.absmax"], "bitsandbytes' 4 bits"),
        (["a.qweight", "a.wscales", "a.smooth_factor"], "SVDQuant"),
        (["a.qweight", "a.qzeros", "a.scales"], "GPTQ or AWQ"),
        (["a.weight", "a.weight_scale", "a.weight_scale_2"], "NVFP4"),
        (["a.weight._data", "a.weight._scale"], "optimum-quanto"),
    ],
)
def test_other_quantizations_are_called_by_name(names, title, tmp_path):
    save_file({name: np.zeros(4, np.int8) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"is quantized with {title}.*dequantize") as refusal:
        open_tensors(tmp_path / "a.safetensors")
    assert "\n" not in str(refusal.value)
    save_file({"a.weight": np.zeros((4, 4), np.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is quantized .a.weight is int8.*give the file in bfloat16"):
        open_tensors(tmp_path / "a.safetensors")


def test_networks_in_float8_are_loaded_with_the_same_numbers(tmp_path):
    for kind in ("transformer", "umt5"):
        entries, like, tensors = network(kind, "official")
        plain = {n: v.astype(E4M3) if v.ndim == 2 and n.startswith("blocks.0.") else v for n, v in tensors.items()}
        save_file(plain, tmp_path / "plain.safetensors")
        _, params = load_network(tmp_path / "plain.safetensors", kind, CONFIGS[kind], "float32")
        wide = {name: value.astype(np.float32) for name, value in plain.items()}
        assert_trees(params, mapping.to_params(entries, wide, like, kind))
        load_network(tmp_path / "plain.safetensors", kind, CONFIGS[kind])  # layers with different types
        products = dict(tensors)
        file = dict(tensors)
        for name, value in tensors.items():
            if value.ndim == 2 and name.endswith(".weight") and name.startswith("blocks."):
                file[name], file[f"{name}_scale"], products[name] = scaled(value, (value.shape[0], 1))
        save_file(file, tmp_path / "scaled.safetensors")
        _, params = load_network(tmp_path / "scaled.safetensors", kind, CONFIGS[kind], scaled=True)
        assert_trees(params, mapping.to_params(entries, products, like, kind))
        with pytest.raises(ValueError, match="holds scaled float8"):
            load_network(tmp_path / "scaled.safetensors", kind, CONFIGS[kind])


def assert_trees(ours, expected):
    import jax

    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_float8_alone_becomes_bfloat16(tmp_path):
    entries, like, tensors = network("umt5", "official")
    save_file({name: value.astype(E4M3) for name, value in tensors.items()}, tmp_path / "a.safetensors")
    _, params = load_network(tmp_path / "a.safetensors", "umt5")
    assert params["norm"]["scale"].dtype == "bfloat16"
    wide = {name: value.astype(E4M3).astype(np.float32) for name, value in tensors.items()}
    assert_trees({**params}, mapping.to_params(entries, wide, like, "umt5"))


PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "vae.",
    "umt5": "text_encoders.umt5xxl.transformer.",
}


def test_networks_of_an_all_in_one_file(tmp_path):
    path, whole = tmp_path / "aio.safetensors", {}
    for kind, prefix in PREFIXES.items():
        whole |= {prefix + name: value for name, value in network(kind, "official")[2].items()}
    save_file(whole, path)
    for kind in PREFIXES:
        entries, like, tensors = network(kind, "official")
        _, params = load_network(path, kind, CONFIGS[kind])
        assert_trees(params, mapping.to_params(entries, tensors, like, kind))
    with open_tensors(path, "text_encoder") as stored:
        assert_same(stored, network("umt5", "official")[2])
    with open_tensors(path) as stored:
        assert "all-in-one: transformer, vae, text_encoder): say which with part" in recognize(stored.shapes).title
    # A scaled text encoder does not affect the other networks.
    name = next(name for name in whole if name.startswith(PREFIXES["umt5"]) and "attn.q.weight" in name)
    scale = {f"{name.removesuffix('.weight')}.scale_weight": np.ones(1, np.float32)}
    save_file(whole | scale | {name: whole[name].astype(E4M3)}, path)
    assert describe_network(path, "vae").kind == "vae" and load_network(path, "transformer", CONFIGS["transformer"])
    with pytest.raises(ValueError, match="holds scaled float8"):
        describe_network(path, "umt5")
    without = {name: value for name, value in whole.items() if not name.startswith("vae.")}
    save_file(without, path)
    with pytest.raises(ValueError, match="part is 'vae': .* holds transformer, text_encoder"):
        open_tensors(path, "vae")
    with pytest.raises(ValueError, match="a vae is needed; this is a file of several networks"):
        load_network(path, "vae")
    save_file(network("vae", "official")[2], path)
    with pytest.raises(ValueError, match="part is 'vae': .* is no all-in-one file"):
        open_tensors(path, "vae")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.bf16.safetensors", "a.safetensors"], "a.safetensors"),
        (["a.fp16.safetensors", "a.bf16.safetensors"], "a.bf16.safetensors"),
        (["a.fp16.safetensors", "a.bin"], "a.bin"),
        (["a.ema.safetensors"], "a.ema.safetensors"),
        (["a.safetensors.index.fp16.json", "a.fp16-00001-of-00002.safetensors"], "a.safetensors.index.fp16.json"),
        (["a.bin.index.json", "a-00001-of-00002.bin"], "a.bin.index.json"),
        (["a.fp16.bin"], "a.fp16.bin"),
        (["ab.safetensors", "a-00001-of-00002.safetensors"], None),
    ],
)
def test_variants_are_found(names, found):
    assert places.find_stem(names, "a") == found
    if found is not None and "index" in found:
        assert places.files_of(names, found) == names


def test_variants_that_differ_are_asked_for(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    for variant in ("ema", "bf16"):
        (folder / f"diffusion_pytorch_model.{variant}.safetensors").touch()
    for path in (tmp_path, folder):
        with pytest.raises(ValueError, match="has several variants and none without a name: give one of .*bf16.*ema"):
            open_tensors(path)
    with pytest.raises(ValueError, match="model folder .* has several variants"):
        folders.find_model(tmp_path, ["transformer"])


def test_rcm_has_a_linear_patch_embedding(tmp_path):
    entries, like, tensors = network("transformer", "official")
    kernel = tensors["patch_embedding.weight"]
    file = {f"net.{name}": value for name, value in tensors.items()}
    file["net.patch_embedding.weight"] = kernel.reshape(kernel.shape[0], -1)
    file["net.accum_video_sample_counter"] = np.zeros((), np.int64)
    save_file(file, tmp_path / "rcm.safetensors")
    config, params = load_network(tmp_path / "rcm.safetensors", "transformer", CONFIGS["transformer"])
    assert describe_network(tmp_path / "rcm.safetensors", "transformer").naming == "rcm"
    assert_trees(params, mapping.to_params(entries, tensors, like, "transformer"))
    # Its patches are flattened as (c kt kh kw), ours as (kt kh kw c).
    patch = np.random.default_rng(0).normal(size=(config.channels, *config.patch)).astype(np.float32)
    theirs = file["net.patch_embedding.weight"] @ patch.reshape(-1)
    ours = np.moveaxis(patch, 0, -1).reshape(-1) @ np.asarray(params["patch_embedding"]["kernel"])
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("blocks.0.to_gate_compress.weight", "FastWan"),
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("img_emb.proj.0.weight", "image-to-video"),
        ("condition_embedder.image_embedder.ff.net.0.proj.weight", "image-to-video"),
        ("control_adapter.conv.weight", "camera control"),
        ("blocks.0.cam_encoder.weight", "camera control"),
        ("ref_conv.weight", "reference images"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "character animation"),
        ("casual_audio_encoder.encoder.final_linear.weight", "speech-to-video"),
        ("audio_proj.audio_proj_glob_1.layer.bias", "driven by sound"),
        ("fps_embedding.weight", "SkyReels-V2"),
        ("blocks.0.other.weight", "another network, which has all that this transformer has and more"),
    ],
)
def test_networks_that_have_more_are_called_by_name(name, title, tmp_path):
    tensors = network("transformer", "official")[2]
    save_file({f"model.{n}": v for n, v in (tensors | {name: np.zeros(1)}).items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=title) as refusal:
        load_network(tmp_path / "a.safetensors", "transformer", CONFIGS["transformer"])
    assert "\n" not in str(refusal.value) and name in str(refusal.value)


def test_checkpoints_of_other_tools_are_called_by_name(tmp_path):
    files = {
        "dcp/.metadata": None,
        "dcp/__0_0.distcp": "torch.distributed.checkpoint.format_utils dcp_to_torch .*dcp OUTPUT.pt",
        "fsdp/pytorch_model_fsdp_0/__0_0.distcp": "dcp_to_torch .*pytorch_model_fsdp_0 OUTPUT.pt",
        "ds/global_step9/mp_rank_00_model_states.pt": "DeepSpeed.*zero_to_fp32.py .*ds OUTPUT",
        "ds2/global_step9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": "DeepSpeed.*zero_to_fp32.py .*ds2 OUTPUT",
        "orbax/manifest.ocdbt": "Orbax.*sf_jax.convert --from=WORKDIR",
        "orbax2/default/_METADATA": "Orbax",
    }
    for name, message in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
        if message is not None:
            for open_folder in (open_tensors, folders.find_model):
                with pytest.raises(ValueError, match=message):
                    open_folder(tmp_path / name.partition("/")[0])
            if file.suffix in (".distcp", ".pt"):
                with pytest.raises(ValueError, match=message):
                    open_tensors(file)


@pytest.mark.slow
def test_dtensors_are_called_by_name(tmp_path):
    torch = pytest.importorskip("torch", reason=TORCH)
    dist = pytest.importorskip("torch.distributed", reason=TORCH)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

        sharded = distribute_tensor(torch.ones(3), init_device_mesh("cpu", (1,)), [Replicate()])
        torch.save({"generator": {"a": sharded}}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="holds DTensors.*full_tensor.*dcp_to_torch"):
            open_tensors(tmp_path / "a.pt")
    finally:
        dist.destroy_process_group()


def test_sizes_of_other_models_are_told_by_their_channels():
    config = wan.wan_1_3b(dim=256, ffn_dim=8, num_heads=2, num_layers=1)
    shapes = mapping.file_shapes(transformer.entries(config), param_shapes_of("transformer", config))
    for channels, outputs, title in ((48, 192, "Wan2.2-TI2V-5B"), (36, 64, "an image-to-video model")):
        other = shapes | {"patch_embedding.weight": (256, channels, 1, 2, 2), "head.head.weight": (outputs, 256)}
        assert title in recognize(other).title


def test_folders_with_nothing_but_gguf_are_called_by_name(tmp_path):
    (tmp_path / "wan2.1-t2v-14b-Q4_K_M.gguf").write_bytes(b"GGUF")
    for open_folder in (open_tensors, folders.find_model):
        with pytest.raises(ValueError, match="Q4_K_M.gguf is no weight file: it is a GGUF file .*dequantize"):
            open_folder(tmp_path)


@pytest.mark.parametrize("name", ["a-00001-of-00006.safetensors", "model.fp16-00003-of-00006.safetensors"])
def test_single_shards_are_called_by_name(name, tmp_path):
    save_file(network("transformer", "official")[2], tmp_path / name)
    with pytest.raises(ValueError, match=r"is shard [13] of 6 of a network: give their folder, or their index"):
        load_network(tmp_path / name, "transformer")
    path = (tmp_path / name).rename(tmp_path / "a-00001-of-00001.safetensors")
    assert load_network(path, "transformer", CONFIGS["transformer"])


FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "beside", "message"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", {}, "two experts of Wan2.2-A14B"),
        ("Wan2_2-T2V-A14B_LOW.safetensors", {}, "two experts of Wan2.2-A14B"),
        (f"high_noise_model/{FILE}", {}, "by the name high_noise_model"),
        (f"transformer_2/{FILE}", {}, "by the name transformer_2"),
        (f"transformer/{FILE}", {"transformer_2/config.json": "{}"}, "transformer_2 is beside it"),
        (f"transformer/{FILE}", {"model_index.json": '{"boundary_ratio": 0.875}'}, "model_index.json is beside it"),
        (f"transformer/{FILE}", {"model_index.json": '{"_class_name": "WanImageToVideoPipeline"}'}, "is of a WanImage"),
        (FILE, {"config.json": '{"model_type": "i2v"}'}, "has the model_type 'i2v'"),
        (f"transformer/{FILE}", {"model_index.json": '{"_class_name": "WanCausalDMDPipeline"}'}, None),
        ("Wan2.1-T2V-14B_student.safetensors", {"transformer_2/config.json": "{}"}, None),
    ],
)
def test_experts_and_other_tasks_are_told_by_what_is_around_them(name, beside, message, tmp_path):
    for file, content in beside.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    save_file(network("transformer", "official")[2], tmp_path / name)
    for path in dict.fromkeys((tmp_path / name, (tmp_path / name).parent, tmp_path)):
        if message is None:
            load_network(path, "transformer", CONFIGS["transformer"])
            continue
        with pytest.raises(ValueError, match=message), open_tensors(path) as tensors:
            read_network(tensors, "diffusers")
        with pytest.raises(ValueError, match=message):
            describe_network(path, "transformer")


def test_articles(tmp_path):
    assert [with_article(noun) for noun in ("adapter", "int", "VAE", "umt5", "upscaling transformer")] == [
        "an adapter",
        "an int",
        "a VAE",
        "a umt5",
        "an upscaling transformer",
    ]
    with pytest.raises(
        ValueError, match=r"config.json: the sizes .* cannot be read from it .No such file or directory.$"
    ):
        folders.read_config(tmp_path / "config.json")
