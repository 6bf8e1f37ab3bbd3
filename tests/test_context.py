"""The context of a chunk in training: clean chunks as in the cache, and the regression's context."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.models import wan
from sf_jax.objectives import consistency
from sf_jax.training import self_forcing, stages, supervised
from tests.helpers import SIZE, SMALL
from tests.test_objectives import FRAMES, MEDIA, make_config, setting


def test_clean_chunks_are_context_and_never_learned():
    state, seed, examples = types.SimpleNamespace(step=0), {"seed": np.uint32(0)}, jnp.arange(64)
    index = supervised.ode_program(make_config(stage="init")).prepare(state, {}, seed, examples)
    assert set(np.unique(index)) == {0, 1, 2, 3, 4}
    behind_real = make_config(stage="init", ode={"teacher": "causal"})
    index = supervised.ode_program(behind_real).prepare(state, {}, seed, examples)
    assert set(np.unique(index)) == {0, 1, 2, 3}
    batch = {"latent": jnp.ones((64, FRAMES, *SIZE, SMALL.channels))}
    for kind, clean in (("diffusion_forcing", True), ("teacher_forcing", False)):
        config = make_config(student_input=kind)
        _, t, _ = self_forcing._noised(self_forcing.Setup.of(config, MEDIA), batch, jax.random.key(0), examples, clean)
        assert (t == 0).any() == clean and len(np.unique(t)) == 4 + clean


@pytest.mark.slow
def test_baselines_do_not_learn_on_clean_chunks():
    config = make_config(student_input="diffusion_forcing", batch_size=8)
    state, frozen, batch = setting(config)
    student = self_forcing.programs(config, MEDIA)[0]
    fake = jax.jit(student.prepare)(state, frozen, batch, jnp.arange(8))
    clean, t, _ = fake.forced
    video, mask, _ = self_forcing._video(self_forcing.Setup.of(config, MEDIA), state.model.params, frozen, batch, fake)
    at_zero = np.asarray(t == 0)
    assert at_zero.any() and not at_zero.all()
    np.testing.assert_array_equal(np.asarray(video)[at_zero], np.asarray(clean)[at_zero])
    np.testing.assert_array_equal(np.asarray(mask)[..., 0, 0, 0], ~at_zero)


def test_guidance_can_differ_between_the_first_and_the_later_chunks():
    config = make_config(batch_size=2)
    state, frozen, batch = setting(config)
    layout, solver = supervised.layout_of(config, True), FlowSchedule(3.0, 8)
    noise = jax.random.normal(jax.random.key(2), batch["latent"].shape)
    inputs = (batch["latent"], batch["text"], 0 * batch["text"], jnp.full((2, FRAMES), 2), noise, solver)

    def step(guidance):
        return consistency.teacher_step((wan.WanTransformer(SMALL), frozen["teacher"]), layout, *inputs, guidance)

    mixed, strong, plain = (jax.jit(lambda g=g: step(g))() for g in (np.repeat([3.0, 1.0], FRAMES // 2), 3.0, 1.0))
    np.testing.assert_allclose(mixed[:, :3], strong[:, :3], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed[:, 3:], plain[:, 3:], rtol=1e-5, atol=1e-6)
    assert np.abs(strong - plain).max() > 1e-3


def test_the_regression_leaves_out_the_first_chunk():
    config = make_config(regression_weight=1.0, batch_size=2)
    state, frozen, batch = setting(config)
    setup = self_forcing.Setup.of(config, MEDIA)
    fake = types.SimpleNamespace(key=jax.random.key(1), examples=jnp.arange(2))

    @jax.jit
    def error(latent):
        return self_forcing._regression(setup, state.model.params, batch | {"latent": latent}, fake)

    latent = batch["latent"]
    assert float(error(latent)) > 0
    slope = jax.jit(jax.grad(error))(latent)
    assert np.any(slope[:, :3]) and np.any(slope[:, 3:])  # the first chunk is context
    (loss,) = self_forcing.programs(config, MEDIA)[0].losses
    assert stages.keys_of(config)[0] == ("video", "text") and loss.network == "model"
