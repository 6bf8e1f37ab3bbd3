"""Measures the error of 8-bit quantization when a network is loaded."""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sf_jax.diffusion.schedule import TRAIN_STEPS
from sf_jax.models.eight_bit import Scaled
from sf_jax.models.wan import WanConfig, WanTransformer, bidirectional_layout
from sf_jax.weights.eight_bit import Quantization, Quantizer

SIDE = 8  # tokens along each side of the frame


def report(
    quantizer: Quantizer | None, config: WanConfig, params: dict, mesh: Mesh | None = None, quiet: bool = False
) -> Quantization | None:
    """Reports the quantization error of a network; warns if it exceeds the quality gate.

    Args:
      quantizer: the quantizer that was used; None without quantization.
      config: the transformer's sizes.
      params: the transformer's quantized parameters.
      mesh: the devices that hold them; None is the default device.
      quiet: whether to suppress the warning, for weights that are not the network's own.
    """
    if quantizer is None:
        return None
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        report = quantizer.report(products_error(config, params, mesh) if quantizer.products else None)
    if not quiet:
        report.warn()
    return report


def products_error(config: WanConfig, params: dict, mesh: Mesh | None = None) -> float:
    """Relative L2 error of the flow from quantizing activations, compared with exact ones and the same weights.

    The input is one frame of noise at the first timestep with an empty prompt. Outlier activations, which cost the
    other numbers of a token their precision, are a property of the network, so they show for this input too.

    Args:
      config: the transformer's sizes.
      params: the transformer's quantized parameters.
      mesh: the devices that hold them; None is the default device.
    """
    model = WanTransformer(config)
    columns = SIDE * (1 if mesh is None else mesh.shape.get("context", 1))  # makes the tokens divisible by `context`
    shape = (1, 1, SIDE * config.patch[1], columns * config.patch[2], config.channels)
    x, text = jax.random.normal(jax.random.key(0), shape), jnp.zeros((1, config.text_len, config.text_dim))
    exact = jax.tree.map(
        lambda leaf: leaf.replace(products=False) if isinstance(leaf, Scaled) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Scaled),
    )
    quantized, reference = (_flow(model, each, x, text) for each in (params, exact))
    return float(jnp.linalg.norm(quantized - reference) / jnp.linalg.norm(reference))


@functools.partial(jax.jit, static_argnums=0)
def _flow(model, params, x, text):
    t = jnp.full((1, 1), TRAIN_STEPS, jnp.float32)
    return model.apply({"params": params}, x, t, text, bidirectional_layout(1))
