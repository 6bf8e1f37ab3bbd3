"""The cases: each compares one golden file with this package and yields a `Result` per quantity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax import rollout as ro
from sf_jax import rollout_cache
from sf_jax.diffusion.schedule import FlowSchedule
from sf_jax.models import attention, kv_cache, rope, wan
from sf_jax.objectives import dmd, scores, sid
from sf_jax.replay import replay
from tests import oracle
from tests.goldens.folder import Folder, Result, channels_last, recorded_blocks, recorded_draw, relative


def rollout_config(folder: Folder, **changes) -> ro.RolloutConfig:
    """The student's rollout as the official training runs it."""
    c = folder.config
    return ro.RolloutConfig(
        **{
            "steps": tuple(c["denoising_steps"]),
            "shift": c["timestep_shift"]["generator"],
            "chunk": c["frames_per_chunk"],
            "context_noise": "official",
            **changes,
        }
    )


@functools.partial(jax.jit, static_argnums=(0, 6))
def _forward(model, params, x, t, text, layout, return_kv=False):
    return model.apply({"params": params}, x, t, text, layout, return_kv=return_kv)


def bidirectional(folder: Folder):
    """01: the bidirectional network at two timesteps."""
    arrays, meta = folder.arrays("01_wan_bidirectional.npz")
    model, params = folder.load("real")
    x, text = channels_last(arrays["noisy"]), arrays["prompt_embeds"]
    layout = wan.bidirectional_layout(x.shape[1])
    for call in ("t0", "t1"):
        t = arrays[f"{call}_timestep"][:, :1].astype(np.float32)
        flow = _forward(model, params, x, t, text, layout)
        yield Result(f"{call} flow", relative(flow, channels_last(arrays[f"{call}_flow"])))
        clean = FlowSchedule(meta["timestep_shift"]).to_clean(flow, x, t)
        if f"{call}_x0" in arrays:
            yield Result(f"{call} clean", relative(clean, channels_last(arrays[f"{call}_x0"])))


def causal_train(folder: Folder):
    """02: block-causal, windowed, teacher-forcing and first-frame-alone masks in one forward pass."""
    arrays, meta = folder.arrays("02_causal_train.npz")
    model, params = folder.load("generator")
    schedule = FlowSchedule(meta["timestep_shift"])
    for name, case in meta["cases"].items():
        frames, window = case["frames"], case["local_attn_size"]
        window = None if window == -1 else window
        chunks = attention.split_chunks(frames, case["num_frame_per_block"], case["independent_first_frame"])
        make = attention.teacher_forcing if case["teacher_forcing"] else attention.block_causal
        pattern = make(chunks, window)
        mask = arrays[f"{name}_framemask"]
        ours = attention.frame_mask(pattern, len(mask))
        yield Result(f"{name} mask", float((ours != mask).sum()), 0.0, "frames that differ")
        noisy = channels_last(arrays["noisy"])[:, :frames]
        t = arrays[case["timestep"]][:, :frames].astype(np.float32)
        x, times, positions = noisy, t, np.arange(frames)
        if case["teacher_forcing"]:
            aug = arrays["aug_t"][:, :frames].astype(np.float32) if case["aug_t"] else np.zeros_like(t)
            x = np.concatenate([channels_last(arrays["clean"])[:, :frames], noisy], axis=1)
            times, positions = np.concatenate([aug, t], axis=1), np.tile(positions, 2)
        layout = wan.Layout(frames=positions, pattern=pattern)
        flow = _forward(model, params, x, times, arrays["prompt_embeds"], layout)[:, -frames:]
        reference = channels_last(arrays[f"{name}_flow"])
        rows = slice(-reference.shape[0], None)
        yield Result(f"{name} flow", relative(flow[rows], reference))
        if f"{name}_x0" in arrays:
            clean = schedule.to_clean(flow, noisy, t)[rows]
            yield Result(f"{name} clean", relative(clean, channels_last(arrays[f"{name}_x0"])))


