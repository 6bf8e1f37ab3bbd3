"""Time of the two updates of Self Forcing with DMD, by part, and the share of the machine's matmul peak.

  python -m benchmarks.train_step            # the moving digits: 9 frames of 9 tokens, dim 128, 4 layers, batch 32
  python -m benchmarks.train_step --middle   # dim 384, 6 layers, 9 frames of 24x40 latent pixels, batch 1

Networks have random weights, in float32 or `--dtype`. Each figure is the mean over the same `--steps` iterations after
one warm-up call, with exit steps (where a rollout stops and takes the gradient) drawn as in training. The parts are
separate programs:

  rollout    the student's own video, without gradient
  scores     the critic's and the guided teacher's prediction, forward (student update)
  gradient   replay and its gradient (student), the flow-matching loss and its gradient (critic)
  rest       the remaining time of the whole update: clipping, optimizer, averaging, NaN checks
  by scan    the student's rollout, scores and gradient, with the gradient through the rollout's scan

FLOPs are those of the model's matmuls without recomputation; the peak is that of a square matmul.
"""

import argparse
import dataclasses
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from sf_jax import rollout as ro
from sf_jax.config import TrainConfig, from_dict
from sf_jax.models.patch_codec import PatchCodec
from sf_jax.models.vae import wan_vae
from sf_jax.models.wan import WanConfig, init_params
from sf_jax.training import self_forcing
from sf_jax.training import step as steps
from sf_jax.training.media import digits_media, wan_media
from sf_jax.training.metrics import measured_flops
from sf_jax.training.programs import countable, matmul_flops
from tests import oracle


def config_of(middle: bool, batch: int | None, dtype: str, remat: str | None) -> TrainConfig:
    """The recipe of the moving digits, at their size or the middle size."""
    config = from_dict(digits.get_config("distill"))
    model = config.model
    if middle:
        model = WanConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=6, remat="dots")
        data = dataclasses.replace(config.data, name="wan", dir="none", frames=9, height=24, width=40)
        config = dataclasses.replace(config, data=data, batch_size=1, teacher=None, critic=None)
    model = dataclasses.replace(model, dtype=dtype, remat=remat or model.remat)
    return dataclasses.replace(config, model=model, batch_size=batch or config.batch_size)


def seconds(function, arguments) -> float:
    """Mean time of a call over a list of arguments, without compilation."""
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments[0]))
    began = time.perf_counter()
    for given in arguments:
        jax.block_until_ready(run(*given))
    return (time.perf_counter() - began) / len(arguments)


def scan_loss(setup, frozen, state, batch):
    """The student's loss with the gradient through the rollout's scan; same random draws as the program."""
    config = setup.config

    def loss(params, fake):
        shape = (len(fake.examples), config.data.frames, config.data.height, config.data.width, config.model.channels)
        noise = ro.example_noise(jax.random.fold_in(fake.key, 1), fake.examples, shape)
        draw = ro.key_draw(jax.random.fold_in(fake.key, 2), fake.examples)
        given = (setup.student, config.rollout, params, batch["text"], noise, fake.exits, draw)
        video = oracle.rollout_video(*given, cache_gradient=config.cache_gradient)
        return objective(setup, frozen, state, batch, video, fake)

    return loss


def objective(setup, frozen, state, batch, video, fake):
    """The DMD loss of a video."""
    return self_forcing.OBJECTIVES["dmd"](
        video,
        (setup.teacher, frozen["teacher"]),
        (setup.critic, state.critic.params),
        batch["text"],
        jnp.broadcast_to(batch["negative"], batch["text"].shape),
        fake.t,
        fake.noise,
        setup.config.score,
        None,
    )[0]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--middle", action="store_true", help="the middle size")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--remat", choices=("none", "dots", "block"))
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    config = config_of(args.middle, args.batch, args.dtype, args.remat)
    model, data = config.model, config.data
    media = wan_media(wan_vae()) if args.middle else digits_media(PatchCodec.load())
    state, frozen = steps.new_state(config), {"teacher": init_params(model, jax.random.key(1))}
    text = jax.random.normal(jax.random.key(2), (config.batch_size, model.text_len, model.text_dim))
    batch = {"text": text, "negative": jnp.zeros((1, *text.shape[1:])), "seed": np.uint32(config.seed)}
    examples = jnp.arange(config.batch_size, dtype=jnp.int32)
    setup = self_forcing.Setup.of(config, media)
    states = [state.replace(step=jnp.int32(k)) for k in range(args.steps)]
    size = f"{data.frames} frames of {data.height}x{data.width}, dim {model.dim}, {model.num_layers} layers"
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind} x {jax.device_count()}, {platform.machine()}")
    print(f"batch {config.batch_size}, {size}, {model.dtype}, remat {model.remat}, cache_gradient stop")
    peak = measured_flops(jax.devices()[:1], args.dtype)
    print(f"matmul peak {peak / 1e9:.0f} GFLOP/s")
    columns = ("rollout", "scores", "gradient", "rest", "whole", "GFLOP")
    print(f"{'seconds of':10s}{''.join(f'{name:>10s}' for name in columns)}{'of peak':>9s}")
    counted = self_forcing.programs(countable(config), media)
    for program, plain in zip(self_forcing.programs(config, media), counted, strict=True):
        loss = program.losses[0]
        student = loss.network == "model"
        prepare = jax.jit(lambda state, program=program: program.prepare(state, frozen, batch, examples))
        fakes = [prepare(state) for state in states]
        # The last chunk has no clean pass, and in the student's update no exit step.
        skipped = (2 if student else 1) * config.rollout.chunk / data.frames
        trips = float(np.mean([np.mean(fake.exits) for fake in fakes])) + 2.0 - skipped

        def gradient(params, state, fake, loss=loss):
            return jax.value_and_grad(loss.function, has_aux=True)(params, state, frozen, batch, fake)

        def scores(state, fake):
            return objective(setup, frozen, state, batch, fake.past.video, fake)

        def rollout(state, prepare=prepare, student=student):
            fake = prepare(state)
            return fake if student else (fake.past.video, fake.t, fake.noise)  # all that the critic needs

        parts = {"rollout": seconds(rollout, [(state,) for state in states]), "scores": 0.0}
        if student:
            parts["scores"] = seconds(scores, list(zip(states, fakes, strict=True)))
        params = [getattr(state, loss.network).params for state in states]
        whole_gradient = seconds(gradient, list(zip(params, states, fakes, strict=True)))
        parts["gradient"] = whole_gradient - parts["scores"]
        update = steps.make_step(config, program)
        whole = seconds(update, [(state, frozen, batch) for state in states])
        parts["rest"] = whole - sum(parts.values())
        flops = matmul_flops(jax.make_jaxpr(steps.make_step(config, plain))(state, frozen, batch), trips)
        row = "".join(f"{part:10.3f}" for part in (*parts.values(), whole))
        print(f"{program.name:10s}{row}{flops / 1e9:10.1f}{flops / whole / peak:9.0%}", flush=True)
        if student:
            by_scan = scan_loss(setup, frozen, state, batch)
            took = seconds(jax.value_and_grad(by_scan), list(zip(params, fakes, strict=True)))
            print(f"{'by scan':10s}{took:10.3f} against {parts['rollout'] + whole_gradient:.3f} by replay", flush=True)


if __name__ == "__main__":
    main()
