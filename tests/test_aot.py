"""Networks compiled for several GPUs and for a TPU slice that are not attached: the fused kernels on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.config import MeshConfig
from sf_jax.inference import programs
from sf_jax.models import attention, discriminator, vae, wan
from sf_jax.models.kv_cache import KeysValues
from sf_jax.models.slots import unstack_layers
from sf_jax.perf.devices import devices_of
from sf_jax.perf.traffic import COPIES, traffic
from sf_jax.replay import keep_from, replay
from sf_jax.training import sharding
from tests.absent import KERNELS, TARGETS, WIDE, on
from tests.helpers import marked

CONFIG = dataclasses.replace(WIDE, channels=4)
FRAMES, SIZE = 4, (16, 16)


on_targets = pytest.mark.parametrize("target", [on(target) for target in TARGETS])
SPLIT = {"context": 2, "tensor": 2}


def compiled(target: str, function, *arguments) -> str:
    """The HLO of `function` on a mesh of absent devices; leaves are shapes, with or without a sharding."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, **SPLIT), list(devices_of(target)))
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH_AXES))

    def place(tree):
        if isinstance(tree, dict):  # parameters
            splits = sharding.tree_shardings(tree, mesh)
            return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, splits)
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), tree)

    with jax.set_mesh(mesh):
        # cuBLAS matmuls compile twice as fast as XLA's own kernels
        options = {"xla_gpu_enable_triton_gemm": False} if "h100" in target else None
        return jax.jit(function).lower(*map(place, arguments)).compile(options).as_text()


def has_kernel(target: str, text: str) -> bool:
    return any(name in text for name in KERNELS[target])


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


LATENTS, TEXT = shape(2, FRAMES, *SIZE, CONFIG.channels), shape(2, CONFIG.text_len, CONFIG.text_dim)
PATTERNS = {
    "bidirectional": wan.bidirectional_layout(FRAMES),
    "teacher forcing": wan.Layout(np.tile(np.arange(2), 2), pattern=attention.teacher_forcing((1, 1))),
    "replay": wan.Layout(np.arange(FRAMES), np.arange(FRAMES), pattern=attention.replay((2, 2))),
}


