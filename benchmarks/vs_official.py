"""Compares the official Self Forcing code with ours on the same CPU: rollout, updates, forward and backward.

  git clone https://github.com/guandeh17/Self-Forcing official
  pip install 'sf_jax[parity]' einops
  python -m benchmarks.vs_official --official=official             # all cores, time on the clock
  python -m benchmarks.vs_official --official=official --one_core  # CPU time on one core, for busy machines
  python -m benchmarks.vs_official --official=official --size=embedded --row=rollout

The official code is imported from the folder and adapted in memory (`benchmarks/official.py`). Sizes: "middle" is dim
384, 6 layers, 9 frames of 24x40 latents (240 tokens per frame); "embedded" is dim 128, 4 layers, 9 frames of 6x6. Batch
1, chunks of 3 latent frames, float32, and the same weights on both sides. Each side runs once to compile or warm up,
then they alternate `--repeats` times. Rows:

  rollout   9 frames, all four denoising steps, no gradient
  forward   the bidirectional network on 9 frames; backward: also the gradient of all parameters
  student   DMD's student update: rollout, critic, guided teacher, gradient, clipping, AdamW; exit steps 0 and 3 in turn
  critic    the critic's update, likewise

(The exit step is where the rollout stops and takes the gradient.) The official updates use gradient checkpointing, as
in the official recipe (the student's fails without it); ours use `remat="dots"`, as in the embedded model's recipe. In
the row "forward and backward" neither side recomputes.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.side_by_side import HEADER, Row, device, line, measure
from configs import digits
from sf_jax import backend
from sf_jax import rollout as ro
from sf_jax.config import TrainConfig, from_dict
from sf_jax.models.vae import wan_vae
from sf_jax.models.wan import WanConfig, WanTransformer, bidirectional_layout, param_shapes
from sf_jax.training import self_forcing
from sf_jax.training import step as steps
from sf_jax.training.media import wan_media
from sf_jax.weights import transformer

try:
    import torch

    from benchmarks import official as theirs
except ImportError as error:
    raise SystemExit(f"error: {error}; pip install 'sf_jax[parity]' einops") from error

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "numpy")
FRAMES, GUIDANCE, EXITS = 9, 3.0, (0, 3)
ROWS = ("rollout", "forward", "backward", "student", "critic")  # updates change the weights of one side
SIZES = {"middle": ((384, 1536, 6, 6), (24, 40)), "embedded": ((128, 512, 4, 4), (6, 6))}


@dataclasses.dataclass
class Sides:
    """Networks of both sides with the same weights, and their inputs."""

    official: theirs.Official
    config: WanConfig
    size: tuple[int, int]

    def __post_init__(self):
        tokens = self.size[0] * self.size[1] // 4
        build = {"generator": True, "real_score": False, "fake_score": False}
        self.theirs = {
            name: theirs.build_network(self.official, self.config, causal, FRAMES * tokens, seed)
            for seed, (name, causal) in enumerate(build.items())
        }
        self.theirs["real_score"].requires_grad_(False)
        shapes = param_shapes(self.config)
        self.ours = {
            name: jax.tree.map(jnp.asarray, transformer.from_official(theirs.weights_of(network), self.config, shapes))
            for name, network in self.theirs.items()
        }
        self.pipe = theirs.build_pipeline(self.official, self.theirs["generator"], self.config, FRAMES, tokens)
        rng = np.random.default_rng(0)
        self.noise = rng.standard_normal((1, FRAMES, *self.size, self.config.channels), np.float32)
        self.text = rng.standard_normal((1, self.config.text_len, self.config.text_dim), np.float32)

    @property
    def their_noise(self) -> torch.Tensor:
        """[B, F, C, H, W]."""
        return torch.from_numpy(np.moveaxis(self.noise, -1, 2).copy())

    @property
    def their_text(self) -> torch.Tensor:
        """[B, S, D]."""
        return torch.from_numpy(self.text)

    def train_config(self) -> TrainConfig:
        """The official recipe at this size."""
        config = from_dict(digits.get_config("distill"))
        place = {"name": "wan", "dir": "none", "frames": FRAMES, "height": self.size[0], "width": self.size[1]}
        data = dataclasses.replace(config.data, **place)
        score = dataclasses.replace(config.score, guidance=GUIDANCE + 1)
        rollout = ro.RolloutConfig(context_noise="official")
        return dataclasses.replace(
            config, data=data, batch_size=1, teacher=None, critic=None, score=score, rollout=rollout, model=self.config
        )


def rollout(sides: Sides) -> Row:
    """The row for a video with all denoising steps."""
    model, config = WanTransformer(sides.config), ro.RolloutConfig(context_noise="official")
    key, examples, noise = jax.random.key(0), jnp.arange(1), jnp.asarray(sides.noise)

    @jax.jit
    def run(params, text, noise):
        return ro.rollout(model, config, params, text, noise, 3, ro.key_draw(key, examples), None, None).video

    def official():
        sides.pipe.exit_step = 3
        with torch.no_grad():
            video = sides.pipe.inference_with_trajectory(noise=sides.their_noise, prompt_embeds=sides.their_text)[0]
        return np.moveaxis(video.numpy(), 2, -1)

    params, text = sides.ours["generator"], jnp.asarray(sides.text)
    return Row("rollout", lambda: jax.block_until_ready(run(params, text, noise)), official, same=False)


def update(sides: Sides, name: str) -> Row:
    """The student's or the critic's update, with each of `EXITS`."""
    config, student = sides.train_config(), name == "student"
    program = self_forcing.programs(config, wan_media(wan_vae()))[0 if student else 1]
    frozen = {"teacher": sides.ours["real_score"]}
    state = steps.new_state(config, sides.ours["generator"], sides.ours["fake_score"])
    text = jnp.asarray(sides.text)
    batch = {"text": text, "negative": jnp.zeros_like(text), "seed": np.uint32(0)}
    prepare = jax.jit(lambda state: program.prepare(state, frozen, batch, jnp.arange(1)).exits[0])
    by_exit = {}
    for step in range(64):
        by_exit.setdefault(int(prepare(state.replace(step=jnp.int32(step)))), step)
    states = [state.replace(step=jnp.int32(by_exit[exit_step])) for exit_step in EXITS]
    run = jax.jit(steps.make_step(config, program))

    def ours():
        for state in states:
            jax.block_until_ready(run(state, frozen, batch))
        return np.zeros(1)

    network = sides.theirs["generator" if student else "fake_score"]
    network.model.gradient_checkpointing = True  # as in the official recipe; the student's update needs it
    dmd = theirs.build_dmd(sides.official, sides.pipe, sides.theirs, GUIDANCE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01)
    prompts = [{"prompt_embeds": value} for value in (sides.their_text, torch.zeros_like(sides.their_text))]

    def official():
        for exit_step in EXITS:
            sides.pipe.exit_step = exit_step
            loss = dmd.generator_loss if student else dmd.critic_loss
            loss(list(sides.their_noise.shape), *prompts, clean_latent=None)[0].backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return np.zeros(1)

    return Row(f"{name}'s update, twice: exits {EXITS[0]} and {EXITS[1]}", ours, official, same=False)


def forward(sides: Sides, backward: bool) -> Row:
    """The bidirectional network, and the gradient of a sum of squares."""
    config = dataclasses.replace(sides.config, remat="none") if backward else sides.config
    model, layout = WanTransformer(config), bidirectional_layout(FRAMES)
    network, t = sides.theirs["fake_score"], 500.0
    network.model.gradient_checkpointing = False

    def apply(params, x, text):
        return model.apply({"params": params}, x, jnp.full((1, 1), t), text, layout)

    def loss(params, x, text):
        flow = apply(params, x, text)
        return (flow**2).mean(), flow

    run = jax.jit(jax.grad(loss, has_aux=True) if backward else apply)
    inputs = (sides.ours["fake_score"], jnp.asarray(sides.noise), jnp.asarray(sides.text))
    times, prompt = torch.full((1, FRAMES), t), {"prompt_embeds": sides.their_text}

    def ours():
        out = jax.block_until_ready(run(*inputs))
        return out[1] if backward else out

    def official():
        with torch.set_grad_enabled(backward):
            flow, _ = network(sides.their_noise, prompt, times)
            if backward:
                (flow**2).mean().backward()
                network.zero_grad(set_to_none=True)
        return np.moveaxis(flow.detach().numpy(), 2, -1)

    return Row("forward and backward" if backward else "forward", ours, official)


def make_row(name: str, sides: Sides) -> Row:
    """One of `ROWS`."""
    if name == "rollout":
        return rollout(sides)
    return update(sides, name) if name in ("student", "critic") else forward(sides, name == "backward")


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="folder of the official code")
    parser.add_argument("--size", choices=list(SIZES), default="middle")
    parser.add_argument("--row", choices=ROWS, default=None, help="only this row")
    parser.add_argument("--one_core", action="store_true", help="CPU time on one core instead of time on all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("out/vs_official.jsonl"), help="file to append to")
    args = parser.parse_args()
    backend.set_cpu_flags()  # as the commands do
    threads, clock = os.cpu_count(), time.perf_counter
    if args.one_core:
        # Set before JAX and PyTorch start their threads, which inherit it.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        threads, clock = 1, time.process_time
    torch.set_num_threads(threads)
    compiling = []

    def note(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiling.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    (dim, ffn_dim, heads, layers), size = SIZES[args.size]
    config = WanConfig(dim=dim, ffn_dim=ffn_dim, num_heads=heads, num_layers=layers, text_len=64, remat="dots")
    sides = Sides(theirs.import_official(args.official), config, size)
    machine = {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": device(),
        "threads": threads,
        "time": "CPU" if args.one_core else "clock",
        "size": args.size,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
    print(f"XLA_FLAGS: {os.environ.get('XLA_FLAGS') or 'none'}")
    print(f"{machine['device']}, threads: {threads}, float32, {args.size}; {machine['time']} time: ", end="")
    print(f"median (minimum) of {args.repeats} runs, seconds; theirs is the official code")
    print(HEADER)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for name in [args.row] if args.row else ROWS:
        compiling.clear()
        row = measure(make_row(name, sides), args.repeats, clock)
        row["compile"] = sum(compiling)
        print(f"{line(row)}  ours compiled in {row['compile']:.1f} s", flush=True)
        with open(args.json, "a", encoding="utf-8") as file:
            file.write(json.dumps({"row": name, **row, **machine}) + "\n")


if __name__ == "__main__":
    main()
