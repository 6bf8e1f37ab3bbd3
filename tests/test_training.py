"""Training at small size: resuming, devices, gradients, configs."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import digits, wan_distill
from sf_jax import load_pipeline
from sf_jax.config import MeshConfig, config_dict, from_dict
from sf_jax.data import moving_digits
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.training import (
    abstract,
    checkpoint,
    fingerprint,
    loop,
    metrics,
    programs,
    self_forcing,
    sharding,
    sources,
    stages,
)
from sf_jax.training import step as steps
from sf_jax.training.media import Media, digits_media
from sf_jax.weights.package import captions_of, load_package, save_package
from tests.helpers import random_params, tree_relative

SMALL = {"dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "channels": 8, "text_dim": 64, "text_len": 10}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A small teacher's weights."""
    return save_teacher(tmp_path_factory.mktemp("weights"), small_config("teacher"))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The dataset."""
    path = tmp_path_factory.mktemp("data")
    moving_digits.build(path)
    return str(path)


def small_config(stage, **changes):
    values = digits.VARIANTS[stage]()
    values["model"] = SMALL | {"freq_dim": 16}
    values["data"] = values["data"] | {"frames": 6, "dir": changes.pop("data_dir", "data")}
    if stage not in ("causal", "diffusion_forcing"):
        values["init_weights"] = None  # the shipped start has other sizes
    if "gan" in values:
        values["gan"] = values["gan"] | {"head": {"taps": (0, 1)}}
    return from_dict(values | {"batch_size": 8, "steps": 4, "log_every": 1, "checkpoint_every": 2, **changes})


def save_teacher(folder, config):
    """Writes a random teacher of a run's sizes; returns its file."""
    path = folder / "teacher.safetensors"
    save_package(path, stages.package_of(config, random_params(config.model)))
    return str(path)


def digits_model():
    """Sizes of the shipped networks."""
    return from_dict(digits.get_config("distill")).model


def test_undirected_captions(tmp_path, monkeypatch):
    few = dataclasses.replace(moving_digits.UNDIRECTED, name="few", clips={"train": (40, 8)})
    monkeypatch.setitem(moving_digits.VARIANTS, "undirected", few)
    config = small_config("teacher", data_dir=str(tmp_path / "data"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, captions="undirected"))
    source = sources.open_source(config, needs_videos=True)
    captions = {source.prompt(i)[0] for i in range(60)} | {source.clip(i)[0] for i in range(40)}
    assert captions <= set(moving_digits.all_captions("undirected"))
    path = tmp_path / "teacher.safetensors"
    save_package(path, stages.package_of(config, random_params(config.model)))
    assert load_package(path).captions == load_pipeline(path).captions == "undirected"
    assert load_pipeline().captions == "full"
    assert captions_of(path) == "undirected" and captions_of(None) == captions_of("teacher") == "full"
    full = small_config("distill", teacher_weights=str(path))
    undirected = dataclasses.replace(full, data=dataclasses.replace(full.data, captions="undirected"))
    mesh = sharding.make_mesh(full.mesh)
    assert stages._teacher(undirected, mesh, "float32")
    with pytest.raises(ValueError, match="which knows captions 'undirected': data.captions is 'full', it must be"):
        stages._teacher(full, mesh, "float32")
    own = dataclasses.replace(undirected, init_weights="init", model=digits_model(), teacher=undirected.model)
    with pytest.raises(ValueError, match="init_weights is init, which knows captions 'full': data.captions is 'und"):
        stages.start_params(own, mesh)
    with pytest.raises(ValueError, match="has sizes .*; 'init' is shipped, give a file of your own, or None"):
        stages.start_params(dataclasses.replace(full, init_weights="init"), mesh)
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, frames=15))
    with pytest.raises(ValueError, match="data.frames is 15: the clips of moving digits have 8 frames"):
        sources.open_source(longer, needs_videos=True)
    cut = dataclasses.replace(undirected.data, cut=0.5)
    cut = dataclasses.replace(undirected, data=cut, rollout=dataclasses.replace(full.rollout, window=6, sink=3))
    with pytest.raises(ValueError, match="data.cut is 0.5: this run trains on no whole clips, it must be 0"):
        stages.open_stage(cut, tmp_path, mesh)
    rollout = dataclasses.replace(config.rollout, window=None, sink=0, positions="absolute")
    cut = dataclasses.replace(config, data=dataclasses.replace(config.data, cut=0.5), rollout=rollout)
    with pytest.raises(ValueError, match="data.cut is 0.5: it moves the first rollout.sink frames .*rollout.sink is 0"):
        stages.open_stage(cut, tmp_path, mesh)
    with pytest.raises(ValueError, match="data.captions is 'few': it must be one of full, undirected"):
        dataclasses.replace(config.data, captions="few")
    with pytest.raises(ValueError, match="data.captions is 'undirected': for the data 'wan' it must be 'full'"):
        dataclasses.replace(config.data, name="wan")


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in metrics.TIMING} for line in lines]


