"""The state of a training run, and its update by optimizers."""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax

from sf_jax.config import EmaConfig, OptimizerConfig


@flax.struct.dataclass
class Network:
    """A trained network: float32 parameters, optimizer state, number of updates, and the parameters' EMA (or None)."""

    params: dict
    opt_state: optax.OptState
    updates: jax.Array
    ema: dict | None = None


@flax.struct.dataclass
class TrainState:
    """Iteration, trained network, and critic if there is one; donated to every update."""

    step: jax.Array
    model: Network
    critic: Network | None = None


def _is_matrix(path, leaf) -> bool:
    """Whether a leaf is a block's kernel (at any depth, as in a discriminator): Muon for these, AdamW for the rest."""
    names = [part.key for part in path]
    return "blocks" in names and names[-1] == "kernel"


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW or Muon, with warm-up and decay over `steps` updates."""
    if config.decay == "cosine":
        lr = optax.warmup_cosine_decay_schedule(0.0, config.lr, config.warmup, max(steps, config.warmup + 1))
    elif config.warmup:
        lr = optax.linear_schedule(0.0, config.lr, config.warmup)
    else:
        lr = config.lr
    if config.name == "muon":
        # Kernels are stacked: [layers, in, out].
        matrices = optax.contrib.MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))

        def dimension_numbers(params):
            return jax.tree_util.tree_map_with_path(lambda p, x: matrices if _is_matrix(p, x) else None, params)

        rule = optax.contrib.muon(
            lr,
            beta=0.95,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=config.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimension_numbers,
        )
    else:
        rule = optax.adamw(lr, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), rule)


def new_network(params: dict, optimizer: optax.GradientTransformation, ema: bool) -> Network:
    """The initial state of a network."""
    return Network(
        params=params,
        opt_state=optimizer.init(params),
        updates=jnp.zeros((), jnp.int32),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
    )


def update(
    network: Network,
    grads: dict,
    optimizer: optax.GradientTransformation,
    ema: EmaConfig | None,
    step: jax.Array | int,
    scale: Callable | None = None,
) -> tuple[Network, jax.Array]:
    """One optimizer step; also returns the gradient's global norm before clipping.

    Args:
      network: the network to update.
      grads: gradients of its parameters.
      optimizer: the optimizer.
      ema: settings of the EMA; None if there is none.
      step: number of finished iterations.
      scale: (path of a parameter, updates so far) -> factor of its change; None is 1 for all.
    """
    changes, opt_state = optimizer.update(grads, network.opt_state, network.params)
    if scale is not None:
        changes = jax.tree_util.tree_map_with_path(lambda path, x: x * scale(path, network.updates), changes)
    params = optax.apply_updates(network.params, changes)
    average = network.ema
    if ema is not None and average is not None:
        decay = jnp.where(step >= ema.start, ema.decay, 0.0)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
    network = Network(params=params, opt_state=opt_state, updates=network.updates + 1, ema=average)
    return network, optax.tree.norm(grads)
