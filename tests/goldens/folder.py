"""Reads a folder of recorded numbers: sizes, weights, arrays, draws, gradients."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models.wan import WanConfig, WanTransformer, param_shapes
from sf_jax.weights import transformer
from tests.goldens import packed

OUTPUT_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 5e-5


@dataclasses.dataclass(frozen=True)
class Result:
    """One compared quantity; `error` None means that this package cannot do the case, with the reason in `note`."""

    name: str
    error: float | None
    tolerance: float = OUTPUT_TOLERANCE
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within tolerance (NaN is not)."""
        return self.error is not None and self.error <= self.tolerance


def relative(ours, reference, norm: float | None = None) -> float:
    """L2 error in float64 relative to `norm`, by default the reference's; NaN in the reference means not recorded."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    if ours.shape != reference.shape:
        raise ValueError(f"shape {ours.shape} against {reference.shape}")
    recorded = ~np.isnan(reference)
    if not recorded.any():
        raise ValueError("nothing of the reference is recorded")
    ours, reference = ours[recorded], reference[recorded]
    norm = np.linalg.norm(reference) if norm is None else norm
    return float(np.linalg.norm(ours - reference) / max(norm, 1e-30))


def channels_last(x) -> np.ndarray:
    """[..., C, H, W] to [..., H, W, C]."""
    return np.moveaxis(np.asarray(x), -3, -1)


class Folder:
    """One folder of goldens."""

    def __init__(self, path):
        """Reads `config.json`; arrays are read when asked for."""
        self.path = pathlib.Path(path)
        self.config = json.loads((self.path / "config.json").read_text())

    @property
    def files(self) -> list[str]:
        """Names of the npz files, packed or not."""
        names = {path.name.removesuffix(packed.SUFFIX) for path in self.path.iterdir()}
        return sorted(name for name in names if name.endswith(".npz"))

    def has(self, name: str) -> bool:
        """Whether the folder holds this file, packed or not."""
        return (self.path / name).exists() or packed.packed_path(self.path / name).exists()

    def arrays(self, name: str) -> tuple[dict[str, np.ndarray], dict]:
        """Arrays and meta data of an npz file."""
        arrays, _ = packed.read(self.path / name)
        same = json.loads(str(arrays.pop("same_json", "{}")))  # arrays equal to others are kept once
        meta = json.loads(str(arrays.pop("meta_json")))
        return arrays | {key: arrays[other] for key, other in same.items()}, meta

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Tensors of a safetensors file."""
        return packed.read(self.path / name)[0]

    def model(self, role: str) -> WanTransformer:
        """The network of a role: generator, fake or real."""
        c = self.config
        return WanTransformer(
            WanConfig(
                dim=c["dim"],
                ffn_dim=c["ffn_dim"],
                num_heads=c["num_heads"],
                num_layers=c["num_layers"][role],
                text_dim=c["text_dim"],
                text_len=c["text_len"],
                freq_dim=c["freq_dim"],
                channels=c["in_dim"],
                patch=tuple(c["patch"]),
                eps=c["eps"],
            )
        )

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of a frame."""
        return self.config["latent_height"] // self.config["patch"][1], (
            self.config["latent_width"] // self.config["patch"][2]
        )

    @property
    def tokens(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]

    def load(self, role: str) -> tuple[WanTransformer, dict]:
        """The network of a role and its parameters."""
        model = self.model(role)
        tensors = self.tensors(f"weights_{role}.safetensors")
        return model, transformer.from_official(tensors, model.config, param_shapes(model.config))

    def compare_gradients(self, name: str, file: str, role: str, gradients: dict) -> list[Result]:
        """Compares a tree of gradients with recorded ones: the worst parameter, and those without gradient."""
        ours = transformer.to_official(jax.device_get(gradients), self.model(role).config)
        return self.compare_tensors(name, file, ours)

    def compare_tensors(self, name: str, file: str, ours: dict[str, np.ndarray]) -> list[Result]:
        """Compares gradients under their official names with recorded ones."""
        worst, worst_name, compared = 0.0, "", set()
        stored, meta = packed.read(self.path / file)
        without = json.loads(meta.get("none_grads", "[]"))
        norms = json.loads(meta.get("grad_norms", "{}"))
        strided = set(json.loads(meta.get("strided", "[]")))
        step = int(meta.get("row_step", "1"))
        for key, recorded in stored.items():
            parameter = key.removesuffix("#proj")
            compared.add(parameter)
            if parameter not in ours:
                worst, worst_name = float("nan"), f"{key}, which is missing"
                continue
            ours_full = np.asarray(ours[parameter], np.float64)
            if key.endswith("#proj"):
                flat = ours_full.reshape(ours_full.shape[0], -1)
                value = np.cos(np.arange(1, flat.shape[0] + 1, dtype=np.float64)) @ flat
            else:
                value = ours_full[::step] if parameter in strided else ours_full
            reference = recorded.reshape(value.shape)
            # Rows can cancel in a projection: its error is that of the gradient, whose norm was recorded.
            error = relative(value, reference, norms[parameter] if key.endswith("#proj") else None)
            if not np.isnan(worst) and not error <= worst:  # NaN is the worst of all
                worst, worst_name = error, key
        results = [Result(name, worst, GRADIENT_TOLERANCE, f"worst of {len(compared)} parameters: {worst_name}")]
        if without:
            largest = float(np.max([np.abs(ours[parameter]).max() for parameter in without if parameter in ours]))
            results.append(Result(f"{name}, parameters without gradient", largest, 0.0, f"{len(without)} parameters"))
        left = sorted(set(ours) - compared - set(without))
        if left and step > 0 and "rel0" not in file:
            results.append(Result(f"{name}, completeness", float("nan"), 0.0, f"no recorded gradient of {left[:3]}"))
        return results


def recorded_blocks(arrays: dict, prefix: str, exits: list[int], first: int) -> list[tuple[list, np.ndarray]]:
    """Splits recorded `randn_like` draws into (renoise draws, context draw) of each block.

    Args:
      arrays: the arrays of a file.
      prefix: prefix of the case, possibly empty.
      exits: exit step of each block.
      first: number of the first draw of the rollout.
    """
    blocks, number = [], first
    for exit_step in exits:
        draws = [channels_last(arrays[f"{prefix}draw{number + i:02d}_randn_like"])[None] for i in range(exit_step + 1)]
        blocks.append((draws[:-1], draws[-1]))
        number += exit_step + 1
    return blocks


def recorded_draw(blocks):
    """A `rollout.Draw` that returns recorded noise; blocks of another size than the last come first."""
    size = blocks[-1][1].shape[1]
    scanned = [block for block in blocks if block[1].shape[1] == size]
    offset = len(blocks) - len(scanned)
    steps = max((len(renoise) for renoise, _ in blocks), default=0)

    def padded(renoise, like):
        return np.stack([*renoise, *[np.zeros_like(like)] * (max(steps, 1) - len(renoise))])

    renoise_all = jnp.asarray(np.stack([padded(r, c) for r, c in scanned]))
    context_all = jnp.asarray(np.stack([c for _, c in scanned]))

    def draw(kind, chunk, step, shape):
        if isinstance(chunk, int) and chunk < offset:
            renoise, context = blocks[chunk]
            out = context if kind == "context" else jnp.asarray(padded(renoise, context))[step]
        else:
            out = context_all[chunk - offset] if kind == "context" else renoise_all[chunk - offset, step]
        return jnp.asarray(out).reshape(shape)

    return draw
