"""Causal diffusion training: the inputs that each chunk's prediction depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.models import wan
from sf_jax.objectives import causal
from tests.helpers import SMALL, inputs, random_params, relative

CHUNKS = (1, 2, 2)
MODEL, SCHEDULE = wan.WanTransformer(SMALL), FlowSchedule(5)


def predict(clean, noise, forcing, context_t=None):
    """Predictions of all chunks at their own noise levels."""
    _, text, _ = inputs(5, batch=1)
    t = jnp.asarray([[900.0, 600.0, 600.0, 300.0, 300.0]])
    layout = causal.causal_layout(CHUNKS, forcing)
    run = jax.jit(lambda c, n: causal.causal_loss(random_params(), MODEL, layout, c, text, t, n, SCHEDULE, context_t))
    loss, aux = run(clean, noise)
    return float(loss), np.asarray(aux["clean"])


@pytest.fixture
def videos():
    """Clean latents and noise."""
    return inputs(5, batch=1, seed=2)[0], inputs(5, batch=1, seed=3)[0]


@pytest.mark.parametrize("forcing", [False, True])
def test_the_future_changes_nothing_and_the_past_matters(forcing, videos):
    clean, noise = videos
    _, before = predict(clean, noise, forcing)
    _, after = predict(clean.at[:, 3:].add(1.0), noise, forcing)
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    _, after = predict(clean.at[:, :1].add(1.0), noise, forcing)
    assert relative(after[:, 1:], before[:, 1:]) > 1e-3


def test_teacher_forcing_sees_clean_chunks_and_diffusion_forcing_noisy_ones(videos):
    clean, noise = videos
    other = noise.at[:, :1].add(1.0)  # noise of the first chunk
    for forcing in (False, True):
        _, before = predict(clean, noise, forcing)
        _, after = predict(clean, other, forcing)
        assert (relative(after[:, 1:], before[:, 1:]) == 0.0) == forcing
    _, before = predict(clean, noise, True, jnp.full((1, 5), 500.0))
    _, after = predict(clean, other, True, jnp.full((1, 5), 500.0))
    assert relative(after[:, 1:], before[:, 1:]) > 1e-3


def test_frames_of_pure_noise_have_no_weight(videos):
    clean, noise = videos
    _, text, _ = inputs(5, batch=1)
    layout = causal.causal_layout(CHUNKS, teacher_forcing=False)
    t = jnp.full((1, 5), 1000.0)  # the bell-shaped loss weight is 0 there
    loss, _ = causal.causal_loss(random_params(), MODEL, layout, clean, text, t, noise, SCHEDULE)
    assert float(loss) == 0.0 < predict(clean, noise, False)[0]


def test_frames_of_a_chunk_share_their_value_and_wrong_layouts_are_refused(videos):
    np.testing.assert_array_equal(causal.per_chunk(np.arange(5)[None], CHUNKS), [[0, 1, 1, 3, 3]])
    clean, noise = videos
    with pytest.raises(ValueError, match="context_t is given: it is for teacher forcing alone"):
        predict(clean, noise, False, jnp.zeros((1, 5)))
    with pytest.raises(ValueError, match="the layout has 5 frames: it must be 4, or 8"):
        predict(clean[:, :4], noise[:, :4], False)
