"""Chip data and the analysis of compiled programs, without compiling for absent devices."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import wan_distill
from sf_jax.config import from_dict
from sf_jax.inference.job import Job
from sf_jax.models import wan
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.perf import chips, compile, devices, generation, report, traffic
from sf_jax.perf import training as perf_training
from sf_jax.perf.compile import Compiled
from sf_jax.perf.traffic import ATTENTION, COPIES, PRODUCTS, REST, Attention, Traffic
from sf_jax.training import stages
from sf_jax.training.media import digits_media
from sf_jax.training.programs import matmul_flops
from sf_jax.training.self_forcing import mean_calls
from sf_jax.weights.model_configs import config_of
from tests.test_training import small_config

LOOPS = """HloModule m
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %g = f32[32,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
  %r = f32[8,4]{1,0} dynamic-slice(%g, %i), dynamic_slice_sizes={8,4}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %r)
}
%cond (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %n = s32[] constant(30)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
%loose (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %j = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %j), direction=LT
}
ENTRY %main (a: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %a = (s32[], f32[8,4]{1,0}) parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%a), condition=%cond, body=%body
  ROOT %v = (s32[], f32[8,4]{1,0}) while(%w), condition=%loose, body=%body
}
"""
# XLA's output for a GPU layer: a matmul, a fusion that reads part of its result, a cache updated in place, another one
# that is copied, and cuDNN's attention.
LAYER = """HloModule m
%gemm (p0: bf16[6,8], p1: bf16[8,24]) -> bf16[6,24] {
  %p0 = bf16[6,8]{1,0} parameter(0)
  %p1 = bf16[8,24]{1,0} parameter(1)
  ROOT %dot.1 = bf16[6,24]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%norm (p0: bf16[6,24], p1: bf16[8]) -> bf16[6,8] {
  %p0 = bf16[6,24]{1,0} parameter(0)
  %wide = f32[6,24]{1,0} convert(%p0)
  %part = f32[6,8]{1,0} slice(%wide), slice={[0:6], [8:16]}
  %p1 = bf16[8]{0} parameter(1)
  %spread = bf16[6,8]{1,0} broadcast(%p1), dimensions={1}
  %scale = f32[6,8]{1,0} convert(%spread)
  %product = f32[6,8]{1,0} multiply(%part, %scale)
  ROOT %narrow = bf16[6,8]{1,0} convert(%product)
}
%put (p0: bf16[60,8], p1: bf16[6,24], p2: s32[]) -> bf16[60,8] {
  %p0 = bf16[60,8]{1,0} parameter(0)
  %p1 = bf16[6,24]{1,0} parameter(1)
  %part = bf16[6,8]{1,0} slice(%p1), slice={[0:6], [16:24]}
  %p2 = s32[] parameter(2)
  ROOT %changed = bf16[60,8]{1,0} dynamic-update-slice(%p0, %part, %p2, %p2)
}
%turn (p0: bf16[60,8]) -> bf16[60,8] {
  %p0 = bf16[60,8]{1,0} parameter(0)
  ROOT %turned = bf16[60,8]{1,0} negate(%p0)
}
ENTRY %main (x: bf16[6,8], w: bf16[8,24], s: bf16[8], k: bf16[60,8], v: bf16[60,8], n: s32[]) -> bf16[6,8] {
  %x = bf16[6,8]{1,0} parameter(0)
  %w = bf16[8,24]{1,0} parameter(1)
  %s = bf16[8]{0} parameter(2)
  %k = bf16[60,8]{1,0} parameter(3)
  %v = bf16[60,8]{1,0} parameter(4)
  %n = s32[] parameter(5)
  %qkv = bf16[6,24]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm
  %q = bf16[6,8]{1,0} fusion(%qkv, %s), kind=kLoop, calls=%norm, metadata={op_name="jit(f)/while/blocks_3/norm/mul"}
  %v2 = bf16[60,8]{1,0} fusion(%v, %qkv, %n), kind=kLoop, calls=%put, metadata={op_name="jit(f)/put"}
  %k2 = bf16[60,8]{1,0} fusion(%k), kind=kLoop, calls=%turn, metadata={op_name="jit(f)/turn"}
  %view = bf16[1,6,1,8]{3,2,1,0} bitcast(%q)
  %many = bf16[1,60,1,8]{3,2,1,0} bitcast(%k2)
  ROOT %y = bf16[6,8]{1,0} custom-call(%view, %many, %v2), custom_call_target="__cudnn$fmhaSoftmax",
    metadata={op_name="jit(f)/blocks_3/blocks_3.run/dot_product_attention_fwd"}
}
"""


def test_every_loop_is_counted_as_often_as_it_runs():
    once = traffic.traffic(LOOPS, 2.0)
    assert once.links == {"all-gather": 32 * 4 * 4 * 32.0}
    assert once.memory == once.outside == 32 * (32 * 16 + 8 * 16 + 2 * 8 * 16)
    assert once.kernels == 64
    with pytest.raises(ValueError, match="no ENTRY"):
        traffic.traffic("nothing")
    with pytest.raises(ValueError, match="branch is 'first': it must be one of largest, mean"):
        traffic.traffic(LOOPS, branch="first")


def test_bytes_are_told_by_kind_and_parts_of_arrays_are_read_as_parts():
    moved = traffic.traffic(LAYER, cached={60 * 8: 60})
    token, cache = 6 * 8 * 2, 60 * 8 * 2
    assert moved.kinds[PRODUCTS] == token + 8 * 24 * 2 + 3 * token
    assert moved.kinds[COPIES] == 2 * cache
    assert moved.kinds[ATTENTION] == token + 2 * cache + token
    # A third of the matmul and the scale, written once; a third of the matmul, its slot in the cache, an index.
    assert moved.kinds[REST] == (token + 8 * 2 + token) + (2 * token + 4)
    assert moved.outside == moved.kinds[COPIES] + moved.kinds[REST]
    assert moved.kernels == 5 and not moved.links
    assert moved.attention == {Attention("cudnn", "blocks/blocks.run", "[1,6,1,8] x [1,60,1,8]"): 1.0}
    assert [(mover.kind, mover.source) for mover in moved.movers] == [
        (COPIES, "f/turn"),
        (REST, "blocks/norm/mul"),
        (REST, "f/put"),
    ]


def test_a_choice_is_counted_by_its_mean_or_by_its_branch_for_a_full_cache():
    text = """HloModule m
%short (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %n = f32[8,8]{1,0} negate(%a)
  %m = f32[8,8]{1,0} negate(%n)
  ROOT %d = f32[8,8]{1,0} negate(%m)
}
%full (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, metadata={op_name="jit(f)/middle/attention_xla/dot"}
}
ENTRY %main (a: f32[8,8], n: s32[]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %c = f32[8,8]{1,0} conditional(%n, %a, %a), branch_computations={%short, %full}, metadata={op_name="f/rare/cond"}
}
"""
    size = 8 * 8 * 4
    assert traffic.traffic(text, branch="largest").kinds == {ATTENTION: 3 * size}
    assert traffic.traffic(text).kinds == {ATTENTION: 1.5 * size, REST: 3 * size}
    assert traffic.traffic(text).attention == {Attention("xla", "f/middle"): 0.5}
    seldom = traffic.traffic(text, branch="largest", shares={"rare": 0.25})
    assert seldom.kinds == {ATTENTION: 0.75 * 3 * size, REST: 0.25 * 6 * size}


def test_operations_of_a_choice_in_a_scope_are_counted_by_its_share():
    def run(x, n):
        with jax.named_scope("rare"):
            return jax.lax.cond(n > 0, lambda x: x @ x, lambda x: x, x)

    jaxpr = jax.make_jaxpr(run)(jnp.zeros((8, 8)), 1)
    assert matmul_flops(jaxpr, largest=True) == 2 * 8**3
    assert matmul_flops(jaxpr, largest=True, shares={"rare": 0.25, "other": 0.0}) == 2 * 8**3 / 4


def test_network_calls_of_a_training_rollout():
    config = small_config("distill", teacher_weights="unused")
    chunks, steps = len(config.rollout.chunks(config.data.frames)[1]), len(config.rollout.steps)
    critic = (steps + 1) / 2 + 1 - 1 / chunks  # the last chunk has no clean pass
    assert mean_calls(config, config.data.frames, last_exit=True) == pytest.approx(critic)
    assert mean_calls(config, config.data.frames, last_exit=False) == pytest.approx(critic - 1 / chunks)
    media = digits_media(PatchCodec.load())
    assert {each.name: each.trips for each in stages.updates_of(config, media)} == pytest.approx(
        {"student": critic - 1 / chunks, "critic": critic}
    )
    shared = dataclasses.replace(config, share_rollout=True)
    assert {each.name: each.trips for each in stages.updates_of(shared, media)} == pytest.approx(
        {"student and critic": critic, "critic": critic}
    )
    longer = dataclasses.replace(config, rollout_frames=(6, 12))
    trips = {each.name: each.trips for each in stages.updates_of(longer, media)}
    assert trips["critic of 6 frames"] == pytest.approx(critic)
    assert trips["student of 12 frames"] == pytest.approx((steps + 1) / 2 + 1 - 2 / (2 * chunks))
    switched = dataclasses.replace(longer, prompt_switch=0.5)  # two rollouts, each without its last clean pass
    assert mean_calls(switched, 12, last_exit=True) == pytest.approx((steps + 1) / 2 + 1 - 2 / (2 * chunks))
    noisy = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, context="noisy"))
    assert mean_calls(noisy, config.data.frames, last_exit=True) == pytest.approx((steps + 1) / 2)


def test_the_workspace_of_a_product_is_not_written():
    text = """HloModule m
ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %c = (bf16[8,8]{1,0}, s8[4194304]{0}) custom-call(%a, %a), custom_call_target="__cublas$lt$matmul"
  ROOT %d = bf16[8,8]{1,0} get-tuple-element(%c), index=0
}
"""
    assert traffic.traffic(text).kinds == {PRODUCTS: 3 * 8 * 8 * 2}


def test_what_a_tpu_brings_to_its_core_is_read_once_and_for_whom():
    text = """HloModule m
