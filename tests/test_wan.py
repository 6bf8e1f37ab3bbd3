"""The transformer and its layers."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax.models import attention, rope, wan
from sf_jax.models.layers import layer_norm, time_features
from sf_jax.weights import transformer
from tests.helpers import SMALL, inputs, random_params, relative, tree_relative


def test_layer_norm_and_its_gradient_equal_autodiff():
    x = jax.random.normal(jax.random.key(0), (3, 5, 16)) * 3 + 1

    def reference(x):
        centerd = x - x.mean(-1, keepdims=True)
        return centerd / jnp.sqrt((centerd**2).mean(-1, keepdims=True) + 1e-6)

    weight = jax.random.normal(jax.random.key(1), x.shape)
    assert relative(layer_norm(x, 1e-6), reference(x)) < 1e-6
    ours = jax.grad(lambda x: (layer_norm(x, 1e-6) * weight).sum())(x)
    assert relative(ours, jax.grad(lambda x: (reference(x) * weight).sum())(x)) < 1e-5


@pytest.mark.parametrize("dim", [16, 32, 256])
def test_time_features_keep_float32_precision_up_to_1000(dim):
    t = np.concatenate([np.linspace(0, 1000, 997), [937.5, 833.3333, 0.00498, 999.9998]]).astype(np.float32)
    angle = t.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    assert np.abs(np.asarray(jax.jit(time_features, static_argnums=1)(t, dim)) - expected).max() < 2e-6


def test_rotations_only_depend_on_distance():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 1, 12))

    def logits(shift):
        turn = rope.rotation(np.arange(4) + shift, (1, 1), 12)
        return jnp.einsum("btnd,bsnd->ts", rope.rotate(q, turn), rope.rotate(k, turn))

    assert relative(logits(900), logits(0)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotations_on_tpus_are_the_same(dtype, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2, 6, 3, 16)).astype(dtype)
    turn = rope.rotation(np.array([0, 3, 700]), (1, 2), 16)
    plain = rope.rotate(x, turn)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    other = rope.rotate_constant(x, turn)
    assert other.dtype == plain.dtype and relative(other, plain) < (1e-7 if dtype == "float32" else 1e-3)


def test_traced_positions_equal_static_ones():
    positions = np.array([0, 5, 1023])
    traced = jax.jit(lambda p: rope.rotation(p, (2, 3), 16))(positions)
    np.testing.assert_array_equal(traced, rope.rotation(positions, (2, 3), 16))


@pytest.mark.slow
def test_recomputing_does_not_change_gradients():
    noise, text, _ = inputs(4)
    params, layout = random_params(), wan.Layout(frames=np.arange(4), pattern=attention.block_causal((2, 2)))

    def loss(params, remat):
        model = wan.WanTransformer(dataclasses.replace(SMALL, remat=remat))
        return jnp.sin(model.apply({"params": params}, noise, jnp.full((2, 1), 500.0), text, layout)).sum()

    plain, dots, block = (
        jax.jit(jax.grad(functools.partial(loss, remat=r)))(params) for r in ("none", "dots", "block")
    )
    assert tree_relative(dots, plain) < 1e-6
    assert tree_relative(block, plain) < 1e-6


@pytest.mark.parametrize(("tiles", "logits"), [(False, 2), (True, 0)])
def test_checkpointed_dots_are_not_recomputed(monkeypatch, tiles, logits):
    """Only a product of queries and keys, for self- and cross-attention, if not in tiles (which never keep it)."""
    if tiles:
        monkeypatch.setattr(attention, "MAX_LOGITS", {"cpu": 1})
    noise, text, _ = inputs(4)
    params = jax.eval_shape(random_params)

    def products(remat):
        model = wan.WanTransformer(dataclasses.replace(SMALL, remat=remat))

        def loss(params):
            flow = model.apply({"params": params}, noise, jnp.full((2, 1), 500.0), text, wan.bidirectional_layout(4))
            return jnp.square(flow).mean()

        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("dot_general[")

    none, dots, block = map(products, ("none", "dots", "block"))
    assert dots == none + logits
    assert block >= none + 10  # 8 dense layers, and attention


def test_later_frames_do_not_reach_earlier_chunks():
    noise, text, _ = inputs(6)
    model, params = wan.WanTransformer(SMALL), random_params()
    layout = wan.Layout(frames=np.arange(6), pattern=attention.block_causal((2, 2, 2)))
    t = jnp.full((2, 1), 700.0)
    run = jax.jit(lambda x: model.apply({"params": params}, x, t, text, layout))
    changed = run(noise.at[:, 4:].add(1.0))
    np.testing.assert_array_equal(changed[:, :4], run(noise)[:, :4])
    assert not np.array_equal(changed[:, 4:], run(noise)[:, 4:])


def test_one_compile_per_shape():
    noise, text, _ = inputs(4)
    params = random_params()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, x, t):
        layout = wan.bidirectional_layout(4)
        return wan.WanTransformer(SMALL).apply({"params": params}, x, t, text, layout)

    for t in (1.0, 500.0, 999.0):
        run(params, noise, jnp.full((2, 1), t))


def test_bfloat16_is_close_and_keeps_float32_outputs():
    noise, text, _ = inputs(4)
    params, t = random_params(), jnp.full((2, 1), 500.0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype):
        model = wan.WanTransformer(dataclasses.replace(SMALL, dtype=dtype))
        return model.apply({"params": params}, noise, t, text, wan.bidirectional_layout(4))

    flows = [run("float32"), run("bfloat16")]
    assert flows[1].dtype == jnp.float32 and 1e-4 < relative(flows[1], flows[0]) < 0.05


def test_official_names_round_trip_bit_by_bit():
    params = random_params()
    tensors = transformer.to_official(params, SMALL)
    assert tensors["blocks.1.ffn.0.weight"].shape == (48, 32) and tensors["patch_embedding.weight"].shape == (
        32,
        4,
        1,
        2,
        2,
    )
    wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in tensors.items()}
    jax.tree.map(
        np.testing.assert_array_equal, transformer.from_official(wrapped, SMALL, wan.param_shapes(SMALL)), params
    )
    tensors.pop("head.head.bias")
    with pytest.raises(ValueError, match=r"1 tensors missing \['head.head.bias'\]"):
        transformer.from_official(tensors, SMALL, wan.param_shapes(SMALL))
    bad = transformer.to_official(params, SMALL) | {"head.head.bias": np.zeros(3)}
    with pytest.raises(ValueError, match="head.head.bias is .3,., must be .16,."):
        transformer.from_official(bad, SMALL, wan.param_shapes(SMALL))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="latent size is 5x4"):
        SMALL.grid(5, 4)
    with pytest.raises(ValueError, match="remat is 'all'"):
        dataclasses.replace(SMALL, remat="all")
    with pytest.raises(ValueError, match="dim is 30"):
        dataclasses.replace(SMALL, dim=30)
    noise, text, _ = inputs(4)
    with pytest.raises(ValueError, match="latents have 3 channels"):
        wan.WanTransformer(SMALL).apply(
            {"params": random_params()}, noise[..., :3], jnp.ones((2, 1)), text, wan.bidirectional_layout(4)
        )


@pytest.mark.parametrize(("config", "count"), [(wan.wan_1_3b(), 1_418_996_800), (wan.wan_14b(), 14_288_491_584)])
def test_full_sizes_have_the_real_number_of_parameters(config, count):
    assert sum(x.size for x in jax.tree.leaves(wan.param_shapes(config))) == count


def test_float32_products_are_exact_on_every_device():
    """Those of the time embedding, forward and backward; GPUs and TPUs round the inputs of other matmuls."""
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    noise, text, _ = inputs(2)
    model, layout = wan.WanTransformer(config), wan.bidirectional_layout(2)

    def loss(params):
        return model.apply({"params": params}, noise, jnp.ones((2, 1)), text, layout).mean()

    def products(function):
        lines = jax.jit(function).lower(random_params()).as_text().split("\n")
        lines = [line for line in lines if "dot_general" in line]
        wide = [line for line in lines if "f32" in line.split(" : (")[1].split(" -> ")[0]]
        return len(wide), sum("HIGHEST" in line for line in lines)

    assert products(loss) == (3, 3)
    # Plus gradients of kernels and of inputs (not the timesteps); attention's gradient also has float32 factors.
    assert products(jax.grad(loss))[1] == 3 + 3 + 2


def test_a_seed_draws_the_weights_that_it_always_drew():
    """Flax's random draws depend on the order in which a layer declares its parameters, and so do runs from scratch."""
    leaves = jax.tree.leaves(wan.init_params(SMALL, jax.random.key(0)))
    total = sum((i + 1) * float(np.abs(np.asarray(leaf, np.float64)).sum()) for i, leaf in enumerate(leaves))
    np.testing.assert_allclose(total, 96160.2086, rtol=1e-6)
