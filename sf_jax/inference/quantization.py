"""What 8-bit numbers cost a network, measured when it is loaded."""

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
    """What quantization costs a network; warns where that is outside the gate.

    Args:
      quantizer: what quantized it; None where nothing did.
      config: of the transformer.
      params: its parameters, quantized.
      mesh: the devices that they are on; None is the default device.
      quiet: whether not to warn, of weights that are not the network's own.
    """
    if quantizer is None:
        return None
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        report = quantizer.report(products_error(config, params, mesh) if quantizer.products else None)
    if not quiet:
        report.warn()
    return report


def products_error(config: WanConfig, params: dict, mesh: Mesh | None = None) -> float:
    """Relative error (L2) of the flow with quantized activations against that with the same weights and exact ones.

    One frame of noise at the first timestep, behind an empty prompt: activations far above the others, which rob a
    token's other numbers of their bits, are the network's own and show there, too.

    Args:
      config: of the transformer.
      params: its parameters, quantized.
      mesh: the devices that they are on; None is the default device.
    """
    model = WanTransformer(config)
    columns = SIDE * (1 if mesh is None else mesh.shape.get("context", 1))  # tokens that `context` divides
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