ENTRY %main (a: f32[8,128], w: f32[128,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %w = f32[128,128]{1,0:T(8,128)} parameter(1)
  %s = (f32[128,128]{1,0:T(8,128)S(1)}, f32[128,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %d = f32[128,128]{1,0:T(8,128)S(1)} copy-done(%s)
  ROOT %c = f32[8,128]{1,0:T(8,128)} dot(%a, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    assert traffic.traffic(text).kinds == {PRODUCTS: 128 * 128 * 4 + 8 * 128 * 4}


@pytest.mark.parametrize("name", chips.CHIPS)
def test_chips_have_figures_that_can_be(name):
    chip = chips.CHIPS[name]
    assert 0.7 * chip.flops < chip.products < chip.flops
    assert 2**34 <= chip.memory < 2**38 and 5e11 < chip.bandwidth < 1e13 and chip.links < chip.bandwidth
    assert chip.source
    if chip.platform == "gpu":
        config = devices.gpu_config(name)
        assert f"device_memory_size: {chip.memory} " in " ".join(config.split()) and config.count("{") == 3


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("v9x:2x2", "compile_only is 'v9x:2x2': it must be one of v4, v5e, v5p, v6e, then :SHAPE, as v5p:4x4x4, or"),
        ("h100", "one of a100, h100, h200, b200, rtx4090, then :COUNT, as h100:1"),
        ("h100:9", "compile_only is 'h100:9': h100 must have a number of GPUs, 1 to 8, or machines of 8"),
        ("h100:0", "must have a number of GPUs"),
        ("h100:2x2", "must have a number of GPUs"),
    ],
)
def test_targets_that_cannot_be_are_refused(target, message):
    with pytest.raises(ValueError, match=message):
        devices.devices_of(target)


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is not installed: pip install 'sf_jax\[gpu_aot\]'"):
        devices.devices_of("h100:1")


def row(name="one chunk", kernel="cudnn", calls=(), **changes):
    """A compiled program with round figures."""
    moved = Traffic({}, {PRODUCTS: 1e9, REST: 2e9}, 10, {call: 5.0 for call in calls}, ())
    fields = dict(
        name=name, rate=1.0, arguments=2**31, temporary=2**30, flops=8e12, work=8e12, traffic=moved, seconds=1
    )
    return Compiled(**fields | {"kernel": kernel} | changes)


def test_a_kernel_that_was_expected_and_is_missing_is_named():
    fused, plain = Attention("cudnn", "blocks/blocks.run", "q x k"), Attention("xla", "blocks/blocks.run")
    compile.check_kernels([row(calls=[fused, Attention("xla", "decoder/middle")]), row(kernel=None, calls=[plain])])
    with pytest.raises(ValueError, match="one chunk attends by xla in blocks/blocks.run where cudnn was expected"):
        compile.check_kernels([row(calls=[fused, plain])])
    with pytest.raises(ValueError, match="one chunk has no attention by cudnn, which was expected"):
        compile.check_kernels([row()])


@pytest.mark.parametrize(
    ("changes", "gpu", "tpu"),
    [
        ({"dtype": "bfloat16"}, "cudnn", "splash"),
        ({}, None, "splash"),
        ({"dtype": "bfloat16", "num_heads": 4}, "cudnn", None),
        ({"dtype": "bfloat16", "num_heads": 1}, None, "splash"),
        ({"dtype": "bfloat16", "attention": "xla"}, None, None),
    ],
)
def test_a_kernel_is_expected_where_auto_would_take_it(changes, gpu, tpu):
    config = wan.WanConfig(**{"dim": 256, "num_heads": 2} | changes)
    assert compile.expected_kernel(config, "gpu") == gpu
    assert compile.expected_kernel(config, "tpu") == tpu
    assert compile.expected_kernel(config, "cpu") is None


def test_times_are_those_of_the_chip():
    chip = chips.CHIPS["h100"]
    one = row()
    assert one.estimate(chip) == pytest.approx(8e12 / 800e12 + 3e9 / chip.bandwidth)
    assert max(one.bounds(chip).values()) == one.bounds(chip)["arithmetic"] == pytest.approx(8e12 / 989e12)
    lines = list(report.details(one))
    assert lines[0] == "one chunk: 2.00 GiB of arguments, 1.00 temporary; compiled in 1 s"
    assert lines[1] == "  moves 2.00 GB the rest, 1.00 GB matrix products"
    assert "one chunk needs 3.00 GiB: it fits" in report.fits([one], chip)
    assert "it does NOT fit" in report.fits([row(beside=2**40)], chip)


def test_frames_a_second_are_those_of_a_chunk_and_of_its_decoder():
    what = generation.generation_of(Job(prompts=(), model="1.3B", abstract=True, vae="none"))
    chip = chips.CHIPS["h100"]
    rows = [row(), row(name=generation.LATER, kernel=None)]
    seconds = rows[0].estimate(chip)
    first, second = report.rates(what, rows, chip)
    assert first.endswith(f"{seconds:.3f} s for 12 frames, {12 / seconds:.1f} FPS")
    assert second.endswith(f"{4 * seconds:.3f} s, {3 / seconds:.1f} FPS")


def test_a_job_without_weights_is_described():
    what = generation.generation_of(Job(prompts=(), model="1.3B", abstract=True, vae="tiny"))
    assert what.config.num_layers == 30 and what.config.dtype == "bfloat16"
    assert (what.frames, what.size, what.seen, what.evaluations) == (21, (60, 104, 16), 18, 5)
    assert what.decoder is not None and what.text.dim == what.config.text_dim
    flags = {
        "window": 12,
        "sink": 3,
        "positions": "relative",
        "frames": 117,
        "vae": "tiny",
        "height": 240,
        "width": 416,
    }
    window = generation.generation_of(Job(prompts=(), model="14B", abstract=True, **flags))
    assert window.seen == 9 and window.size == (30, 52, 16) and window.config.dim == 5120
    assert type(window.decoder.module).__name__ == "TinyVaeDecoder"
    alone = generation.generation_of(Job(prompts=(), model="1.3B", abstract=True, chunk=1, vae="none", frames=1))
    assert alone.decoder is None and alone.size == (60, 104, 16) and alone.seen == 0
    many = generation.generation_of(Job(prompts=(), model="1.3B", abstract=True, solver="unipc", steps=30, vae="none"))
    assert many.rollout is None and many.many[0].steps == 30
    digits = generation.generation_of(Job(prompts=("a 3",), abstract=True))
    assert digits.factors == (1, 4) and digits.seen == 6 and digits.text is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "13B"}, "model 13B does not exist: give a folder with a config.json, or one of 1.3B, 14B"),
        ({"model": "1.3B", "frames": 80}, "frames is 80: it must be 1"),
        ({"model": "1.3B", "guidance": 2.0}, "guidance has no effect here: a few-step student has none"),
        (
            {"model": "1.3B", "image": "x.png", "frames": 13},
            "image is given: compile_only describes videos from prompts",
        ),
        ({"model": "1.3B", "solver": "unipc", "window": 12}, "window has no effect here: it is for a causal network"),
    ],
)
def test_jobs_that_cannot_be_described_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        generation.generation_of(Job(prompts=(), abstract=True, **fields))


