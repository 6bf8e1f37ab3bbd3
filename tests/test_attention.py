"""Attention, its patterns and the cache's bookkeeping."""

import functools
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax.models import attention, attention_kernels, kv_cache, tiled_attention
from tests.helpers import relative


def plain(q, k, v, mask):
    """Textbook softmax attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("btnd,bsnd->bnts", q, k) * q.shape[-1] ** -0.5
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(-1, keepdims=True), v)


def qkv(t=12, s=12):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, n, 3, 8)) for k, n in zip(keys, (t, s, s), strict=True)]


@pytest.mark.parametrize("max_logits", [1 << 20, 2 * 3 * 12 * 5, 1])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attend_equals_the_textbook_in_any_number_of_blocks(max_logits, groups, monkeypatch):
    monkeypatch.setitem(tiled_attention.GROUPS, "cpu", groups)
    q, k, v = (jnp.concatenate([x, x[:, :, 1:2] + 1], axis=2) for x in qkv())  # four heads
    mask = np.arange(7) != 2
    segments = [(k[:, :7], v[:, :7], jnp.asarray(mask)), (k[:, 7:], v[:, 7:], None)]
    out = attention.attend(q, segments, max_logits=max_logits)
    assert relative(out, plain(q, k, v, np.concatenate([mask, np.ones(5, bool)]))) < 1e-6


@pytest.mark.parametrize("groups", [2, 6])
def test_blocks_do_not_change_gradients(groups, monkeypatch):
    monkeypatch.setitem(tiled_attention.GROUPS, "cpu", groups)
    q, k, v = (jnp.concatenate([x, x[:, :, 1:2] + 1], axis=2) for x in qkv())  # four heads
    grads = [
        jax.grad(lambda *a, m=m: jnp.sin(attention.attend(a[0], [(a[1], a[2], None)], max_logits=m)).sum(), (0, 1, 2))(
            q, k, v
        )
        for m in (1 << 20, 100)
    ]
    for one, two in zip(*grads, strict=True):
        assert relative(one, two) < 1e-6


def test_large_attention_never_holds_all_logits():
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 16), jnp.float32)
    compiled = (
        jax.jit(lambda q, k, v: attention.attend(q, [(k, v, None)], max_logits=1 << 20))
        .lower(shape, shape, shape)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4  # half the size of the two heads' logits


MASKS = {"none": None, "count": jnp.int32(5), "mask": jnp.arange(7) % 3 != 2}


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("kind", MASKS)
def test_kernels_equal_the_plain_one(kind, odd):
    q, k, v = qkv(12 - odd, 12 - odd)
    segments = [(k[:, :7], v[:, :7], MASKS[kind]), (k[:, 7:], v[:, 7:], None)]
    splash = functools.partial(attention_kernels.splash_attention, interpret=True)
    # The arguments for cuDNN, computed by XLA; cuDNN takes no masks.
    lengths = functools.partial(attention_kernels.cudnn, implementation="xla")
    for kernel in (splash,) if kind == "mask" else (splash, lengths):
        for run in (lambda f, q: f(q, segments), lambda f, q: jax.grad(lambda q: (f(q, segments) ** 2).sum())(q)):
            assert relative(run(kernel, q), run(lambda *a: attention.attend(*a, "xla"), q)) < 2e-6


def test_splash_reads_no_block_behind_the_last_visible_key():
    pytest.importorskip("jax.experimental.pallas.ops.tpu.splash_attention")  # inside of a trace, it causes another one
    q, k, v = qkv(12, 1300)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(k, v, count):
        return attention_kernels.splash_attention(q, [(k, v, count)], most=count, interpret=True)

    for count in (5, 512, 513, 1300):
        blocks = -(-count // attention_kernels.BLOCK)
        unread = jnp.arange(1300)[:, None, None] >= blocks * attention_kernels.BLOCK
        plain = attention.attend(q, [(k[:, :count], v[:, :count], None)], "whole")
        assert relative(run(*(jnp.where(unread, jnp.nan, a) for a in (k, v)), jnp.int32(count)), plain) < 2e-6


def test_kernels_run_on_every_devices_share():
    code = """
import functools, jax, jax.numpy as jnp
from sf_jax.config import MeshConfig
from sf_jax.models import attention, attention_kernels
from sf_jax.training.sharding import make_mesh
q, k, v = (jax.random.normal(key, (4, 12, 4, 8)) for key in jax.random.split(jax.random.key(0), 3))
segments = [(k[:, :7], v[:, :7], jnp.int32(5)), (k[:, 7:], v[:, 7:], None)]
splash = functools.partial(attention_kernels.splash_attention, interpret=True)
cudnn = functools.partial(attention_kernels.cudnn, implementation="xla")

