"""Attention in tiles with a running softmax: holds at most one tile of logits, forward and backward.

For devices without a fused kernel. Source: FlashAttention-2 (arXiv 2307.08691), Algorithms 1 and 2. The forward pass
saves the logarithm of each query's softmax sum, from which the backward pass recomputes every tile's weights.
"""

import functools

import jax
import jax.numpy as jnp

from sf_jax.models import partition

HIDDEN = -1e30  # logit of a hidden key
# Keys and logits per tile, sized to CPU caches.
KEYS = {"cpu": 256}
LOGITS = {"cpu": 1 << 20}
KEYS_ELSEWHERE, LOGITS_ELSEWHERE = 1024, 1 << 25


@jax.named_scope("attention_xla")  # lets `perf.traffic` identify the matmuls
def tiled_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, logits: int | None) -> jax.Array:
    """Softmax attention.

    Args:
      q: [B, T, N, D] queries, already scaled.
      k: [B, S, N, D] keys.
      v: [B, S, N, D] values.
      bias: float32 [S] to add to the logits, a constant without gradient; None adds nothing.
      logits: most logits per tile; None uses the backend's default.

    Returns:
      [B, T, N, D], dtype of `q`.
    """
    platform = partition.platform()
    logits = logits or LOGITS.get(platform, LOGITS_ELSEWHERE)
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    columns = -(-keys // KEYS.get(platform, KEYS_ELSEWHERE))
    width = -(-keys // columns)
    rows = -(-length // max(1, logits // (batch * heads * width)))
    height = -(-length // rows)
    rows = -(-length // height)
    if columns * width > keys:  # pads the last tile with hidden keys
        extra = columns * width - keys
        k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (k, v))
        bias = jnp.pad(jnp.zeros(keys) if bias is None else bias, (0, extra), constant_values=HIDDEN)
    q = jnp.pad(q, ((0, 0), (0, rows * height - length), (0, 0), (0, 0)))
    q = q.reshape(batch, rows, height, heads, -1).transpose(1, 0, 3, 2, 4)
    k = k.reshape(batch, columns, width, heads, -1).transpose(1, 0, 3, 4, 2)
    v = v.reshape(batch, columns, width, heads, -1).transpose(1, 0, 3, 2, 4)
    out = _tiles(q, k, v, None if bias is None else bias.reshape(columns, width))
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, rows * height, heads, -1)[:, :length]


@jax.custom_vjp
def _tiles(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attention [R, B, N, t, D] of q [R, B, N, t, D], k [C, B, N, D, s], v [C, B, N, s, D] and bias [C, s]."""
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    """The output, and the logarithm of each query's softmax sum, float32 [R, B, N, t, 1]."""

    def row(q):
        def column(carry, tile):
            top, total, out = carry
            k, v, bias = tile
            part = _logits(q, k, bias)
            higher = jnp.maximum(top, part.max(-1, keepdims=True))
            weights, fade = jnp.exp(part - higher), jnp.exp(top - higher)
            product = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (higher, total * fade + weights.sum(-1, keepdims=True), out * fade + product), None

        one = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
        start = (one + HIDDEN * 2, one, jnp.zeros(q.shape, jnp.float32))
        (top, total, out), _ = jax.lax.scan(column, start, (k, v, bias))
        return (out / total).astype(q.dtype), top + jnp.log(total)

    return jax.lax.map(row, q)


def _logits(q, k, bias):
    part = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    return part if bias is None else part + bias


def _keep(q, k, v, bias):
    out, log_total = _forward(q, k, v, bias)
    return out, (q, k, v, bias, out, log_total)


def _backward(kept, gradient):
    q, k, v, bias, out, log_total = kept
    wide = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def row(carry, parts):
        q, out, log_total, gradient = parts
        # The softmax's gradient term that all weights of a query share.
        shared = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)

        def column(q_gradient, tile):
            k, v, bias = tile
            weights = jnp.exp(_logits(q, k, bias) - log_total)
            v_gradient = wide(weights.astype(v.dtype).mT, gradient)
            part = (weights * (wide(gradient, v.mT) - shared)).astype(k.dtype)
            return q_gradient + wide(part, k.mT), (wide(q.mT, part), v_gradient)

        q_gradient, tiles = jax.lax.scan(column, jnp.zeros(q.shape, jnp.float32), (k, v, bias))
        return jax.tree.map(jnp.add, carry, tiles), q_gradient.astype(q.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    (k_gradient, v_gradient), q_gradient = jax.lax.scan(row, zeros, (q, out, log_total, gradient))
    no_bias = None if bias is None else jnp.zeros_like(bias)
    return q_gradient, k_gradient.astype(k.dtype), v_gradient.astype(v.dtype), no_bias


_tiles.defvjp(_keep, _backward)
