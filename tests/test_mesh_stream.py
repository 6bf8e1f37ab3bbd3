"""One video on several devices: same results as on one, no recompilation, and arrays that are really sharded."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import sf_jax
from sf_jax.inference.load import WanOptions, load_pipeline
from sf_jax.inference.sampling import Sampling
from sf_jax.models import wan
from sf_jax.parallel import mesh as meshes
from sf_jax.parallel import params
from sf_jax.perf import generation
from sf_jax.perf.chips import chip_of
from sf_jax.perf.devices import devices_of
from sf_jax.rollout import RolloutConfig
from sf_jax.server.launch import Model
from tests.absent import KERNELS, TARGETS, WIDE, on
from tests.helpers import marked, refused
from tests.mesh_cases import CASES, MODEL, pipeline

QUICK = "quick"
SIMILAR = ("tensor", "context", "framewise", "framewise queries", "causal", "bidirectional queries", "tiny pixels")


def found_of(cases) -> dict:
    """Measurements of the cases, from a process with eight devices."""
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.mesh_cases", *cases]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: found for line in done.stdout.splitlines() for name, found in json.loads(line).items()}


@pytest.fixture(scope="module")
def others(request):
    """The cases of the selected tests, from one process."""
    items = [item for item in request.session.items if "others" in getattr(item, "fixturenames", ())]
    return found_of(dict.fromkeys(item.callspec.params["case"] for item in items))


def check(case: str, found: dict) -> None:
    """Checks that a case's video equals that of one device, and that its arrays are sharded by its mesh."""
    sizes = meshes.mesh_sizes(CASES[case][0])
    data, tensor, context = (sizes.get(axis, 1) for axis in ("data", "tensor", "context"))
    if case == "files":
        assert found["files"]["error"] < 1e-5 and found["held"] == [tensor, tensor * context]
        return
    assert found["pipeline"]["error"] < 1e-5 and found["pipeline"]["grey"] <= 1
    assert found["programs"] <= 1  # 0 if another case has compiled it
    assert found["parameter"] == tensor
    if "stream" in found:
        assert found["stream"]["error"] < 1e-5 and found["stream"]["grey"] <= 1
        assert found["stream programs"] == 1
        heads = tensor * context if MODEL.num_heads % (tensor * context) == 0 else tensor
        assert found["cache"] == data * heads
        split, alone = found["bytes"]
        assert split * heads == alone
    if "decoder" in found:
        assert found["decoder"] == tensor * context


def test_a_stream_on_four_devices_is_the_video_of_one():
    found = found_of([QUICK])[QUICK]
    assert found["error"] < 1e-5 and found["programs"] == 1 and found["cache"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("case", marked([case for case in CASES if case != QUICK], SIMILAR))
def test_every_kind_of_video_is_that_of_one_device(others, case):
    check(case, others[case])


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("", "mesh is '': give axes with their sizes, such as tensor:2,context:2"),
        ("tensor", "mesh is 'tensor': give axes with their sizes"),
        ("tensor:2:3", "give axes with their sizes"),
        ("fsdp:2", "mesh is 'fsdp:2': its axes are data, context, tensor, such as tensor:2,context:2"),
        ("tensor:2,tensor:2", "tensor comes twice"),
        ("tensor:0", "the size of tensor must be a whole number from 1 on"),
        ("tensor:-2", "the size of tensor must be a whole number from 1 on"),
        ("tensor:two", "the size of tensor must be a whole number from 1 on"),
        ({"tensor": 2.0}, "the size of tensor must be a whole number from 1 on"),
        ({"tensor": True}, "the size of tensor must be a whole number from 1 on"),
        (
            "tensor:4,context:64",
            "its sizes multiply to 256, the devices are 1: leave data out",
        ),
        (3, "mesh is 3: give axes with their sizes, such as 'tensor:2,context:2'"),
    ],
)
def test_bad_meshes_are_refused(mesh, message):
    assert message in refused(WanOptions, mesh=mesh)


def test_a_mesh_must_divide_the_network_and_its_frames():
    config = wan.wan_1_3b()
    wanted = "mesh.tensor is 8: it must divide the 12 heads and the 8960 hidden channels of the network, as 1, 2, 4 do"
    assert refused(meshes.check_mesh, {"tensor": 8}, config) == wanted
    assert "as 1, 2, 4, 8 do" in refused(meshes.check_mesh, {"tensor": 3}, wan.wan_14b())
    meshes.check_mesh({"tensor": 4, "context": 2}, config)
    wanted = "mesh.context is 7: it must divide the 1560 tokens of a latent frame, as 1, 2, 3, 4, 5, 6, 8"
    assert wanted in refused(meshes.check_tokens, {"context": 7}, 30, 52)
    meshes.check_tokens({"context": 8}, 45, 80)


