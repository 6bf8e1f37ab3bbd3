"""8-bit numbers with scales, for the kernels of dense layers and for cached keys and values.

qwix (https://github.com/google/qwix) does the quantization and the 8-bit matmuls; it is an extra of this package
(`pip install "sf_jax[eight_bit]"`). A scale is the largest absolute value of its group over the type's maximum.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from sf_jax.models import partition

DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
# The dense layers of every block. Embeddings, time, modulation, norms, biases and head keep their type: they are small,
# run once per call, and carry the network's inputs (prompt, time, latents).
LAYERS = (
    *(f"{attention}.{part}" for attention in ("self_attn", "cross_attn") for part in ("q", "k", "v", "o")),
    "ffn_in",
    "ffn_out",
)
# TPUs that multiply a type at twice the rate of bfloat16 (Cloud TPU's tables; v4 and older do not), and the lowest
# NVIDIA compute capability that does (CUDA's tables of arithmetic instructions).
_TPUS = {"int8": ("TPU v5", "TPU v6"), "fp8": ("TPU7", "TPU v7")}
_CAPABILITIES = {"int8": 8.0, "fp8": 8.9}


@flax.struct.dataclass
class Scaled:
    """8-bit numbers and their scales; supports slicing and casting like the array it represents.

    Attributes:
      values: int8 or float8_e4m3fn [..., N].
      scale: float32 [..., 1].
      products: for a kernel, whether activations are quantized too, so that the matmul is 8-bit (static).
    """

    values: jax.Array
    scale: jax.Array
    products: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.values.shape

    def __getitem__(self, index: Any) -> "Scaled":
        """Slices all axes but the last, whose numbers share a scale."""
        return jax.tree.map(lambda a: a[index], self)

    def astype(self, dtype) -> jax.Array:
        """Dequantizes in float32, then casts to `dtype`."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(x: jax.Array, name: str, products: bool = False) -> Scaled:
    """Quantizes an array.

    Args:
      x: floating-point array; numbers along the last axis share a scale.
      name: "int8" or "fp8".
      products: see `Scaled`.
    """
    array = library().quantize(x.astype(jnp.float32), DTYPES[name], channelwise_axes=range(x.ndim - 1))
    return Scaled(array.qvalue, array.scale, products)


def like(old: jax.Array | Scaled, new: jax.Array) -> jax.Array | Scaled:
    """Converts new keys or values [..., D] to the cache's format; in 8 bits, with a scale per token and head."""
    if not isinstance(old, Scaled):
        return new.astype(old.dtype)
    return quantize(new, next(name for name, dtype in DTYPES.items() if dtype == old.values.dtype))


def zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array | Scaled:
    """Zeros; if `dtype` is "int8" or "fp8", a `Scaled` with one scale along the last axis."""
    if dtype not in DTYPES:
        return jnp.zeros(shape, dtype)
    return Scaled(jnp.zeros(shape, DTYPES[dtype]), jnp.ones((*shape[:-1], 1), jnp.float32))


def linear(x: jax.Array, kernel: Scaled, bias: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """`x @ kernel.T + bias` without gradient; returns the dtype of `x`.

    With `kernel.products`, every token is quantized with a scale of its own and the matmul is 8-bit.

    Args:
      x: [..., C_in] activations.
      kernel: [C_out, C_in] with a scale per output channel. GPUs need this layout for 8-bit matmuls; with the other,
        every chunk would transpose all kernels and hold them in memory twice.
      bias: [C_out].
      axes: names of the axes C_in and C_out, see `partition`.
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
    # Rounds between the two scales, as GPUs cannot fuse both into the matmul: it then writes 16 bits.
    y = qwix.dot_general(tokens.qvalue, qwix.QArray(values, scale), dimensions, preferred_element_type=x.dtype)
    return (y.astype(wide) * tokens.scale + bias).astype(x.dtype)


def multiplies(name: str, device: jax.Device) -> bool:
    """Whether a device multiplies a type faster than bfloat16; on other devices only weights are quantized."""
    if device.platform == "tpu":
        return device.device_kind.startswith(_TPUS[name])
    return device.platform in ("gpu", "cuda") and partition.compute_capability(device) >= _CAPABILITIES[name]


def library():
    """Imports qwix.

    Raises:
      ValueError: if qwix is not installed.
    """
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise ValueError(f"8 bit needs qwix ({error.name} is missing): pip install 'sf_jax[eight_bit]'") from error
    return qwix
