"""The Wan2.1 video diffusion transformer, for every size and every attention pattern.

Source: official `WanModel` (wan/modules/model.py) and `CausalWanModel` (wan/modules/causal_model.py). Teacher and
critic (bidirectional) and student (causal) are the same network, called with different `Layout`s. It predicts the flow,
`noise - clean`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sf_jax.models import attention, partition, rope
from sf_jax.models.kv_cache import KeysValues, KVCache, OneLayer
from sf_jax.models.layers import Axes, Exact, LayerNorm, Linear, RMSNorm, layer_norm, time_features
from sf_jax.models.layout import Layout, Shared, bidirectional_layout
from sf_jax.models.partition import constrain
from sf_jax.models.patches import patchify, unpatchify
from sf_jax.models.pattern_attention import pattern_attention
from sf_jax.models.sizes import check_eps, check_sizes
from sf_jax.models.slots import Slots, slot_attention
from sf_jax.models.tiled_attention import RESIDUALS

REMAT_POLICIES = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(RESIDUALS),
    ),
}
# Largest sizes, see `check_sizes`.
LIMITS = {
    "dim": 1 << 16,
    "ffn_dim": 1 << 20,
    "num_heads": 1 << 16,
    "num_layers": 1000,
    "text_dim": 1 << 16,
    "text_len": 1 << 13,
    "channels": 1 << 12,
    "freq_dim": 1 << 16,
}
MAX_PATCH = 64
# Scope of the conditional of `Layout.keys_only`, by which `perf` identifies it.
UNLESS_KEYS_ONLY = "unless_keys_only"


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Sizes of the transformer.

    Attributes:
      dim: channels of the residual stream.
      ffn_dim: hidden channels of the feed-forward layers.
      num_heads: attention heads; `dim / num_heads` must be even.
      num_layers: transformer blocks.
      text_dim: channels of the prompt embeddings.
      text_len: rows of the prompt embeddings (zero after the text's end, but still attended to).
      freq_dim: sinusoidal features of the timestep.
      channels: latent channels C, in and out.
      patch: latent (frames, rows, columns) of one token; frames must be 1.
      eps: epsilon of all norms.
      dtype: compute type; norms, rotary embedding, modulation, softmax and time embedding are always float32.
      attention: "xla", "whole", "cudnn" (GPU), "splash" (TPU), or "auto" for the best that the device supports.
      remat: what the backward pass recomputes: "none", "dots" (all but the outputs of dense layers and of
        attention; cuDNN's attention runs again), "block" (all but the blocks' inputs).
      scan_layers: whether one compiled block is scanned over stacked parameters. If not, every layer has its own
        parameters and code (`unstack_layers`): compilation takes longer, but GPUs and TPUs generate fastest.
    """

    dim: int = 128
    ffn_dim: int = 512
    num_heads: int = 4
    num_layers: int = 4
    text_dim: int = 64
    text_len: int = 10
    freq_dim: int = 64
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    scan_layers: bool = True

    def __post_init__(self):
        """Validates the sizes."""
        check_sizes(self, **LIMITS)
        check_eps(self.eps)
        if len(self.patch) != 3 or min(self.patch) < 1 or self.freq_dim % 2:
            raise ValueError(f"patch is {self.patch}, freq_dim {self.freq_dim}: three sizes >= 1 and an even number")
        if max(self.patch) > MAX_PATCH:
            raise ValueError(f"patch is {self.patch}: its sizes must be at most {MAX_PATCH}")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ValueError(f"dim is {self.dim}, num_heads {self.num_heads}: dim / num_heads must be an even number")
        if self.patch[0] != 1:
            raise ValueError(f"patch is {self.patch}: its first entry (frames) must be 1")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}: it must be one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in attention.IMPLEMENTATIONS:
            raise ValueError(
                f"attention is {self.attention!r}: it must be one of {', '.join(attention.IMPLEMENTATIONS)}"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}: it must be float32 or bfloat16")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.dim // self.num_heads

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of a latent frame.

        Raises:
          ValueError: if the latent size is not a multiple of the patch.
        """
        if height % self.patch[1] or width % self.patch[2]:
            raise ValueError(f"latent size is {height}x{width}: it must be a multiple of the patch {self.patch[1:]}")
        return height // self.patch[1], width // self.patch[2]


def wan_1_3b(**changes) -> WanConfig:
    """Wan2.1-T2V-1.3B."""
    base = WanConfig(
        dim=1536,
        ffn_dim=8960,
        num_heads=12,
        num_layers=30,
        text_dim=4096,
        text_len=512,
        freq_dim=256,
        remat="block",
    )
    return dataclasses.replace(base, **changes)


def wan_14b(**changes) -> WanConfig:
    """Wan2.1-T2V-14B."""
    return wan_1_3b(**{"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40, **changes})


# Axes of the residual stream [B, F, P, dim], see `partition.AXES`.
STREAM = ("batch", None, "tokens", None)
# Axes of kernels: to heads or hidden channels, back from them, and to and from unsplit channels.
SPREAD, JOIN, ENTER, LEAVE = ("embed", "features"), ("features", "embed"), (None, "embed"), ("embed", None)


def _dense(config: WanConfig, features: int, axes: Axes) -> Linear:
    return Linear(features, config.dtype, axes)


class Attention(nn.Module):
    """Projections of one attention layer; queries and keys are RMS-normalized over all heads together."""

    config: WanConfig
    # Random query and key biases make every head attend to some relative position (in time and space) from the start.
    positional: bool = False

    def setup(self):
        """Declares the layers."""
        dim, eps = self.config.dim, self.config.eps
        biases = nn.initializers.normal(1.0) if self.positional else nn.initializers.zeros
        self.o = _dense(self.config, dim, JOIN)
        self.fused = self.has_variable("params", "qkv")
        if self.fused:
            self.qkv = _dense(self.config, 3 * dim, SPREAD)
        else:
            self.q, self.k = (Linear(dim, self.config.dtype, SPREAD, bias_init=biases) for _ in range(2))
            self.v = _dense(self.config, dim, SPREAD)
        apart = self.positional and not self.config.scan_layers
        self.norm_q, self.norm_k = RMSNorm(eps, apart), RMSNorm(eps, apart)

    def projections(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The input of `queries` for `x` [..., dim], and keys and values [..., dim] before normalization.

        If `slots.unstack_layers` has joined the three projections, they are computed together, and `x` is read once.
        """
        if not self.fused:
            return x, self.k(x), self.v(x)
        joined = self.qkv(x)
        return joined, *jnp.split(joined, 3, axis=-1)[1:]

    def queries(self, x: jax.Array) -> jax.Array:
        """[..., dim] (if the projections are joined, the first output of `projections` instead) to [..., N, D]."""
        return self.heads(self.norm_q(x[..., : self.config.dim] if self.fused else self.q(x)))

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., dim] to keys and values [..., N, D]."""
        return self.keys(self.k(x)), self.heads(self.v(x))

    def keys(self, projected: jax.Array) -> jax.Array:
        """Keys [..., N, D] from the output [..., dim] of the projection `k`."""
        return self.heads(self.norm_k(projected))

    def output(self, x: jax.Array) -> jax.Array:
        """[..., N, D] to [..., dim]."""
        return self.o(x.reshape(*x.shape[:-2], -1))

    def heads(self, x: jax.Array) -> jax.Array:
        """[..., dim] to [..., N, D]."""
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


class Block(nn.Module):
    """One block: self-attention, cross-attention to the prompt, feed-forward (official `WanAttentionBlock`)."""

    config: WanConfig

    def setup(self):
        """Declares the layers."""
        config = self.config
        self.self_attn, self.cross_attn = Attention(config, positional=True), Attention(config)
        self.norm3 = LayerNorm(config.eps)
        self.ffn_in, self.ffn_out = _dense(config, config.ffn_dim, SPREAD), _dense(config, config.dim, JOIN)
        self.modulation = self.param("modulation", nn.initializers.normal(config.dim**-0.5), (1, 6, config.dim))

    def text_kv(self, carry: None, text: jax.Array) -> tuple[None, KeysValues]:
        """Cross-attention keys and values [B, S, N, D] of the projected prompt [B, S, dim]."""
        k, v = (constrain(a, "batch", None, "features", None) for a in self.cross_attn.keys_values(text))
        return carry, KeysValues(k, v)

    def __call__(
        self,
        carry: tuple[jax.Array, jax.Array | None],
        text: KeysValues,
        context: KeysValues | Slots | jax.Array | None,
        slot: jax.Array | None,
        shared: Shared,
    ) -> tuple[tuple[jax.Array, jax.Array | None], KeysValues | Slots | None]:
        """Runs the block on (`x` [B, F, P, dim], tapped outputs [taps + 1, ...] or None); `slot` is its tap's index.

        If `shared` has the keys and values of all layers, `context` is the index of this one.
        """
        x, tapped = carry
        if shared.stack is not None:
            context = OneLayer(shared.stack, context)
        x, kv = self.run(x, text, context, shared)
        if tapped is not None:  # outside `run`, so that remat does not store the taps of every layer
            tapped = jax.lax.dynamic_update_index_in_dim(tapped, x, slot, 0)
        return (x, tapped), kv

    def run(
        self, x: jax.Array, text: KeysValues, context: KeysValues | OneLayer | Slots | None, shared: Shared
    ) -> tuple[jax.Array, KeysValues | Slots | None]:
        """Runs the block on `x` [B, F, P, dim]; also returns its keys and values [B, F*P, N, D] if `return_kv` is set.

        With slots as context, returns them with the own keys and values written to them.
        """
        shift, scale, *rest = jnp.moveaxis(self.modulation[:, None] + shared.modulation, 2, 0)
        x = constrain(x, *STREAM)
        h = self._modulated(x, shift, scale)
        h, projected, v = self.self_attn.projections(h)
        k, v = (_all_tokens(a) for a in (self.self_attn.keys(projected), self.self_attn.heads(v)))
        if isinstance(context, Slots):
            rotated = rope.rotate_constant(k, shared.own_rotation)
            own = context.put(rotated, projected.reshape(*k.shape[:2], -1), v, shared.place)
        else:
            own = KeysValues(k, v) if shared.return_kv else None

        def behind_keys(block, x):
            q = partition.own_queries(_all_tokens(block.self_attn.queries(h)), len(shared.pattern))
            slots = isinstance(context, Slots)
            y = slot_attention(q, own, shared) if slots else pattern_attention(q, k, v, context, shared)
            y = partition.all_queries(y).reshape(*x.shape[:3], *q.shape[2:])
            return block._behind_attention(x, y, text, rest, shared.implementation)

        if shared.keys_only is None:
            return behind_keys(self, x), own
        with jax.named_scope(UNLESS_KEYS_ONLY):
            return nn.cond(shared.keys_only, lambda block, x: x, behind_keys, self, x), own

    def _modulated(self, x, shift, scale):
        """Normalizes `x` [B, F, P, dim], then scales and shifts it by float32 [B, F or 1, dim]."""
        wide = layer_norm(x, self.config.eps).astype(jnp.float32)
        return (wide * (1 + scale[:, :, None]) + shift[:, :, None]).astype(x.dtype)

    def _behind_attention(self, x, y, text, modulation, implementation):
        """Adds self-attention's output `y` [B, F, P, N, D] to `x`; then cross-attention and feed-forward."""
        gate1, shift2, scale2, gate2 = modulation

        def gated(a, gate):
            return (a.astype(jnp.float32) * gate[:, :, None]).astype(a.dtype)

        y = self.self_attn.output(constrain(y, "batch", None, "tokens", "features", None))
        x = constrain(x + gated(y, gate1), *STREAM)
        q = partition.merge_tokens(self.cross_attn.queries(self.norm3(x)))
        y = attention.attend(q, [(text.k, text.v, None)], implementation, split="tokens")
        x = x + self.cross_attn.output(partition.split_tokens(y, x.shape[1]))
        h = constrain(self.ffn_in(self._modulated(x, shift2, scale2)), *STREAM[:3], "features")
        y = self.ffn_out(nn.gelu(h, approximate=True))
        return constrain(x + gated(y, gate2), *STREAM)


