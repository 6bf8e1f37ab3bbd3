"""Embeds prompts for Wan's transformer, with the tokenizer and text encoder of a model folder."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax.inference.executables import Executables
from sf_jax.inference.tokenizer import Tokenizer, load_tokenizer
from sf_jax.models.umt5 import Umt5Config, Umt5Encoder
from sf_jax.parallel.params import GENERATION, tree_shardings
from sf_jax.weights.folders import ModelFiles
from sf_jax.weights.networks import describe_network, load_network

REMEMBERED = 64  # number of cached embeddings if the encoder stays in memory


class TextEncoder(Protocol):
    """Embeds prompts."""

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeddings [B, S, D] of B prompts; zeros after each prompt's last token."""


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """Embeds prompts: one per device at a time, or one after another if all devices share the parameters.

    Attributes:
      tokenizer: the tokenizer.
      config: sizes of the encoder; its `dtype` is that of computation and embeddings.
      params: the encoder's parameters, on every device of the mesh, or split over its axis `tensor`.
      mesh: devices, with axes `data` and `tensor`.
      executables: cache of compiled programs; None if there is none.
    """

    tokenizer: Tokenizer
    config: Umt5Config
    params: dict
    mesh: Mesh
    executables: Executables | None = None

    def embed(self, prompts: Sequence[str]) -> Iterator[tuple[np.ndarray, int]]:
        """Embeds prompts in order.

        Yields:
          For each prompt its embedding [512, dim], zeros after the text's end, and its number of tokens.
        """
        split = NamedSharding(self.mesh, PartitionSpec("data"))
        size = self.mesh.shape["data"]
        for first in range(0, len(prompts), size):
            part = list(prompts[first : first + size])
            # every part of the mesh needs a prompt
            ids, mask = self.tokenizer.encode(part + part[:1] * (size - len(part)))
            arguments = (self.config, self.params, *jax.device_put((ids, mask), split))
            keep = self.executables
            found = np.asarray(embed_tokens(*arguments) if keep is None else keep.call(embed_tokens, (0,), *arguments))
            yield from zip(found[: len(part)], mask.sum(axis=1).tolist(), strict=False)


@functools.partial(jax.jit, static_argnums=0)
def embed_tokens(config: Umt5Config, params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Prompt embeddings [B, L, dim] of tokens int32 [B, L], in the compute type; see `Umt5Encoder.embed`."""
    return Umt5Encoder(config).apply({"params": params}, ids, mask, method="embed").astype(config.dtype)


def encoder_mesh(devices: Sequence[jax.Device], shared: Umt5Config | None = None) -> Mesh:
    """A mesh of devices that embed one prompt each, or share an encoder's parameters.

    With the encoder's sizes `shared`, it has as many devices as divide the parameters.
    """
    if shared is not None:
        devices = devices[: math.gcd(len(devices), shared.dim_attn, shared.dim_ffn, shared.vocab)]
    shape = (len(devices), 1) if shared is None else (1, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def load_embedder(
    model: ModelFiles,
    dtype: str,
    devices: Sequence[jax.Device] | None = None,
    split: bool = False,
    unread: bool = False,
) -> Embedder:
    """Loads tokenizer and text encoder.

    Args:
      model: the model folder's files.
      dtype: type of computation and embeddings, "bfloat16" or "float32".
      devices: devices that share the prompts; None is the default device only.
      split: whether they share the parameters instead; uses as many devices as divide these.
      unread: see `load_network`.

    Raises:
      ValueError: if a file is damaged, or the two do not belong together.
    """
    tokenizer = load_tokenizer(model.tokenizer)
    named = "text_encoder" in model.named
    sizes = describe_network(model.text_encoder, "umt5", scaled=named).config if split else None
    mesh = encoder_mesh(devices or jax.local_devices()[:1], sizes)
    config, params = load_network(
        model.text_encoder,
        "umt5",
        dtype=dtype if named and dtype == "bfloat16" else None,  # otherwise scaled float8 would take twice the memory
        sharding=functools.partial(tree_shardings, mesh=mesh, rules=GENERATION),
        scaled=named,
        unread=unread,
    )
    if tokenizer.vocab > config.vocab:
        raise ValueError(
            f"{model.text_encoder} knows {config.vocab} tokens, {model.tokenizer} has {tokenizer.vocab}: they do not "
            "belong together"
        )
    return Embedder(tokenizer, dataclasses.replace(config, dtype=dtype), params, mesh)


class Umt5TextEncoder:
    """Wan's text encoder, as the pipeline's `TextEncoder`.

    The encoder of Wan2.1 takes 11 GB. It is loaded for prompts that are not embedded yet, and freed afterwards unless
    `keep` is set. Embeddings are cached without the zeros after each prompt's end.
    """

    def __init__(
        self,
        files: ModelFiles,
        dtype: str,
        keep: bool = False,
        mesh: Mesh | None = None,
        *,
        executables: Executables | None = None,
        unread: bool = False,
    ):
        """Stores the settings; loads nothing yet.

        Args:
          files: the model folder's files.
          dtype: type of computation and embeddings, "bfloat16" or "float32".
          keep: whether to keep the weights in memory, for prompts that change while a video plays.
          mesh: the pipeline's mesh; if its devices share videos, they share the encoder, too. Otherwise the encoder is
            on the default device.
          executables: cache of compiled programs, as used by the commands.
          unread: see `load_network`.
        """
        self.files, self.dtype, self.keep = files, dtype, keep
        self.executables, self.unread = executables, unread
        shared = mesh is not None and mesh.shape["data"] < mesh.size
        self._devices = tuple(mesh.devices.flat) if shared else None
        # with the weights in memory, evicted embeddings can be recomputed
        self._remembered = REMEMBERED if keep else None
        self._embedder: Embedder | None = None
        self._embeddings: dict[str, np.ndarray] = {}

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeds prompts.

        Args:
          prompts: B prompts.

        Returns:
          [B, 512, dim], zeros after each prompt's end.

        Raises:
          ValueError: if a weight file is damaged, or tokenizer and encoder do not belong together.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._embeddings]
        if missing:
            split = self._devices is not None
            embedder = self._embedder or load_embedder(self.files, self.dtype, self._devices, split, self.unread)
            embedder = dataclasses.replace(embedder, executables=self.executables)
            if self.keep:
                self._embedder = embedder
            self._length = embedder.tokenizer.length
            for prompt, (embedding, count) in zip(missing, embedder.embed(missing), strict=True):
                self._embeddings[prompt] = embedding[:count].copy()
        for prompt in prompts:  # moves them to the end, as the newest
            self._embeddings[prompt] = self._embeddings.pop(prompt)
        rows = [self._embeddings[prompt] for prompt in prompts]
        out = np.zeros((len(rows), self._length, rows[0].shape[1]), rows[0].dtype)
        for row, embedding in zip(out, rows, strict=True):
            row[: len(embedding)] = embedding
        while self._remembered is not None and len(self._embeddings) > self._remembered:
            del self._embeddings[next(iter(self._embeddings))]
        return out
