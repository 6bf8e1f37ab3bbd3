"""The mechanics of update programs: functions (state, frozen, batch) -> (state, metrics), jitted with donated state.

`supervised.py` and `self_forcing.py` define the losses. This module accumulates their gradients over parts of the
batch, checks that they are finite, and applies them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sf_jax.config import TrainConfig
from sf_jax.models.discriminator import init_discriminator
from sf_jax.models.wan import init_params
from sf_jax.rng import Purpose, key_for
from sf_jax.training import lora
from sf_jax.training.state import Network, TrainState, make_optimizer, new_network, update

Step = Callable[[TrainState, dict, dict], tuple[TrainState, dict]]
# Entries of a batch that all its examples share.
CONSTANTS = ("seed", "negative")


@dataclasses.dataclass(frozen=True)
class Loss:
    """One loss of a program.

    Attributes:
      network: which network it trains, "model" or "critic".
      prefix: prefix of its metrics' names.
      function: (params, state, frozen, batch, prepared) -> (scalar, metrics), differentiated in `params`.
    """

    network: str
    prefix: str
    function: Callable[..., tuple[jax.Array, dict]]


@dataclasses.dataclass(frozen=True)
class Program:
    """One update program.

    Attributes:
      name: its name in reports and in the documentation.
      prepare: (state, frozen, batch, examples) -> prepared, without gradient; `examples` int32 [B] are the global
        indices of the batch's examples, from which all noise is drawn.
      losses: the losses to differentiate; each gets the state from before the program.
      ends: whether it ends the iteration.
      due: whether an iteration (counted from 0) runs it.
      trips: mean trip count of loops whose bound is known only at run time: network calls per chunk of a rollout; 1
        without any.
    """

    name: str
    prepare: Callable[..., Any]
    losses: tuple[Loss, ...]
    ends: bool
    due: Callable[[int], bool]
    trips: float = 1.0


class Update(NamedTuple):
    """A program's update function, jitted or not; the other fields are those of `Program`."""

    name: str
    step: Step
    due: Callable[[int], bool]
    trips: float


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """Optimizers of the trained network and of the critic."""

    model: optax.GradientTransformation
    critic: optax.GradientTransformation


