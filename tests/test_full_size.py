"""Full-size checks without running anything: FLOP counts, sharding, memory per chip, traffic of compiled programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import wan_distill
from sf_jax.config import MeshConfig, from_dict
from sf_jax.parallel import params
from sf_jax.perf import training as perf_training
from sf_jax.perf.chips import chip_of
from sf_jax.training import abstract, ahead, programs, sharding
from sf_jax.training.abstract import bytes_per_device
from tests.absent import needs_libtpu
from tests.test_ahead import quick_compilation  # noqa: F401 (a fixture)
from tests.test_training import small_config


def test_every_loop_is_counted_as_often_as_it_runs():
    def f(x, w, n):
        def layer(x, w):
            return x @ w, None

        x, _ = jax.lax.scan(layer, x, w)
        x = jax.lax.cond(n > 1, lambda x: x @ w[0], lambda x: x, x)
        return jax.lax.fori_loop(0, n, lambda i, x: x @ w[0], x)

    x, w, n = jnp.zeros((5, 8)), jnp.zeros((3, 8, 8)), jnp.int32(4)
    assert programs.matmul_flops(jax.make_jaxpr(f)(x, w, n), 4) == 2 * 5 * 8 * 8 * (3 + 1 + 4)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_recomputation_and_kernels_do_not_change_the_count():
    config = small_config("distill", teacher_weights="unused")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    counts, work = [], []
    for changes in ({}, {"remat": "block"}, {"attention": "xla"}):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        run = abstract.abstract_run(changed, mesh)
        counts.append(ahead.flops_of(run))
        work.append(ahead.flops_of(run, recompute=True))
    assert work[0] == work[2] == counts[0]
    # Only one network call has a gradient: 3 of an update's 6.5 passes become nearly 4.
    assert all(1.05 < work[1][name] / counts[0][name] < 1.2 for name in counts[0])
    assert counts[0] == counts[1] == counts[2] and set(counts[0]) == {"student", "critic"}
    # The critic's update: the rollout, and one flow with its gradient.
    assert 0 < counts[0]["critic"] < counts[0]["student"]


RECIPES = {variant: {} for variant in wan_distill.VARIANTS} | {
    "muon": {"optimizer": {"name": "muon"}, "critic_optimizer": {"name": "muon"}},
    "adapters": {"lora": {"rank": 16}, "critic_lora": {"rank": 16}},
}


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=pytest.mark.slow if r == "long" else ()) for r in RECIPES])
def test_every_array_is_split_as_its_rule_says_at_full_size(recipe):
    values = wan_distill.get_config(recipe if recipe in wan_distill.VARIANTS else "1_3b")
    values.update(RECIPES[recipe])
    config = from_dict(values)
    mesh = jax.sharding.AbstractMesh((1, 16, 2, 2), sharding.MESH_AXES)
    run = abstract.abstract_run(config, mesh)
    wide = {"heads": 2, "mlp": 2, "embed": 32}
    vae = run.frozen.pop("vae", {})
    assert all(leaf.sharding.spec == PartitionSpec() for leaf in jax.tree.leaves(vae))
    for tree in (run.state, run.frozen):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            names = tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", "")))) for part in path)
            parts = [wide.get(axis, 1) for axis in params.logical_axes(names, leaf.ndim)]
            held = leaf.sharding.shard_shape(leaf.shape)
            assert held == tuple(size // part for size, part in zip(leaf.shape, parts, strict=True)), path
            # Adapter matrices that only `tensor` splits are thin.
            assert np.prod(parts) >= 32 or leaf.size < (1e7 if config.lora.rank else 1e6), (path, leaf.shape)
    total = bytes_per_device(run.arguments)
    alone = jax.sharding.AbstractMesh((1, 1, 1, 1), sharding.MESH_AXES)
    even = bytes_per_device(abstract.abstract_run(config, alone).arguments) / 32
    assert total < (1.3 if config.lora.rank else 1.15) * even + bytes_per_device(vae)


def test_a_description_names_everything():
    config = from_dict(wan_distill.get_config("14b"))
    away = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=64, context=2))
    lines = list(ahead.describe(away, jax.devices()[:1]))
    text = "\n".join(lines)
    assert "on 128 x devices that are not here" in text
    assert "teacher (frozen, bfloat16): 14,288,491,584 parameters" in text
    assert "update student:" in text and "in 0.2 of the iterations" in text
    assert sum(line.startswith("  ") for line in lines) > 90
    assert "model/blocks/ffn_in/kernel" in text and "30x12x8960" in text


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9x:2x2", "compile_only is 'v9x:2x2': it must be one of v4, v5e, v5p, v6e, then :SHAPE"),
        ("v5p:4x4x4", "fsdp"),
    ],
)
@needs_libtpu
def test_slices_that_do_not_fit_are_refused(topology, message):
    config = from_dict(wan_distill.get_config("1_3b"))
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=5))
    with pytest.raises(ValueError, match=message):
        next(perf_training.compile_for(config, topology))


# The chip with the least memory; benchmarks/full_size_training.py compiles the other slices and updates.
CASES = [("14b", "v6e:16x16", {"fsdp": 64, "context": 4}, 1, 8)]


@pytest.mark.slow
@pytest.mark.exhaustive
@needs_libtpu
@pytest.mark.parametrize(("variant", "topology", "mesh", "accumulate", "gib"), CASES)
def test_full_size_training_fits_a_chip(variant, topology, mesh, accumulate, gib, quick_compilation):  # noqa: F811
    config = from_dict(wan_distill.get_config(variant))
    config = dataclasses.replace(config, mesh=MeshConfig(**{"data": 1} | mesh), accumulate=accumulate)
    row = next(perf_training.compile_for(config, topology))  # the student's update, the larger one
    chip = chip_of(topology)
    assert row.name == "student" and row.rate == 0.2
    assert row.memory < gib * 2**30 < chip.memory
    assert row.work / chip.flops > row.sent / chip.links
    # Weights are gathered whole, without thin matmuls over parts of them.
    assert "collective-permute" not in row.traffic.links
