"""Every stage and objective: progress at embedded size, what has no gradient, and options that must agree."""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from sf_jax.config import from_dict
from sf_jax.data import moving_digits
from sf_jax.models.layers import Linear
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.models.text import WordEmbedding
from sf_jax.models.wan import bidirectional_layout
from sf_jax.objectives import dmd, sid
from sf_jax.training import lora, metrics, self_forcing, sharding, supervised
from sf_jax.training import step as steps
from sf_jax.training.media import Media, digits_media
from sf_jax.weights.package import load_package, shipped_path
from tests.helpers import SIZE, SMALL, marked, random_params, tree_relative

MEDIA = Media(lambda batch: batch["latent"], lambda frozen, latents: 0.5 * latents[:, -1:], None, 1.0)
FRAMES = 6


def make_config(**changes):
    optimizer = {"lr": 3e-3, "beta1": 0.9, "clip": 1e3, "weight_decay": 0.0}
    return from_dict(
        {
            "model": dataclasses.asdict(SMALL),
            "batch_size": 4,
            "generator_every": 1,
            "teacher_weights": "unused",
            "rollout": {"chunk": 3, "shift": 3.0, **changes.pop("rollout", {})},
            "data": {"frames": FRAMES, "height": SIZE[0], "width": SIZE[1]},
            "score": {"guidance": 1.5, "student_shift": 3.0, "score_shift": 3.0, "time_shift": 3.0},
            "optimizer": optimizer,
            "critic_optimizer": optimizer,
            "gan": {"head": {"taps": (0, 1)}, "r1_weight": 0.1, "r2_weight": 0.1, **changes.pop("gan", {})},
            "ema": {"decay": 0.9, "start": 0},
            **changes,
        }
    )


def make_batch(config, frames=FRAMES):
    keys = jax.random.split(jax.random.key(3), 3)
    text = jax.random.normal(keys[0], (config.batch_size, SMALL.text_len, SMALL.text_dim))
    latent = jax.random.normal(keys[1], (config.batch_size, frames, *SIZE, SMALL.channels))
    trajectory = jax.random.normal(keys[2], (config.batch_size, 5, frames, *SIZE, SMALL.channels))
    constants = {"negative": jnp.zeros((1, *text.shape[1:])), "seed": np.uint32(config.seed)}
    return {"text": text, "latent": latent, "trajectory": trajectory, **constants}


def setting(config):
    """State, frozen networks and batch."""
    state = steps.new_state(config, random_params(seed=1), random_params(seed=2))
    frozen = {"teacher": random_params(seed=4)}
    if config.lora.rank:
        frozen["model_base"] = random_params(seed=1)
    if config.critic_lora.rank:
        frozen["critic_base"] = random_params(seed=2)
    return state, frozen, make_batch(config)


EMBEDDED = digits_media(PatchCodec.load())


def embedded_config(variant, **changes):
    """A shipped config of the moving digits with a small batch, updates at every step, and a plain optimizer."""
    values = digits.VARIANTS[variant]() | {"batch_size": 2, "generator_every": 1}
    values |= {"teacher_weights": "unused"} if values["stage"] in ("init", "distill") else {}
    values |= {name: {"lr": 1e-3, "beta1": 0.9, "weight_decay": 0.0} for name in ("optimizer", "critic_optimizer")}
    return from_dict(values | {k: values.get(k, {}) | v if isinstance(v, dict) else v for k, v in changes.items()})


@functools.cache
def embedded_networks():
    """The shipped teacher, and two degraded copies."""
    teacher = jax.tree.map(jnp.asarray, load_package(shipped_path("teacher")).params)

    def worse(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: x + 0.3 * jnp.std(x) * rng.normal(size=x.shape).astype("float32"), teacher)

    return teacher, worse(1), worse(2)


def embedded_setting(config):
    """State, frozen networks and a batch of real clips."""
    teacher, student, critic = embedded_networks()
    state = steps.new_state(config, student, critic)
    frozen = {"teacher": teacher, "model_base": student, "critic_base": critic}
    clips = list(moving_digits.generate(moving_digits.plan_clips("train", config.batch_size), config.data.frames))
    text = WordEmbedding()
    batch = {
        "video": np.stack([clip["video"] for clip in clips]),
        "text": jnp.asarray(text.encode([clip["caption"] for clip in clips])),
        "negative": jnp.asarray(text.encode([""])),
        "seed": np.uint32(config.seed),
    }
    if config.stage == "init":  # straight paths from noise
        clean = EMBEDDED.clean(batch)
        times = jnp.asarray(config.rollout.timesteps)[:, None, None]
        noise = jax.random.normal(jax.random.key(5), clean.shape)
        path = config.rollout.schedule.add_noise(
            clean[None], noise[None], jnp.broadcast_to(times, (4, config.batch_size, config.data.frames))
        )
        batch["trajectory"] = jnp.moveaxis(jnp.concatenate([path, clean[None]]), 0, 1)
        batch |= {"context": clean} if config.ode.teacher == "causal" else {}
    return state, frozen, batch


