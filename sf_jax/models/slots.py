"""Per-layer keys and values of one chunk and its context, read in place.

For networks with separate parameters per layer (`WanConfig.scan_layers` is False). Attention reads one array per layer,
without concatenating arrays or slicing layers out of a stack. The slots are those of a `slot_cache.SlotCache`, which
stay where they are, or copies of a `KVCache` for the calls of one chunk (`take_apart`), such as one of 8 bits.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sf_jax.models import attention, rope
from sf_jax.models.eight_bit import Scaled
from sf_jax.models.kv_cache import KeysValues, KVCache
from sf_jax.models.layout import SlotPlace
from sf_jax.models.partition import constrain

QKV = ("q", "k", "v")


@flax.struct.dataclass
class Slots:
    """The keys and values of one layer.

    Attributes:
      k: [B, rows, N, D] keys with rotary embedding. From `take_apart`: of the n own frames, then of the cached ones.
      v: values of the same frames.
      projected: [B, n * tokens, dim] output of the key projection for the own tokens, which `KVCache` stores
        normalized; `WanTransformer.own_keys_values` normalizes it once per chunk. None if the slots are the cache.
      text: prompt keys and values [B, S, N, D].
      heads_first: whether keys and values are [B, N, rows, D] instead, as Splash reads them (static).
    """

    k: jax.Array
    v: jax.Array
    projected: jax.Array | None
    text: KeysValues
    heads_first: bool = flax.struct.field(pytree_node=False, default=False)

    def put(self, rotated_k: jax.Array, projected: jax.Array, v: jax.Array, place: SlotPlace | None) -> "Slots":
        """Writes the own rotated keys and values [B, n * tokens, N, D]; without `place` also keeps `projected`."""
        if place is None:
            k, v = (put_rows(old, new, 0) for old, new in ((self.k, rotated_k), (self.v, v)))
            return self.replace(k=k, v=v, projected=projected)
        k, values, part = self.k, self.v, v.shape[1] // len(place.rows)
        for i, row in enumerate(place.rows):
            own = slice(i * part, (i + 1) * part)
            k = put_rows(k, rotated_k[:, own], row, self.heads_first)
            values = put_rows(values, v[:, own], row, self.heads_first)
        return self.replace(k=k, v=values)


def put_rows(old: jax.Array, new: jax.Array, row: jax.Array | int, heads_first: bool = False) -> jax.Array:
    """Keys or values of slots, see `Slots`, with the rows from `row` on replaced by `new` [B, T, N, D]."""
    new = new.astype(old.dtype)
    if heads_first:
        return jax.lax.dynamic_update_slice(old, new.transpose(0, 2, 1, 3), (0, 0, row, 0))
    return jax.lax.dynamic_update_slice(old, new, (0, row, 0, 0))


def get_rows(slots: jax.Array, row: jax.Array | int, count: int, heads_first: bool = False) -> jax.Array:
    """`count` rows [B, count, N, D] of keys or values of slots, from `row` on."""
    if heads_first:
        return jax.lax.dynamic_slice_in_dim(slots, row, count, axis=2).transpose(0, 2, 1, 3)
    return jax.lax.dynamic_slice_in_dim(slots, row, count, axis=1)


def take_apart(
    cache: KVCache, text: KeysValues, rotation: jax.Array, own: int, seen: int, multiple: int = 1
) -> tuple[Slots, ...]:
    """Makes the slots of every layer for a chunk; its own slots are still empty.

    Args:
      cache: keys and values [L, B, capacity * tokens, N, D].
      text: prompt keys and values [L, B, S, N, D].
      rotation: [2, capacity * tokens, D/2], rotations of the cached frames as this chunk sees them.
      own: number of tokens of the chunk.
      seen: number of the cache's first slots that the chunk can see.
      multiple: the number of keys is padded to a multiple of this, see `attention.key_multiple`.
    """
    tokens = seen * cache.tokens_per_frame

    def slots(layer):
        k, v = (a[layer, :, :tokens].astype(text.k.dtype) for a in (cache.k, cache.v))
        room, tail = (jnp.zeros((len(k), n, *k.shape[2:]), k.dtype) for n in (own, -(own + tokens) % multiple))
        k, v = (
            constrain(jnp.concatenate([room, a, tail], axis=1), "batch", None, "heads", None)
            for a in (rope.rotate_constant(k, rotation[:, :tokens]), v)
        )
        projected = jnp.zeros((*room.shape[:2], room.shape[2] * room.shape[3]), text.k.dtype)
        return Slots(k, v, projected, jax.tree.map(lambda a: a[layer], text))

    return tuple(slots(layer) for layer in range(cache.k.shape[0]))


def slot_attention(q: jax.Array, slots: Slots, shared: Any) -> jax.Array:
    """Self-attention [B, T, N, D] of one chunk's queries (without rotary embedding) over its slots."""
    own, tokens = len(shared.own_rotation[0]), shared.tokens
    if shared.place is not None:
        mask = shared.place.count
    elif shared.mask_is_prefix:
        mask = own + shared.context_mask.sum(dtype=jnp.int32) * tokens
    else:
        mask = jnp.concatenate([jnp.ones(own, bool), jnp.repeat(shared.context_mask, tokens)])
        mask = jnp.pad(mask, (0, max(0, slots.k.shape[1] - len(mask))))[: slots.k.shape[1]]
    k, v = (a.transpose(0, 2, 1, 3) if slots.heads_first else a for a in (slots.k, slots.v))
    segment = (k.astype(q.dtype), v.astype(q.dtype), mask)
    q = rope.rotate_constant(q, shared.own_rotation)
    most = mask if shared.most is None and not mask.ndim else shared.most
    return attention.attend(q, [segment], shared.implementation, most=most)


