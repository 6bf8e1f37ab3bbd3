"""Attention patterns and the attention itself.

A pattern defines statically, in whole frames, which keys each group of queries attends to. The keys of a call are its
*own* (of the tokens being processed) and, optionally, *context* (from a cache). All patterns of Self Forcing
(bidirectional, block-causal, teacher-forcing, cached, replay) are values of one type and run through one function. It
slices instead of masking, so hidden blocks are never computed.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sf_jax.models import attention_kernels, partition
from sf_jax.models.tiled_attention import HIDDEN, RESIDUALS, bounded_attention, tiled_attention

Range = tuple[int, int]
Segment = tuple[jax.Array, jax.Array, jax.Array | None]
IMPLEMENTATIONS = ("auto", "xla", "whole", "cudnn", "splash")
# Calls with more logits (in elements) run in tiles. Above 16 MB CPUs slow down, as all logits go to new memory pages.
MAX_LOGITS = {"cpu": 1 << 22}
MAX_LOGITS_ELSEWHERE = 1 << 25
# The same if tiles can be skipped, see `attend`.
MAX_BOUNDED_LOGITS = {"cpu": 1 << 18}
# Most latent frames to split into chunks, two days of video. Positions have a lower limit unless they are relative.
MAX_FRAMES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Group:
    """Query frames [start, stop) of the own tokens, and the ranges of own and context frames they attend to."""

    queries: Range
    own: tuple[Range, ...]
    context: tuple[Range, ...] = ()


Pattern = tuple[Group, ...]


def chunk_bounds(chunks: Sequence[int]) -> list[Range]:
    """Frame ranges of consecutive chunks: `(1, 3, 3)` gives `[(0, 1), (1, 4), (4, 7)]`."""
    stops = np.cumsum(chunks).tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def split_chunks(frames: int, chunk: int, first_frame_alone: bool = False) -> tuple[int, ...]:
    """Splits `frames` latent frames into chunks; the first may be a single frame (image-to-video models).

    Raises:
      ValueError: if the frames cannot be split this way.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: it must be at least 1 latent frame")
    if frames > MAX_FRAMES:
        raise ValueError(f"frames is {frames}: it must be at most {MAX_FRAMES} latent frames")
    rest = frames - 1 if first_frame_alone else frames
    if frames < 1 or rest % chunk:
        wanted = f"1 + a multiple of {chunk}" if first_frame_alone else f"a multiple of {chunk}"
        raise ValueError(f"frames is {frames}: with chunk={chunk} it must be {wanted}")
    return ((1,) if first_frame_alone else ()) + (chunk,) * (rest // chunk)


def visible_past(start: int, stop: int, window: int | None, sink: int) -> tuple[Range, ...]:
    """Frames before `start` that the chunk [start, stop) sees: the sink (first frames) and the newest in its window.

    The window includes the sink and the chunk itself, as in the official rolling cache: once there are more than
    `window` frames, a chunk sees the first `sink` frames and the newest `window - sink`.
    """
    oldest = 0 if window is None else max(0, stop - (window - sink))
    if window is None or oldest <= sink:
        ranges = [(0, start)]
    else:
        ranges = [(0, min(sink, start)), (oldest, start)]
    return tuple(r for r in ranges if r[0] < r[1])


def check_window(window: int | None, sink: int, chunks: Sequence[int]) -> None:
    """Checks that the window can hold a chunk and the sink."""
    if window is None:
        if sink:
            raise ValueError(f"sink is {sink} but window is None: a sink needs a window")
        return
    if sink < 0:
        raise ValueError(f"sink is {sink} frames: it must be at least 0")
    if window < max(chunks) + sink:
        raise ValueError(f"window is {window} frames: it must be at least chunk + sink = {max(chunks)} + {sink}")


def bidirectional(frames: int) -> Pattern:
    """Every frame sees every frame."""
    return (Group((0, frames), ((0, frames),)),)


def block_causal(chunks: Sequence[int], window: int | None = None, sink: int = 0) -> Pattern:
    """Each chunk sees itself and the chunks before it (official `_prepare_blockwise_causal_attn_mask` and `_i2v`)."""
    check_window(window, sink, chunks)
    return tuple(
        Group((start, stop), _merge((*visible_past(start, stop, window, sink), (start, stop))))
        for start, stop in chunk_bounds(chunks)
    )


def teacher_forcing(chunks: Sequence[int], window: int | None = None, sink: int = 0) -> Pattern:
    """Own tokens are the clean frames followed by the noisy ones (official `_prepare_teacher_forcing_mask`).

    A noisy chunk sees itself and the clean chunks before it; a clean chunk sees clean chunks up to itself.
    """
    check_window(window, sink, chunks)
    total = sum(chunks)
    noisy = tuple(
        Group(
            (total + start, total + stop),
            (*visible_past(start, stop, window, sink), (total + start, total + stop)),
        )
        for start, stop in chunk_bounds(chunks)
    )
    return block_causal(chunks, window, sink) + noisy


def replay(
    chunks: Sequence[int],
    first: int = 0,
    window: int | None = None,
    sink: int = 0,
    context_frames: int | None = None,
    live: Range | None = None,
) -> Pattern:
    """Chunks `first:` in parallel; each sees itself and the *context* (clean) frames of the chunks before it.

    Args:
      chunks: sizes of all chunks of the video.
      first: index of the first chunk to process; its first frame is the first own frame after `live`.
      window: as in `visible_past`.
      sink: as in `visible_past`.
      context_frames: number of frames in the context; None means all.
      live: clean frames [begin, end), whole chunks, to process as well. They are the first own frames, and later chunks
        see them there instead of in the context, which needs only the frames before `begin`.
    """
    check_window(window, sink, chunks)
    bounds = chunk_bounds(chunks)
    begin, end = live or (bounds[first][0],) * 2

    def group(start, stop, place):
        """The group of frames [start, stop), which are own frames from `place` on."""
        past = visible_past(start, stop, window, sink)
        before = tuple((a, min(b, begin)) for a, b in past if a < begin) if end > begin else past
        if context_frames is not None and any(r[1] > context_frames for r in before):
            raise ValueError(f"the context holds {context_frames} frames, chunk [{start}, {stop}) needs {before}")
        seen = tuple((max(a, begin) - begin, b - begin) for a, b in past if b > begin) if end > begin else ()
        own = (place, place + stop - start)
        return Group(own, _merge((*seen, own)), before)

    clean = tuple(group(start, stop, start - begin) for start, stop in bounds if begin <= start and stop <= end)
    places = end - begin - bounds[first][0]
    return clean + tuple(group(start, stop, places + start) for start, stop in bounds[first:])


def cached(frames: int, context_frames: int) -> Pattern:
    """`frames` new frames see themselves and the whole cache; a run-time mask hides its unused slots."""
    context = ((0, context_frames),) if context_frames else ()
    return (Group((0, frames), ((0, frames),), context),)


def frame_mask(pattern: Pattern, own_frames: int, context_frames: int = 0) -> np.ndarray:
    """The pattern as bool [own_frames, context_frames + own_frames], True where a query frame sees a key frame."""
    mask = np.zeros((own_frames, context_frames + own_frames), bool)
    for group in pattern:
        rows = slice(*group.queries)
        for start, stop in group.context:
            mask[rows, start:stop] = True
        for start, stop in group.own:
            mask[rows, context_frames + start : context_frames + stop] = True
    return mask


def _merge(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Merges adjacent ranges, so that they are read as one slice."""
    merged: list[Range] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def choose(implementation: str, q: jax.Array, segments: Sequence[Segment]) -> str:
    """Resolves "auto": the platform's own kernel if it supports this call, else "xla"."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}: it must be one of {', '.join(IMPLEMENTATIONS)}")
    platform = partition.platform()
    if implementation == "cudnn" and (platform != "gpu" or not attention_kernels.can_cudnn(q, segments)):
        raise ValueError(
            f"attention is 'cudnn' with {q.dtype} heads of {q.shape[-1]} on {platform}: it needs an NVIDIA GPU of "
            "compute capability 8.0 or more, bfloat16, heads of at most 128 and no window in a full cache; 'auto' "
            "takes another where it cannot be"
        )
    if implementation != "auto":
        return implementation
    if platform == "gpu" and attention_kernels.can_cudnn(q, segments):
        return "cudnn"
    return "splash" if platform == "tpu" and q.shape[-1] % attention_kernels.LANES == 0 else "xla"


def key_multiple(implementation: str, dtype: jnp.dtype | str, head_dim: int) -> int:
    """How many keys the kernel reads at once; it copies all of them at every call if they are no multiple of it."""
    head = jax.ShapeDtypeStruct((1, 1, 1, head_dim), jnp.dtype(dtype))
    counted = (head, head, jax.ShapeDtypeStruct((), jnp.int32))
    return attention_kernels.BLOCK if choose(implementation, head, [counted]) == "splash" else 1


def attend(
    q: jax.Array,
    segments: Sequence[Segment],
    implementation: str = "auto",
    max_logits: int | None = None,
    split: str = "heads",
    most: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of `q` over the keys of all segments together.

    Logits and softmax are float32, and nothing of size T x T is stored: "xla" computes in tiles (`tiled_attention`) if
    there are more than `max_logits` logits; the kernels never store them.

    Args:
      q: [B, T, N, D] queries, any float dtype.
      segments: tuples (k [B, S, N, D], v [B, S, N, D], mask); the mask is None, bool [S], or an int32 scalar n for the
        first n keys. At least one key must be visible.
      implementation: "xla" (any device), "whole" ("xla" without tiles: all logits at once), "cudnn" (GPU, 16 bit),
        "splash" (TPU) or "auto".
      max_logits: most logits that "xla" computes at once, and most per tile of a group of heads; None uses the
        backend's defaults.
      split: what the mesh axis `context` splits, in addition to the batch: the "heads", the queries' "tokens", or
        "none", which also keeps all heads on every device.
      most: int32, upper bound of the visible keys, counted over all segments in their order, that is the same for a
        whole batch even under `vmap`. Splash and tiles read no block of keys behind it, which changes no bit of the
        output; such tiles have no gradient. (cuDNN never reads keys behind a count.)

    Returns:
      [B, T, N, D], dtype of `q`.
    """
    chosen = choose(implementation, q, segments)
    if chosen == "cudnn":
        return attention_kernels.cudnn(q, segments, split)
    if chosen == "splash":
        return attention_kernels.splash_attention(q, segments, split, most)
    tiled = in_tiles(chosen, q, segments, max_logits, bounded=most is not None)
    q = q * q.shape[-1] ** -0.5
    if not tiled:
        return _attend_whole(q, segments)
    if most is not None:
        return bounded_attention(q, [(*segment, None) for segment in segments], most, max_logits)
    k, v = (jnp.concatenate([segment[i] for segment in segments], axis=1) for i in (0, 1))
    bias = None
    if any(mask is not None for _, _, mask in segments):
        masks = [jnp.ones(k.shape[1], bool) if mask is None else _mask(k, mask) for k, _, mask in segments]
        bias = jnp.where(jnp.concatenate(masks), 0.0, HIDDEN)
    return tiled_attention(q, k, v, bias, max_logits)


def in_tiles(
    chosen: str, q: jax.Array, segments: Sequence[tuple], max_logits: int | None = None, bounded: bool = False
) -> bool:
    """Whether `attend` computes in tiles; `chosen` is from `choose`, and `bounded` says whether `most` is given."""
    batch, length, heads, _ = q.shape
    keys = sum(segment[0].shape[1] for segment in segments)
    limits = MAX_BOUNDED_LOGITS if bounded else MAX_LOGITS
    whole = max_logits or limits.get(partition.platform(), MAX_LOGITS_ELSEWHERE)
    return chosen == "xla" and batch * heads * length * keys > whole


def _mask(k, mask):
    """Converts a count of keys to a mask; returns a mask unchanged."""
    return mask if mask is None or mask.ndim else jnp.arange(k.shape[1]) < mask


@jax.named_scope("attention_xla")  # lets `perf.traffic` identify the matmuls
def _attend_whole(q, segments):
    """Attention with all logits at once; normalizes after the product with the values."""
    q = q.transpose(0, 2, 1, 3)
    segments = tuple((k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), _mask(k, mask)) for k, v, mask in segments)
    logits = []
    for k, _, mask in segments:
        part = jnp.matmul(q, k, preferred_element_type=jnp.float32)
        logits.append(part if mask is None else jnp.where(mask, part, HIDDEN))
    top = logits[0].max(-1, keepdims=True)
    for part in logits[1:]:
        top = jnp.maximum(top, part.max(-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    total, out = 0.0, 0.0
    for part, (_, v, _) in zip(logits, segments, strict=True):
        weights = jnp.exp(part - top)
        total = total + weights.sum(-1, keepdims=True)
        out = out + jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out, total = (checkpoint_name(a, RESIDUALS) for a in (out, total))
    return (out / total).astype(q.dtype).transpose(0, 2, 1, 3)