@on_targets
@pytest.mark.parametrize("kind", marked(PATTERNS, [kind for kind in PATTERNS if kind != "teacher forcing"]))
def test_attention_and_its_gradient_run_on_every_devices_share(target, kind):
    model, layout = wan.WanTransformer(CONFIG), PATTERNS[kind]
    past = shape(2, FRAMES * SIZE[0] * SIZE[1] // 4, CONFIG.num_heads, CONFIG.head_dim, dtype=jnp.bfloat16)

    def loss(params, latents, text, k, v):
        context = KeysValues(k[None], v[None]) if kind == "replay" else None
        return (model.apply({"params": params}, latents, jnp.ones((2, 1)), text, layout, context) ** 2).mean()

    arguments = (wan.param_shapes(CONFIG), LATENTS, TEXT, past, past)
    assert has_kernel(target, compiled(target, jax.grad(loss), *arguments))


@on_targets
def test_registers_of_the_discriminator_run_on_every_devices_share(target):
    config = discriminator.DiscriminatorConfig(taps=(0,), ffn_dim=512)
    critic, head = wan.WanTransformer(CONFIG), discriminator.Discriminator(CONFIG, config)
    head_shapes = jax.eval_shape(lambda: discriminator.init_discriminator(CONFIG, config, jax.random.key(0)))

    def loss(params, head_params, latents, text):
        layout, t = wan.bidirectional_layout(FRAMES), jnp.ones((2, 1))
        features, time = critic.apply({"params": params}, latents, t, text, layout, (0,), method="features")
        return head.apply({"params": head_params}, features, time).mean()

    gradient = jax.grad(loss, (0, 1, 2))
    assert has_kernel(target, compiled(target, gradient, wan.param_shapes(CONFIG), head_shapes, LATENTS, TEXT))


@on_targets
def test_the_discriminator_can_be_initialized(target):
    config = discriminator.DiscriminatorConfig(taps=(0, 0), ffn_dim=512)

    def init(latents):
        return discriminator.init_discriminator(CONFIG, config, jax.random.key(0)), latents

    assert compiled(target, init, LATENTS)


@on_targets
def test_products_of_the_time_embedding_are_exact(target):
    """GPUs and TPUs would round their inputs to TF32 and bfloat16."""

    def flow(params, latents, text):
        model = wan.WanTransformer(dataclasses.replace(CONFIG, dtype="bfloat16"))
        return model.apply({"params": params}, latents, jnp.ones((2, 1)), text, wan.bidirectional_layout(FRAMES))

    lines = compiled(target, flow, wan.param_shapes(CONFIG), LATENTS, TEXT).split("\n")
    lines = [line for line in lines if "/time_" in line]
    products = [line for line in lines if " dot(" in line or " convolution(" in line or "__cublas" in line]
    assert all("highest,highest" in line.lower().replace('"', "") for line in products), products
    # GPUs multiply and add up single rows in float32, without a matrix unit.
    assert products or any("reduce" in line.split("(")[0] for line in lines)


@on_targets
@pytest.mark.parametrize("form", marked(["scanned", "apart", "slots"], ["apart"]))
def test_streaming_with_a_cache_runs_on_every_devices_share(target, form):
    scan_layers = form == "scanned"
    config = dataclasses.replace(CONFIG, scan_layers=scan_layers)
    model, rollout = wan.WanTransformer(config), ro.RolloutConfig(chunk=2, window=6, sink=2, positions="relative")
    params = wan.param_shapes(CONFIG)

    def chunk(params, noise, text):
        params = params if scan_layers else unstack_layers(params)
        cache = (rollout_cache.empty_slots if form == "slots" else rollout_cache.empty_cache)(
            model, rollout, 2, 8, *SIZE
        )
        text = model.apply({"params": params}, text, method="encode_text")
        draw = ro.key_draw(jax.random.key(0), jnp.arange(2))
        noisy = ro.NoisyChunk(noise, jnp.int32(2), 1, 1, draw)
        cache, clean, _ = ro.generate_chunk(model, rollout, params, text, cache, noisy)
        return clean, cache.k

    noise = shape(2, 2, *SIZE, CONFIG.channels)
    assert has_kernel(target, compiled(target, chunk, params, noise, TEXT))


@on_targets
@pytest.mark.parametrize("text_len", [128, 127])
def test_streams_side_by_side_use_the_kernel(target, text_len):
    config = dataclasses.replace(CONFIG, text_len=text_len)
    model, rollout = wan.WanTransformer(config), ro.RolloutConfig(chunk=2, window=6, sink=2, positions="relative")

    def chunk(params, noise, text):
        def one(noise, text, frame):
            cache = rollout_cache.empty_cache(model, rollout, 1, 8, *SIZE)
            text = model.apply({"params": params}, text, method="encode_text")
            draw = ro.key_draw(jax.random.key(0), jnp.arange(1))
            noisy = ro.NoisyChunk(noise, frame, 1, 1, draw)
            cache, clean, _ = ro.generate_chunk(model, rollout, params, text, cache, noisy)
            return clean, cache.k

        return jax.vmap(one, spmd_axis_name="data")(noise, text, 2 * jnp.arange(2))

    noise, text = shape(2, 1, 2, *SIZE, CONFIG.channels), shape(2, 1, text_len, CONFIG.text_dim)
    assert has_kernel(target, compiled(target, chunk, wan.param_shapes(config), noise, text))


@on_targets
def test_a_window_in_training_stays_on_the_kernel(target):
    model, config = wan.WanTransformer(CONFIG), ro.RolloutConfig(chunk=2, window=6, sink=2)

    def loss(params, noise, text):
        text = model.apply({"params": params}, text, method="encode_text")
        draw = ro.key_draw(jax.random.key(0), jnp.arange(2))
        past = ro.rollout(model, config, params, text, noise, 1, draw, None, keep_from(config, "stop", 10))
        return (replay(model, config, params, text, past) ** 2).mean()

    text = compiled(target, jax.grad(loss), wan.param_shapes(CONFIG), shape(2, 10, *SIZE, CONFIG.channels), TEXT)
    assert has_kernel(target, text) and "attention_xla" not in text


@pytest.mark.parametrize("target", [on("v6e:2x2")])
def test_checkpointed_dots_run_attentions_kernel_once(target):
    config = dataclasses.replace(CONFIG, remat="dots")

    def loss(params, noise, text):
        t = jnp.full((1, 1), 500.0)
        flow = wan.WanTransformer(config).apply({"params": params}, noise, t, text, PATTERNS["bidirectional"])
        return jnp.square(flow).mean()

    text = compiled(target, jax.grad(loss), wan.param_shapes(config), LATENTS, TEXT)
    # Self- and cross-attention: forward, queries' gradient, keys' gradient.
    assert text.count('custom_call_target="tpu_custom_call"') == 6


@on_targets
def test_the_vae_compiles_where_its_one_head_cannot_be_split(target):
    """Wan's VAE has one head of 384 channels: Splash supports it, cuDNN does not."""
    layer = vae.FrameAttention("bfloat16")
    frames = shape(2, 1, 30, 52, 384, dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x)["params"], frames)
    call = functools.partial(_loss, layer)
    text = compiled(target, jax.grad(call, 1), {"vae": params}, frames)
    assert has_kernel(target, text) == (target == "v6e:2x2")


