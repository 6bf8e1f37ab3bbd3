"""The cases of the adversarial objective."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax.models.discriminator import DiscriminatorConfig, init_discriminator
from sf_jax.objectives import gan, scores
from sf_jax.replay import replay
from sf_jax.weights import discriminator, transformer
from tests.goldens.cases import rollout_config
from tests.goldens.folder import (
    OUTPUT_TOLERANCE,
    Folder,
    Result,
    channels_last,
    recorded_blocks,
    recorded_draw,
    relative,
)


def _critic(folder: Folder):
    """The critic and its parameters with and without the time embedding, and the head's config."""
    info = folder.config["gan"]
    role = "gan_fake" if "gan_fake" in info["weights"] else "fake"
    model, params = folder.load(role)
    head = DiscriminatorConfig(taps=tuple(info["taps"]), classes=info["num_class"])
    tensors = folder.tensors(info["heads"])

    def load(head, tensors):
        like = jax.eval_shape(lambda: init_discriminator(model.config, head, jax.random.key(0)))
        return discriminator.from_official(tensors, head, like)

    timed = dataclasses.replace(head, concat_time=True)
    more = folder.tensors(info["heads"].replace(".safetensors", "_concat_time.safetensors"))
    return (
        model,
        {"critic": params, "head": load(head, tensors)},
        {"critic": params, "head": load(timed, tensors | more)},
        head,
    )


def gan_losses(folder: Folder):
    """08: logits, the student's and the discriminator's losses, and every parameter's gradient."""
    arrays, meta = folder.arrays("08_gan.npz")
    student, params = folder.load("generator")
    model, critic, timed, head = _critic(folder)
    noisy, t = channels_last(arrays["classify_noisy"]), arrays["classify_timestep"][:, :1].astype(np.float32)
    for name, weights, config in (
        ("classify_logits", critic, head),
        ("classify_concat_time_logits", timed, dataclasses.replace(head, concat_time=True)),
    ):
        ours = jax.jit(
            lambda p, config=config: gan.logits(p, model, config, noisy, t, arrays["classify_prompt_embeds"])
        )
        yield Result(name, relative(ours(weights), arrays[name]))
    shifts = folder.config["timestep_shift"]
    score = scores.ScoreConfig(
        student_shift=shifts["generator"], score_shift=shifts["scores"], time_shift=meta["critic_timestep_shift"]
    )
    for relativistic in (False, True):
        config = gan.GanConfig(
            head=head,
            relativistic=relativistic,
            generator_weight=meta["gan_g_weight"],
            critic_weight=meta["gan_d_weight"],
            **{key: meta[key] for key in ("r1_weight", "r2_weight", "r1_sigma", "r2_sigma")},
        )
        yield from _student(folder, arrays, meta, student, params, (model, critic), score, config)
        yield from _discriminator(folder, arrays, meta, student, params, (model, critic), score, config)


def _rollout(folder, arrays, meta, kind, student, params):
    """The recorded rollout, and the number of the draw after it."""
    exits = [meta[f"exit_flags_{kind}"][0]] * len(meta[f"exit_flags_{kind}"])
    draw = recorded_draw(recorded_blocks(arrays, f"{kind}_", exits, 3))
    noise, text = channels_last(arrays[f"{kind}_draw01_randn"]), arrays["prompt_embeds"]
    config = rollout_config(folder)
    past = jax.jit(lambda p: ro.rollout(student, config, p, text, noise, jnp.asarray(exits), draw))(params)
    return config, past, 3 + sum(e + 1 for e in exits)


def _student(folder, arrays, meta, student, params, critic, score, config):
    roll, past, number = _rollout(folder, arrays, meta, "G", student, params)
    t = scores.score_time(score, jnp.asarray(arrays[f"G_draw{number:02d}_randint"], jnp.int32))
    noises = [channels_last(arrays[f"G_draw{number + i:02d}_randn_like"]) for i in (1, 2)]
    real, text = channels_last(arrays["clean_latent"]), arrays["prompt_embeds"]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        video = replay(student, roll, params, text, past, "straight_through")
        return gan.generator_loss(video, real, critic, text, t, *noises, score, config)

    (loss, _), grads = run(params)
    name = f"rel{int(config.relativistic)}_G"
    yield Result(f"{name} loss", relative(loss, arrays[f"{name}_loss"]))
    file = f"08_gan_generator_rel{int(config.relativistic)}_grads.safetensors"
    if folder.has(file):
        yield from folder.compare_gradients(f"{name} gradient", file, "generator", grads)


def _discriminator(folder, arrays, meta, student, params, critic, score, config):
    model, weights = critic
    _, past, number = _rollout(folder, arrays, meta, "D", student, params)
    t = scores.score_time(score, jnp.asarray(arrays[f"D_draw{number:02d}_randint"], jnp.int32))
    noise, *steps = (channels_last(arrays[f"D_draw{number + i:02d}_randn_like"]) for i in (1, 2, 3))
    real, text = channels_last(arrays["clean_latent"]), arrays["prompt_embeds"]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(weights):
        return gan.critic_loss(weights, model, past.video, real, text, t, noise, steps, score, config)

    (total, aux), grads = run(weights)
    name = f"rel{int(config.relativistic)}_D"
    yield Result(f"{name} time", relative(t, arrays[f"{name}_timestep"][:, :1]))
    ours = aux | {"total": total, "loss": aux["discriminator_loss"]}
    lost = _lost_digits(arrays, name, config)
    for key in ("loss", "r1", "r2", "total", "real_logit", "fake_logit"):
        tolerance = OUTPUT_TOLERANCE * (max(lost.values()) if key == "total" else lost.get(key, 1.0))
        yield Result(f"{name} {key}", relative(ours[key], arrays[f"{name}_{key}"]), tolerance)
    file = f"08_gan_critic_rel{int(config.relativistic)}_grads.safetensors"
    if folder.has(file):
        grads = jax.device_get(grads)
        tensors = transformer.to_official(grads["critic"], model.config)
        tensors = {f"model.{key}": value for key, value in tensors.items()}
        tensors |= discriminator.to_official(grads["head"], config.head)
        worst, *rest = folder.compare_tensors(f"{name} gradient", file, tensors)
        tolerance = max(worst.tolerance, OUTPUT_TOLERANCE * max(lost.values()))
        yield from (dataclasses.replace(worst, tolerance=tolerance), *rest)


def _lost_digits(arrays, name, config) -> dict[str, float]:
    """How much larger the relative rounding error of each penalty is than that of the logits whose difference it is.

    Each logit rounds by itself, so the errors of both add up; the two differ by far less than either is large.
    """
    lost = {}
    for key, kind in (("r1", "real"), ("r2", "fake")):
        weight, sigma = getattr(config, f"{key}_weight"), getattr(config, f"{key}_sigma")
        difference = sigma * np.sqrt(arrays[f"{name}_{key}"] / weight)
        lost[key] = float(2 * 2 * np.abs(arrays[f"{name}_{kind}_logit"]).max() / difference)
    return lost


CASES = {"08_gan.npz": gan_losses}
