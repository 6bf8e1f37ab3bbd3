"""Attention in tiles with a running softmax: holds at most one tile of logits per group of heads, in both passes.

For devices without a fused kernel. Source: FlashAttention-2 (arXiv 2307.08691), Algorithms 1 and 2. The forward pass
saves the logarithm of each query's softmax sum, from which the backward pass recomputes every tile's weights.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sf_jax.models import partition, rope
from sf_jax.models.eight_bit import Scaled

HIDDEN = -1e30  # logit of a hidden key
# Name, for policies of `jax.checkpoint`, of outputs and softmax sums that attention's backward pass needs.
RESIDUALS = "attention_residuals"
# Keys and logits per tile, sized to CPU caches.
KEYS = {"cpu": 512}
LOGITS = {"cpu": 5 << 18}
# Most groups of heads, whose loops run at the same time: a single loop leaves much of a second core idle.
GROUPS = {"cpu": 6}
KEYS_ELSEWHERE, LOGITS_ELSEWHERE = 1024, 1 << 25


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
    parts = _by_heads(q, k, v)
    return jnp.concatenate([_tiled(*part, bias, logits) for part in parts], axis=2)


def _by_heads(*arrays: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Splits queries, keys and values [B, T, N, D] into groups of heads."""
    heads, most = arrays[0].shape[2], GROUPS.get(partition.platform(), 1)
    if jax.sharding.get_abstract_mesh().size > 1:  # which may split the heads
        most = 1
    size = next(n for n in range(1, heads + 1) if heads % n == 0 and heads // n <= most)
    return [tuple(a[:, :, first : first + size] for a in arrays) for first in range(0, heads, size)]


@jax.named_scope("attention_xla")  # lets `perf.traffic` identify the matmuls
def _tiled(q, k, v, bias, logits):
    """`tiled_attention` of a group of heads."""
    batch, keys, heads, _ = k.shape
    columns, width = _columns(keys)
    if columns * width > keys:  # pads the last tile with hidden keys
        extra = columns * width - keys
        k, v = (jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) for x in (k, v))
        bias = jnp.pad(jnp.zeros(keys) if bias is None else bias, (0, extra), constant_values=HIDDEN)
    k = k.reshape(batch, columns, width, heads, -1).transpose(1, 0, 3, 4, 2)
    v = v.reshape(batch, columns, width, heads, -1).transpose(1, 0, 3, 2, 4)
    out = _tiles(_rows(q, width, logits), k, v, None if bias is None else bias.reshape(columns, width))
    return _whole(out, q.shape[1])


Keys = tuple[jax.Array | Scaled, jax.Array | Scaled, jax.Array | None, jax.Array | None]


def bounded_attention(q: jax.Array, segments: Sequence[Keys], most: jax.Array, logits: int | None = None) -> jax.Array:
    """As `tiled_attention`, for numbers that take no gradient: reads tiles where the keys are, and none behind `most`.

    Tiles do not depend on `most`, so a hidden tile that is not read changes no bit of the output. On one CPU a batch
    under `vmap` is computed one by one, so that each example reads only what it sees, and its tiles stay in the cache.

    Args:
      q: [B, T, N, D] queries, already scaled.
      segments: (k, v, mask, rotation): keys and values [B, S, N, D] of any type, the mask of `attention.attend`, and
        the rotary embedding float32 [2, S, D/2] that the keys still need, or None.
      most: int32, number of keys, counted over all segments in their order, behind which all are hidden.
      logits: as in `tiled_attention`.

    Returns:
      [B, T, N, D], dtype of `q`.
    """
    if partition.platform() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return _bounded(q, segments, most, logits, single=False)
    single = functools.partial(_bounded, logits=logits, single=True)
    return jax.custom_batching.sequential_vmap(single)(q, tuple(segments), most)


def _bounded(q, segments, most, logits, single):
    """`bounded_attention`; `single`: whether a mask that is a count is the same for the whole batch."""
    parts, first = [], 0
    for (queries,) in _by_heads(q):
        parts.append(_bounded_heads(queries, segments, most, first, (logits, single)))
        first += queries.shape[2]
    return jnp.concatenate(parts, axis=2)