def _all_tokens(x):
    """[B, F, P, N, D] to [B, F*P, N, D]; each device holds all tokens of its heads."""
    x = constrain(x, "batch", None, None, "heads", None)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


class WanTransformer(nn.Module):
    """The network; the blocks' parameters are stacked along a leading layer axis (see `WanConfig.scan_layers`)."""

    config: WanConfig

    def setup(self):
        """Declares the layers."""
        config = self.config
        self.patch_embedding = _dense(config, config.dim, ENTER)
        self.text_in, self.text_out = _dense(config, config.dim, ENTER), _dense(config, config.dim, LEAVE)
        self.time_in, self.time_out = Exact(config.dim, axes=ENTER), Exact(config.dim, axes=LEAVE)
        self.time_projection = Exact(6 * config.dim, axes=LEAVE)
        self.head_modulation = self.param(
            "head_modulation", nn.initializers.normal(config.dim**-0.5), (1, 2, config.dim)
        )
        outputs = config.channels * int(np.prod(config.patch))
        self.head = Linear(outputs, config.dtype, LEAVE, nn.initializers.zeros)
        block = Block
        if config.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=False, methods=["run"])
        if not config.scan_layers:
            self.blocks = [block(config) for _ in range(config.num_layers)]
            return
        layers = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": config.num_layers}
        layers["check_constancy_invariants"] = self.is_initializing()  # the check traces the block twice
        self.blocks = nn.scan(
            block,
            methods={
                "__call__": {**layers, "in_axes": (0, 0, 0, nn.broadcast)},
                "text_kv": {**layers, "in_axes": nn.broadcast},
            },
        )(config)

    def encode_text(self, text: jax.Array) -> KeysValues:
        """Cross-attention keys and values [L, B, S, N, D] of embeddings [B, S, text_dim]; run it once per prompt."""
        if text.shape[-1] != self.config.text_dim:
            raise ValueError(f"prompt embeddings have {text.shape[-1]} channels, text_dim is {self.config.text_dim}")
        text = self.text_out(nn.gelu(self.text_in(text.astype(self.config.dtype)), approximate=True))
        if self.config.scan_layers:
            return self.blocks.text_kv(None, text)[1]
        return _stack([block.text_kv(None, text)[1] for block in self.blocks])

    def own_keys_values(self, layers: tuple[Slots, ...]) -> KeysValues:
        """Own keys (without rotary embedding) and values [L, B, n * tokens, N, D] from the slots."""
        own = layers[0].projected.shape[1]
        pairs = zip(self.blocks, layers, strict=True)
        keys = [block.self_attn.keys(layer.projected).astype(layer.k.dtype) for block, layer in pairs]
        return KeysValues(jnp.stack(keys), jnp.stack([layer.v[:, :own] for layer in layers]))

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        text: jax.Array | KeysValues,
        layout: Layout,
        context: KeysValues | KVCache | tuple[Slots, ...] | None = None,
        return_kv: bool = False,
    ) -> jax.Array | tuple[jax.Array, KeysValues | tuple[Slots, ...]]:
        """Predicts the flow.

        Args:
          x: [B, F, H, W, C] noisy latent frames.
          t: float [B, F] or [B, 1] timesteps in [0, 1000].
          text: prompt embeddings [B, S, text_dim], or the output of `encode_text`.
          layout: positions and attention pattern.
          context: keys and values of other frames, as described by `layout`. Without `scan_layers` they may be slots,
            which also hold the prompt's keys and values.
          return_kv: whether to also return the own keys (without rotary embedding) and values.

        Returns:
          float32 flow [B, F, H, W, C]; with `return_kv` also KeysValues [L, B, F*tokens, N, D], or the new slots.
        """
        config = self.config
        h, _, kv, time = self._trunk(x, t, text, layout, context, return_kv)
        shift, scale = jnp.moveaxis(self.head_modulation[:, None] + time[:, :, None], 2, 0)
        h = layer_norm(h, config.eps).astype(jnp.float32)
        h = (h * (1 + scale[:, :, None]) + shift[:, :, None]).astype(config.dtype)
        h = constrain(h, "batch", None, "tokens", None)
        flow = unpatchify(self.head(h).astype(jnp.float32), config.grid(*x.shape[2:4]), config.patch)
        return (flow, kv) if return_kv else flow

    def features(
        self, x: jax.Array, t: jax.Array, text: jax.Array | KeysValues, layout: Layout, taps: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Outputs [taps, B, T, dim] of the blocks `taps` (indices), and the time embedding float32 [B, F or 1, dim].

        These are the inputs of a discriminator on this network. Other arguments as in `__call__`. If the tokens are
        split over devices, their order is that of `partition.merge_tokens`.

        Raises:
          ValueError: if `taps` is empty, repeats a block, or names a block that does not exist.
        """
        if not taps or min(taps) < 0 or max(taps) >= self.config.num_layers or len(set(taps)) != len(taps):
            raise ValueError(f"taps is {taps}: give different blocks out of 0 to {self.config.num_layers - 1}")
        _, tapped, _, time = self._trunk(x, t, text, layout, taps=taps)
        return jax.vmap(partition.merge_tokens)(tapped), time

    def _trunk(self, x, t, text, layout, context=None, return_kv=False, taps=()):
        """Runs all blocks: returns last output [B, F, P, dim], tapped outputs, own keys and values, time embedding."""
        config = self.config
        if x.shape[-1] != config.channels:
            raise ValueError(f"latents have {x.shape[-1]} channels (last axis), the model has {config.channels}")
        in_place = isinstance(context, tuple)
        if not in_place and not isinstance(text, KeysValues):
            text = self.encode_text(text)
        grid = config.grid(*x.shape[2:4])
        time = self.time_out(nn.silu(self.time_in(time_features(t, config.freq_dim))))
        context_rotation = stack = None
        if context is not None and not in_place:
            context = KeysValues(context.k, context.v)
            context_rotation = rope.rotation(layout.context_frames, grid, config.head_dim)
            if layout.prefixes:  # then a call may read little of a layer
                stack, context = context, np.arange(config.num_layers, dtype=np.int32)
        moved = np.arange(layout.sink)
        endless = layout.place is not None and layout.place.endless
        sinks = [rope.rotation(moved + n, grid, config.head_dim) if n else None for n in layout.sink_shifts]
        shared = Shared(
            modulation=self.time_projection(nn.silu(time)).reshape(*t.shape, 6, config.dim),
            own_rotation=(rope.endless_rotation if endless else rope.rotation)(layout.frames, grid, config.head_dim),
            context_rotation=context_rotation,
            context_mask=layout.context_mask,
            sink_rotations=tuple(sinks),
            keys_only=None,
            place=layout.place,
            most=layout.most,
            stack=stack,
            frames=_static(layout.frames) if sinks else None,
            context_frames=_static(layout.context_frames) if sinks else None,
            pattern=layout.pattern,
            tokens=grid[0] * grid[1],
            straight_through=layout.straight_through,
            mask_is_prefix=layout.mask_is_prefix,
            prefixes=layout.prefixes,
            prefixes_masked=layout.prefixes_masked,
            implementation=config.attention,
            return_kv=return_kv,
        )
        h = self.patch_embedding(patchify(constrain(x, "batch", *[None] * 4).astype(config.dtype), config.patch))
        h = constrain(h, "batch", None, "tokens", None)
        tapped = slots = None
        if taps:
            # One extra slot, to which all blocks without a tap write.
            tapped = jnp.zeros((len(taps) + 1, *h.shape), h.dtype)
            slots = np.full(config.num_layers, len(taps), np.int32)
            slots[list(taps)] = np.arange(len(taps))
        if config.scan_layers:
            (h, tapped), kv = self.blocks((h, tapped), text, context, slots, shared)
        else:
            kv = []
            for i, block in enumerate(self.blocks):
                if i == config.num_layers - 1:
                    shared = shared.replace(keys_only=layout.keys_only)
                layers = (context[i].text, context[i]) if in_place else _layer((text, context), i)
                (h, tapped), own = block((h, tapped), *layers, None if slots is None else slots[i], shared)
                kv.append(own)
            kv = tuple(kv) if in_place else _stack(kv)
        return h, None if tapped is None else tapped[: len(taps)], kv, time


def init_params(config: WanConfig, key: jax.Array) -> dict:
    """Random parameters; they do not depend on the size of the videos."""
    latents = jnp.zeros((1, 1, *config.patch[1:], config.channels))
    text = jnp.zeros((1, config.text_len, config.text_dim))
    return WanTransformer(config).init(key, latents, jnp.zeros((1, 1)), text, bidirectional_layout(1))["params"]


def param_shapes(config: WanConfig) -> dict:
    """Shapes and types of the parameters."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def _stack(layers):
    """Stacks the trees of single layers."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)


def _layer(stacked, index):
    """One layer of a stacked tree."""
    return jax.tree.map(lambda a: a[index], stacked)


def _static(frames):
    """Positions as a hashable constant."""
    return None if frames is None else tuple(int(frame) for frame in frames)