def abstract_mesh(**sizes) -> jax.sharding.AbstractMesh:
    """A mesh without devices."""
    return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def test_a_pipeline_refuses_meshes_it_cannot_use():
    devices = np.asarray(jax.devices()[:1])
    other = Mesh(devices, ("videos",))
    assert "mesh has the axes videos: it must have data" in refused(pipeline("window").with_mesh, other)
    explicit = Mesh(devices, ("data",), axis_types=(AxisType.Explicit,))
    assert "mesh has axes that are not automatic" in refused(pipeline("window").with_mesh, explicit)
    assert "mesh is tensor:2: its sizes multiply to 2, the devices are 1" in refused(
        pipeline("window").with_mesh, "tensor:2"
    )


def test_the_commands_take_meshes(folder):
    student = folder / "student.safetensors"
    wanted = "mesh is tensor:2: its sizes multiply to 2, the devices are 1"
    assert wanted in refused(load_pipeline, folder, student, mesh="tensor:2")
    assert "its axes are data, context, tensor" in refused(Model, folder="x", checkpoint="y", options={"mesh": "x:2"})
    assert Model(folder="x", checkpoint="y", options={"mesh": "data:2,tensor:2"}).devices == 4
    assert "mesh is given without model" in refused(Model, options={"mesh": "tensor:2"})
    pipe = load_pipeline(folder, student, mesh="tensor:1", rollout=RolloutConfig(window=6, context_noise="none"))
    assert pipe.mesh.shape == {"data": 1} and sf_jax.Stream(pipe, height=32, width=32).slots == 1


def test_layers_of_their_own_are_split_like_stacked_ones():
    shapes = {"blocks_3": {"ffn_in": {"kernel": jax.ShapeDtypeStruct((8, 16), "float32")}}}
    mesh = abstract_mesh(data=1, context=2, tensor=2)
    split = params.tree_shardings(shapes, mesh, params.GENERATION)["blocks_3"]["ffn_in"]["kernel"]
    assert tuple(split.spec) == (None, "tensor")
    assert params.logical_axes(("blocks_3", "self_attn", "q", "kernel"), 2) == ("embed", "heads")


def test_the_text_encoder_is_split_over_all_devices_of_a_video():
    from sf_jax.models import umt5

    shapes = umt5.param_shapes(umt5.umt5_xxl())
    placed = params.tree_shardings(shapes, abstract_mesh(data=1, tensor=4), params.GENERATION)
    held = sum(np.prod(s.shard_shape(x.shape)) for x, s in zip(*map(jax.tree.leaves, (shapes, placed)), strict=True))
    assert held < 0.26 * sum(x.size for x in jax.tree.leaves(shapes))


MESHES = ["tensor:2,context:2", "context:4", "tensor:4"]


@pytest.mark.parametrize("mesh", marked(MESHES, MESHES[1:]))
@pytest.mark.parametrize("target", [on(target) for target in TARGETS])
def test_a_chunk_sends_activations_and_never_the_cache(target, mesh):
    config, rollout = dataclasses.replace(WIDE, num_layers=2), RolloutConfig(context_noise="none")
    what = generation.Generation(config, rollout, Sampling(height=128, width=128), mesh=meshes.mesh_sizes(mesh))
    devices = generation.device_mesh(what, list(devices_of(target)))
    call = next(call for call in generation.calls(what, devices, chip_of(target)) if call.name == generation.CHUNK)
    with jax.set_mesh(devices):
        text = call.function.lower(*call.arguments).compile().as_text()
    assert all(name in text for name in KERNELS[target])
    lines = [line for line in text.splitlines() if re.search(r" (all-gather|all-reduce|all-to-all)(-start)?\(", line)]
    sent = [math.prod(map(int, sizes.split(","))) for line in lines for sizes in re.findall(r"\w\[([\d,]+)\]", line)]
    chunk, cache = (count * 64 * WIDE.dim for count in (3, 18))  # elements in one array of a layer
    assert lines and max(sent) <= chunk < cache / 4
    assert (("all-to-all" in text) or ("all-gather" in text)) == ("context" in mesh)
    assert ("all-reduce" in text) or "tensor" not in mesh