def cache(folder: Folder):
    """03: a noisy call, then a clean call that writes the cache, for every block; full and rolling caches."""
    arrays, meta = folder.arrays("03_kv_cache.npz")
    model, params = folder.load("generator")
    for name, case in meta["cases"].items():
        yield from _cache_case(folder, arrays, meta, model, params, name, case)


def _cache_case(folder, arrays, meta, model, params, name, case):
    source = "full" if name == "full" else "roll"
    if f"{source}_noisy" not in arrays or f"{name}_end_indices" not in arrays:
        yield Result(name, None, note="not in the file")
        return
    size, blocks = case["num_frame_per_block"], case["blocks"]
    window = None if case["local_attn_size"] == -1 else case["local_attn_size"]
    rolls = window is not None and case["cache_frames"] <= window
    sink = case["sink_size"] if rolls else 0  # a larger cache makes the official code forget the sink
    config = rollout_config(folder, chunk=size, window=window, sink=sink, shift=meta["timestep_shift"])
    text = model.apply({"params": params}, arrays[f"{source}_prompt_embeds"], method="encode_text")
    noisy, clean = (channels_last(arrays[f"{source}_{kind}"])[:, : size * blocks] for kind in ("noisy", "clean"))
    c = model.config
    state = kv_cache.init_cache(
        c.num_layers, noisy.shape[0], case["cache_frames"], folder.tokens, c.num_heads, c.head_dim, sink=sink
    )

    @jax.jit
    def call(state, x, t, start):
        layout = rollout_cache.chunk_layout(state, config, start, size)
        times = jnp.full((x.shape[0], 1), t)
        flow, kv = model.apply({"params": params}, x, times, text, layout, state, return_kv=True)
        return flow, config.schedule.to_clean(flow, x, times), kv

    outputs = {"t500_flow": [], "t500_x0": [], "t0_flow": [], "t0_x0": []}
    filled = []
    for block in range(blocks):
        part = slice(block * size, (block + 1) * size)
        for key, x, t in (("t500", noisy[:, part], 500.0), ("t0", clean[:, part], 0.0)):
            flow, x0, kv = call(state, x, t, block * size)
            outputs[f"{key}_flow"].append(flow)
            outputs[f"{key}_x0"].append(x0)
        state = kv_cache.write(state, kv.k, kv.v, block * size)
        filled.append([(block + 1) * size * folder.tokens, int((state.frames >= 0).sum()) * folder.tokens])
    for key, parts in outputs.items():
        reference = arrays.get(f"{name}_{key}")
        if reference is None and name == "window_noroll":
            reference = arrays.get(f"roll_sink0_{key}")  # recorded as bit-equal to it
        if reference is not None:
            yield Result(f"{name} {key}", relative(jnp.concatenate(parts, axis=1), channels_last(reference)))
    ends = arrays[f"{name}_end_indices"][1::2]
    yield Result(f"{name} end indices", float(np.abs(np.asarray(filled) - ends).max()), 0.0)
    order = np.argsort(np.asarray(state.frames), kind="stable")
    order = order[np.asarray(state.frames)[order] >= 0]
    rotation = rope.rotation(np.maximum(np.asarray(state.frames), 0), folder.grid, c.head_dim)
    slots = (order[:, None] * folder.tokens + np.arange(folder.tokens)).reshape(-1)
    for layer in range(c.num_layers):
        for kind in ("k", "v"):
            reference = arrays.get(f"{name}_cache_{kind}_layer{layer}")
            if reference is not None:
                ours = getattr(state, kind)[layer]
                ours = rope.rotate(ours, rotation) if kind == "k" else ours
                ours = np.asarray(ours)[-1:, slots]
                yield Result(f"{name} cache {kind} layer {layer}", relative(ours, reference[:, : ours.shape[1]]))
            reference = arrays.get(f"{name}_crossattn_{kind}_layer{layer}")
            if reference is not None:
                yield Result(f"{name} text {kind} layer {layer}", relative(getattr(text, kind)[layer], reference))


