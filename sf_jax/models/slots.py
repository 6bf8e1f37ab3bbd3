"""Per-layer keys and values of one chunk and its context, read in place.

For networks with separate parameters per layer (`WanConfig.scan_layers` is False). Every call for the chunk writes its
own keys and values to the first slots. The cached ones follow, with keys rotated once for all calls. Attention then
reads one array, without concatenating arrays or slicing layers out of a stack.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sf_jax.models import attention, rope
from sf_jax.models.kv_cache import KeysValues, KVCache
from sf_jax.models.partition import constrain


@flax.struct.dataclass
class Slots:
    """The keys and values of one layer.

    Attributes:
      k: [B, (n + m) * tokens + padding, N, D] keys with rotary embedding: of the n own frames, then of m cached ones.
      v: values of the same frames.
      projected: [B, n * tokens, dim] output of the key projection for the own tokens. The cache stores it normalized;
        `WanTransformer.own_keys_values` normalizes it once per chunk.
      text: prompt keys and values [B, S, N, D].
    """

    k: jax.Array
    v: jax.Array
    projected: jax.Array
    text: KeysValues

    def put(self, rotated_k: jax.Array, projected: jax.Array, v: jax.Array) -> "Slots":
        """Writes the own rotated keys and values [B, n * tokens, N, D], and stores the key projection's output."""

        def front(old, new):
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, 0, 0))

        return self.replace(k=front(self.k, rotated_k), v=front(self.v, v), projected=projected)


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
    own, tokens = slots.projected.shape[1], shared.tokens
    if shared.mask_is_prefix:
        mask = own + shared.context_mask.sum(dtype=jnp.int32) * tokens
    else:
        mask = jnp.concatenate([jnp.ones(own, bool), jnp.repeat(shared.context_mask, tokens)])
        mask = jnp.pad(mask, (0, max(0, slots.k.shape[1] - len(mask))))[: slots.k.shape[1]]
    segment = (slots.k.astype(q.dtype), slots.v.astype(q.dtype), mask)
    return attention.attend(rope.rotate_constant(q, shared.own_rotation), [segment], shared.implementation)


def unstack_layers(params: dict, delete: bool = False) -> dict:
    """Parameters for `scan_layers=False` from stacked ones; `delete` frees each stack once it is copied."""
    blocks = flatten_dict(params["blocks"])
    layers = len(jax.tree.leaves(blocks)[0])
    parts = [{} for _ in range(layers)]
    for path, stack in blocks.items():
        for layer, part in enumerate(parts):
            part[path] = jax.tree.map(lambda a, layer=layer: a[layer], stack)
        if delete:
            jax.tree.map(lambda a: a.delete(), stack)
    rest = {name: value for name, value in params.items() if name != "blocks"}
    return rest | {f"blocks_{layer}": unflatten_dict(part) for layer, part in enumerate(parts)}


def stack_layers(params: dict) -> dict:
    """Inverse of `unstack_layers`: parameters for `scan_layers=True`, the form used by files and training."""
    layers = [params[f"blocks_{i}"] for i in range(sum(name.startswith("blocks_") for name in params))]
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    return rest | {"blocks": jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)}