@pytest.mark.slow
def test_interrupted_run_continues_bit_exactly(teacher, data_dir, tmp_path, monkeypatch, capsys):
    changes = {"ema": {"decay": 0.9, "start": 0}, "generator_every": 1, "data_dir": data_dir}
    config = small_config("gan", teacher_weights=teacher, **changes)
    whole = loop.train(config, tmp_path / "whole")
    take = metrics.Log.step

    def interrupt(self, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        take(self, step, *rest)

    monkeypatch.setattr(metrics.Log, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "parts")
    assert [line["step"] for line in losses(tmp_path / "parts")] == [1, 2, 3]
    monkeypatch.undo()
    capsys.readouterr()
    parts = loop.train(config, tmp_path / "parts")
    assert "resuming from step 2" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert parts.read_bytes() == whole.read_bytes()
    with pytest.raises(ValueError, match="another config .optimizer.lr: .* -> 0.5"):
        changed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=0.5))
        loop.train(changed, tmp_path / "whole")
    assert loop.train(dataclasses.replace(config, log_every=3), tmp_path / "whole").read_bytes() == whole.read_bytes()


@pytest.fixture
def run(data_dir, tmp_path):
    """Trains two steps of a variant, generates with the result, and returns its path."""

    def trained(variant, **changes):
        config = small_config(variant, steps=2, generator_every=1, data_dir=data_dir, **changes)
        path = loop.train(config, tmp_path / f"{variant}{len(list(tmp_path.iterdir()))}")
        pipe = load_pipeline(path)
        frames = 11 if config.image_to_video else 6
        assert pipe("a 3 moving left", frames=pipe.only_frames or frames).shape == (1, frames, 24, 24, 1)
        assert path.with_name("README.md").read_text().startswith("---\n")  # its model card
        return str(path)

    return trained


@pytest.mark.slow
def test_every_stage_continues_from_the_files_of_the_others(teacher, run):
    causal = run("causal", init_weights=teacher)
    student = run("consistency", teacher_weights=causal)
    run("init", teacher_weights=causal, ode={"pairs": 70, "solver_steps": 4, "teacher": "causal"})
    for variant in ("gan", "causvid"):
        run(variant, teacher_weights=teacher, init_weights=student)
    adapted = run("distill", teacher_weights=teacher, init_weights=student, lora={"rank": 2}, critic_lora={"rank": 2})
    change = tree_relative(load_package(adapted).params, load_package(student).params)
    assert 0 < change < 0.1
    with pytest.raises(ValueError, match="is a teacher network: here it must be a causal network"):
        run("consistency", teacher_weights=teacher)
    with pytest.raises(ValueError, match="is a causal network: here it must be a teacher network"):
        run("sid", teacher_weights=causal)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_longer_rollouts_and_given_images_train_and_generate(teacher, run):
    run("distill", teacher_weights=teacher, rollout_frames=(6, 9), exits="per_chunk", accumulate=2, share_rollout=True)
    image = {"rollout": {"chunk": 5, "first_frame_alone": True}, "image_to_video": True}
    run("distill", teacher_weights=teacher, **image)


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path):
    unfinished = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-7" / "state"
    unfinished.mkdir(parents=True)
    checkpoint.open_manager(tmp_path, small_config("teacher")).close()
    assert list((tmp_path / "checkpoints").iterdir()) == []


MEDIA = Media(lambda batch: batch["latent"], lambda frozen, latents: latents[:, -1:], None, 1.0)


def step_functions(config, media=MEDIA):
    """The update functions of "distill", by name."""
    return {p.name: steps.make_step(config, p) for p in self_forcing.programs(config, media)}


def batch_for(config):
    text = jax.random.normal(jax.random.key(1), (config.batch_size, 10, 64))
    return {"text": text, "negative": jnp.zeros((1, 10, 64)), "seed": np.uint32(config.seed)}


