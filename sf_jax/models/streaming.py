"""Shared by networks over streamed video: the cache of past frames, and convolutions that look back in time.

A network that is causal in time can process a video piece by piece. Each layer that looks back needs its last few input
frames. They are the explicit state of the stream, a `StreamCache`.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class StreamCache:
    """The past frames that a network keeps; the shapes do not depend on the chunks.

    Attributes:
      frames: one array [B, k, H, W, C] per layer that looks back, its last input frames, in the network's order.
      started: whether the video's first frame has been processed (static).
    """

    frames: tuple[jax.Array, ...]
    started: bool = flax.struct.field(pytree_node=False, default=False)


class Past:
    """The past frames of one call, layer by layer: returns the old frames in order and collects the new ones.

    Attributes:
      first: whether the call processes the video's first latent frame.
      new: the frames for the next call's `Past`.
    """

    def __init__(self, frames: Sequence[jax.Array] | None, first: bool):
        """Starts from the previous call's `new` frames; None means zeros."""
        self._old = None if frames is None else iter(frames)
        self.first = first
        self.new: list[jax.Array] = []

    def extend(self, x: jax.Array, count: int) -> jax.Array:
        """Prepends the layer's last `count` frames to `x` [B, n, H, W, C]; returns [B, count + n, H, W, C]."""
        x = jnp.concatenate([self._next(x, count), x], axis=1)
        self.new.append(x[:, -count:])
        return x

    def extend_known(self, x: jax.Array, count: int) -> jax.Array:
        """`extend` for a `Conv`, which needs nothing before the video's first frame."""
        extended = self.extend(x, count)
        return x if self.first else extended

    def skip(self, x: jax.Array, count: int) -> None:
        """Skips a layer with input `x` and keeps its past unchanged."""
        self.new.append(self._next(x, count))

    def _next(self, x, count):
        return jnp.zeros((x.shape[0], count, *x.shape[2:]), x.dtype) if self._old is None else next(self._old)


def run_stream(
    network: nn.Module, cache: StreamCache | None, x: jax.Array, group: int = 1
) -> tuple[StreamCache, jax.Array]:
    """Runs a causal network over the next frames of a video: a video's first frame alone, then group by group.

    `scan` runs one group at a time. Memory does not grow with the number of frames, and every group goes through the
    same operations on the same shapes, however many frames there are.

    Args:
      network: called with frames [B, 1 (the video's first) or group, H, W, C] and a `Past`.
      cache: the cache returned by the previous call; None for a new video.
      x: [B, n, H, W, C] frames; n is a multiple of `group`, plus one at the start of a video.
      group: number of frames that the network processes at once.

    Returns:
      The new cache, and the outputs [B, m, H', W', C'] of all frames.
    """
    frames, outputs = None if cache is None else cache.frames, []
    if cache is None or not cache.started:
        past = Past(frames, first=True)
        outputs.append(network(x[:, :1], past))
        frames, x = tuple(past.new), x[:, 1:]
    if x.shape[1]:

        def step(network, frames, x):
            past = Past(frames, first=False)
            out = network(x, past)
            return tuple(past.new), out

        scan = nn.scan(
            step,
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
            check_constancy_invariants=network.is_initializing(),  # the check traces every group twice
        )
        frames, out = scan(network, frames, x.reshape(x.shape[0], -1, group, *x.shape[2:]))
        outputs.append(out.reshape(out.shape[0], -1, *out.shape[3:]))
    out = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
    return StreamCache(frames, started=True), out


def check_latents(shape: tuple[int, ...], z_dim: int, cache: StreamCache | None = None) -> None:
    """Checks the shape of latents for a decoder, and against the video size of the cache.

    Raises:
      ValueError: if the shape is wrong; names the shape and the expected one.
    """
    if len(shape) != 5 or shape[-1] != z_dim or shape[1] < 1:
        raise ValueError(f"latents have the shape {tuple(shape)}: it must be [B, F, H, W, {z_dim}] with F >= 1")
    if cache is not None:
        batch, _, height, width, _ = cache.frames[0].shape
        if (batch, height, width) != (shape[0], *shape[2:4]):
            raise ValueError(
                f"latents have the shape {tuple(shape)}: the cache is for B = {batch}, H = {height}, W = {width}"
            )


