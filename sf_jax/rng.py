"""Random keys of a training run: a pure function of (seed, step, purpose), so there is no random state to save."""

import enum

import jax


class Purpose(enum.IntEnum):
    """What a key is used for; the numbers are part of the reproducible stream and never change."""

    INIT = 0
    CRITIC_INIT = 1
    FLOW = 2
    ODE_INDEX = 3
    ODE_PAIRS = 4
    GENERATOR = 5
    CRITIC = 6
    SAMPLE = 7
    CAUSAL = 8
    CONSISTENCY = 9
    ROLLOUT_FRAMES = 10
    HEAD_INIT = 11
    LORA_INIT = 12
    CRITIC_LORA_INIT = 13


def key_for(seed: int, step: jax.Array | int, purpose: Purpose) -> jax.Array:
    """The key of one purpose at one step; the same on every host and for any number of devices."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)
