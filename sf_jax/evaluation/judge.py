"""The judge: a small classifier of the digit and its direction in a short piece of video.

No generator is trained on the judge's training scans, and neither has seen its test scans. The shipped file was made by

  python -m sf_jax.evaluate --train_judge=sf_jax/assets/digits_judge.safetensors
"""

import dataclasses
import functools
import importlib.resources
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import scipy.ndimage

from sf_jax import files
from sf_jax.data import moving_digits
from sf_jax.models.patch_codec import PatchCodec, to_float

ASSET = "digits_judge.safetensors"
WINDOW = 3
DIGITS = 10
FEATURES = 64
_BATCH = 256


class Opinion(NamedTuple):
    """The judge's output for N windows.

    Attributes:
      digit: Logits, float32 [N, 10].
      direction: Logits over moving_digits.DIRECTIONS, float32 [N, 8].
      features: The layer before the logits, float32 [N, 64].
    """

    digit: Any
    direction: Any
    features: Any


class JudgeNet(nn.Module):
    """Convolutions with circular padding, then a mean over the canvas, so that position does not matter.

    Attributes:
      kernels: Kernel side length per layer.
      strides: Stride per layer.
      widths: Channels per layer.
    """

    kernels: tuple[int, ...] = (5, 3, 3, 3)
    strides: tuple[int, ...] = (2, 1, 2, 1)
    widths: tuple[int, ...] = (32, 48, 64, 96)

    @nn.compact
    def __call__(self, windows: jax.Array) -> Opinion:
        """Judges windows of consecutive frames, float32 [N, h, w, WINDOW] in [-1, 1], oldest first."""
        x = (windows + 1) / 2  # An empty canvas should be zero: digits are learned much faster.
        for i, (side, stride, width) in enumerate(zip(self.kernels, self.strides, self.widths, strict=True)):
            x = jnp.pad(x, [(0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)], mode="wrap")
            x = nn.Conv(width, (side, side), (stride, stride), padding="VALID", name=f"conv{i}")(x)
            # Not in the first layer: normalization would amplify the noise of an empty canvas.
            x = nn.gelu(nn.LayerNorm(name=f"norm{i}")(x) if i else x)
        x = nn.LayerNorm(name="pooled")(x.mean(axis=(1, 2)))
        features = nn.gelu(nn.Dense(FEATURES, name="features")(x))
        digit = nn.Dense(DIGITS, name="digit")(features)
        direction = nn.Dense(len(moving_digits.DIRECTIONS), name="direction")(features)
        return Opinion(digit, direction, features)


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A trained judge.

    Attributes:
      params: Parameters of JudgeNet, float32.
    """

    params: Any

    def __call__(self, videos: np.ndarray) -> Opinion:
        """Judges every window of WINDOW consecutive frames.

        Args:
          videos: uint8 [N, F, h, w, 1], F at least WINDOW.

        Returns:
          The output as numpy arrays, [N, F - WINDOW + 1, ...].

        Raises:
          ValueError: The videos have another type or shape.
        """
        videos = np.asarray(videos)
        if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 1:
            raise ValueError(f"videos: got {videos.dtype} {videos.shape}, allowed: uint8 [N, F, h, w, 1]")
        if videos.shape[1] < WINDOW:
            raise ValueError(f"videos: got {videos.shape[1]} frames, allowed: {WINDOW} or more")
        windows = np.lib.stride_tricks.sliding_window_view(videos[..., 0], WINDOW, axis=1)
        flat = windows.reshape(-1, *windows.shape[2:])
        parts = []
        for begin in range(0, len(flat), _BATCH):
            part = flat[begin : begin + _BATCH]
            # Pads the last batch, as another size would be compiled anew.
            padded = np.concatenate([part, np.zeros((_BATCH - len(part), *part.shape[1:]), np.uint8)])
            parts.append([np.asarray(x)[: len(part)] for x in _judge(self.params, padded)])
        joined = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Opinion(*(x.reshape(*windows.shape[:2], -1) for x in joined))


@jax.jit
def _judge(params, windows):
    return JudgeNet().apply({"params": params}, to_float(windows))


def save(judge: Judge, path: str | Path) -> None:
    """Writes a judge as safetensors in float16, which halves the file and does not change its decisions."""
    flat = flax.traverse_util.flatten_dict(judge.params, sep=".")
    tensors = {name: np.ascontiguousarray(value, np.float16) for name, value in flat.items()}
    with files.replacing(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(tensors))


def load(path: str | Path | None = None) -> Judge:
    """Loads a judge; without a path, the shipped one for the moving digits.

    Raises:
      ValueError: The file is missing or is not a judge.
    """
    source = importlib.resources.files("sf_jax").joinpath("assets", ASSET) if path is None else Path(path)
    allowed = "allowed: a file that `python -m sf_jax.evaluate --train_judge=...` has written"
    try:
        tensors = safetensors.numpy.load(source.read_bytes())
    except OSError as error:
        raise ValueError(f"judge: cannot read {source} ({error.strerror}), {allowed}") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"judge: {source} is not a safetensors file ({error}), {allowed}") from error
    expected = {name: value.shape for name, value in _flat(_init(0)).items()}
    if {name: value.shape for name, value in tensors.items()} != expected:
        raise ValueError(f"judge: {source} holds the tensors of another network, {allowed}")
    flat = {name: jnp.asarray(value, jnp.float32) for name, value in tensors.items()}
    return Judge(flax.traverse_util.unflatten_dict(flat, sep="."))


def _flat(params) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params, sep=".")


def _init(seed: int):
    windows = jnp.zeros((1, moving_digits.CANVAS, moving_digits.CANVAS, WINDOW))
    return JudgeNet().init(jax.random.key(seed), windows)["params"]


def warp_scans(scans: np.ndarray, variants: int, rng: np.random.Generator) -> np.ndarray:
    """Draws slightly rotated, sheared, scaled and bent versions of scans.

    Without them, the judge would memorize the few hundred scans of its split.

    Args:
      scans: uint8 [S, h, w].
      variants: Number V of versions per scan.
      rng: Random generator.

    Returns:
      uint8 [S, V, h, w].
    """
    height, width = scans.shape[1:]
    grid = np.stack(np.mgrid[:height, :width]).astype(np.float64)
    middle = np.array([height - 1, width - 1])[:, None, None] / 2
    warped = np.zeros((len(scans), variants, height, width), np.uint8)
    for i, j in np.ndindex(len(scans), variants):
        angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.15, 0.15)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = turn @ np.array([[1, shear], [0, 1]]) / rng.uniform(0.88, 1.1, size=2)
        bend = scipy.ndimage.zoom(rng.normal(0, 0.35, (2, 4, 4)), (1, height / 4, width / 4), order=1)
        places = np.tensordot(matrix, grid - middle, 1) + middle + bend
        sprite = scipy.ndimage.map_coordinates(scans[i].astype(np.float32), places, order=1)
        warped[i, j] = np.round(np.clip(sprite, 0, 255))
    return warped


def training_windows(steps: int, batch_size: int, seed: int, variants: int) -> Iterator[dict[str, Any]]:
    """Yields batches of windows from the judge's own split, each window with its own motion.

    Args:
      steps: Number of batches.
      batch_size: N.
      seed: Seed.
      variants: Warped versions per scan.

    Yields:
      windows uint8 [N, 24, 24, WINDOW], digit and direction int64 [N].
    """
    rng = np.random.Generator(np.random.Philox(seed))
    scans, labels = moving_digits.load_scans()
    own = moving_digits.split_scans(labels)["judge"]
    warped = warp_scans(scans[own], variants, rng)
    clips = moving_digits.plan_clips("judge", steps * batch_size, seed=seed)
    for step in range(steps):
        part = clips[step * batch_size : (step + 1) * batch_size]
        sprites = warped[np.searchsorted(own, part.scan), rng.integers(variants, size=batch_size)]
        positions = moving_digits.trajectory(part.start, part.velocity, WINDOW)
        windows = np.moveaxis(moving_digits.render(sprites, positions)[..., 0], 1, -1)
        yield {"windows": windows, "digit": part.digit, "direction": part.direction}


def degrade(key: jax.Array, windows: jax.Array, codec: PatchCodec) -> jax.Array:
    """Makes windows more like generated ones: codec blur for half of them, noise, a different contrast.

    Args:
      key: Random key.
      windows: float32 [N, h, w, WINDOW] in [-1, 1].
      codec: The generator's codec.

    Returns:
      float32 [N, h, w, WINDOW] in [-1, 1].
    """
    keys = jax.random.split(key, 4)
    each = (len(windows), 1, 1, 1)
    frames = jnp.moveaxis(windows, -1, 1)[..., None]
    blurred = jnp.moveaxis(codec.decode(codec.encode(frames))[..., 0], 1, -1)
    windows = jnp.where(jax.random.bernoulli(keys[0], 0.5, each), blurred, windows)
    windows = (windows + 1) * jax.random.uniform(keys[1], each, minval=0.8, maxval=1.1) - 1
    amount = jax.random.uniform(keys[2], each, maxval=0.1)
    return jnp.clip(windows + amount * jax.random.normal(keys[3], windows.shape), -1, 1)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnums=(0, 1))
def _step(params, state, batch, key, codec, *, optimizer):
    def loss_of(params):
        windows = degrade(key, to_float(batch["windows"]), codec)
        opinion = JudgeNet().apply({"params": params}, windows)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        digit = cross_entropy(opinion.digit, batch["digit"]).mean()
        return digit + cross_entropy(opinion.direction, batch["direction"]).mean()

    loss, gradient = jax.value_and_grad(loss_of)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, loss


def train_judge(
    steps: int = 2600, seed: int = 0, *, batch_size: int = 64, variants: int = 64, log_every: int = 100
) -> Judge:
    """Trains a judge on clips of the `judge` split, whose scans no generator sees.

    Args:
      steps: Optimizer steps.
      seed: Seed.
      batch_size: Windows per step.
      variants: Warped versions per scan.
      log_every: Steps between printed lines; 0 prints nothing.

    Returns:
      The judge.

    Raises:
      ValueError: An argument is out of range.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("variants", variants)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, allowed: 1 or more")
    params, codec = _init(seed), PatchCodec.load()
    rate = optax.warmup_cosine_decay_schedule(0.0, 2.5e-3, max(1, steps // 20), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.02))
    state, key, begun = optimizer.init(params), jax.random.key(seed), time.monotonic()
    for step, batch in enumerate(training_windows(steps, batch_size, seed, variants)):
        key_of_step = jax.random.fold_in(key, step)
        params, state, loss = _step(params, state, batch, key_of_step, codec, optimizer=optimizer)
        if log_every and (step + 1) % log_every == 0:
            left = (time.monotonic() - begun) / (step + 1) * (steps - step - 1)
            print(f"judge: step {step + 1}/{steps}, loss {loss:.4f}, {math.ceil(left)} s left", flush=True)
    return Judge(params)


def make(path: str | Path, seed: int = 0) -> Path:
    """Trains a judge with the default settings, writes it and prints its accuracy on test scans.

    Args:
      path: The file to write.
      seed: Seed.

    Returns:
      The path.

    Raises:
      ValueError: The folder is not writable, or the path is a folder.
    """
    files.check_writable(Path(path).parent, "train_judge")  # Fails before the training instead of after it.
    if Path(path).is_dir():
        raise ValueError(f"train_judge: got the folder {path}, allowed: the name of a file")
    save(train_judge(seed=seed), path)
    shares = accuracy(load(path)).items()
    print("judge on test scans:", ", ".join(f"{name} {share:.4f}" for name, share in shares), flush=True)
    return Path(path)


def accuracy(judge: Judge, split: str = "test", num_clips: int = 1600, num_frames: int = 5) -> dict[str, float]:
    """Measures a judge on real clips.

    Args:
      judge: The judge.
      split: One of moving_digits.SPLITS.
      num_clips: Number of clips; in multiples of 160, all digits, directions and speeds are equally frequent.
      num_frames: Frames per clip.

    Returns:
      Shares of correctly judged windows: digit, direction, and joint (both correct).
    """
    clips = moving_digits.plan_clips(split, num_clips)
    scans, _ = moving_digits.load_scans()
    positions = moving_digits.trajectory(clips.start, clips.velocity, num_frames)
    opinion = judge(moving_digits.render(scans[clips.scan], positions))
    digit = opinion.digit.argmax(-1) == clips.digit[:, None]
    direction = opinion.direction.argmax(-1) == clips.direction[:, None]
    both = digit & direction
    return {"digit": float(digit.mean()), "direction": float(direction.mean()), "joint": float(both.mean())}
