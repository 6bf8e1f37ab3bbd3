"""Networks compiled for several GPUs and for a TPU slice that are absent: the fused kernels on a mesh."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sf_jax import rollout as ro
from sf_jax.config import MeshConfig
from sf_jax.models import attention, discriminator, vae, wan
from sf_jax.models.kv_cache import KeysValues
from sf_jax.models.slots import unstack_layers
from sf_jax.perf.devices import devices_of
from sf_jax.training import sharding

COMPILERS = {"h100:4": "jax_plugins.xla_cuda12", "v6e:2x2": "libtpu"}
# what the compiled program calls the kernels
KERNELS = {"h100:4": ("__cudnn$fmhaSoftmax",), "v6e:2x2": ("tpu_custom_call", "splash_mha")}
WIDE = wan.WanConfig(
    dim=512,
    ffn_dim=512,
    num_heads=4,
    num_layers=1,
    text_dim=64,
    text_len=128,
    freq_dim=64,
    channels=4,
    dtype="bfloat16",
)
FRAMES, SIZE = 4, (16, 16)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _targets():
    for target, module in COMPILERS.items():
        missing = pytest.mark.skipif(
            not _has(module), reason=f"{module}, which compiles for {target}, is not installed"
        )
        yield pytest.param(target, marks=(pytest.mark.aot, missing))


on_targets = pytest.mark.parametrize("target", list(_targets()))
SPLITS = ({"context": 2, "fsdp": 2}, {"tensor": 2, "context": 2})
on_meshes = pytest.mark.parametrize("split", SPLITS, ids=("context", "context and tensor"))


def compiled(target: str, split: dict, function, *arguments) -> str:
    """The program of `function` on a mesh of absent devices; leaves are shapes, or have a sharding already."""
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1, "fsdp": 1} | split), list(devices_of(target)))
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))

    def place(tree):
        if isinstance(tree, dict):  # parameters
            splits = sharding.tree_shardings(tree, mesh)
            return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, splits)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), tree)

    with jax.set_mesh(mesh):
        # products by cuBLAS compile in half the time that XLA's own kernels take
        options = {"xla_gpu_enable_triton_gemm": False} if "h100" in target else None
        return jax.jit(function).lower(*map(place, arguments)).compile(options).as_text()


def has_kernel(target: str, text: str) -> bool:
    return any(name in text for name in KERNELS[target])


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


LATENTS, TEXT = shape(2, FRAMES, *SIZE, WIDE.channels), shape(2, WIDE.text_len, WIDE.text_dim)
PATTERNS = {
    "bidirectional": wan.bidirectional_layout(FRAMES),
    "teacher forcing": wan.Layout(np.tile(np.arange(2), 2), pattern=attention.teacher_forcing((1, 1))),
    "replay": wan.Layout(np.arange(FRAMES), np.arange(FRAMES), pattern=attention.replay((2, 2))),
}


@on_targets
@on_meshes
@pytest.mark.parametrize("kind", PATTERNS)
def test_attention_and_its_gradient_run_on_every_devices_share(target, split, kind):
    model, layout = wan.WanTransformer(WIDE), PATTERNS[kind]
    past = shape(2, FRAMES * SIZE[0] * SIZE[1] // 4, WIDE.num_heads, WIDE.head_dim, dtype=jnp.bfloat16)

    def loss(params, latents, text, k, v):
        context = KeysValues(k[None], v[None]) if kind == "replay" else None
        return (model.apply({"params": params}, latents, jnp.ones((2, 1)), text, layout, context) ** 2).mean()

    arguments = (wan.param_shapes(WIDE), LATENTS, TEXT, past, past)
    assert has_kernel(target, compiled(target, split, jax.grad(loss), *arguments))


@on_targets
def test_registers_of_the_discriminator_run_on_every_devices_share(target):
    config = discriminator.DiscriminatorConfig(taps=(0,), ffn_dim=512)
    critic, head = wan.WanTransformer(WIDE), discriminator.Discriminator(WIDE, config)
    head_shapes = jax.eval_shape(lambda: discriminator.init_discriminator(WIDE, config, jax.random.key(0)))

    def loss(params, head_params, latents, text):
        layout, t = wan.bidirectional_layout(FRAMES), jnp.ones((2, 1))
        features, time = critic.apply({"params": params}, latents, t, text, layout, (0,), method="features")
        return head.apply({"params": head_params}, features, time).mean()

    gradient = jax.grad(loss, (0, 1, 2))
    assert has_kernel(target, compiled(target, SPLITS[1], gradient, wan.param_shapes(WIDE), head_shapes, LATENTS, TEXT))


@on_targets
@pytest.mark.parametrize("scan_layers", [True, False])
def test_streaming_with_a_cache_runs_on_every_devices_share(target, scan_layers):
    config = dataclasses.replace(WIDE, scan_layers=scan_layers)
    model, rollout = wan.WanTransformer(config), ro.RolloutConfig(chunk=2, window=6, sink=2, positions="relative")
    params = wan.param_shapes(WIDE)

    def chunk(params, noise, text):
        params = params if scan_layers else unstack_layers(params)
        cache = ro.empty_cache(model, rollout, 2, 8, *SIZE)
        text = model.apply({"params": params}, text, method="encode_text")
        draw = ro.key_draw(jax.random.key(0), jnp.arange(2))
        cache, clean, _ = ro.generate_chunk(model, rollout, params, text, cache, noise, jnp.int32(2), 1, 1, draw)
        return clean, cache.k

    noise = shape(2, 2, *SIZE, WIDE.channels)
    assert has_kernel(target, compiled(target, SPLITS[1], chunk, params, noise, TEXT))


@on_targets
@on_meshes
def test_the_vae_compiles_where_its_one_head_cannot_be_split(target, split):
    """Wan's head of 384 channels: Splash takes it, cuDNN does not."""
    layer = vae.FrameAttention("bfloat16")
    frames = shape(2, 1, 30, 52, 384, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x)["params"], frames)
    call = functools.partial(_loss, layer)
    text = compiled(target, split, jax.grad(call, 1), {"vae": params}, frames)
    assert has_kernel(target, text) == (target == "v6e:2x2")


@on_targets
def test_a_small_vae_decodes_on_a_mesh(target):
    config = vae.VaeConfig(dim=32, num_res_blocks=1)
    model, latents = vae.WanVae(config), shape(2, 2, 8, 8, config.z_dim)

    def decode(params, latents):
        return model.apply({"params": params["vae"]}, latents, method="decode")

    compiled(target, SPLITS[1], decode, {"vae": vae.param_shapes(config)}, latents)


def _loss(layer, params, x):
    return (layer.apply({"params": params["vae"]}, x).astype(jnp.float32) ** 2).mean()
