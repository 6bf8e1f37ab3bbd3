"""What a step of endless streams made."""

from collections.abc import Iterator

import jax
import numpy as np


class Frames:
    """What a step made, still on the devices until somebody looks at it.

    `frames[id]` is uint8 [m, h, w, c]: the stream's new frames, behind the given ones where it has just begun. Of a
    pipeline without decoder it is `latents(id)`.
    """

    def __init__(self, latents: jax.Array | None, pixels: jax.Array | None, parts: dict[int, tuple]):
        """Keeps arrays of all slots, and of each id its slot, its first frame there, given pixels, lone latents."""
        self._latents, self._pixels, self._parts = latents, pixels, parts
        self._host: dict[bool, np.ndarray] = {}

    def __getitem__(self, stream: int) -> np.ndarray:
        """The frames of a stream."""
        if self._pixels is None:
            return self.latents(stream)
        slot, first, given, _ = self._part(stream)
        return np.concatenate([*given, self._fetched(pixels=True)[slot, first:]])

    def latents(self, stream: int) -> np.ndarray:
        """The new clean latents of a stream, float32 [n, H, W, C], without given ones."""
        slot, _, _, lone = self._part(stream)
        return np.concatenate([*lone, self._fetched(pixels=False)[slot]])

    def count(self, stream: int) -> int:
        """How many frames `self[stream]` has, without waiting for them."""
        _, first, given, lone = self._part(stream)
        if self._pixels is None:
            return self._latents.shape[1] + len(lone)
        return self._pixels.shape[1] - first + sum(len(part) for part in given)

    def _part(self, stream):
        if stream not in self._parts:
            there = ", ".join(map(str, self._parts)) or "none"
            raise KeyError(f"stream {stream!r} has no frames in this step: streams that do: {there}")
        return self._parts[stream]

    def _fetched(self, pixels):
        if pixels not in self._host:
            self._host[pixels] = np.asarray(self._pixels if pixels else self._latents)
        return self._host[pixels]

    def __iter__(self) -> Iterator[int]:
        """The ids of the streams that have new frames."""
        return iter(self._parts)

    def __len__(self) -> int:
        """How many streams have new frames."""
        return len(self._parts)

    def block_until_ready(self) -> "Frames":
        """Waits until the devices are done."""
        jax.block_until_ready((self._latents, self._pixels))
        return self
