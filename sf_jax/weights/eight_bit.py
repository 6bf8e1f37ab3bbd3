"""Quantizes a transformer's kernels to 8 bits, kernel by kernel while they are loaded, and measures what that costs."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sf_jax.models import eight_bit
from sf_jax.models.eight_bit import DTYPES, LAYERS, Scaled

# Largest relative error of a layer's weights, by which 8 bits are known to keep the video (docs/eight_bit.md): three
# times what normally distributed weights have in int8 (0.0075 to 0.011 for 32 to 13824 inputs), one and a half times
# what any weights within the range of float8 have (0.026).
GATE = {"int8": 0.025, "fp8": 0.04}


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How a network was quantized.

    Attributes:
      name: "int8" or "fp8".
      products: whether activations are quantized too.
      error: the largest relative error (L2) of a layer's weights; 0 where the file has them in 8 bits.
      layer: which layer has it.
    """

    name: str
    products: bool
    error: float
    layer: str

    @property
    def passes(self) -> bool:
        """Whether every layer is within the gate."""
        return self.error <= GATE[self.name]

    def describe(self) -> str:
        """A few words."""
        what = "weights and activations" if self.products else "weights"
        return f"{self.name} {what} (largest error {self.error:.2%}, gate {GATE[self.name]:.2%})"

    def warn(self) -> None:
        """Warns, in a line, of a network outside the gate."""
        if not self.passes:
            other = next(name for name in DTYPES if name != self.name)
            warnings.warn(
                f"quantize is {self.name}: the weights of {self.layer} are off by {self.error:.2%}, above the gate of "
                f"{GATE[self.name]:.2%}, and the video may suffer: compare quantize={other}, or leave it out",
                stacklevel=3,
            )


class Quantizer:
    """Quantizes the kernels that it is given, and keeps the error of each."""

    def __init__(self, name: str, products: bool):
        """Chooses the type: "int8" or "fp8", and whether products are to be of 8 bits, too.

        Raises:
          ValueError: if qwix is not installed.
        """
        eight_bit.library()
        self.name, self.products = name, products
        self.errors: dict[str, float] = {}

    def wants(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at a path is a kernel that is quantized."""
        block = path[0] == "blocks" or path[0].startswith("blocks_")
        return block and path[-1] == "kernel" and ".".join(path[1:-1]) in LAYERS

    def quantize(self, path: tuple[str, ...], kernel: jax.Array) -> Scaled:
        """Quantizes a kernel [C_in, C_out] or a stack of them [L, C_in, C_out]."""
        scaled, errors = _quantized(kernel, self.name, self.products)
        errors, title = np.atleast_1d(np.asarray(errors)), ".".join(path[:-1])
        worst = int(errors.argmax())
        title = title.replace("blocks.", f"blocks.{worst}.", 1) if errors.size > 1 else title
        self.errors[title] = float(errors[worst])
        return scaled

    def keep(self, path: tuple[str, ...], values: jax.Array, scale: jax.Array) -> Scaled:
        """Takes over a float8 kernel of a file with its scales."""
        self.errors[".".join(path[:-1])] = 0.0
        return Scaled(values, scale, self.products)

    def report(self) -> Quantization:
        """What has been done; warns where it is outside the gate."""
        layer = max(self.errors, key=self.errors.__getitem__)
        report = Quantization(self.name, self.products, self.errors[layer], layer)
        report.warn()
        return report


def quantizer_for(name: str | None, device: jax.Device | None = None) -> Quantizer | None:
    """A quantizer for a device (None: the default one); None without a name."""
    if name is None:
        return None
    return Quantizer(name, eight_bit.multiplies(name, device or jax.devices()[0]))


def quantize_params(params: dict, quantizer: Quantizer | None) -> dict:
    """A transformer's parameters with the kernels of its blocks quantized; the same without a quantizer."""
    if quantizer is None:
        return params
    flat = flatten_dict(params)
    for path, leaf in flat.items():
        if quantizer.wants(path):
            flat[path] = quantizer.quantize(path, jnp.asarray(leaf))
    return unflatten_dict(flat)


def count(params: dict) -> int:
    """How many parameters there are, scales apart."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Scaled))
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantized(kernel: jax.Array, name: str, products: bool) -> tuple[Scaled, jax.Array]:
    """The kernel in 8 bits, and its relative error, of each of a stack; one at a time, to save memory."""

    def one(kernel):
        wide, scaled = kernel.astype(jnp.float32), eight_bit.quantize(kernel, name, (-2,), products)
        lost = jnp.linalg.norm(scaled.astype(jnp.float32) - wide)
        return scaled, lost / jnp.maximum(jnp.linalg.norm(wide), jnp.finfo(jnp.float32).tiny)

    return jax.lax.map(one, kernel) if kernel.ndim == 3 else one(kernel)
