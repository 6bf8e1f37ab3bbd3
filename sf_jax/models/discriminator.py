"""The discriminator's head on the critic's features: register tokens that attend to tapped blocks, then a small MLP.

Source: official `GanAttentionBlock`, `RegisterTokens` (wan/modules/model.py) and `adding_cls_branch`
(utils/wan_wrapper.py); paper, Section 3.3.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from sf_jax.models import attention
from sf_jax.models.layers import Exact, LayerNorm, Linear, RMSNorm, layer_norm
from sf_jax.models.wan import JOIN, LEAVE, SPREAD, Attention, WanConfig

# In the official code, the classifier's LayerNorm uses PyTorch's default epsilon, the registers' RMSNorm the network's.
CLASSIFIER_EPS, REGISTER_EPS = 1e-5, 1e-6


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator's head.

    Attributes:
      taps: blocks of the critic whose outputs it reads; each has a register token (official 13, 21, 29 of 30).
      ffn_dim: hidden channels of the tokens' feed-forward layers (official 8192); None is the critic's.
      classes: number of logits.
      concat_time: whether it also reads the time embedding (multiplied by ten, as in the official code).
    """

    taps: tuple[int, ...] = (1, 2, 3)
    ffn_dim: int | None = None
    classes: int = 1
    concat_time: bool = False

    def __post_init__(self):
        """Checks that the head has an input and an output."""
        if not self.taps or self.classes < 1 or (self.ffn_dim is not None and self.ffn_dim < 1):
            raise ValueError(
                f"taps is {self.taps}, classes {self.classes}, ffn_dim {self.ffn_dim}: give at least one of each"
            )


class RegisterBlock(nn.Module):
    """A block in which a register token attends to the tokens of a video (official `GanAttentionBlock`)."""

    config: WanConfig
    ffn_dim: int

    def setup(self):
        """Declares the layers."""
        config = self.config
        self.cross_attn = Attention(config)
        self.norm3 = LayerNorm(config.eps)
        self.ffn_in = Linear(self.ffn_dim, config.dtype, SPREAD)
        self.ffn_out = Linear(config.dim, config.dtype, JOIN)

    def __call__(self, register: jax.Array, x: jax.Array) -> jax.Array:
        """Updates `register` [B, dim] by attention to the tokens `x` [B, T, dim]; returns [B, dim]."""
        register = register[:, None]
        k, v = self.cross_attn.keys_values(self.norm3(x))
        seen = attention.attend(self.cross_attn.queries(register), [(k, v, None)], self.config.attention)
        token = register + self.cross_attn.output(seen)
        hidden = nn.gelu(self.ffn_in(layer_norm(token, self.config.eps)), approximate=True)
        return (token + self.ffn_out(hidden))[:, 0]


class Discriminator(nn.Module):
    """Logits of a video from the critic's tapped features; the register blocks are stacked along a leading axis."""

    critic: WanConfig
    config: DiscriminatorConfig

    def setup(self):
        """Declares the layers."""
        count, dim = len(self.config.taps), self.critic.dim
        self.registers = self.param("registers", nn.initializers.normal(0.02), (count, dim))
        self.register_norm = RMSNorm(REGISTER_EPS)
        self.register_blocks = nn.vmap(
            RegisterBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(1, 0),
            out_axes=1,
            axis_size=count,
        )(self.critic, self.config.ffn_dim or self.critic.ffn_dim)
        self.classifier_norm = LayerNorm(CLASSIFIER_EPS)
        # Exact, because R1 and R2 are differences between logits of nearly equal videos.
        self.classifier_in = Exact(dim, axes=LEAVE)
        self.classifier_out = Exact(self.config.classes, axes=LEAVE)

    def __call__(self, features: jax.Array, time: jax.Array) -> jax.Array:
        """float32 logits [B, classes].

        Args:
          features: [taps, B, T, dim], see `WanTransformer.features`.
          time: float32 [B, 1, dim], the time embedding.
        """
        if len(features) != len(self.config.taps):
            raise ValueError(f"features of {len(features)} blocks, taps is {self.config.taps}")
        batch = features.shape[1]
        registers = self.register_norm(self.registers).astype(features.dtype)
        tokens = self.register_blocks(jnp.broadcast_to(registers, (batch, *registers.shape)), features)
        seen = tokens.astype(jnp.float32).reshape(batch, -1)
        if self.config.concat_time:
            seen = jnp.concatenate([seen, 10 * time[:, 0]], axis=-1)
        return self.classifier_out(nn.silu(self.classifier_in(self.classifier_norm(seen))))


def init_discriminator(critic: WanConfig, config: DiscriminatorConfig, key: jax.Array) -> dict:
    """Random parameters of the head."""
    features = jnp.zeros((len(config.taps), 1, 2, critic.dim))
    return Discriminator(critic, config).init(key, features, jnp.zeros((1, 1, critic.dim)))["params"]
