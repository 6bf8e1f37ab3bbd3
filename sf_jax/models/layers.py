"""Layers shared by the transformers: normalization with a cheap backward pass, and the time embedding."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models import eight_bit, partition


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Layer normalization over the last axis without scale or shift, in float32; returns the dtype of `x`.

    The backward pass is written by hand because autodiff's is several times slower on CPUs.
    """
    return _layer_norm_forward(x, eps)[0]


def _layer_norm_forward(x, eps):
    wide = x.astype(jnp.float32)
    centerd = wide - wide.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centerd).mean(-1, keepdims=True) + eps)
    normed = centerd * inverse
    return normed.astype(x.dtype), (normed, inverse)


def _layer_norm_backward(eps, saved, grad):
    normed, inverse = saved
    wide = grad.astype(jnp.float32)
    projected = (wide * normed).mean(-1, keepdims=True)
    out = inverse * (wide - wide.mean(-1, keepdims=True) - normed * projected)
    return (out.astype(grad.dtype),)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


Axes = tuple[str | None, str | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, axes: Axes = (None, None), precision: str | None = None
) -> jax.Array:
    """`x @ kernel + bias` for `x` [..., C_in]; `axes` name the kernel's axes for `partition`.

    The backward pass is written by hand: it is twice as fast on CPUs, and on a mesh it keeps the kernel sharded between
    the passes and shards its gradient as soon as it is computed. `precision` is that of `jax.lax.dot`, in both passes.
    """
    return _linear_forward(x, kernel, bias, axes, precision)[0]


def _linear_forward(x, kernel, bias, axes, precision):
    # Does not call `linear`: policies of `jax.checkpoint` do not see a product inside another custom_vjp.
    y = jnp.matmul(x, partition.gather(kernel, axes), precision=precision)
    return y + partition.gather(bias, axes[1:]), (x, kernel)


def _linear_backward(axes, precision, saved, grad):
    x, kernel = saved
    kernel_grad = _kernel_gradient(x, grad, precision)
    x_grad = jnp.matmul(grad, partition.gather(kernel, axes).T, precision=precision)
    bias_grad = grad.sum(range(grad.ndim - 1))
    return x_grad, partition.scatter(kernel_grad, axes), partition.scatter(bias_grad, axes[1:])


linear.defvjp(_linear_forward, _linear_backward)


def _kernel_gradient(x, grad, precision=None):
    """The gradient [C_in, C_out] of the kernel, from x [..., C_in] and the output's gradient [..., C_out]."""
    if partition.platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        # XLA's CPU compiler transposes `x` if the product sums over several axes. On a mesh, which may split two of
        # them, merging them would move data between devices.
        x, grad = (a.reshape(-1, a.shape[-1]) for a in (x, grad))
    rows = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, grad, ((rows, rows), ((), ())), precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def adapted_linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, down: jax.Array, up: jax.Array, axes: Axes = (None, None)
) -> jax.Array:
    """`x @ (kernel + down @ up) + bias` with a frozen kernel and bias: low-rank adapters (arXiv 2106.09685).

    The sum is rounded only once: in 16 bits, rounding the kernel or `x @ kernel` first would lose a small product.
    `down` is [C_in, r], `up` [r, C_out]; other arguments as in `linear`.
    """
    return _adapted_forward(x, kernel, bias, down, up, axes)[0]


def _adapted_forward(x, kernel, bias, down, up, axes):
    inner = x @ partition.gather(down, (axes[0], None))
    y = jnp.matmul(x, partition.gather(kernel, axes), preferred_element_type=jnp.float32)
    y = y + jnp.matmul(inner, partition.gather(up, (None, axes[1])), preferred_element_type=jnp.float32)
    return (y + partition.gather(bias, axes[1:])).astype(x.dtype), (x, kernel, down, up, inner)


