"""Quantizes a transformer's kernels to 8 bits one by one during loading, and measures the error."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sf_jax.models import eight_bit
from sf_jax.models.eight_bit import DTYPES, LAYERS, Scaled

# Quality gates: up to these errors of a layer's weights, and of the flow from quantized activations, 8 bits are known
# to preserve the video (tables in docs/eight_bit.md). Any weights within float8's range have an error of 0.026 in fp8;
# in int8, normally distributed ones have 0.009, and the digits models', which use few prompt channels, 0.06.
GATE = {"int8": 0.1, "fp8": 0.04}
PRODUCTS_GATE = {"int8": 0.05, "fp8": 0.1}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a network was quantized, and the resulting error.

    Attributes:
      name: "int8" or "fp8".
      error: the largest error of any layer's weights, where a layer's error is the relative L2 error of its median
        input channel; 0 if the file stores the weights in 8 bits.
      layer: the layer with that error.
      products_error: relative error of the flow from quantized activations; None if they are not quantized.
    """

    name: str
    error: float
    layer: str
    products_error: float | None = None

    @property
    def faults(self) -> tuple[str, ...]:
        """Short descriptions of the errors that exceed the gate."""
        faults, gate = [], PRODUCTS_GATE[self.name]
        if not self.error <= GATE[self.name]:
            faults.append(f"the weights of {self.layer} are off by {self.error:.2%} (gate {GATE[self.name]:.2%})")
        if self.products_error is not None and not self.products_error <= gate:
            faults.append(f"activations in 8 bits put the flow off by {self.products_error:.2%} (gate {gate:.2%})")
        return tuple(faults)

    def describe(self) -> str:
        """A short description."""
        parts = [f"weights {self.error:.2%} off at most"]
        parts += [] if self.products_error is None else [f"activations {self.products_error:.2%}"]
        return f"{self.name} {'weights' if self.products_error is None else 'products'} ({', '.join(parts)})"

    def warn(self) -> None:
        """Issues a one-line warning if the network exceeds the gate."""
        if self.faults:
            other = next(name for name in DTYPES if name != self.name)
            warnings.warn(
                f"quantize is {self.name}, outside its quality gate: {' and '.join(self.faults)}; the video may "
                f"suffer, compare it with quantize={other} or without",
                stacklevel=3,
            )


class Quantizer:
    """Quantizes kernels and records the error of each."""

    def __init__(self, name: str, products: bool):
        """Sets the type, "int8" or "fp8", and whether the matmuls are 8-bit too.

        Raises:
          ValueError: if qwix is not installed.
        """
        eight_bit.library()
        self.name, self.products = name, products
        self.errors: dict[str, float] = {}

    def wants(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at a path is a kernel to quantize."""
        block = path[0] == "blocks" or path[0].startswith("blocks_")
        return block and path[-1] == "kernel" and ".".join(path[1:-1]) in LAYERS

    def quantize(self, path: tuple[str, ...], kernel: jax.Array) -> Scaled:
        """Quantizes a kernel [C_in, C_out] or a stack [L, C_in, C_out], and transposes it to [..., C_out, C_in]."""
        scaled, errors = _quantized(kernel, self.name, self.products)
        errors, title = np.atleast_1d(np.asarray(errors)), ".".join(path[:-1])
        worst = int(errors.argmax())
        title = title.replace("blocks.", f"blocks.{worst}.", 1) if errors.size > 1 else title
        self.errors[title] = float(errors[worst])
        return scaled

    def keep(self, path: tuple[str, ...], values: jax.Array, scale: jax.Array) -> Scaled:
        """Uses a file's float8 kernels [..., C_out, C_in] with scales [..., C_out, 1] unchanged."""
        self.errors[".".join(path[:-1])] = 0.0
        return Scaled(values, scale, self.products)

    def report(self, products_error: float | None = None) -> Quantization:
        """Summarizes the quantization."""
        layer = max(self.errors, key=lambda name: (np.isnan(self.errors[name]), self.errors[name]))
        return Quantization(self.name, self.errors[layer], layer, products_error)


def quantizer_for(name: str | None, device: jax.Device | None = None) -> Quantizer | None:
    """A quantizer for a device (None: the default one); None if `name` is None."""
    if name is None:
        return None
    return Quantizer(name, eight_bit.multiplies(name, device or jax.devices()[0]))


def quantize_params(params: dict, quantizer: Quantizer | None) -> dict:
    """Quantizes the kernels of a transformer's blocks; without a quantizer, returns the parameters unchanged."""
    if quantizer is None:
        return params
    flat = flatten_dict(params)
    for path, leaf in flat.items():
        if quantizer.wants(path):
            flat[path] = quantizer.quantize(path, jnp.asarray(leaf))
    return unflatten_dict(flat)


def quantized_shapes(name: str | None, products: bool, params: dict) -> dict:
    """`quantize_params` for shapes: call it inside `jax.eval_shape`; it measures no errors."""
    if name is None:
        return params
    quantizer, flat = Quantizer(name, products), flatten_dict(params)
    for path, leaf in flat.items():
        if quantizer.wants(path):
            flat[path] = eight_bit.quantize(leaf.mT, name, products)
    return unflatten_dict(flat)


def count(params: dict) -> int:
    """Number of parameters, not counting scales."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Scaled))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(kernel: jax.Array, name: str, products: bool) -> tuple[Scaled, jax.Array]:
    """The transposed 8-bit kernel and its error, for each kernel of a stack; one at a time, to save memory.

    The error is the median over input channels: in one over the whole kernel, a channel with large weights would hide
    that all others are lost.
    """

    def one(kernel):
        wide = kernel.T.astype(jnp.float32)
        scaled = eight_bit.quantize(wide, name, products)
        lost, norms = (jnp.linalg.norm(a, axis=0) for a in (scaled.astype(jnp.float32) - wide, wide))
        return scaled, jnp.median(lost / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny))

    return jax.lax.map(one, kernel) if kernel.ndim == 3 else one(kernel)
