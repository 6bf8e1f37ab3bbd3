"""Programs compiled for GPUs and TPUs that are not attached."""

import dataclasses

import jax
import pytest

from sf_jax.inference.sampling import Sampling
from sf_jax.models import vae, wan
from sf_jax.perf import generation
from sf_jax.perf import training as perf_training
from sf_jax.perf.chips import chip_of
from sf_jax.perf.compile import compile_call
from sf_jax.perf.devices import devices_of
from sf_jax.rollout import RolloutConfig
from tests.absent import needs_libtpu, on
from tests.test_training import small_config


@pytest.fixture
def quick_compilation():
    """Level O0: programs compile in seconds instead of minutes, with the same memory within a percent."""
    names = ("jax_optimization_level", "jax_memory_fitting_level")
    before = {name: getattr(jax.config, name) for name in names}
    for name in names:
        jax.config.update(name, "O0")
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def small_generation(**changes):
    """Two layers with heads of size 128, as in Wan."""
    config = wan.WanConfig(
        **{"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_len": 128, "dtype": "bfloat16"} | changes
    )
    return generation.Generation(config, RolloutConfig(context_noise="none"), Sampling(33, 128, 128))


@pytest.mark.parametrize("target", [on("h100:1"), on("h100:4"), on("v6e:2x2")])
def test_a_chunk_attends_by_the_kernel_of_the_devices_that_it_is_compiled_for(target, quick_compilation):
    what, chip = small_generation(), chip_of(target)
    mesh = generation.data_mesh(list(devices_of(target)))
    call = next(call for call in generation.calls(what, mesh, chip) if call.name == generation.CHUNK)
    row = compile_call(call, mesh)
    kernel = {"gpu": "cudnn", "tpu": "splash"}[chip.platform]
    assert call.kernel == kernel and row.missing_kernel() is None
    calls = row.traffic.attention
    assert {each.implementation for each in calls} == {kernel}
    # Two layers, five network calls, self- and cross-attention; the last layer of the clean pass skips both, which is
    # counted where the kernels' names in the program tell, on GPUs.
    assert sum(calls.values()) == {"gpu": 18, "tpu": 20}[chip.platform]
    assert row.traffic.kinds["attention"] > 0 and row.traffic.kinds["matrix products"] > 0
    assert 0 < row.traffic.outside < row.traffic.memory and row.traffic.kernels > 100
    assert row.flops == call.flops / mesh.size and row.estimate(chip) > max(row.bounds(chip).values())
    assert not row.traffic.links  # every chip has its own video


@pytest.mark.parametrize(("target", "kernel"), [on("h100:1", "xla"), on("v6e:2x2", "splash")])
def test_the_vae_decoder_has_an_attention_of_its_own(target, kernel, quick_compilation):
    config = vae.VaeConfig(dim=64, dtype="bfloat16")
    decoder = generation.VaeDecoder(vae.WanVae(config), {"decoder": vae.param_shapes(config)["decoder"]})
    what = dataclasses.replace(small_generation(), decoder=decoder)
    mesh = generation.data_mesh(list(devices_of(target))[:1])
    calls = {call.name: call for call in generation.calls(what, mesh, chip_of(target))}
    row = compile_call(calls[generation.LATER], mesh)
    assert {each.implementation for each in row.traffic.attention} == {kernel}
    assert all("middle" in each.place for each in row.traffic.attention)


@pytest.mark.parametrize("target", [on("h100:4"), on("v6e:2x2")])
def test_an_update_is_compiled_for_several_devices(target, quick_compilation):
    config = small_config("causal")
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=4), batch_size=4)
    lines = list(perf_training.training_report(config, target))
    assert lines[1].startswith("| update | GiB a chip") and lines[3].startswith("| causal | ")
    assert any("all-" in line or "reduce" in line for line in lines if line.startswith("  sends "))
    assert "it fits" in "\n".join(lines)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("target", ["v6e:2x2"])  # the chip with the least memory
def test_full_size_generation_fits_a_chip(target, quick_compilation):
    config = wan.wan_1_3b(dtype="bfloat16", remat="none")
    decoder = generation.wan_decoder("wan", "bfloat16")
    what = generation.Generation(config, RolloutConfig(context_noise="none"), Sampling(), decoder)
    chip, mesh = chip_of(target), generation.data_mesh(list(devices_of(target)))
    rows = {call.name: compile_call(call, mesh) for call in generation.calls(what, mesh, chip)}
    chunk, frames = rows[generation.CHUNK], [rows[generation.FIRST], rows[generation.LATER]]
    assert rows[generation.PROMPT].memory < chunk.memory < chip.memory
    assert chunk.arguments > 8 * 2**30  # the parameters and the whole cache
    for frame in frames:  # the transformer's arguments stay in memory during decoding
        assert 2**30 < frame.memory < chip.memory and frame.beside > 8 * 2**30


@needs_libtpu
def test_an_unknown_topology_is_refused():
    with pytest.raises(ValueError, match="compile_only v6e:9x2 cannot be had"):
        devices_of("v6e:9x2")
