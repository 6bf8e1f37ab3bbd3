"""The UMT5 encoder, which computes the prompt embeddings that the transformer attends to.

Source: official `T5Encoder` (wan/modules/t5.py) and `WanTextEncoder.forward` (utils/wan_wrapper.py). Unlike the
original T5, it has a relative position bias in every block.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models.layers import RMSNorm
from sf_jax.models.sizes import check_eps, check_sizes

# Largest sizes, see `check_sizes`.
LIMITS = {
    "vocab": 1 << 22,
    "dim": 1 << 16,
    "dim_attn": 1 << 16,
    "dim_ffn": 1 << 20,
    "num_heads": 1 << 16,
    "num_layers": 1000,
    "num_buckets": 1 << 12,
    "max_distance": 1 << 20,
}


@dataclasses.dataclass(frozen=True)
class Umt5Config:
    """Sizes of the text encoder.

    Attributes:
      vocab: rows of the token embedding.
      dim: channels of the residual stream and of the prompt embeddings.
      dim_attn: channels of queries, keys and values, all heads together.
      dim_ffn: hidden channels of the gated feed-forward layers.
      num_heads: attention heads; divides `dim_attn`.
      num_layers: blocks.
      num_buckets: entries of a position bias, half of them for keys after the query.
      max_distance: distance in tokens from which all keys share a bucket.
      eps: epsilon of all norms.
      dtype: compute type; residual stream, norms, position bias and softmax are always float32.
    """

    vocab: int = 128
    dim: int = 64
    dim_attn: int = 64
    dim_ffn: int = 128
    num_heads: int = 4
    num_layers: int = 2
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    dtype: str = "float32"

    def __post_init__(self):
        """Validates the sizes."""
        check_sizes(self, **LIMITS)
        check_eps(self.eps)
        if self.dim_attn % self.num_heads:
            raise ValueError(f"dim_attn is {self.dim_attn}: it must be a multiple of num_heads = {self.num_heads}")
        if self.num_buckets < 4 or self.num_buckets % 2:
            raise ValueError(f"num_buckets is {self.num_buckets}: it must be an even number, at least 4")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance is {self.max_distance}: it must be above num_buckets / 4 = {self.num_buckets // 4}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}: it must be float32 or bfloat16")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim_attn // self.num_heads


def umt5_xxl(**changes) -> Umt5Config:
    """The encoder of google/umt5-xxl, which all sizes of Wan2.1 use."""
    base = Umt5Config(vocab=256384, dim=4096, dim_attn=4096, dim_ffn=10240, num_heads=64, num_layers=24)
    return dataclasses.replace(base, **changes)


def position_buckets(length: int, num_buckets: int = 32, max_distance: int = 128) -> np.ndarray:
    """The bucket of every pair of tokens (official `T5RelativeEmbedding._relative_position_bucket`, bidirectional).

    A quarter of the buckets hold one small distance each. Another quarter holds logarithmically growing ranges of
    distances up to `max_distance`. The other half is the same for keys after the query.

    Args:
      length: tokens L.
      num_buckets: even number of buckets.
      max_distance: distance from which all keys share a bucket.

    Returns:
      int32 [L, L]: row = query, column = key.
    """
    side = num_buckets // 2
    exact = side // 2
    distance = np.arange(length, dtype=np.float32)
    # Rounds in float32 like the official code, so that borderline distances get the same bucket. The logarithm itself
    # is rounded from float64, because float32 logarithms differ between machines.
    logs = np.log(np.maximum(distance, 1) / np.float32(exact), dtype=np.float64).astype(np.float32)
    share = logs / np.float32(np.log(max_distance / exact)) * np.float32(side - exact)
    far = np.minimum(exact + share.astype(np.int32), side - 1)
    by_distance = np.where(distance < exact, distance.astype(np.int32), far)
    offset = np.arange(length) - np.arange(length)[:, None]
    return (by_distance[np.abs(offset)] + np.where(offset > 0, side, 0)).astype(np.int32)


class Block(nn.Module):
    """One block: self-attention with position bias, gated feed-forward (official `T5SelfAttention`)."""

    config: Umt5Config

    def setup(self):
        """Declares the layers."""
        c = self.config

        def dense(features, std):
            return nn.Dense(features, use_bias=False, dtype=c.dtype, kernel_init=nn.initializers.normal(std))

        self.norm1, self.norm2 = RMSNorm(c.eps), RMSNorm(c.eps)
        self.q = dense(c.dim_attn, (c.dim * c.dim_attn) ** -0.5)
        self.k, self.v = dense(c.dim_attn, c.dim**-0.5), dense(c.dim_attn, c.dim**-0.5)
        self.o = dense(c.dim, (c.num_heads * c.dim_attn) ** -0.5)
        self.gate, self.ffn_in = dense(c.dim_ffn, c.dim**-0.5), dense(c.dim_ffn, c.dim**-0.5)
        self.ffn_out = dense(c.dim, c.dim_ffn**-0.5)
        std = (2 * c.num_buckets * c.num_heads) ** -0.5
        self.position_bias = self.param("position_bias", nn.initializers.normal(std), (c.num_buckets, c.num_heads))

    def __call__(self, x: jax.Array, mask: jax.Array, buckets: jax.Array) -> tuple[jax.Array, None]:
        """Runs the block on float32 `x` [B, L, dim], with `mask` bool [B, L] and `buckets` int32 [L, L]."""
        x = x + self._attend(self.norm1(x), mask, buckets)
        h = self.norm2(x)
        return x + self.ffn_out(self.ffn_in(h) * nn.gelu(self.gate(h), approximate=True)), None

    def _attend(self, x, mask, buckets):
        """Attention of `x` [B, L, dim] over its unmasked rows; the logits are not scaled."""
        c = self.config
        q, k, v = (layer(x).reshape(*x.shape[:2], c.num_heads, c.head_dim) for layer in (self.q, self.k, self.v))
        # Not einsum, which takes more than twice as long on CPUs as matmuls of transposed arrays.
        q, k, v = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        bias = jnp.take(self.position_bias.astype(jnp.float32).T, buckets, axis=1)
        logits = jnp.matmul(q, k, preferred_element_type=jnp.float32) + bias
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e30), axis=-1)
        y = jnp.matmul(weights.astype(v.dtype), v)
        return self.o(y.transpose(0, 2, 1, 3).reshape(*x.shape[:2], c.dim_attn))


class Umt5Encoder(nn.Module):
    """The encoder; parameters of the blocks are stacked along a leading layer axis.

    Parameters are created in float32 but may be bfloat16, as in the official file; they are converted when used.
    """

    config: Umt5Config

    def setup(self):
        """Declares the layers."""
        config = self.config
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), (config.vocab, config.dim))
        self.blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )(config)
        self.norm = RMSNorm(config.eps)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes tokens.

        Args:
          ids: int32 [B, L] tokens.
          mask: [B, L], above zero where a token is text; other tokens are not attended to, but also get an output.

        Returns:
          float32 [B, L, dim].

        Raises:
          ValueError: if `ids` and `mask` are not both [B, L].
        """
        config = self.config
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise ValueError(f"ids are {ids.shape}, mask is {mask.shape}: both must be [batch, tokens], and equal")
        x = jnp.take(self.embedding, ids, axis=0).astype(jnp.float32)
        buckets = position_buckets(ids.shape[1], config.num_buckets, config.max_distance)
        x, _ = self.blocks(x, mask > 0, jnp.asarray(buckets))
        return self.norm(x)

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Prompt embeddings float32 [B, L, dim]: the output, with zeros after the text's end."""
        ends = (mask > 0).sum(axis=1)
        inside = jnp.arange(ids.shape[1]) < ends[:, None]
        return jnp.where(inside[..., None], self(ids, mask), 0.0)


def init_params(config: Umt5Config, key: jax.Array) -> dict:
    """Random parameters, float32."""
    ids = jnp.zeros((1, 1), jnp.int32)
    return Umt5Encoder(config).init(key, ids, jnp.ones_like(ids))["params"]


def param_shapes(config: Umt5Config) -> dict:
    """Shapes and types of the parameters."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
