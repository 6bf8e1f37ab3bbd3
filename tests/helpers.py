"""Small models and inputs that several tests share."""

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sf_jax import rollout as ro
from sf_jax.models import wan

SMALL = wan.WanConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=8, text_len=3, freq_dim=16, channels=4)
SIZE = (4, 4)


def marked(cases, exhaustive):
    """Parameters of all cases; those in `exhaustive` get that mark."""
    return [pytest.param(case, marks=pytest.mark.exhaustive if case in exhaustive else ()) for case in cases]


def relative(ours, reference) -> float:
    """Relative L2 error in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def tree_relative(ours, reference) -> float:
    """Relative L2 error over all leaves together."""
    flat = [np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(t)]) for t in (ours, reference)]
    return relative(*flat)


def random_params(config: wan.WanConfig = SMALL, seed: int = 0) -> dict:
    """Parameters without zeros, so that every path affects the output."""
    shapes = wan.param_shapes(config)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    out = []
    for leaf in leaves:
        scale = leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.3
        out.append(
            jnp.asarray(rng.normal(0, scale, leaf.shape) + (len(leaf.shape) < 3) * 0.5 * (scale == 0.3), "float32")
        )
    return jax.tree.unflatten(tree, out)


def inputs(frames: int, batch: int = 2, config: wan.WanConfig = SMALL, seed: int = 1):
    """(noise [B, F, H, W, C], text [B, S, text_dim], draw)."""
    keys = jax.random.split(jax.random.key(seed), 3)
    noise = jax.random.normal(keys[0], (batch, frames, *SIZE, config.channels))
    text = jax.random.normal(keys[1], (batch, config.text_len, config.text_dim))
    return noise, text, ro.key_draw(keys[2], jnp.arange(batch))


def refused(function, *arguments, **keywords) -> str:
    """The message of the expected ValueError; checks that it is one short line."""
    with pytest.raises(ValueError) as error:
        function(*arguments, **keywords)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000, message[:2000]
    return message


def read_frames(path) -> np.ndarray:
    """A video's stored frames, uint8 [F, h, w, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
