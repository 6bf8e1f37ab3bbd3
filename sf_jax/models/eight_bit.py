"""Numbers of 8 bits with scales: kernels of dense layers, and cached keys and values.

Quantization and products of 8-bit numbers are qwix's (https://github.com/google/qwix), an extra of this package
(`pip install "sf_jax[eight_bit]"`). Scales are the largest absolute value that they stand for, over the type's limit.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sf_jax.models import partition

DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
# The dense layers of every block. Embeddings, time, modulation, norms, biases and head stay in their own type: they are
# few, run once a call, and what the network is told (prompt, time, latents) enters through them.
LAYERS = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in ("q", "k", "v", "o")),
    "ffn_in",
    "ffn_out",
)
# TPUs that multiply a type at twice the rate of bfloat16 (Cloud TPU's tables; v4 and older do not), and the first
# compute capability of NVIDIA's that does (CUDA's tables of arithmetic instructions).
_TPUS = {"int8": ("TPU v5", "TPU v6"), "fp8": ("TPU7", "TPU v7")}
_CAPABILITIES = {"int8": 8.0, "fp8": 8.9}


@flax.struct.dataclass
class Scaled:
    """8-bit numbers and their scales; it slices and casts like the array that it stands for.

    Attributes:
      values: int8 or float8_e4m3fn [..., N].
      scale: float32 [..., 1].
      products: of a kernel, whether it is multiplied by activations that are quantized too (static).
    """

    values: jax.Array
    scale: jax.Array
    products: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.values.shape

    def __getitem__(self, index: Any) -> "Scaled":
        """A slice; along the last axis, whose numbers share a scale, only whole."""
        return jax.tree.map(lambda a: a[index], self)

    def astype(self, dtype) -> jax.Array:
        """The numbers times their scales, multiplied in float32."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(x: jax.Array, name: str, products: bool = False) -> Scaled:
    """Quantizes an array.

    Args:
      x: floating array; numbers along the last axis share a scale.
      name: "int8" or "fp8".
      products: see `Scaled`.
    """
    array = library().quantize(x.astype(jnp.float32), DTYPES[name], channelwise_axes=range(x.ndim - 1))
    return Scaled(array.qvalue, array.scale, products)


def like(old: jax.Array | Scaled, new: jax.Array) -> jax.Array | Scaled:
    """New keys or values [..., D] in the form in which a cache keeps the old ones: a scale for each token and head."""
    if not isinstance(old, Scaled):
        return new.astype(old.dtype)
    return quantize(new, next(name for name, dtype in DTYPES.items() if dtype == old.values.dtype))


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array | Scaled:
    """Zeros; where `dtype` is "int8" or "fp8", scaled ones that share a scale along the last axis."""
    if dtype not in DTYPES:
        return jnp.zeros(shape, dtype)
    return Scaled(jnp.zeros(shape, DTYPES[dtype]), jnp.ones((*shape[:-1], 1), jnp.float32))


def linear(x: jax.Array, kernel: Scaled, bias: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """`x @ kernel.T + bias` without gradient; dtype of `x` out.

    With `kernel.products` every token is quantized by its own largest value and 8-bit numbers are multiplied.

    Args:
      x: [..., C_in].
      kernel: [C_out, C_in], a scale for each output channel. GPUs multiply 8-bit numbers that lie so; given the other
        way round, all kernels would be turned, and in memory twice, in every chunk.
      bias: [C_out].
      axes: of C_in and C_out, see `partition`.
    """
    values, scale = (
        partition.gather(a, (axes[1], name)) for a, name in ((kernel.values, axes[0]), (kernel.scale, None))
    )
    bias = partition.gather(bias, axes[1:]).astype(jnp.float32)
    dimensions, wide = (((x.ndim - 1,), (1,)), ((), ())), jnp.float32
    if not kernel.products:
        y = jax.lax.dot_general(x, values.astype(x.dtype), dimensions)
        return (y.astype(wide) * scale[:, 0] + bias).astype(x.dtype)
    qwix = library()
    tokens = qwix.quantize(x.astype(wide), values.dtype, channelwise_axes=range(x.ndim - 1))
    # Rounded between the two scales: GPUs then write 16 bits, as both at once do not fit into the product's kernel.
    y = qwix.dot_general(tokens.qvalue, qwix.QArray(values, scale), dimensions, preferred_element_type=x.dtype)
    return (y.astype(wide) * tokens.scale + bias).astype(x.dtype)


def multiplies(name: str, device: jax.Device) -> bool:
    """Whether a device multiplies numbers of a type faster than bfloat16; elsewhere only weights are quantized."""
    if device.platform == "tpu":
        return device.device_kind.startswith(_TPUS[name])
    capability = getattr(device, "compute_capability", None)
    return device.platform in ("gpu", "cuda") and float(capability or 0) >= _CAPABILITIES[name]


def library():
    """The module qwix.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ValueError(f"8 bit needs qwix ({error.name} is missing): pip install 'sf_jax[eight_bit]'") from error
    return qwix