def make_optimizers(config: TrainConfig) -> Optimizers:
    """The optimizers of a run; learning-rate decay ends with the run."""
    updates = config.steps
    if config.stage == "distill":
        warmup = config.gan.warmup if config.objective == "gan" else 0
        updates = max(1, -(-config.steps // config.generator_every) - -(-warmup // config.generator_every))
    return Optimizers(make_optimizer(config.optimizer, updates), make_optimizer(config.critic_optimizer, config.steps))


def new_state(
    config: TrainConfig, params: dict | None = None, critic: dict | None = None, adapters: dict | None = None
) -> TrainState:
    """The state at step 0, from given parameters or random ones.

    With adapters, the given parameters are the frozen network's, and the state holds only the adapters; `adapters` are
    initial values from a file (`lora.read_start`).
    """
    optimizers = make_optimizers(config)
    if params is None:
        params = init_params(config.model, key_for(config.seed, 0, Purpose.INIT))
    if config.lora.rank:
        params = lora.init_adapters(params, config.lora, key_for(config.seed, 0, Purpose.LORA_INIT))
        params = lora.with_start(params, adapters or {})
    network = new_network(params, optimizers.model, ema=True)
    critic_network = None
    if config.stage == "distill":
        if critic is None:
            critic = init_params(config.critic_model, key_for(config.seed, 0, Purpose.CRITIC_INIT))
        if config.critic_lora.rank:
            key = key_for(config.seed, 0, Purpose.CRITIC_LORA_INIT)
            critic = lora.init_adapters(critic, config.critic_lora, key)
        if config.objective == "gan":
            key = key_for(config.seed, 0, Purpose.HEAD_INIT)
            critic = {"critic": critic, "head": init_discriminator(config.critic_model, config.gan.head, key)}
        critic_network = new_network(critic, optimizers.critic, ema=False)
    return TrainState(step=jnp.zeros((), jnp.int32), model=network, critic=critic_network)


def model_params(config: TrainConfig, params: dict, frozen: dict) -> dict:
    """The student's parameters, from its trained parameters or adapters."""
    return lora.attach(frozen["model_base"], params, config.lora) if config.lora.rank else params


def critic_params(config: TrainConfig, params: dict, frozen: dict) -> dict:
    """The critic's parameters (with the GAN's head, if any), from its trained parameters or adapters."""
    return lora.attach(frozen["critic_base"], params, config.critic_lora) if config.critic_lora.rank else params


def make_step(config: TrainConfig, program: Program) -> Step:
    """The function of a program, not yet jitted."""
    optimizers = make_optimizers(config)

    def step(state, frozen, batch):
        if config.prompt_switch:  # on the whole batch, as a neighbor may be in another part of it
            batch = batch | {"other_text": jnp.roll(batch["text"], 1, axis=0)}
        grads, metrics = _gradients(program, state, frozen, batch, config.accumulate)
        before = state
        for loss, gradient in zip(program.losses, grads, strict=True):
            is_model = loss.network == "model"
            network, new = _apply(
                getattr(before, loss.network),
                gradient,
                metrics[f"{loss.prefix}loss"],
                getattr(optimizers, loss.network),
                config.ema if is_model else None,
                before.step,
                None if is_model else _change_scale(config),
            )
            state = state.replace(**{loss.network: network})
            metrics |= {f"{loss.prefix}{name}": value for name, value in new.items()}
        return state.replace(step=state.step + program.ends), metrics

    return step


def _gradients(program, state, frozen, batch, parts):
    """Mean gradients of all losses and mean metrics, over `parts` parts of the batch, computed sequentially."""
    constants = {name: batch[name] for name in CONSTANTS if name in batch}
    split = {name: value for name, value in batch.items() if name not in constants}
    examples = jnp.arange(jax.tree.leaves(split)[0].shape[0], dtype=jnp.int32)

    def one(split, examples):
        whole = split | constants
        prepared = program.prepare(state, frozen, whole, examples)
        grads, metrics = [], {}
        for loss in program.losses:
            params = getattr(state, loss.network).params
            function = jax.value_and_grad(loss.function, has_aux=True)
            (value, aux), gradient = function(params, state, frozen, whole, prepared)
            grads.append(gradient)
            metrics |= {f"{loss.prefix}loss": value} | aux
        return grads, metrics

    if parts == 1:
        return one(split, examples)

    def interleaved(x):
        # [B / parts, parts], so that every device keeps its examples.
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    xs = jax.tree.map(interleaved, (split, examples))
    first = jax.tree.map(lambda x: x[0], xs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(lambda: one(*first)))

    def body(total, part):
        return jax.tree.map(lambda a, b: a + b / parts, total, one(*part)), None

    return jax.lax.scan(body, zeros, xs)[0]


def _change_scale(config: TrainConfig):
    """A function (path, updates so far) -> factor that scales the critic's changes; None for no scaling."""
    if config.objective != "gan":
        return None

    def scale(path, updates):
        if path[0].key == "head":
            return config.gan.head_lr
        return jnp.where(updates < config.gan.warmup, 0.0, 1.0)

    return scale


def _apply(network: Network, grads: dict, loss: jax.Array, optimizer, ema, step, scale) -> tuple[Network, dict]:
    """The updated network, or the old one if the loss or a gradient is not finite; and metrics."""
    new, norm = update(network, grads, optimizer, ema, step, scale)
    wrong = jnp.stack([jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32) for leaf in jax.tree.leaves(grads)])
    finite = jnp.isfinite(loss) & (wrong.sum() == 0)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, network)
    return new, {"grad_norm": norm, "finite": finite, "nonfinite": wrong}


def leaf_names(params: dict) -> list[str]:
    """Names of the entries of the metric `nonfinite`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return ["/".join(str(part.key) for part in path) for path, _ in paths]


def student_params(network: Network) -> dict:
    """The student's trained parameters: their EMA if there is one."""
    return network.params if network.ema is None else network.ema


def whole_params(config: TrainConfig, params: dict, frozen: dict) -> dict:
    """The whole network of `student_params`, with any adapters merged into its kernels."""
    if not config.lora.rank:
        return params
    return jax.jit(lambda *trees: lora.merge(*trees, config.lora))(frozen["model_base"], params)