def repeat(function, state, frozen, batch, times):
    """Runs a step repeatedly with the random numbers of step 0; returns the state and the metrics."""
    run = jax.jit(function)
    seen = []
    for _ in range(times):
        state, metrics = run(state.replace(step=jnp.zeros((), jnp.int32)), frozen, batch)
        seen.append(jax.device_get(metrics))
    return state, seen


IMAGE = {"image_to_video": True, "rollout": {"chunk": 4, "first_frame_alone": True}}
SUPERVISED = {
    "teacher": (lambda c: supervised.teacher_program(c, EMBEDDED), "teacher", {}),
    "teacher forcing": (lambda c: supervised.causal_program(c, EMBEDDED), "causal", {}),
    "context noise": (
        lambda c: supervised.causal_program(c, EMBEDDED),
        "causal",
        {"causal": {"forcing": "teacher", "context_noise": 100.0}},
    ),
    "diffusion forcing": (lambda c: supervised.causal_program(c, EMBEDDED), "diffusion_forcing", {}),
    "frame-wise": (lambda c: supervised.causal_program(c, EMBEDDED), "causal", {"rollout": {"chunk": 1}}),
    "image to video": (lambda c: supervised.causal_program(c, EMBEDDED), "causal", IMAGE),
    "ode": (supervised.ode_program, "init", {}),
    "ode behind real clips": (supervised.ode_program, "init", {"ode": {"teacher": "causal"}}),
    "consistency": (lambda c: supervised.consistency_program(c, EMBEDDED), "consistency", {}),
}

# Similar to other cases in the lists.
LONGEST = [
    "DF+DMD",
    "write",
    "straight through, last step, guided critic",
    "frame-wise with a window, times of the exit",
]
LONGEST += [
    "long, an exit per chunk",
    "noisy context",
    "adapters",
    "context noise",
    "frame-wise",
    "image to video",
    "regression",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(SUPERVISED, LONGEST))
def test_the_loss_of_the_same_draws_falls(name):
    make, variant, changes = SUPERVISED[name]
    config = embedded_config(variant, **changes)
    state, frozen, batch = embedded_setting(config)
    after, seen = repeat(steps.make_step(config, make(config)), state, frozen, batch, 30)
    losses = [float(metrics["loss"]) for metrics in seen]
    assert losses[-1] < 0.7 * losses[0], losses
    assert int(after.model.updates) == 30 and all(bool(metrics["finite"]) for metrics in seen)