def both(kernel, q):
    return kernel(q), jax.grad(lambda q: (kernel(q) ** 2).sum())(q)

plain = both(lambda q: attention.attend(q, segments, "whole"), q)
with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))):
    print(float(jnp.abs(jax.jit(splash)(q, segments) - plain[0]).max()) < 1e-6)
    for split in ("heads", "tokens", "none"):
        ours = jax.jit(lambda q: both(lambda q: cudnn(q, segments, split), q))(q)
        print(ours[0].sharding.spec, max(float(jnp.abs(a - b).max()) for a, b in zip(ours, plain)) < 1e-5)
"""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.count("True") == 4, done
    for spec in ("('fsdp', None, ('tensor', 'context')", "('fsdp', 'context', 'tensor'", "('fsdp',"):
        assert spec in done.stdout, done


@pytest.mark.gpu
def test_cudnn_equals_the_plain_one():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(256, 512))
    segments = [(k[:, :256], v[:, :256], jnp.int32(100)), (k[:, 256:], v[:, 256:], None)]
    assert relative(attention.attend(q, segments, "cudnn"), attention.attend(q, segments, "xla")) < 1e-2


def test_bad_choices_of_an_implementation_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="attention is 'flash': it must be one of auto, xla, whole, cudnn, splash"):
        attention.attend(q, [(k, v, None)], "flash")
    with pytest.raises(ValueError, match="attention is 'cudnn' with float32 heads of 8"):
        attention.attend(q, [(k, v, None)], "cudnn")


def test_patterns_show_what_they_should():
    chunks = attention.split_chunks(7, 3, first_frame_alone=True)
    assert chunks == (1, 3, 3)
    mask = attention.frame_mask(attention.block_causal(chunks), 7)
    assert mask[0].tolist() == [True] + [False] * 6
    assert mask[1:4, :4].all() and not mask[1:4, 4:].any() and mask[4:].all()
    windowed = attention.frame_mask(attention.block_causal((3, 3, 3), window=5, sink=1), 9)
    assert np.flatnonzero(windowed[8]).tolist() == [0, 5, 6, 7, 8]
    forcing = attention.frame_mask(attention.teacher_forcing((2, 2)), 8)
    assert np.flatnonzero(forcing[6]).tolist() == [0, 1, 6, 7]
    replayed = attention.frame_mask(attention.replay((2, 2, 2), first=1), 4, 6)
    assert np.flatnonzero(replayed[2]).tolist() == [0, 1, 2, 3, 8, 9]


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (4, 0), (5, 1), (6, 2), (5, 3)])
@pytest.mark.parametrize("spare", [0, 3])
def test_ring_holds_exactly_what_the_pattern_sees(window, sink, spare):
    chunk, total = 2, 14
    capacity = kv_cache.capacity_for(total, chunk, window) + (spare if window else 0)
    cache = kv_cache.init_cache(1, 1, capacity, 3, 1, 4, sink=sink)
    for start in range(0, total, chunk):
        shown = np.asarray(kv_cache.visible(cache, start, start + chunk, window))
        expected = [f for a, b in attention.visible_past(start, start + chunk, window, sink) for f in range(a, b)]
        assert sorted(np.asarray(cache.frames)[shown].tolist()) == expected
        slots = np.flatnonzero(shown)
        held = np.asarray(cache.k)[0, 0].reshape(capacity, 3, 4)[slots, 0, 0] if capacity else np.zeros(0)
        assert sorted(held.tolist()) == expected  # contents and frame numbers moved together
        value = jnp.repeat(jnp.arange(start, start + chunk, dtype=jnp.float32), 3)
        new = jnp.broadcast_to(value[None, None, :, None, None], (1, 1, chunk * 3, 1, 4))
        cache = kv_cache.write(cache, new, new, jnp.int32(start))


def test_bad_sizes_are_refused_with_the_field_to_change():
    with pytest.raises(ValueError, match="frames is 10: with chunk=3 it must be a multiple of 3"):
        attention.split_chunks(10, 3)
    with pytest.raises(ValueError, match="window is 3 frames: it must be at least chunk"):
        attention.block_causal((3, 3), window=3, sink=1)
    with pytest.raises(ValueError, match="sink is 1 but window is None"):
        attention.block_causal((3, 3), sink=1)
    cache = kv_cache.init_cache(1, 1, 4, 1, 1, 2)
    with pytest.raises(ValueError, match="the cache holds 4 frames but the rollout has 6"):
        kv_cache.check_capacity(cache, 6, None)
    with pytest.raises(ValueError, match="sink is 5 frames"):
        kv_cache.init_cache(1, 1, 4, 1, 1, 2, sink=5)