def schedule(folder: Folder):
    """04: the noise schedule's tables and conversions."""
    arrays, _ = folder.arrays("04_scheduler.npz")
    x, noise = (channels_last(arrays[key])[:, None] for key in ("x", "noise"))
    for shift in (5, 8):  # the two tables that the file records
        prefix, table, short = f"shift{shift}_", FlowSchedule(shift), FlowSchedule(shift, 48)
        t = _recorded_times(table, arrays, prefix, x, noise)[:, None]
        head = slice(0, len(arrays[f"{prefix}step_t"]))
        step_t = arrays[f"{prefix}step_t"].astype(np.float32)[:, None]
        with_last = np.concatenate([step_t[:-1], table.timesteps[-1:, None]])
        spread = short.timesteps[:: short.steps // len(step_t), None]
        pairs = {
            "sigmas": table.sigmas,
            "timesteps": table.timesteps,
            "weights": table.training_weights,
            "warped_1000_750_500_250": np.asarray(table.warp((1000, 750, 500, 250))),
            "warped_1000_750_500_250_0": np.asarray(table.warp((1000, 750, 500, 250, 0))),
            "add_noise": table.add_noise(x, noise, t),
            "training_weight": table.training_weight(t)[:, 0],
            "training_target": noise - x,
            "flow_to_x0": table.to_clean(noise, x, t),
            "x0_to_flow": table.to_flow(noise, x, t),
            "step": table.step(noise[head], x[head], step_t),
            "step_to_final": table.step(noise[head], x[head], t[head], to_clean=True),
            # one sample at the last entry sends the whole batch to sigma 0 in the official code
            "step_with_last": table.step(noise[head], x[head], with_last, to_clean=True),
            "sigmas48": short.sigmas,
            "timesteps48": short.timesteps,
            "step48": short.step(noise[head], x[head], spread[: len(step_t)]),
        }
        for key, ours in pairs.items():
            if prefix + key in arrays:
                ours, reference = np.asarray(ours), arrays[prefix + key]
                reference = channels_last(reference)[:, None] if ours.ndim == 5 else reference
                yield Result(prefix + key, relative(ours, reference))


def _recorded_times(table, arrays, prefix, x, noise) -> np.ndarray:
    """The times [N] of a table's cases.

    The file stores one `t` although every table had times of its own; those of the other table are recovered from its
    `add_noise` (one unknown sigma a sample) and then serve the remaining quantities.
    """
    t, reference = arrays["t"].astype(np.float32), channels_last(arrays[f"{prefix}add_noise"])[:, None]
    if relative(table.add_noise(x, noise, t[:, None]), reference) < 1e-3:
        return t
    axes = (1, 2, 3, 4)
    sigma = ((reference - x) * (noise - x)).sum(axes) / np.square(noise - x).sum(axes)
    return table.timesteps[np.abs(table.sigmas - sigma[:, None]).argmin(-1)]


def _case_rollout(folder, arrays, prefix, exits, first_draw, *, noise=None, text=None, frames_alone=False):
    """Runs a recorded rollout; returns model, params, config, text and the arguments of `rollout`."""
    config = rollout_config(folder, first_frame_alone=frames_alone)
    noise = channels_last(arrays[f"{prefix}noise"] if noise is None else noise)
    text = arrays[f"{prefix}prompt_embeds"] if text is None else text
    initial = arrays.get(f"{prefix}initial_latent")
    draw = recorded_draw(recorded_blocks(arrays, prefix, exits, first_draw))
    initial = None if initial is None else channels_last(initial)
    return config, text, (noise, jnp.asarray(exits, jnp.int32), draw, initial)


def rollouts(folder: Folder):
    """05: the training rollout without gradient: every exit step, different ones, given and lone first frames."""
    arrays, meta = folder.arrays("05_rollout.npz")
    model, params = folder.load("generator")
    steps = rollout_config(folder).timesteps
    if "denoising_step_list" in arrays:
        yield Result("denoising steps", relative(np.asarray(steps), arrays["denoising_step_list"]))
    for prefix, case in meta["cases"].items():
        if f"{prefix}output" not in arrays:
            yield Result(f"{prefix}output", None, note="not in the file")
            continue
        alone = prefix in ("i2v_", "indep_")
        first = next(i for i in range(99) if f"{prefix}draw{i:02d}_randn_like" in arrays)
        exits = (
            case["exit_flags"]
            if not case["same_step_across_blocks"]
            else [case["exit_flags"][0]] * len(case["exit_flags"])
        )
        config, text, (noise, exits, draw, initial) = _case_rollout(
            folder, arrays, prefix, exits, first, frames_alone=alone
        )
        run = jax.jit(lambda *a, config=config, draw=draw: ro.rollout(model, config, *a[:4], draw, a[4]))
        result = run(params, text, noise, exits, initial)
        yield Result(f"{prefix}output", relative(result.video, channels_last(arrays[f"{prefix}output"])))
        replayed = jax.jit(lambda *a, config=config: replay(model, config, *a))(params, text, result)
        yield Result(f"{prefix}output by replay", relative(replayed, channels_last(arrays[f"{prefix}output"])))
        if case["same_step_across_blocks"]:
            ends = [int(v) for v in ro.exit_range(config, int(exits[0]))]
            wanted = [case["denoised_timestep_from"], case["denoised_timestep_to"]]
            yield Result(f"{prefix}exit range", float(np.abs(np.subtract(ends, wanted)).max()), 0.0)
        if f"{prefix}call00_x0" in arrays:
            yield from _trace(folder, arrays, prefix, model, params, config, text, noise, draw)


def _trace(folder, arrays, prefix, model, params, config, text, noise, draw):
    """Every call of the network in one rollout, in order."""
    text = model.apply({"params": params}, text, method="encode_text")
    frames, count = noise.shape[1], len(config.steps)
    state = rollout_cache.empty_cache(model, config, noise.shape[0], frames, *noise.shape[2:4])
    one = jax.jit(
        lambda state, x, start, chunk, step: ro.generate_chunk(
            model, config, params, text, state, ro.NoisyChunk(x, start, chunk, step, draw)
        )
    )
    errors, number = [], 0
    for chunk in range(frames // config.chunk):
        start = chunk * config.chunk
        for step in range(count):
            after, clean, _ = one(state, noise[:, start : start + config.chunk], start, chunk, step)
            errors.append(relative(clean, channels_last(arrays[f"{prefix}call{number:02d}_x0"])))
            number += 1
        state, number = after, number + 1  # the clean pass is compared through what it writes
    yield Result(f"{prefix}every denoising call", float(np.max(errors)), note=f"worst of {len(errors)} calls")


def rollout_gradients(folder: Folder):
    """06: loss = sum(output * W) differentiated through the rollout, by replay and through the scan."""
    arrays, meta = folder.arrays("06_rollout_grad_inputs.npz")
    recorded, roll_meta = folder.arrays("05_rollout.npz")
    model, params = folder.load("generator")
    for case in ("exit1", "exit3", "perblock", "long"):
        source, prefix = (arrays, "long_") if case == "long" else (recorded, f"{case}_")
        if f"{prefix}noise" not in source:
            yield Result(f"{case} gradient", None, note="its inputs are not in the file")
            continue
        if case == "long":
            exits, weight, reference = meta["long"]["exit_flags"], arrays["long_W"], arrays["long_loss"]
            live = (meta["long"]["frames"] - meta["long"]["training_window"]) // folder.config["frames_per_chunk"]
        else:
            info = roll_meta["cases"][prefix]
            exits, weight, reference, live = info["exit_flags"], arrays["W"], arrays[f"{case}_loss"], 0
            exits = [exits[0]] * len(exits) if info["same_step_across_blocks"] else exits
        config, text, args = _case_rollout(folder, source, prefix, exits, 1)
        weight = channels_last(weight)
        for suffix, mode in (
            ("ckpt", "straight_through"),
            ("detachpast_ckpt", "stop"),
            ("nockpt", "straight_through"),
        ):
            file = f"06_grads_{case}_{suffix}.safetensors"
            if not folder.has(file):
                continue
            value, grads = _replay_gradient(model, config, params, text, args, weight, mode, live, suffix == "nockpt")
            name = f"{case} {'official' if suffix == 'ckpt' else suffix.removesuffix('_ckpt')}"
            yield Result(f"{name} loss", abs(float(value) - float(reference)) / abs(float(reference)))
            yield from folder.compare_gradients(f"{name} gradient", file, "generator", grads)
            if suffix != "nockpt":
                grads = _scan_gradient(model, config, params, text, args, weight, mode, live)
                yield from folder.compare_gradients(f"{name} gradient through the scan", file, "generator", grads)


def _replay_gradient(model, config, params, text, args, weight, mode, live, freeze_text):
    noise, exits, draw, initial = args

    @jax.jit
    def run(params):
        past = ro.rollout(model, config, params, text, noise, exits, draw, initial)

        def loss(params):
            prompt = model.apply({"params": params}, text, method="encode_text")
            prompt = jax.lax.stop_gradient(prompt) if freeze_text else prompt
            return (replay(model, config, params, prompt, past, mode, live) * weight).sum()

        return jax.value_and_grad(loss)(params)

    return run(params)


def _scan_gradient(model, config, params, text, args, weight, mode, live):
    noise, exits, draw, initial = args

    @jax.jit
    @jax.grad
    def run(params):
        video = oracle.rollout_video(model, config, params, text, noise, exits, draw, initial, mode, live)
        return (video * weight).sum()

    return run(params)


def _score_config(folder, **changes):
    shifts = folder.config["timestep_shift"]
    return scores.ScoreConfig(
        **{
            "guidance": 4.0,
            "student_shift": shifts["generator"],
            "score_shift": shifts["scores"],
            "time_shift": 5.0,
            **changes,
        }
    )


def _distillation_case(folder, arrays, prefix, exits, fallback=""):
    """Rollout arguments, score time and score noise of one recorded distillation loss."""

    def get(number, kind):
        for p in (prefix, fallback):
            if f"{p}draw{number:02d}_{kind}" in arrays:
                return arrays[f"{p}draw{number:02d}_{kind}"]
        raise KeyError(f"{prefix}draw{number:02d}_{kind}")

    exits = [exits[0]] * len(exits)
    merged = dict(arrays)
    merged.update(
        {
            f"{prefix}{k.removeprefix(fallback)}": v
            for k, v in arrays.items()
            if fallback and fallback in k and f"{prefix}{k.removeprefix(fallback)}" not in arrays
        }
    )
    config, text, args = _case_rollout(
        folder, merged, prefix, exits, 3, noise=get(1, "randn"), text=arrays["prompt_embeds"]
    )
    after = 3 + sum(e + 1 for e in exits)
    even = jnp.asarray(get(after, "randint"), jnp.int32)
    noise = channels_last(get(after + 1, "randn_like"))
    return config, text, args, even, noise, after


def distillation(folder: Folder, file: str):
    """07: DMD and SiD generator losses and the critic's loss, with every parameter's gradient."""
    arrays, meta = folder.arrays(file)
    student, params = folder.load("generator")
    teacher, critic = folder.load("real"), folder.load("fake")
    if file == "07_dmd_variants.npz":
        yield from _variants(folder, arrays, meta, student, params, teacher, critic)
        return
    config, text, (noise, exits, draw, _), even, score_noise, _ = _distillation_case(
        folder, arrays, "", meta["exit_flags"]
    )
    score_config = _score_config(
        folder, guidance=1 + meta.get("guidance_scale", 3.0), sid_alpha=meta.get("sid_alpha", 1.0)
    )
    t = scores.score_time(score_config, even)
    key = "critic_timestep" if "critic_timestep" in arrays else "timestep"
    yield Result("time", relative(t, np.asarray(arrays[key])[:, :1]))
    past = jax.jit(lambda p: ro.rollout(student, config, p, text, noise, exits, draw))(params)
    if "critic" in file:
        run = jax.jit(
            jax.value_and_grad(
                lambda p: dmd.critic_loss(p, critic[0], past.video, text, t, score_noise, score_config)[0]
            )
        )
        value, grads = run(critic[1])
        role, aux = "fake", {}
    else:
        objective = sid if "sid" in file else dmd

        def loss(p):
            video = replay(student, config, p, text, past, "straight_through")
            negative = arrays["negative_prompt_embeds"]
            out = objective.generator_loss(video, teacher, critic, text, negative, t, score_noise, score_config)
            return out[0], (out[1], video)

        (value, (aux, video)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        role = "generator"
        if "x_gen" in arrays:
            yield Result("video", relative(video, channels_last(arrays["x_gen"])))
    yield Result("loss", abs(float(value) - float(arrays["loss"])) / abs(float(arrays["loss"])))
    if "grad" in arrays:
        yield Result("gradient in the video", relative(aux["gradient"], channels_last(arrays["grad"])))
        reference = float(arrays["dmdtrain_gradient_norm"])
        yield Result("gradient norm", abs(float(aux["gradient_norm"]) - reference) / reference)
    grads_file = file.replace(".npz", "_grads.safetensors")
    if folder.has(grads_file):
        yield from folder.compare_gradients("gradient", grads_file, role, grads)


def _variants(folder, arrays, meta, student, params, teacher, critic):
    options = {
        "ts_schedule": {"from_exit": True, "to_exit": True},
        "fake_guidance": {
            "guidance": 1 + meta["fake_guidance"]["real_guidance_scale"],
            "fake_guidance": 1 + meta["fake_guidance"]["fake_guidance_scale"],
        },
    }
    for name, changes in options.items():
        info = meta[name]
        config, text, (noise, exits, draw, _), even, score_noise, number = _distillation_case(
            folder, arrays, f"{name}_", info["exit_flags"], "ts_schedule_"
        )
        score_config = _score_config(folder, **changes)
        bounds = scores.time_bounds(score_config, *ro.exit_range(config, info["exit_flags"][0]))
        wanted = next((r[1:] for r in info["randint_ranges[(draw index, low, high)]"] if r[0] == number), None)
        if wanted is not None:
            yield Result(f"{name} range of times", float(np.abs(np.subtract(bounds, wanted)).max()), 0.0)
        t = scores.score_time(score_config, even)
        yield Result(f"{name} time", relative(t, np.asarray(arrays[f"{name}_timestep"])[:, :1]))

        @jax.jit
        def run(params, config=config, args=(text, noise, exits, draw), t=t, noise=score_noise, score=score_config):
            video = ro.rollout(student, config, params, *args).video
            return dmd.generator_loss(
                video, teacher, critic, args[0], arrays["negative_prompt_embeds"], t, noise, score
            )

        value, aux = run(params)
        reference = float(arrays[f"{name}_loss"])
        yield Result(f"{name} loss", abs(float(value) - reference) / reference)
        reference = float(arrays[f"{name}_dmdtrain_gradient_norm"])
        yield Result(f"{name} gradient norm", abs(float(aux["gradient_norm"]) - reference) / reference)


# file name -> the function that compares it
CASES = {
    "01_wan_bidirectional.npz": bidirectional,
    "02_causal_train.npz": causal_train,
    "03_kv_cache.npz": cache,
    "04_scheduler.npz": schedule,
    "05_rollout.npz": rollouts,
    "06_rollout_grad_inputs.npz": rollout_gradients,
    **{
        name: functools.partial(distillation, file=name)
        for name in (
            "07_dmd_critic.npz",
            "07_dmd_generator_exit1.npz",
            "07_dmd_generator_exit3.npz",
            "07_dmd_variants.npz",
            "07_sid_generator.npz",
        )
    },
}