@jax.named_scope("attention_xla")
def _bounded_heads(q, segments, most, head, options):
    """`_bounded` for the queries of a group of heads, of which `head` is the first."""
    logits, single = options
    sizes = [_columns(k.shape[1]) for k, *_ in segments]

    def row(q):
        carry, before = _nothing(q), 0
        for segment, (columns, width) in zip(segments, sizes, strict=True):
            keys, mask = segment[0].shape[1], segment[2]
            read, visible = jnp.clip(-(-(most - before) // width), 0, columns), keys // width
            if mask is not None:
                visible = 0
                if single and not mask.ndim:
                    read, visible = jnp.minimum(read, -(-mask // width)), mask // width
            visible = jnp.minimum(visible, read)  # tiles without a hidden key need no mask
            add = functools.partial(_add_tile, q, segment, (width, head))
            carry = jax.lax.fori_loop(0, visible, functools.partial(add, False), carry)
            carry = jax.lax.fori_loop(visible, read, functools.partial(add, True), carry)
            before += keys
        return _normalized(carry, q.dtype)[0]

    return _whole(jax.lax.map(row, _rows(q, max(width for _, width in sizes), logits)), q.shape[1])


def _add_tile(q, segment, tile, masked, index, carry):
    """Adds tile `index` of a segment to the running softmax; `tile` is (number of keys, first head)."""
    (k, v, mask, rotation), (width, head) = segment, tile
    start = jnp.minimum(index * width, k.shape[1] - width)  # the last tile may begin in the one before it

    def part(a, axis):
        return jax.lax.dynamic_slice_in_dim(a, start, width, axis)

    def of_heads(a):
        return jax.lax.dynamic_slice(a, (0, start, head, 0), (a.shape[0], width, q.shape[1], a.shape[3]))

    k, v = (jax.tree.map(of_heads, a).astype(q.dtype) for a in (k, v))
    if rotation is not None:
        k = rope.rotate_constant(k, part(rotation, 1))
    bias = None
    if masked:
        places = start + jnp.arange(width)
        visible = places >= index * width
        if mask is not None:
            visible &= part(mask, 0) if mask.ndim else places < mask
        bias = jnp.where(visible, 0.0, HIDDEN)
    return _added(q, carry, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), bias)


def _columns(keys):
    """Number and width of the tiles of so many keys."""
    columns = -(-keys // KEYS.get(partition.platform(), KEYS_ELSEWHERE))
    return columns, -(-keys // columns)


def _rows(q, width, logits):
    """[B, T, N, D] queries in rows of tiles [R, B, N, t, D], whose logits with `width` keys are at most `logits`."""
    batch, length, heads, _ = q.shape
    logits = logits or LOGITS.get(partition.platform(), LOGITS_ELSEWHERE)
    rows = -(-length // max(1, logits // (batch * heads * width)))
    height = -(-length // rows)
    rows = -(-length // height)
    q = jnp.pad(q, ((0, 0), (0, rows * height - length), (0, 0), (0, 0)))
    return q.reshape(batch, rows, height, heads, -1).transpose(1, 0, 3, 2, 4)


def _whole(out, length):
    """The inverse of `_rows`."""
    rows, batch, heads, height, _ = out.shape
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, rows * height, heads, -1)[:, :length]


@jax.custom_vjp
def _tiles(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attention [R, B, N, t, D] of q [R, B, N, t, D], k [C, B, N, D, s], v [C, B, N, s, D] and bias [C, s]."""
    return _forward(q, k, v, bias)[0]


def _forward(q, k, v, bias):
    """The output, and the logarithm of each query's softmax sum, float32 [R, B, N, t, 1]."""

    def row(q):
        def column(carry, tile):
            return _added(q, carry, *tile), None

        carry, _ = jax.lax.scan(column, _nothing(q), (k, v, bias))
        return _normalized(carry, q.dtype)

    return jax.lax.map(row, q)


def _nothing(q):
    """The running softmax before the first tile: largest logit, sum of weights, weighted sum of values."""
    one = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    return one + HIDDEN * 2, one, jnp.zeros(q.shape, jnp.float32)


def _added(q, carry, k, v, bias):
    """The running softmax with the keys of one more tile."""
    top, total, out = carry
    part = _logits(q, k, bias)
    higher = jnp.maximum(top, part.max(-1, keepdims=True))
    weights, fade = jnp.exp(part - higher), jnp.exp(top - higher)
    product = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return higher, total * fade + weights.sum(-1, keepdims=True), out * fade + product


def _normalized(carry, dtype):
    """The output, and the logarithm of the softmax sum."""
    top, total, out = carry
    return (out / total).astype(dtype), top + jnp.log(total)


def _logits(q, k, bias):
    part = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    return part if bias is None else part + bias


def _keep(q, k, v, bias):
    out, log_total = (checkpoint_name(a, RESIDUALS) for a in _forward(q, k, v, bias))
    return out, (q, k, v, bias, out, log_total)


def _backward(kept, gradient):
    q, k, v, bias, out, log_total = kept
    wide = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)

    def row(carry, parts):
        q, out, log_total, gradient = parts
        # The softmax's gradient term that all weights of a query share.
        shared = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
        q_transposed, gradient_transposed = q.mT, gradient.mT

        def column(q_gradient, tile):
            k, v, bias = tile
            weights = jnp.exp(_logits(q, k, bias) - log_total)
            # Transposed: in the other order XLA would write a transposed tile of weights.
            v_gradient = wide(gradient_transposed, weights.astype(v.dtype))
            part = (weights * (wide(gradient, v.mT) - shared)).astype(k.dtype)
            return q_gradient + wide(part, k.mT), (wide(q_transposed, part), v_gradient)

        q_gradient, tiles = jax.lax.scan(column, jnp.zeros(q.shape, jnp.float32), (k, v, bias))
        return jax.tree.map(jnp.add, carry, tiles), q_gradient.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (k_gradient, v_gradient), q_gradient = jax.lax.scan(row, (zeros, zeros), (q, out, log_total, gradient))
    no_bias = None if bias is None else jnp.zeros_like(bias)
    return q_gradient, k_gradient.astype(k.dtype), v_gradient.mT.astype(v.dtype), no_bias


_tiles.defvjp(_keep, _backward)