@pytest.mark.slow
def test_average_starts_at_an_iteration_whatever_the_number_of_updates():
    config = small_config("distill", teacher_weights="unused", ema={"decay": 0.9, "start": 4})
    optimizer = steps.make_optimizers(config).model
    params = random_params(config.model)
    network = steps.new_network(params, optimizer, ema=True)
    grads = jax.tree.map(jnp.ones_like, params)
    network, _ = steps.update(network, grads, optimizer, config.ema, 3)
    chex.assert_trees_all_equal(network.ema, network.params)
    before = network
    network, _ = steps.update(network, grads, optimizer, config.ema, 4)
    expected = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, before.params, network.params)
    chex.assert_trees_all_close(network.ema, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "stage", ["consistency", pytest.param("distill", marks=(pytest.mark.slow, pytest.mark.exhaustive))]
)
def test_runs_with_different_seeds_are_one_program(stage):
    texts = []
    for seed in (0, 1):
        config = small_config(stage, seed=seed, teacher_weights="unused")
        run = abstract.abstract_run(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
        texts.append([program.lower(*run.arguments).as_text() for program in run.programs])
    assert texts[0] == texts[1]


EIGHT = """
import sys, jax, numpy as np
sys.path.insert(0, ".")
from tests.test_training import batch_for, small_config, step_functions
from tests.helpers import random_params, tree_relative
from sf_jax.config import MeshConfig
from sf_jax.training import loop, sharding, stages, step as steps
import dataclasses

config = small_config("distill", teacher_weights="unused", cache_gradient="write")
config = dataclasses.replace(config, data=dataclasses.replace(config.data, height=8))  # 12 tokens a frame
params = jax.device_get(random_params(config.model))  # updates donate what is on a device
results = []
for devices, sizes in ((1, {}), (8, {"data": 2, "fsdp": 2, "tensor": 2}), (8, {"fsdp": 4, "context": 2})):
    mesh_config, devices = MeshConfig(**sizes), jax.devices()[:devices]
    mesh = sharding.make_mesh(mesh_config, devices)
    state = steps.new_state(config, params, jax.device_get(random_params(config.model, 1)))
    state = jax.device_put(state, sharding.tree_shardings(state, mesh))
    frozen = {"teacher": random_params(config.model, 2)}
    updates = tuple(steps.Update(name, function, None, 1.0) for name, function in step_functions(config).items())
    stage = stages.Stage(None, None, frozen, {"negative": 0, "seed": 0}, ("text",), None, updates, None, {})
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    values = {}
    for program in loop.compile_updates(stage, mesh, state):
        program.compile(state, frozen, batch_for(config))
        state, new = program(state, frozen, batch_for(config))
        values |= new
    places = sharding.tree_shardings(state, mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, places)))
    kernel = state.model.params["blocks"]["ffn_in"]["kernel"]
    print(len(devices), kernel.sharding.shard_shape(kernel.shape), jax.tree.map(np.asarray, values))
    results.append(jax.device_get((state, values)))
one, *others = results
for eight in others:
    print("loss", abs(eight[1]["generator_loss"] / one[1]["generator_loss"] - 1))
    for name in ("generator_loss", "generator_grad_norm", "critic_loss", "critic_grad_norm"):
        assert abs(eight[1][name] / one[1][name] - 1) < 1e-5, name
    for a, b in ((one[0].model, eight[0].model), (one[0].critic, eight[0].critic)):
        assert tree_relative(b.params, a.params) < 1e-5
        nu = [jax.tree.leaves(n.opt_state) for n in (a, b)]
        assert tree_relative(nu[1], nu[0]) < 1e-5
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_equal_one():
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", EIGHT], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "equal" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "(2, 16, 24)" in done.stdout and "(2, 4, 48)" in done.stdout  # the kernel is sharded over fsdp and tensor


def test_every_leaf_has_a_sharding_rule():
    config = small_config("teacher")  # Muon, the larger state
    mesh = sharding.make_mesh(config.mesh)
    state = jax.eval_shape(lambda: steps.new_state(config))
    shardings = sharding.tree_shardings(state, mesh)
    spec = shardings.model.opt_state[1].inner_states["adam"].inner_state[0].mu["head"]["kernel"].spec
    assert tuple(spec) == (("fsdp", "context"),)
    with pytest.raises(ValueError, match="no sharding rule for blocks/new/kernel"):
        sharding.tree_shardings({"blocks": {"new": {"kernel": jnp.zeros((2, 3))}}}, mesh)


# One of each kind of program.
KINDS = ("1_3b", "long", "image", "gan", "tf_dmd", "causal", "ode", "consistency")


@pytest.mark.parametrize("variant", [pytest.param(v, marks=() if v == "1_3b" else pytest.mark.slow) for v in KINDS])
def test_full_size_recipe_has_the_right_shapes(variant):
    config = from_dict(wan_distill.get_config(variant))
    run = abstract.abstract_run(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    for update in stages.updates_of(config, run.media):
        after, values = jax.eval_shape(update.step, *run.arguments)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, run.state)
        assert all(v.shape == () or name.endswith("nonfinite") for name, v in values.items())


def loops_over_layers(jaxpr, layers):
    """Number of places in a traced program that loop over the layers of a network, each of which XLA compiles."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == layers:
            count += 1
            continue
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [getattr(one, "jaxpr", one) for one in inner]
        count += sum(loops_over_layers(one, layers) for one in inner if hasattr(one, "eqns"))
    return count


def test_an_update_compiles_few_copies_of_a_network():
    config = from_dict(wan_distill.get_config("1_3b"))
    run = abstract.abstract_run(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    counts = {}
    for update in stages.updates_of(config, run.media):
        jaxpr = jax.make_jaxpr(update.step)(*run.arguments).jaxpr
        counts[update.name] = loops_over_layers(jaxpr, config.model.num_layers)
    # Prompts' keys and values included: student, teacher (guided) and critic; the rollout is one, its replay two.
    assert counts == {"student": 12, "critic": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 3}, "unknown config key stepz; did you mean steps?"),
        ({"rollout": {"widow": 3}}, "unknown config key rollout.widow; did you mean rollout.window?"),
        ({"stage": "train"}, "stage is 'train': it must be one of teacher, causal, init, distill"),
        ({"steps": 0}, "steps is 0: it must be at least 1"),
        ({"steps": "many"}, "steps is 'many': it must be of type int"),
        (
            {"data": {"frames": 10}},
            "data.frames is 10, rollout.chunk 3: frames is 10: with chunk=3 it must be a multiple of 3",
        ),
        ({"data": {"height": 5}}, "latent size is 5x6"),
        ({"stage": "init"}, "teacher_weights is None: stage 'init' needs a teacher"),
        ({"cache_gradient": "all"}, "cache_gradient is 'all'"),
        ({"optimizer": 3}, "optimizer is 3: it must be a group of fields"),
        ({"ema": {"decay": 1.0}}, "ema.decay is 1.0"),
        ({"critic_optimizer": {"lr": -1.0}}, "critic_optimizer.lr is -1.0: it must be at least 0"),
        ({"critic_optimizer": {"name": "sgd"}}, "critic_optimizer.name is 'sgd': it must be one of adamw, muon"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr is nan: it must be a finite number"),
        ({"rollout_frames": (9, 2004)}, "rollout_frames is 2004: at most 1024 latent frames have positions"),
        ({"teacher": {"text_dim": 32}}, "teacher.text_dim is 32: it must be that of the model"),
        (
            {"stage": "distill", "objective": "gan", "gan": {"warmup": 9}, "steps": 9, "teacher_weights": "shipped"},
            "gan.warmup is 9: with steps 9 and generator_every 5 it must be at most 5",
        ),
        ({"model": {"num_heads": 0}}, "num_heads is 0: it must be at least 1"),
        ({"rollout": {"steps": ("a",)}}, "rollout.steps[0] is 'a': it must be of type int"),
        ({"ode": {"pairs": 0}}, "pairs is 0"),
        ({"optimizer": {"clip": 0.0}}, "clip is 0.0"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_dict({"stage": "teacher"} | changes)


@pytest.mark.parametrize("file", [digits, wan_distill])
def test_every_variant_is_a_config(file):
    for variant in file.VARIANTS:
        assert from_dict(file.get_config(variant)).steps > 0


def test_every_field_of_a_config_file_can_be_set():
    config = digits.get_config("distill")
    config.init_weights = "a.safetensors"
    config.rollout.window = 12
    typed = from_dict(config)
    assert typed.init_weights == "a.safetensors" and typed.rollout.window == 12
    assert from_dict(config_dict({"stage": "teacher"})).stage == "teacher"
    with pytest.raises(ValueError, match="configs/digits.py has teacher, causal, diffusion_forcing"):
        digits.get_config("other")


def test_bad_meshes_and_batches_are_refused():
    config = small_config("teacher")
    with pytest.raises(
        ValueError, match="mesh.data=3, mesh.fsdp=1, mesh.context=1, mesh.tensor=1: the sizes must multiply to the 1"
    ):
        sharding.make_mesh(dataclasses.replace(config.mesh, data=3), jax.devices()[:1])
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 1), sharding.MESH_AXES)
    with pytest.raises(ValueError, match="mesh.context is 2: it must divide the 9 tokens of a frame"):
        sharding.check_config(config, mesh)
    square = dataclasses.replace(config, data=dataclasses.replace(config.data, height=8))
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 2), sharding.MESH_AXES)
    with pytest.raises(ValueError, match="mesh.context x mesh.tensor is 4: it must divide model.num_heads, 2"):
        sharding.check_config(square, mesh)
    mesh = jax.sharding.AbstractMesh((4, 2, 1, 1), sharding.MESH_AXES)
    with pytest.raises(ValueError, match="batch_size is 8: .* mesh.data x mesh.fsdp x accumulate = 8 x 2"):
        sharding.check_config(dataclasses.replace(config, accumulate=2), mesh)
    with pytest.raises(ValueError, match="batch_size is 12: it must be a multiple of mesh.data x mesh.fsdp = 8"):
        sharding.check_batch(12, mesh)