@pytest.mark.parametrize("target", [on("h100:1")])
def test_products_of_a_chunk_have_epilogues(target):
    """On GPUs, GELU, biases and the residual of cross-attention are fused into the matmuls, and no cache is copied."""
    config = dataclasses.replace(CONFIG, scan_layers=False, num_layers=2)
    model, rollout = wan.WanTransformer(config), ro.RolloutConfig(chunk=2)
    mesh = jax.sharding.Mesh(np.asarray(devices_of(target)), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):

        def put(tree):
            narrow = {jnp.dtype(jnp.float32): jnp.bfloat16}
            whole = NamedSharding(mesh, PartitionSpec())
            return jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, narrow.get(a.dtype, a.dtype), sharding=whole), tree
            )

        stacked = wan.param_shapes(dataclasses.replace(config, scan_layers=True))
        params = put(jax.eval_shape(functools.partial(unstack_layers, fuse=True), stacked))
        prompt = shape(1, config.text_len, config.text_dim)
        text = put(jax.eval_shape(lambda p, t: programs.encode_text(model, p, t), params, prompt))
        cache = put(jax.eval_shape(lambda: programs.empty_cache(model, rollout, 1, 6, (*SIZE, config.channels))))
        key, number = jax.eval_shape(lambda: jax.random.key(0)), shape(dtype=jnp.int32)
        source, place = (key, shape(1, dtype=jnp.int32), number), (number, number, shape(dtype=jnp.bool_))
        static = (model, rollout, None, (2, *SIZE, config.channels))
        text = programs.next_chunk.lower(*static, params, text, cache, source, place).compile().as_text()
    layers = config.num_layers
    assert text.count('"epilogue":"BIAS_GELU"') == layers and text.count("__cudnn$fmhaSoftmax") == 2 * layers
    assert text.count('"epilogue":"BIAS"') >= 4 * layers and "gemm_fusion" not in text
    slots = cache.k[0]
    assert COPIES not in traffic(text, 5.0, "largest", {slots.size: slots.shape[1]}).kinds


def _loss(layer, params, x):
    return (layer.apply({"params": params["vae"]}, x).astype(jnp.float32) ** 2).mean()
