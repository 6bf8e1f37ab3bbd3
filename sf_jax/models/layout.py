"""Where the tokens of a call are in the video, and what they may see."""

import flax.struct
import jax
import numpy as np

from sf_jax.models import attention


@flax.struct.dataclass
class Layout:
    """Where the tokens of one call are in the video, and what they may see.

    Attributes:
      frames: int [F], positions of the own frames (numpy where static).
      context_frames: int [S], positions of the context's frames, or None without context.
      context_mask: bool [S] of usable context frames, or None where all are.
      mask_is_prefix: whether the usable context frames are the first ones (static); kernels then need no mask.
      prefixes: lengths of context to which attention is compiled (static, ascending) where `pattern` is `cached`: a
        call computes nothing behind the shortest that holds all usable frames. Empty: all frames.
      prefixes_masked: whether the usable frames can be the first ones, but not as many as one of those (static).
      pattern: which own and context frames each query frame sees (static).
      straight_through: index of the context frame that is own frame 0 (static). The context's keys and values then have
        their values, but their gradient goes to the own keys and values of the same frames. None: context is constant.
      sink: frames below this number are the sink where `sink_shifts` moves them (static).
      sink_shifts: by how many frames the sink's keys are moved for each group of `pattern`, so that it stays right
        before the group's window; `frames` and `context_frames` are then numpy. Empty: not at all (static).
      keys_only: bool scalar, whether a call with slots is for its keys and values alone: the last block then does
        nothing else, and the flow means nothing. None: it is not.
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


def bidirectional_layout(frames: int) -> Layout:
    """All frames see all frames: teacher and critic."""
    return Layout(frames=np.arange(frames), pattern=attention.bidirectional(frames))
