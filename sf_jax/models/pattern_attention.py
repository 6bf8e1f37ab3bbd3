"""Self-attention by patterns, which select the own and cached keys of each group of queries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models import attention, rope
from sf_jax.models.kv_cache import KeysValues, OneLayer
from sf_jax.models.tiled_attention import bounded_attention

# Up to this many logits (in elements), masking empty context is cheaper than one copy of the attention per length.
PREFIX_LOGITS = 1 << 19


def pattern_attention(q, k, v, context, shared):
    """Self-attention [B, T, N, D] of the pattern's groups over own and context frames."""
    tokens = shared.tokens
    own_k = rope.rotate(k, shared.own_rotation)
    q = rope.rotate(q, shared.own_rotation)
    mask = shared.context_mask
    if context is not None and shared.prefixes:
        keys = shared.prefixes[-1] * tokens + k.shape[1]
        if len(shared.prefixes) == 1 or q.shape[0] * q.shape[2] * q.shape[1] * keys > PREFIX_LOGITS:
            return _prefix_attention(q, own_k, v, context, shared)
    if isinstance(context, OneLayer):  # a small call reads all of it
        context = KeysValues(*context.first(len(shared.context_mask) * tokens))
    if context is not None and shared.most is not None:
        return _stream_attention(q, own_k, v, context, shared)
    if mask is not None:
        mask = mask.sum(dtype=jnp.int32) * tokens if shared.mask_is_prefix else jnp.repeat(mask, tokens)
    if context is not None:
        context_k, context_v = context.k.astype(k.dtype), context.v.astype(v.dtype)
        if shared.straight_through is not None:
            context_k = _straight_through(context_k, k, shared.straight_through * tokens)
            context_v = _straight_through(context_v, v, shared.straight_through * tokens)
        plain, context_k = context_k, rope.rotate(context_k, shared.context_rotation)
    outputs = []
    for index, group in enumerate(shared.pattern):
        segments = []
        turned = shared.sink_rotations[index] if shared.sink_rotations else None
        for start, stop, moved in _split_at_sink(group.context, shared.context_frames, turned, tokens):
            part = slice(start * tokens, stop * tokens)
            keys = context_k[:, part] if moved is None else rope.rotate(plain[:, part], moved)
            segments.append((keys, context_v[:, part], _part_of_mask(mask, part)))
        for start, stop, moved in _split_at_sink(group.own, shared.frames, turned, tokens):
            part = slice(start * tokens, stop * tokens)
            keys = own_k[:, part] if moved is None else rope.rotate(k[:, part], moved)
            segments.append((keys, v[:, part], None))
        start, stop = group.queries
        outputs.append(attention.attend(q[:, start * tokens : stop * tokens], segments, shared.implementation))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def _prefix_attention(q, own_k, v, context, shared):
    """Self-attention of one chunk over itself and the first context frames, up to the last usable one."""
    tokens, prefixes, mask = shared.tokens, shared.prefixes, shared.context_mask
    used = jnp.max(jnp.where(mask, jnp.arange(1, len(mask) + 1), 0), initial=0)

    def attend(segments):
        return attention.attend(q, [*segments, (own_k, v, None)], shared.implementation)

    def first(count, masked):
        part = slice(count * tokens)
        context_k, context_v = context.first(count * tokens)
        context_k, context_v = context_k.astype(own_k.dtype), context_v.astype(v.dtype)
        hidden = None
        if not shared.mask_is_prefix:
            hidden = jnp.repeat(mask[:count], tokens)
        elif masked:
            hidden = used * tokens
        return rope.rotate(context_k, shared.context_rotation[:, part]), context_v, hidden

    if not prefixes[-1]:
        return attend([])
    whole = jax.eval_shape(lambda: first(prefixes[-1], masked=True))
    if attention.choose(shared.implementation, q, [whole, (own_k, v, None)]) == "cudnn":
        return attend([first(prefixes[-1], masked=True)])  # reads only as many keys as the length says
    # If `prefixes` has every possible length, nothing needs a mask.
    branches = [
        functools.partial(lambda n: attend([first(n, shared.prefixes_masked)] if n else []), count)
        for count in prefixes
    ]
    return jax.lax.switch(jnp.searchsorted(np.asarray(prefixes), used), branches)


def _stream_attention(q, own_k, v, context, shared):
    """Self-attention of one chunk over itself and the cache of its stream, up to `Layout.most`."""
    used, own = shared.context_mask.sum(dtype=jnp.int32) * shared.tokens, (own_k, v, None)
    chosen = attention.choose(shared.implementation, q, [own, (context.k, context.v, used)])
    if attention.in_tiles(chosen, q, [own, (context.k,)], bounded=True):
        segments = [(*own, None), (context.k, context.v, used, shared.context_rotation)]
        return bounded_attention(q * q.shape[-1] ** -0.5, segments, shared.most)
    context_k = rope.rotate_constant(context.k.astype(own_k.dtype), shared.context_rotation)
    return attention.attend(q, [own, (context_k, context.v.astype(v.dtype), used)], chosen, most=shared.most)


def _split_at_sink(ranges, frames, moved, tokens):
    """Splits ranges of keys at the sink's borders; returns (start, stop, new rotation or None) for each part.

    `moved` is the rotation of the sink's keys for the group that reads them; None leaves the sink unchanged.
    """
    if moved is None:
        return [(start, stop, None) for start, stop in ranges]
    parts, sink = [], moved.shape[1] // tokens
    for start, stop in ranges:
        border = start + sum(frame < sink for frame in frames[start:stop])
        if border > start:
            first = frames[start]
            turned = moved[:, first * tokens : (first + border - start) * tokens]
            parts.append((start, border, turned))
        if stop > border:
            parts.append((border, stop, None))
    return parts


def _part_of_mask(mask, part):
    """The mask, or count of visible keys, for a slice of the context."""
    if mask is None or mask.ndim:
        return None if mask is None else mask[part]
    return jnp.clip(mask - part.start, 0, part.stop - part.start)


def _straight_through(context, own, start):
    """The context's values with the gradient of `own`, whose first token is token `start` of the context."""
    count = min(own.shape[1], context.shape[1] - start)
    own = own[:, :count]
    fixed = jax.lax.stop_gradient(context)
    # Not `own + (fixed - own)`, which rounds: the values must be exactly those of the clean pass.
    passed = fixed[:, start : start + count] + (own - jax.lax.stop_gradient(own))
    return jnp.concatenate([fixed[:, :start], passed, fixed[:, start + count :]], axis=1)
