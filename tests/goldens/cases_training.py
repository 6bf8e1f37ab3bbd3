"""The cases of the other training objectives: ODE regression and causal diffusion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.models import attention
from sf_jax.objectives import causal, ode
from tests.goldens.folder import Folder, Result, channels_last, relative


def ode_and_diffusion(folder: Folder):
    """09: losses, predictions and every parameter's gradient."""
    arrays, meta = folder.arrays("09_ode_diffusion.npz")
    model, params = folder.load("generator")
    schedule = FlowSchedule(meta["timestep_shift"])
    for prefix, case in meta["cases"].items():
        if prefix == "note":
            continue
        if prefix.startswith("ode"):
            yield from _ode(folder, arrays, prefix, case, model, params, schedule)
        else:
            yield from _diffusion(folder, arrays, prefix, case, model, params, schedule)


def _ode(folder, arrays, prefix, case, model, params, schedule):
    trajectory = channels_last(arrays[f"{prefix}ode_latent"])
    steps = np.float32(case["denoising_step_list"])
    chunks = attention.split_chunks(trajectory.shape[2], case["num_frame_per_block"], case["independent_first_frame"])
    index = np.array(causal.per_chunk(arrays[f"{prefix}draw00_randint"], chunks), np.int32)
    if case["i2v"]:
        index[:, 0] = len(steps) - 1  # the image is given
    yield Result(f"{prefix}mean timestep", relative(steps[index].mean(1), arrays[f"{prefix}mean_timestep"]))
    layout = causal.causal_layout(chunks, teacher_forcing=False)
    text = arrays[f"{prefix}prompt_embeds"]

    @jax.jit
    def run(params):
        loss = functools.partial(ode.ode_loss, timesteps=jnp.asarray(steps), schedule=schedule)
        return jax.value_and_grad(lambda p: loss(p, model, layout, trajectory, text, jnp.asarray(index))[0])(params)

    loss, grads = run(params)
    yield Result(f"{prefix}loss", relative(loss, arrays[f"{prefix}loss"]))
    if prefix == "ode_" and folder.has("09_ode_grads.safetensors"):
        yield from folder.compare_gradients("ode gradient", "09_ode_grads.safetensors", "generator", grads)


def _diffusion(folder, arrays, prefix, case, model, params, schedule):
    def get(name):
        return arrays[f"{prefix}{name}" if f"{prefix}{name}" in arrays else f"df_{name}"]

    forcing = case.get("teacher_forcing", False)
    clean, noise = channels_last(get("clean_latent")), channels_last(get("draw00_randn_like"))
    chunks = attention.split_chunks(clean.shape[1], folder.config["frames_per_chunk"])
    t = schedule.timesteps[causal.per_chunk(get("draw01_randint"), chunks)]
    context_t = None
    if case.get("noise_augmentation_max_timestep"):
        context_t = schedule.timesteps[causal.per_chunk(get("draw02_randint"), chunks)]
    layout = causal.causal_layout(chunks, forcing)
    text = get("prompt_embeds")

    @jax.jit
    def run(params):
        loss = functools.partial(causal.causal_loss, noise=noise, schedule=schedule, context_t=context_t)
        return jax.value_and_grad(lambda p: loss(p, model, layout, clean, text, t), has_aux=True)(params)

    (loss, aux), grads = run(params)
    yield Result(f"{prefix}loss", relative(loss, arrays[f"{prefix}loss"]))
    yield Result(f"{prefix}prediction", relative(aux["clean"], channels_last(arrays[f"{prefix}x0_pred"])))
    file = f"09_diffusion_{prefix}grads.safetensors"
    if folder.has(file):
        yield from folder.compare_gradients(f"{prefix}gradient", file, "generator", grads)


CASES = {"09_ode_diffusion.npz": ode_and_diffusion}