DISTILL = {
    "dmd": {},
    "straight through, last step, guided critic": {
        "cache_gradient": "straight_through",
        "exits": "last",
        "score": {"fake_guidance": 1.5},
    },
    "long, an exit per chunk": {"rollout_frames": (12,), "exits": "per_chunk", "rollout": {"sink": 0}},
    "frame-wise with a window, times of the exit": {
        "rollout": {"chunk": 1, "window": 3, "sink": 1, "positions": "absolute"},
        "score": {"from_exit": True, "to_exit": True},
    },
    "adapters": {"lora": {"rank": 8}, "critic_lora": {"rank": 8}},
    "write": {"cache_gradient": "write"},
    "write, long, adapters": {
        "cache_gradient": "write",
        "rollout": {"sink": 0},
        "rollout_frames": (12,),
        "lora": {"rank": 8},
        "critic_lora": {"rank": 8},
    },
    "noisy context": {"cache_gradient": "write", "rollout": {"context": "noisy"}},
    "regression": {"regression_weight": 0.5},
    "sid": {"objective": "sid"},
    "DF+DMD": {"student_input": "diffusion_forcing"},
    "TF+DMD": {"student_input": "teacher_forcing"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(DISTILL, LONGEST))
def test_the_student_nears_the_teacher_and_the_critic_keeps_up(name):
    rate = 1e-2 if "adapters" in name else 1e-3
    rates = {name: {"lr": rate, "beta1": 0.0} for name in ("optimizer", "critic_optimizer")}
    config = embedded_config("distill", **DISTILL[name] | rates)
    teacher, worse, _ = embedded_networks()
    _, frozen, batch = embedded_setting(config)
    # As in a run, the critic starts from the teacher.
    state, frozen = steps.new_state(config, worse, teacher), frozen | {"critic_base": teacher}
    student, critic = (jax.jit(steps.make_step(config, p)) for p in self_forcing.programs(config, EMBEDDED))
    seen = []
    for _ in range(24):
        state, metrics = student(state, frozen, batch)
        seen.append(jax.device_get(metrics))
        state, _ = critic(state, frozen, batch)
    distance, lag = (np.asarray([values[key] for values in seen]) for key in ("teacher_distance", "critic_lag"))
    # With the gradient's sign flipped, the distance grows tenfold.
    assert distance[-6:].mean() < 0.9 * distance[:3].mean(), distance
    assert lag[-6:].mean() < 0.7 * lag[0], lag
    assert all(values["generator_finite"] and values["motion"] > 0 for values in seen)


@pytest.mark.slow
@pytest.mark.parametrize("relativistic", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_gan_students_look_more_real_and_critics_tell_apart(relativistic):
    config = embedded_config("gan", gan={"relativistic": relativistic})
    state, _, batch = embedded_setting(config)
    student, critic = (steps.make_step(config, p) for p in self_forcing.programs(config, EMBEDDED))
    trained, seen = repeat(critic, state, {}, batch, 24)
    gap = [float(metrics["real_logit"] - metrics["fake_logit"]) for metrics in seen]
    assert gap[-1] > gap[0] + 0.5, gap
    assert "r1" in seen[0] and "r2" in seen[0]
    chex.assert_trees_all_equal(trained.model, state.model)
    after, seen = repeat(student, trained, {}, batch, 12)
    logits = [float(metrics["fake_logit"]) for metrics in seen]
    assert logits[-1] > logits[0] + 0.1, logits
    chex.assert_trees_all_equal(after.critic, trained.critic)


@pytest.mark.slow
def test_gan_head_learns_alone_at_first_and_at_its_own_rate():
    config = make_config(objective="gan", gan={"warmup": 1, "head_lr": 2.0}, batch_size=2)
    state, frozen, batch = setting(config)
    student, critic = self_forcing.programs(config, MEDIA)
    assert [student.due(step) for step in range(2)] == [False, True] and critic.due(0)
    run = jax.jit(steps.make_step(config, critic))
    first, _ = run(state, frozen, batch)
    chex.assert_trees_all_equal(first.critic.params["critic"], state.critic.params["critic"])
    assert tree_relative(first.critic.params["head"], state.critic.params["head"]) > 0
    scale = steps._change_scale(config)
    head, rest = ((jax.tree_util.DictKey(name),) for name in ("head", "critic"))
    assert [float(scale(path, updates)) for path in (head, rest) for updates in (0, 1)] == [2.0, 2.0, 0.0, 1.0]
    second, _ = run(first, frozen, batch)
    assert tree_relative(second.critic.params["critic"], state.critic.params["critic"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
def test_each_loss_has_a_gradient_in_its_own_network_alone(objective):
    # With the options most likely to leak: the second pass over the clean chunks, and the regression's.
    more = {} if objective == "dmd" else {"cache_gradient": "write", "regression_weight": 0.5}
    config = make_config(objective=objective, batch_size=2, **more)
    state, frozen, batch = setting(config)
    frozen = {} if objective == "gan" else frozen
    for program in self_forcing.programs(config, MEDIA):
        fake = jax.jit(program.prepare)(state, frozen, batch, jnp.arange(2))

        def value(student, critic, frozen, program=program, fake=fake):
            networks = {"model": state.model.replace(params=student), "critic": state.critic.replace(params=critic)}
            own = student if program.losses[0].network == "model" else critic
            return program.losses[0].function(own, state.replace(**networks), frozen, batch, fake)[0]

        grads = jax.jit(jax.grad(value, argnums=(0, 1, 2)))(state.model.params, state.critic.params, frozen)
        moved = [any(np.any(x) for x in jax.tree.leaves(tree)) for tree in grads]
        assert moved == [program.losses[0].network == "model", program.losses[0].network == "critic", False]


@pytest.mark.slow
@pytest.mark.parametrize("name", marked(["dmd", "gan"], exhaustive=("gan",)))
def test_parts_of_a_batch_give_the_update_of_the_whole(name):
    configs = [make_config(accumulate=parts, batch_size=4, objective=name) for parts in (1, 2)]
    for index, network in enumerate(("model", "critic")):
        results = []
        for config in configs:
            state, frozen, batch = setting(config)
            program = self_forcing.programs(config, MEDIA)[index]
            results.append(jax.jit(steps.make_step(config, program))(state, frozen, batch))
        (whole, metrics), (split, others) = results
        loose = 10 if name == "gan" and network == "critic" else 1
        for key in metrics:
            if not key.endswith(("nonfinite", "finite")):
                rtol = 1e-3 if key in ("r1", "r2") else loose * 2e-5  # differences of close numbers
                np.testing.assert_allclose(metrics[key], others[key], rtol=rtol, err_msg=key)
        assert tree_relative(getattr(split, network).opt_state, getattr(whole, network).opt_state) < loose * 1e-5


@pytest.mark.slow
def test_a_shared_rollout_gives_both_updates_of_separate_programs_on_the_same_draws():
    config = make_config(batch_size=2)
    state, frozen, batch = setting(config)
    shared = dataclasses.replace(config, share_rollout=True)
    both, alone = self_forcing.programs(shared, MEDIA)
    assert both.due(0) and not alone.due(0) and both.ends and alone.ends
    student = next(p for p in self_forcing.programs(config, MEDIA) if not p.ends)
    after, _ = jax.jit(steps.make_step(shared, both))(state, frozen, batch)
    expected, _ = jax.jit(steps.make_step(config, student))(state, frozen, batch)
    assert tree_relative(after.model.params, expected.model.params) < 1e-6
    critic = dataclasses.replace(both, losses=(both.losses[1],))
    expected, _ = jax.jit(steps.make_step(shared, critic))(state, frozen, batch)
    assert tree_relative(after.critic.params, expected.critic.params) < 1e-6


def test_adapters_too_small_for_16_bits_still_count():
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=size), "bfloat16") for size in ((4096, 64), (64, 8)))
    down, up = (jnp.asarray(1e-3 * rng.normal(size=size), "float32") for size in ((64, 2), (2, 8)))
    base = {"kernel": kernel, "bias": jnp.zeros(8)}
    layer = Linear(8, "bfloat16")
    change = layer.apply({"params": base | {"down": down, "up": up}}, x).astype("float32")
    change -= layer.apply({"params": base}, x).astype("float32")
    exact = x.astype("float32") @ (down @ up)
    # A thousandth of the output's last digit, but present on average.
    assert abs(float((change * exact).sum() / jnp.square(exact).sum()) - 1) < 0.2
    rounded = (kernel + (down @ up).astype("bfloat16")) - kernel
    assert jnp.abs(rounded).max() == 0  # a merged kernel would lose it

    def loss(adapters, x):
        return jnp.sin(layer.apply({"params": base | adapters}, x).astype("float32")).sum()

    def wide(adapters, x):
        kernel = base["kernel"].astype("float32") + adapters["down"] @ adapters["up"]
        return jnp.sin(x.astype("float32") @ kernel).sum()

    grads, exact = (jax.grad(f)({"down": down, "up": up}, x) for f in (loss, wide))
    assert tree_relative(grads, exact) < 0.02


@pytest.mark.parametrize("objective", [dmd, sid])
def test_scores_that_are_not_finite_show_in_the_loss(objective):
    model, batch = self_forcing.WanTransformer(SMALL), make_batch(make_config(batch_size=2))
    good, t = random_params(), jnp.full((2, 1), 500.0)
    bad = good | {"head_modulation": good["head_modulation"] * jnp.nan}
    video, text = batch["latent"], batch["text"]
    negative = jnp.broadcast_to(batch["negative"], text.shape)

    @jax.jit
    def loss(teacher, critic):
        score = make_config().score
        return objective.generator_loss(
            video, (model, teacher), (model, critic), text, negative, t, jnp.ones_like(video), score
        )[0]

    assert np.isfinite(loss(good, random_params(seed=1)))
    assert np.isnan(loss(bad, good)) and np.isnan(loss(good, bad))


@pytest.mark.slow
def test_updates_that_are_not_finite_change_nothing():
    config = make_config(batch_size=2)
    state, frozen, batch = setting(config)
    critic = jax.jit(steps.make_step(config, self_forcing.programs(config, MEDIA)[1]))
    bad = state.model.params | {"head_modulation": state.model.params["head_modulation"].at[0, 0, 0].set(jnp.nan)}
    broken = state.replace(model=state.model.replace(params=bad))
    after, metrics = critic(broken, frozen, batch)
    assert not metrics["critic_finite"]
    chex.assert_trees_all_equal(after.critic, state.critic)
    names = steps.leaf_names(state.critic.params)
    assert len(names) == len(metrics["critic_nonfinite"]) and metrics["critic_nonfinite"][names.index("head/bias")] > 0


def test_only_the_last_window_of_a_long_rollout_takes_a_gradient():
    config = make_config(rollout_frames=(FRAMES, 12), batch_size=2)
    found = self_forcing.programs(config, MEDIA)
    assert [p.name for p in found if not p.ends] == ["student of 6 frames", "student of 12 frames"]
    for step in range(20):
        assert sum(p.due(step) for p in found if p.ends) == 1
    assert {p.name for step in range(20) for p in found if p.ends and p.due(step)} == {p.name for p in found if p.ends}
    assert self_forcing._first_live(config, 12) == 2
    image = make_config(image_to_video=True, rollout={"chunk": 5, "first_frame_alone": True})
    assert self_forcing._first_live(image, 11) == 1 and self_forcing._first_live(image, 6) == 0
    video = jnp.arange(12.0)[None, :, None, None, None] * jnp.ones((1, 12, 2, 2, 1))
    cut, mask = self_forcing._last_window(self_forcing.Setup.of(config, MEDIA), {}, video)
    np.testing.assert_array_equal(cut[0, :, 0, 0, 0], [3.0, 7, 8, 9, 10, 11])  # MEDIA halves frame 6, the first one
    np.testing.assert_array_equal(mask[0, :, 0, 0, 0], [False] * 3 + [True] * 3)


@pytest.mark.slow
def test_adapters_start_as_the_network_and_are_all_that_learns():
    config = make_config(lora={"rank": 2, "alpha": 4.0})
    params = random_params()
    adapters = lora.init_adapters(params, config.lora, jax.random.key(0))
    chex.assert_trees_all_equal(lora.merge(params, adapters, config.lora), params)
    assert len(jax.tree.leaves(adapters)) == 2 * 10
    moved = jax.tree.map(lambda x: x + 0.1, adapters)
    merged = lora.merge(params, moved, config.lora)
    model, batch = self_forcing.WanTransformer(SMALL), make_batch(config)
    flows = [
        model.apply({"params": tree}, batch["latent"], jnp.full((4, 1), 500.0), batch["text"], bidirectional_layout(6))
        for tree in (merged, lora.attach(params, moved, config.lora), params)
    ]
    assert tree_relative(flows[1], flows[0]) < 1e-6 < 0.1 < tree_relative(flows[2], flows[0])
    kernel = params["blocks"]["ffn_in"]["kernel"]
    pair = moved["blocks"]["ffn_in"]["kernel"]
    np.testing.assert_allclose(merged["blocks"]["ffn_in"]["kernel"], kernel + 2 * pair["down"] @ pair["up"], rtol=1e-5)
    with pytest.raises(ValueError, match="lora.rank is 99: blocks/.* is .*, the rank must be smaller"):
        lora.init_adapters(params, dataclasses.replace(config.lora, rank=99), jax.random.key(0))


@pytest.mark.parametrize("changes", [{}, {"objective": "gan"}, {"lora": {"rank": 2}, "critic_lora": {"rank": 2}}])
def test_every_leaf_of_every_state_has_a_sharding_rule(changes):
    config = make_config(**changes)
    state = jax.eval_shape(lambda: steps.new_state(config))
    found = sharding.tree_shardings(state, sharding.make_mesh(config.mesh))
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "accumulate is 3: it must divide batch_size, 4"),
        ({"objective": "wgan"}, "objective is 'wgan': it must be one of dmd, sid, gan"),
        ({"student_input": "teacher_forcing", "share_rollout": True}, "share_rollout is True: student_input is"),
        ({"rollout_frames": (7,)}, "rollout_frames is (7,): each must be data.frames, 6, or a multiple"),
        ({"image_to_video": True}, "image_to_video is True: rollout.first_frame_alone must be True too"),
        (
            {"objective": "gan", "gan": {"head": {"taps": (5,)}}},
            "gan.head.taps is (5,): the critic's blocks are 0 to 1",
        ),
        ({"gan": {"r1_sigma": 0.0}}, "gan.r1_sigma is 0.0: it must be above 0"),
        ({"regression_weight": -1.0}, "regression_weight is -1.0: it must be at least 0"),
        ({"regression_weight": 1.0, "rollout": {"chunk": 6}}, "with data.frames 6 in one chunk"),
        ({"rollout": {"context": "noisy"}, "regression_weight": 1.0}, "rollout.context is 'noisy': this run trains"),
        ({"rollout": {"context": "noisy"}, "student_input": "teacher_forcing"}, "it must be 'clean'"),
        ({"stage": "causal", "regression_weight": 1.0}, "regression_weight is 1.0: it is for stage 'distill'"),
        ({"causal": {"forcing": "none"}}, "causal.forcing is 'none'"),
        ({"causal": {"forcing": "diffusion", "context_noise": 5.0}}, "with diffusion forcing it must be 0"),
        ({"lora": {"rank": -1}}, "rank is -1"),
        ({"objective": "gan", "critic_lora": {"rank": 1}}, "critic_lora.rank is above 0"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore': it must be one of stop, skip"),
        (
            {"stage": "teacher", "image_to_video": True, "rollout": {"chunk": 5, "first_frame_alone": True}},
            "must be False",
        ),
        ({"optimizer": {"name": "muon"}, "lora": {"rank": 1}}, "optimizer.name is 'muon': it is for whole matrices"),
        ({"objective": "sid", "score": {"fake_guidance": 2.0}}, "score.fake_guidance is 2.0: only the objective 'dmd'"),
        ({"exits": "per_chunk", "score": {"from_exit": True}}, "score.from_exit is True: the scores' times can follow"),
        (
            {"student_input": "diffusion_forcing", "exits": "last"},
            "exits is last: student_input is 'diffusion_forcing'",
        ),
        ({"stage": "causal", "share_rollout": True}, "share_rollout is True: it is for stage 'distill'"),
        ({"stage": "causal", "critic_lora": {"rank": 1}}, "critic_lora.rank is 1: it is for stage 'distill'"),
        (
            {
                "data": {"name": "wan", "height": 4, "width": 4, "frames": 6},
                "log": {"sample_every": 1, "sample_prompts": ("a",)},
            },
            "log.sample_prompts is ('a',): samples of prepared data",
        ),
        ({"rollout": {"context_timestep": -5.0}}, "context_timestep is -5.0: it must be in [0, 1000]"),
        ({"ema": {"start": -1}}, "ema.start is -1: it must be at least 0"),
        ({"ema": {"start": 10**10}}, "ema.start is 10000000000: it must be at most 2147483647"),
        ({"steps": 2**31}, "steps is 2147483648: it must be at most 2147483647"),
        ({"optimizer": {"warmup": 2**31}}, "optimizer.warmup is 2147483648: it must be at most 2147483647"),
        ({"seed": -1}, "seed is -1: it must be at least 0"),
        ({"seed": 2**32}, "seed is 4294967296: it must be at most 4294967295"),
        ({"score": {"student_shift": 0.5}}, "score.student_shift is 0.5: it must be in [1, "),
        ({"score": {"score_shift": 1e9}}, "score.score_shift is 1000000000.0: it must be in [1, "),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        make_config(**changes)
    assert message in str(error.value)


def test_the_log_names_the_first_bad_tensor_or_counts_what_was_skipped(tmp_path):
    good = {"critic_loss": jnp.float32(1), "critic_finite": jnp.array(True), "critic_nonfinite": jnp.zeros(2, "int32")}
    bad = good | {"critic_finite": jnp.array(False), "critic_nonfinite": jnp.array([0, 3])}
    names = {"critic_": ["a/kernel", "b/bias"]}
    log = metrics.Log(tmp_path / "stop.jsonl", 0, 8, 4, "test", leaf_names=names)
    for step, values in ((1, good), (2, bad), (3, good)):
        log.step(step, values)
    with pytest.raises(FloatingPointError, match=r"step 2: the critic gradient of b/bias \(3 values\)"):
        log.step(4, bad)
    log.close()
    log = metrics.Log(tmp_path / "skip.jsonl", 0, 8, 4, "test", skip=True, leaf_names=names)
    for step, values in ((1, good), (2, bad), (3, bad), (4, good)):
        log.step(step, values)
    log.close()
    assert json.loads((tmp_path / "skip.jsonl").read_text())["skipped"] == 2