def test_weight_files_say_what_they_are(teacher, tmp_path):
    package = load_package(teacher)
    assert package.kind == "teacher" and package.config.dim == 32 and package.size == (6, 6)
    assert load_file(teacher)["blocks.0.ffn.0.weight"].shape == (48, 32)
    half = tmp_path / "half.safetensors"
    save_package(half, package, "float16")
    assert half.stat().st_size < 0.6 * os.path.getsize(teacher)
    assert tree_relative(load_package(half).params, package.params) < 1e-3
    with pytest.raises(ValueError, match="does not exist"):
        load_package(tmp_path / "none.safetensors")
    half.write_bytes(half.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_package(half)
    with pytest.raises(ValueError, match="was not written by sf_jax.train"):
        load_package("sf_jax/assets/digits_codec.safetensors")
    with pytest.raises(ValueError, match="teacher_weights .* has sizes"):
        stages.open_stage(
            dataclasses.replace(
                small_config("distill", teacher_weights=teacher), model=package.config.__class__(dim=64, channels=8)
            ),
            tmp_path,
            sharding.make_mesh(MeshConfig()),
        )


def test_progress_is_not_lost_to_a_line_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    log = metrics.Log(path, 1, 4, 1, "test")
    log.step(2, {"loss": jnp.float32(0.5)})
    log.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 0.5]
    log = metrics.Log(path, 2, 4, 1, "test")
    with pytest.raises(FloatingPointError, match="step 3: loss is not finite"):
        log.step(3, {"loss": jnp.float32(np.nan)})
    log.close()