def unstack_layers(params: dict, delete: bool = False, fuse: bool = False) -> dict:
    """Parameters for `scan_layers=False` from stacked ones.

    Args:
      params: stacked parameters, as files and training have them.
      delete: whether to free each stack once it is copied.
      fuse: whether to join self-attention's projections of queries, keys and values, see `Attention.projections`.
    """
    blocks = flatten_dict(params["blocks"])
    layers = len(jax.tree.leaves(blocks)[0])
    parts = [{} for _ in range(layers)]
    for path, stack in blocks.items():
        for layer, part in enumerate(parts):
            part[path] = jax.tree.map(lambda a, layer=layer: a[layer], stack)
        if delete:
            jax.tree.map(lambda a: a.delete(), stack)
    apart = {name: value for name, value in params.items() if name != "blocks"}
    for layer in range(layers):
        block = unflatten_dict(parts[layer])
        parts[layer] = None  # frees the three projections of a layer once they are joined
        apart[f"blocks_{layer}"] = _fused(block) if fuse else block
    return apart


def _fused(block):
    """A block's parameters with one projection `qkv` in place of self-attention's three."""
    parts = [block["self_attn"].pop(name) for name in QKV]

    def joined(*parts):
        if isinstance(parts[0], Scaled):  # [out, in]
            return jax.tree.map(lambda *arrays: jnp.concatenate(arrays, axis=0), *parts)
        return jnp.concatenate(parts, axis=-1)

    block["self_attn"]["qkv"] = jax.tree.map(joined, *parts, is_leaf=lambda x: isinstance(x, Scaled))
    return block


def split_projections(params: dict) -> dict:
    """Parameters whose separate layers have three projections again, where `unstack_layers` has joined them."""
    return {name: _split(value) if name.startswith("blocks_") else value for name, value in params.items()}


def _split(block):
    rest = dict(block["self_attn"])
    if "qkv" not in rest:
        return block

    def parts(whole):
        if isinstance(whole, Scaled):
            return jax.tree.map(lambda a: jnp.stack(jnp.split(a, 3, axis=0)), whole)
        return jnp.stack(jnp.split(whole, 3, axis=-1))

    stacks = jax.tree.map(parts, rest.pop("qkv"), is_leaf=lambda x: isinstance(x, Scaled))
    return block | {"self_attn": rest | {name: jax.tree.map(lambda a, i=i: a[i], stacks) for i, name in enumerate(QKV)}}


def stack_layers(params: dict) -> dict:
    """Inverse of `unstack_layers`: parameters for `scan_layers=True`, the form used by files and training."""
    names = [f"blocks_{i}" for i in range(sum(name.startswith("blocks_") for name in params))]
    layers = [_split(params[name]) for name in names]
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    return rest | {"blocks": jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)}
