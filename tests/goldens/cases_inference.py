"""The cases of inference: few-step and many-step rollouts, and the solvers alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax.diffusion.solvers import Solver, integrate
from sf_jax.many_step import guided_rollout
from tests.goldens.cases import rollout_config
from tests.goldens.folder import Folder, Result, channels_last, relative


def _inputs(arrays, prefix, case):
    """Prompt, noise and given latents of a case."""
    initial = arrays.get(f"{prefix}initial_latent")
    text = jnp.asarray(arrays[f"prompt_{case['prompt']}"])[None]
    return text, channels_last(arrays[f"{prefix}noise"]), None if initial is None else channels_last(initial)


def _draw(arrays, prefix, chunks, steps):
    """The recorded noise between the steps of every chunk; the clean pass draws none."""
    recorded = [arrays[f"{prefix}draw{i:02d}_randn_like"] for i in range(len(chunks) * (steps - 1))]
    frames = len(recorded[0])
    table = jnp.asarray(np.stack([channels_last(r) for r in recorded]).reshape(len(chunks), steps - 1, frames, -1))

    def draw(kind, chunk, step, shape):
        assert kind == "renoise"
        return table[chunk, step].reshape(shape)

    return draw


def few_step(folder: Folder):
    """10: few-step inference: from text, extension, from an image, rolling cache with sink, context timestep."""
    arrays, meta = folder.arrays("10_causal_inference.npz")
    model, params = folder.load(meta["weights"])
    for prefix, case in meta["cases"].items():
        config = rollout_config(
            folder,
            chunk=meta["num_frame_per_block"],
            shift=meta["timestep_shift"],
            context_noise="none",
            context_timestep=float(case.get("cn", 0)),
            first_frame_alone=bool(case.get("indep")),
            window=case.get("local"),
            sink=case.get("sink", 0),
        )
        text, noise, initial = _inputs(arrays, prefix, case)
        yield Result(f"{prefix}timesteps", relative(config.timesteps, case["denoising_step_list"]))
        chunks = config.chunks(noise.shape[1], 0 if initial is None else initial.shape[1])[1]
        draw = _draw(arrays, prefix, chunks, len(config.steps))
        reference = channels_last(arrays[f"{prefix}latents"])
        for full_cache in (False,) if config.window is None else (False, True):
            run = functools.partial(ro.rollout, model, config, draw=draw, keep_from=0 if full_cache else None)
            last = len(config.steps) - 1
            video = jax.jit(lambda p, *a, run=run, last=last: run(p, *a[:2], last, initial=a[2]).video)(
                params, text, noise, initial
            )
            yield Result(f"{prefix}latents{', full cache' if full_cache else ''}", relative(video, reference))


def many_step(folder: Folder):
    """10: causal diffusion with guidance: UniPC at two shifts, DPM++, extension, from an image."""
    file = "10_causal_diffusion_inference.npz"
    arrays, meta = folder.arrays(file)
    model, params = folder.load(meta["weights"])
    negative = jnp.asarray(arrays["prompt_neg"])[None]
    for prefix, case in meta["cases"].items():
        shift = 8.0 if "shift8" in prefix else folder.config["timestep_shift"]["generator"]
        solver = Solver(case.get("solver", "unipc"), shift, case["sampling_steps"])
        config = rollout_config(
            folder, chunk=meta["num_frame_per_block"], context_noise="none", first_frame_alone=bool(case.get("indep"))
        )
        text, noise, initial = _inputs(arrays, prefix, case)
        run = functools.partial(guided_rollout, model, config, solver=solver, guidance=case["guidance_scale"])
        video = jax.jit(lambda p, *a, run=run: run(p, *a[:3], initial=a[3]))(params, text, negative, noise, initial)
        yield Result(f"{prefix}latents", relative(video, channels_last(arrays[f"{prefix}latents"])))
        if f"{prefix}unipc_timesteps" in arrays:
            yield from _solver_alone(arrays, f"{prefix}unipc_iso_", f"{prefix}unipc_", solver)


def solvers(folder: Folder):
    """10: UniPC alone on given model outputs."""
    arrays, _ = folder.arrays("10_unipc_isolated.npz")
    for key in sorted(k for k in arrays if k.endswith("_timesteps")):
        steps = len(arrays[key])
        prefix = key.removesuffix("timesteps")
        yield from _solver_alone(arrays, prefix, prefix, Solver("unipc", 5.0, steps))


def _solver_alone(arrays, prefix, tables, solver):
    """A solver's tables, and what it makes of recorded model outputs."""
    yield Result(f"{tables}timesteps", float(np.abs(solver.timesteps - arrays[f"{tables}timesteps"]).max()), 0.0)
    yield Result(f"{tables}sigmas", relative(solver.sigmas, arrays[f"{tables}sigmas"]))
    outputs, samples = (jnp.asarray(arrays[f"{prefix}{name}"]) for name in ("model_outputs", "samples"))
    times, seen = jnp.asarray(solver.timesteps), []

    def flow(x, t):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return outputs[jnp.argmin(jnp.abs(times - t))]

    last = jax.jit(functools.partial(integrate, solver, flow))(samples[0])
    jax.effects_barrier()
    yield Result(f"{prefix}samples", relative(np.stack([*seen, last]), samples))


CASES = {
    "10_causal_inference.npz": few_step,
    "10_causal_diffusion_inference.npz": many_step,
    "10_unipc_isolated.npz": solvers,
}