def test_a_folder_in_place_of_the_log_is_named(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"log\.jsonl is no file: .* move it or use another workdir"):
        metrics.Log(tmp_path / "log.jsonl", 0, 4, 1, "test")


@pytest.mark.slow
def test_a_teacher_in_host_memory_gives_the_same_update():
    found, digests, devices = [], [], jax.device_count()
    for offload in (False, True):
        config = small_config("distill", teacher_weights="none", batch_size=4, offload_teacher=offload)
        mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=devices))
        frozen = {"teacher": random_params(config.model, 1)}
        places = sharding.frozen_shardings(frozen, mesh, config.offload)
        kinds = {target.memory_kind for target in jax.tree.leaves(places)}
        assert kinds == ({"device", sharding.HOST_MEMORY} if offload else {"device"})
        frozen = sharding.put(frozen, places)
        digests.append(fingerprint.measure(frozen))
        state = steps.new_state(config, random_params(config.model, 2), random_params(config.model, 3))
        state = sharding.put(state, sharding.tree_shardings(state, mesh))
        batch = sharding.put_batch({"text": batch_for(config)["text"]}, mesh)
        batch |= sharding.put_whole({name: batch_for(config)[name] for name in ("seed", "negative")}, mesh)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        updates = stages.updates_of(config, digits_media(PatchCodec.load()))
        student = programs.jit_updates(updates, ["text"], ["seed", "negative"], mesh, shardings, places)[0].step
        with jax.set_mesh(mesh):
            found.append(jax.device_get(student(state, frozen, batch)))
    (state, metrics), (other, others) = found
    assert digests[0] == digests[1]  # a run may resume with the other setting
    assert tree_relative(other.model.params, state.model.params) < 1e-6
    np.testing.assert_allclose(metrics["generator_loss"], others["generator_loss"], rtol=1e-6)
    assert metrics["generator_loss"] > 0 and metrics["generator_grad_norm"] > 0