def empty_decode_cache(model: nn.Module, batch: int, height: int, width: int) -> StreamCache:
    """The cache of zeros before a video's first frame.

    Args:
      model: a `WanVae` or a `TinyVaeDecoder`.
      batch: number of videos decoded together.
      height: latent rows.
      width: latent columns.
    """
    shapes = _cache_shapes(model, batch, height, width)
    return StreamCache(tuple(jnp.zeros(shape.shape, shape.dtype) for shape in shapes))


@functools.lru_cache(maxsize=16)
def _cache_shapes(model, batch, height, width):
    """Shapes of the cache after a video's first latent frame; memoized, as tracing a large decoder takes seconds."""
    latents = jax.ShapeDtypeStruct((batch, 1, height, width, model.config.z_dim), jnp.float32)
    run = functools.partial(model.init_with_output, jax.random.key(0), None, method="stream")
    return jax.eval_shape(run, latents)[0][0].frames


class Conv(nn.Module):
    """A convolution over [frames,] rows and columns: `kernel` [*window, in, out] and `bias` [out] are float32.

    Rows and columns are zero-padded to keep their size if `stride` is 1; with a stride of 2, the padding is one row
    below and one column to the right. Frames are not padded (see `Past`). If the input has fewer frames than the
    window, the missing ones lie before the video: they are zeros, and the convolution skips them.
    """

    features: int
    window: tuple[int, ...]
    dtype: str
    stride: int = 1
    frame_stride: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, F, H, W, C_in] to [B, max(F - (kt - 1), 1), H, W, features]; strides divide H, W and frames."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.window, x.shape[-1], self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if set(self.window) == {1}:
            x = jnp.matmul(x, kernel.reshape(kernel.shape[-2:]))
        elif len(self.window) == 2:
            x = self._plane(x, kernel)
        elif x.shape[1] == 1:
            x = self._plane(x, kernel[-1])
        else:
            kernel = kernel[-x.shape[1] :]
            if self.is_initializing():  # only the shapes matter, and this traces faster
                x = self._volume(x, kernel)
            else:
                x = jax.lax.platform_dependent(x, kernel, cpu=self._by_planes, default=self._volume)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return x

    def _padding(self):
        if self.stride == 2:
            return ((0, 1), (0, 1))
        return tuple((size // 2, size // 2) for size in self.window[-2:])

    def _plane(self, x, kernel):
        """2D convolution of every frame; `kernel` [kh, kw, in, out]."""
        frames = x.reshape(-1, *x.shape[2:])
        out = jax.lax.conv_general_dilated(
            frames, kernel, (self.stride,) * 2, self._padding(), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out.reshape(*x.shape[:2], *out.shape[1:])

    def _volume(self, x, kernel):
        strides, padding = (self.frame_stride, self.stride, self.stride), ((0, 0), *self._padding())
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))

    def _by_planes(self, x, kernel):
        """The 3D convolution as a sum of 2D ones, because XLA's 3D convolution is slow on CPUs."""
        span = x.shape[1] - len(kernel) + 1
        if len(kernel) == 3 and self.frame_stride == 1 and span % 2 == 0 and self.dtype == "float32":
            return self._by_pairs(x, kernel)
        return sum(self._plane(x[:, k : k + span : self.frame_stride], kernel[k]) for k in range(len(kernel)))

    def _by_pairs(self, x, kernel):
        """Two frames from four 2D convolutions instead of six, by Winograd's F(2, 3) in time (arXiv 1509.09308)."""
        even, odd = x[:, 0::2], x[:, 1::2]
        a, b, c, d = even[:, :-1], odd[:, :-1], even[:, 1:], odd[:, 1:]
        ends, middle = (kernel[0] + kernel[2]) / 2, kernel[1] / 2
        first, plus, minus, last = (
            self._plane(frames, tap)
            for frames, tap in ((a - c, kernel[0]), (b + c, ends + middle), (c - b, ends - middle), (b - d, kernel[2]))
        )
        out = jnp.stack([first + plus + minus, plus - minus - last], axis=2)
        return out.reshape(x.shape[0], -1, *out.shape[3:])


def split_frames(x: jax.Array, count: int) -> jax.Array:
    """[B, n, H, W, count*C] to [B, count*n, H, W, C]: the first C channels are the earliest frame."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, count, channels // count).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(batch, frames * count, height, width, channels // count)


def double_size(x: jax.Array) -> jax.Array:
    """Nearest-neighbor upsampling, [B, n, H, W, C] to [B, n, 2H, 2W, C]."""
    batch, frames, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, :, None, :, None], (batch, frames, height, 2, width, 2, channels))
    return x.reshape(batch, frames, 2 * height, 2 * width, channels)
