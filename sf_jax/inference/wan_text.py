"""Prompts to the embeddings that Wan's transformer attends to: tokenizer and text encoder of a model folder."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sf_jax.inference.tokenizer import Tokenizer, load_tokenizer
from sf_jax.models.umt5 import Umt5Config, Umt5Encoder
from sf_jax.weights.folders import ModelFiles
from sf_jax.weights.networks import load_network


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """Embeds prompts, one on each device at a time.

    Attributes:
      tokenizer: the tokenizer.
      config: sizes of the encoder; its `dtype` is that of computation and embeddings.
      params: the encoder's parameters, on every device of the mesh.
      mesh: devices, axis `data`.
    """

    tokenizer: Tokenizer
    config: Umt5Config
    params: dict
    mesh: Mesh

    def embed(self, prompts: Sequence[str]) -> Iterator[tuple[np.ndarray, int]]:
        """Embeds prompts in order.

        Yields:
          For each prompt its embedding [512, dim], zeros behind the text's end, and the number of its tokens.
        """
        split = NamedSharding(self.mesh, PartitionSpec("data"))
        size = self.mesh.size
        for first in range(0, len(prompts), size):
            part = list(prompts[first : first + size])
            # every device needs a prompt
            ids, mask = self.tokenizer.encode(part + part[:1] * (size - len(part)))
            found = np.asarray(_embed(self.config, self.params, *jax.device_put((ids, mask), split)))
            yield from zip(found[: len(part)], mask.sum(axis=1).tolist(), strict=False)


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: Umt5Config, params: dict, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return Umt5Encoder(config).apply({"params": params}, ids, mask, method="embed").astype(config.dtype)


def load_embedder(model: ModelFiles, dtype: str, devices: Sequence[jax.Device] | None = None) -> Embedder:
    """Loads tokenizer and text encoder.

    Args:
      model: the model folder's files.
      dtype: of computation and embeddings, "bfloat16" or "float32".
      devices: that share the prompts; None is the default device alone.

    Raises:
      ValueError: if a file is damaged, or the two do not belong together.
    """
    mesh = Mesh(np.asarray(devices or jax.local_devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    tokenizer = load_tokenizer(model.tokenizer)
    config, params = load_network(model.text_encoder, "umt5", sharding=NamedSharding(mesh, PartitionSpec()))
    if tokenizer.vocab > config.vocab:
        raise ValueError(
            f"{model.text_encoder} knows {config.vocab} tokens, {model.tokenizer} has {tokenizer.vocab}: they do not "
            "belong together"
        )
    return Embedder(tokenizer, dataclasses.replace(config, dtype=dtype), params, mesh)


def embed_prompts(model: ModelFiles, prompts: Sequence[str], dtype: str) -> dict[str, np.ndarray]:
    """Embeddings [512, 4096] of prompts; the encoder is in memory only meanwhile."""
    unique = list(dict.fromkeys(prompts))
    embedded = load_embedder(model, dtype).embed(unique)
    return {prompt: embedding for prompt, (embedding, _) in zip(unique, embedded, strict=True)}
