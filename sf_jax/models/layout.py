"""The positions of a call's tokens in the video, and what they attend to."""

import flax.struct
import jax
import numpy as np

from sf_jax.models import attention
from sf_jax.models.kv_cache import KeysValues


@flax.struct.dataclass
class SlotPlace:
    """Where a call with `slots.Slots` writes its own keys and values, and which it sees.

    Attributes:
      rows: int32 [parts], the first row of each of the equal parts of the own tokens.
      count: int32, number of visible rows; they are the first ones and include the own.
      endless: whether positions have no limit, see `rope.endless_rotation` (static).
    """

    rows: jax.Array
    count: jax.Array
    endless: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Layout:
    """The positions of one call's tokens in the video, and what they attend to.

    Attributes:
      frames: int [F], positions of the own frames, those being processed (numpy if static).
      context_frames: int [S], positions of the context's frames, or None without context.
      context_mask: bool [S], usable context frames, or None if all are usable.
      mask_is_prefix: whether the usable context frames come first (static); kernels then need no mask.
      prefixes: context lengths for which attention is compiled if `pattern` is `cached` (static, ascending). A call
        uses the shortest that holds all usable frames. Empty: all frames.
      prefixes_masked: whether the number of usable frames can differ from every length in `prefixes` (static).
      pattern: which own and context frames each query frame sees (static).
      straight_through: index of the context frame that is own frame 0 (static). The context's keys and values keep
        their values, but their gradient goes to the own keys and values of the same frames. None: context is constant.
      sink: number of sink frames that `sink_shifts` moves (static).
      sink_shifts: number of frames by which the sink's keys move for each group of `pattern`, so that the sink stays
        right before the group's window; `frames` and `context_frames` are then numpy. Empty: no shift (static).
      keys_only: bool scalar, whether a call with `slots.Slots` needs only its keys and values. The last block then
        skips the rest, and the flow is meaningless. None: it needs everything.
      place: where a call with slots that outlive the chunk writes; None: to the first slots, see `slots.take_apart`.
      most: int32, upper bound of the keys that a query sees, its own included, the same for a whole batch even under
        `vmap`; the usable keys then come first. Attention reads no keys behind it. None: no bound.
    """

    frames: jax.Array | np.ndarray
    context_frames: jax.Array | np.ndarray | None = None
    context_mask: jax.Array | None = None
    pattern: attention.Pattern = flax.struct.field(pytree_node=False, default=())
    straight_through: int | None = flax.struct.field(pytree_node=False, default=None)
    mask_is_prefix: bool = flax.struct.field(pytree_node=False, default=False)
    prefixes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    prefixes_masked: bool = flax.struct.field(pytree_node=False, default=False)
    sink: int = flax.struct.field(pytree_node=False, default=0)
    sink_shifts: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    keys_only: jax.Array | None = None
    place: SlotPlace | None = None
    most: jax.Array | None = None


@flax.struct.dataclass
class Shared:
    """What all blocks of one call read: positions as rotations, and `Layout`'s other fields.

    `stack` has the keys and values of all layers, if blocks slice theirs out of them (`kv_cache.OneLayer`).
    """

    modulation: jax.Array
    own_rotation: jax.Array
    context_rotation: jax.Array | None
    context_mask: jax.Array | None
    sink_rotations: tuple[jax.Array | None, ...]
    keys_only: jax.Array | None
    place: SlotPlace | None
    most: jax.Array | None
    stack: KeysValues | None
    frames: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    context_frames: tuple[int, ...] | None = flax.struct.field(pytree_node=False)
    pattern: attention.Pattern = flax.struct.field(pytree_node=False)
    tokens: int = flax.struct.field(pytree_node=False)
    straight_through: int | None = flax.struct.field(pytree_node=False)
    mask_is_prefix: bool = flax.struct.field(pytree_node=False)
    prefixes: tuple[int, ...] = flax.struct.field(pytree_node=False)
    prefixes_masked: bool = flax.struct.field(pytree_node=False)
    implementation: str = flax.struct.field(pytree_node=False)
    return_kv: bool = flax.struct.field(pytree_node=False)


def bidirectional_layout(frames: int) -> Layout:
    """The layout of teacher and critic, in which all frames see all frames."""
    return Layout(frames=np.arange(frames), pattern=attention.bidirectional(frames))
