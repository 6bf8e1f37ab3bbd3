"""Streams attend to no more keys than their caches hold, and no bit of a stream depends on where that ends."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sf_jax
from sf_jax.inference import stream_state
from sf_jax.models import attention, eight_bit, rope, tiled_attention
from sf_jax.models.slots import unstack_layers
from sf_jax.models.wan import WanTransformer
from tests.helpers import SMALL, random_params, relative
from tests.test_stream import BARE, latents, text

KEYS, GRID = 40, (2, 2)


@pytest.fixture
def small_tiles(monkeypatch):
    """Attention in tiles of at most 6 keys, also for networks as small as those of the tests."""
    monkeypatch.setitem(attention.MAX_BOUNDED_LOGITS, "cpu", 16)
    monkeypatch.setitem(tiled_attention.KEYS, "cpu", 6)
    monkeypatch.setitem(tiled_attention.LOGITS, "cpu", 60)
    monkeypatch.setitem(tiled_attention.GROUPS, "cpu", 2)


def inputs():
    """Queries, own and cached keys and values, and the rotations of the cached keys."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, own_k, own_v, k, v = (
        jax.random.normal(key, (2, n, 4, 8)) for key, n in zip(keys, (10, 10, 10, KEYS, KEYS), strict=True)
    )
    return q, (own_k, own_v), (k, v), rope.rotation(np.arange(KEYS // 4), GRID, 8)


@pytest.mark.parametrize("name", ["float32", "int8"])
@pytest.mark.parametrize("kind", ["count", "mask", "none"])
def test_tiles_read_in_place_are_the_whole_attention(kind, name, small_tiles):
    q, own, (k, v), rotation = inputs()
    if name == "int8":
        pytest.importorskip("qwix")
        k, v = (eight_bit.quantize(a, "int8") for a in (k, v))
    mask = {"count": jnp.int32(17), "mask": jnp.arange(KEYS) % 3 != 1, "none": None}[kind]
    plain = attention.attend(
        q, [(*own, None), (rope.rotate(k.astype(q.dtype), rotation), v.astype(q.dtype), mask)], "whole"
    )
    segments = [(*own, None, None), (k, v, mask, rotation)]
    assert relative(tiled_attention.bounded_attention(q * 8**-0.5, segments, jnp.int32(10 + KEYS)), plain) < 2e-6


@pytest.mark.parametrize("single", [True, False])
def test_no_tile_behind_the_bound_is_read_and_none_changes_a_bit(single, small_tiles):
    q, own, (k, v), rotation = inputs()
    width, counts = 6, jnp.array([0, 1, 7, 13])
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(k, v, most):
        def one(count):
            segments = [(*own, None, None), (k, v, count, rotation)]
            if single:  # what a CPU runs
                return tiled_attention.bounded_attention(q, segments, most)
            return tiled_attention._bounded(q, segments, most, None, single=False)

        return jax.vmap(one)(counts)

    whole = run(k, v, jnp.int32(10 + KEYS))
    unread = jnp.arange(KEYS)[:, None, None] >= -(-13 // width) * width
    near = run(*(jnp.where(unread, jnp.nan, a) for a in (k, v)), jnp.int32(10 + 13))
    np.testing.assert_array_equal(near, whole)
    plain = [attention.attend(q * 8**0.5, [(*own, None), (rope.rotate(k, rotation), v, n)], "whole") for n in counts]
    assert relative(whole, jnp.stack(plain)) < 2e-6


def network(scan, **changes):
    """A pipeline of a small network whose attention runs in tiles."""
    config = dataclasses.replace(SMALL, attention="xla", scan_layers=scan, **changes)
    params = random_params() if scan else unstack_layers(random_params())
    return sf_jax.VideoPipeline(None, WanTransformer(config), params, BARE).with_sampling(height=4, width=4)


def played(pipe):
    """Latents of two streams of different age, one of which pauses, and whose prompts change in every way."""
    stream, parts = sf_jax.Stream(pipe, slots=2), {0: [], 1: []}
    old = stream.join(text(0), seed=1)
    for _ in range(4):
        parts[0].append(stream.step().latents(old))
    young = stream.join(text(1), seed=2)
    parts[1] += [stream.step(only=[young]).latents(young)]
    for mode in ("swap", "recache", "flush", "cut"):
        stream.prompt(old, text(2), mode)
        for _ in range(2):
            step = stream.step()
            parts[0].append(step.latents(old))
            parts[1].append(step.latents(young))
    return [np.concatenate(part) for part in parts.values()]


@pytest.mark.parametrize(
    "kind", ["scan", *(pytest.param(k, marks=pytest.mark.slow) for k in ("apart", "absolute", "int8"))]
)
def test_streams_in_tiles_are_those_without(kind, small_tiles):
    if kind == "int8":
        pytest.importorskip("qwix")
    pipe = network(kind != "apart", eps=1.2e-6)  # compiled in this test alone
    if kind == "absolute":
        pipe = pipe.with_rollout(positions="absolute")
    pipe = dataclasses.replace(pipe, cache_dtype="int8" if kind == "int8" else None)
    whole = dataclasses.replace(pipe.transformer.config, attention="whole")
    for ours, theirs in zip(
        played(pipe), played(dataclasses.replace(pipe, transformer=WanTransformer(whole))), strict=True
    ):
        assert relative(ours, theirs) < (1e-3 if kind == "int8" else 1e-5)  # 8 bits: rounding can flip one


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_young_stream_has_the_same_bits_beside_an_old_one(scan, small_tiles):
    pipe = network(scan, eps=1.1e-6)  # compiled in this test alone
    traces = stream_state.step._cache_size()
    stream = sf_jax.Stream(pipe, slots=2)
    lone = stream.join(text(0), seed=1)
    frames = latents(stream, lone, 4)
    stream.leave(lone)
    stream.join(text(1), seed=2)
    for _ in range(3):
        stream.step()
    young = stream.join(text(0), seed=1)
    np.testing.assert_array_equal(latents(stream, young, 4), frames)
    assert stream_state.step._cache_size() == traces + 1