def test_a_folder_needs_no_more_than_a_config(tmp_path):
    small = wan.WanConfig(dim=256, ffn_dim=512, num_heads=2, num_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(config_of("transformer", small, {}, official=True)))
    what = generation.generation_of(Job(prompts=(), model=str(tmp_path), abstract=True, vae="none"))
    assert (what.config.dim, what.config.num_layers) == (256, 2)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json of a transformer"):
        generation.generation_of(Job(prompts=(), model=str(tmp_path), abstract=True))


def test_an_update_has_its_times_and_what_bounds_it(monkeypatch):
    gib = 2**30

    def update(name, rate, arguments, temporary, flops, work, links, moved, seconds, host=0):
        kinds = {PRODUCTS: 0.75 * moved, REST: 0.25 * moved}
        told = Traffic(links, kinds, 7, {}, ())
        return Compiled(name, rate, arguments, temporary, flops, work, told, seconds, host)

    rows = [
        update("student", 0.2, 2 * gib, 3 * gib, 9e14, 459e13, {"all-gather": 6e11}, 2765e9, 4.0, gib),
        update("critic", 1.0, gib, 94 * gib + 1, 2e14, 459e12, {}, 2765e9, 5.0),
    ]
    monkeypatch.setattr(perf_training, "compile_for", lambda config, target: iter(rows))
    lines = list(perf_training.training_report(from_dict(wan_distill.get_config("14b")), "v5p:4x4x4"))
    assert "| student | 5.00 | 2.00 | 3.00 | 0.900 | 3.690 | 600.0 | 2.77 | 0.69 | 7 | 4 s |" in lines
    assert (
        "  sends all-gather 600.00 GB" in lines
        and "  reads 1.00 GiB a chip from the host, which the times leave out" in lines
    )
    assert "memory of a chip: 95 GiB; critic needs 95.00 GiB: it does NOT fit" in lines
    wanted = "arithmetic 3.00 s, memory 1.20 s, links 0.20 s; at least 3.00 s, bound by arithmetic"
    assert f"an iteration at the chip's peaks: {wanted}" in lines
    assert lines[-1].startswith("estimate of an iteration: 5.1")


def test_programs_are_counted_at_a_full_cache():
    config = wan.WanConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_len=4, dtype="bfloat16")
    what = generation.generation_of(Job(prompts=(), model="1.3B", abstract=True, height=64, width=64, vae="none"))
    what = dataclasses.replace(what, config=config)
    mesh = generation.data_mesh(jax.devices()[:1])
    calls = {call.name: call for call in generation.calls(what, mesh, chips.CHIPS["h100"])}
    tokens, keys, dim = 3 * 16, 21 * 16, 64
    layer = 2 * tokens * (6 * dim * dim + 2 * dim * 128) + 4 * tokens * (keys + 4) * dim
    chunk = calls[generation.CHUNK]
    assert 5 * 2 * layer < chunk.flops < 5 * 2 * layer * 1.35  # plus patches, time embedding and head
    assert chunk.trips == 5 and chunk.branch == "largest" and chunk.kernel == "cudnn"
    assert 18 * 16 * dim in chunk.cached and jnp.dtype(chunk.arguments[6].k.dtype) == jnp.bfloat16


def test_benchmarks_import_what_is_there():
    for path in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("sf_jax", "benchmarks", "configs"):
                assert importlib.util.find_spec(node.module) is not None, (path.name, node.module)