def _adapted_backward(axes, saved, grad):
    x, kernel, down, up, inner = saved
    inner_grad = grad @ partition.gather(up, (None, axes[1])).T
    down_grad, up_grad = _kernel_gradient(x, inner_grad), _kernel_gradient(inner, grad)
    x_grad = grad @ partition.gather(kernel, axes).T + inner_grad @ partition.gather(down, (axes[0], None)).T
    down_grad = partition.scatter(down_grad, (axes[0], None))
    return x_grad, None, None, down_grad, partition.scatter(up_grad, (None, axes[1]))


adapted_linear.defvjp(_adapted_forward, _adapted_backward)


class Linear(nn.Module):
    """A dense layer; `kernel` [in, out] and `bias` [out] are float32 parameters, `dtype` is the compute type.

    `axes` name the kernel's axes for `partition`. `precision` is that of the matmul; by default, GPUs and TPUs round
    the inputs of float32 matmuls to TF32 and bfloat16. If the parameters also hold adapters, `down` [in, r] and `up`
    [r, out], only these are differentiable, see `adapted_linear`. An 8-bit kernel is `eight_bit.Scaled` [out, in].
    """

    features: int
    dtype: str = "float32"
    axes: Axes = (None, None)
    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    precision: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C_in] to [..., features]."""
        narrow = self.get_variable("params", "kernel")
        if isinstance(narrow, eight_bit.Scaled):
            bias = self.param("bias", self.bias_init, (self.features,))
            return eight_bit.linear(x.astype(self.dtype), narrow, bias, self.axes)
        # The kernel first: a parameter's random values depend on the parameters declared before it.
        kernel = partition.fetch(self.param("kernel", self.kernel_init, (x.shape[-1], self.features)))
        bias = self.param("bias", self.bias_init, (self.features,))
        if self.has_variable("params", "down"):
            adapters = (self.get_variable("params", name) for name in ("down", "up"))
            return adapted_linear(*(a.astype(self.dtype) for a in (x, kernel, bias, *adapters)), self.axes)
        return linear(*(a.astype(self.dtype) for a in (x, kernel, bias)), self.axes, self.precision)


# A dense layer in float32 on every device; matrix units of lower precision take three to six passes.
Exact = functools.partial(Linear, dtype="float32", precision="highest")


class LayerNorm(nn.Module):
    """Layer normalization with learned scale and shift (official `norm3`)."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` [..., C]; returns the dtype of `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalization over the channels of all heads together (official `WanRMSNorm`).

    `apart` computes the mean separately. GPUs then fuse the rest with the operations that follow (rotary embedding,
    cache write), instead of writing the normalized numbers to memory and reading them back.
    """

    eps: float
    apart: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes `x` [..., C] in float32; returns the dtype of `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        wide = wide * (jax.lax.optimization_barrier(inverse) if self.apart else inverse)
        return (wide * scale).astype(x.dtype)


def time_features(t: jax.Array, dim: int) -> jax.Array:
    """Sinusoidal features of timesteps (official `sinusoidal_embedding_1d`, which uses float64).

    The integer and fractional parts of `t` are multiplied separately, with the frequency split in two, so that in
    float32 the angle of t = 1000 is as exact as that of t = 1.

    Args:
      t: float [...], timesteps in [0, 1024).
      dim: even number of features.

    Returns:
      float32 [..., dim]: cosines, then sines.
    """
    turns = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2)) / (2 * np.pi)
    scale = 2.0 ** (12 - np.ceil(np.log2(turns)))
    high = np.floor(turns * scale) / scale  # 12 bits: its product with a 10-bit integer is exact in float32
    low = (turns - high).astype(np.float32)
    t = t.astype(jnp.float32)[..., None]
    whole = jnp.floor(t)
    coarse = whole * high.astype(np.float32)
    angle = (coarse - jnp.floor(coarse)) + whole * low + (t - whole) * turns.astype(np.float32)
    angle = 2 * np.pi * (angle - jnp.floor(angle))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
