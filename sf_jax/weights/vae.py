"""Name maps of the video VAE (official Wan2.1 names, diffusers' names) and of the tiny decoder (TAEHV's names)."""

import re
from collections.abc import Mapping

from sf_jax.models.tiny_vae import TinyVaeConfig
from sf_jax.models.vae import LIMITS, VaeConfig
from sf_jax.weights.mapping import CONV, SAME, Entry, vector

# The encoder in a file of the tiny VAE, which we do not use.
TINY_UNUSED = "encoder."

# (ours, official, diffusers) for the parts of a residual block: two norms, two convolutions, the shortcut.
_BLOCK = (
    ("norm1", "residual.0", "norm1"),
    ("conv1", "residual.2", "conv1"),
    ("norm2", "residual.3", "norm2"),
    ("conv2", "residual.6", "conv2"),
    ("shortcut", "shortcut", "conv_shortcut"),
)
# The same for the layers around the levels, in both halves (encoder and decoder).
_FRAME = (
    ("conv_in", "conv1", "conv_in"),
    ("norm_out", "head.0", "norm_out"),
    ("conv_out", "head.2", "conv_out"),
    ("middle.attention.norm", "middle.1.norm", "mid_block.attentions.0.norm"),
    ("middle.attention.qkv", "middle.1.to_qkv", "mid_block.attentions.0.to_qkv"),
    ("middle.attention.proj", "middle.1.proj", "mid_block.attentions.0.proj"),
)
_MIDDLE = (("middle.block1", "middle.0", "mid_block.resnets.0"), ("middle.block2", "middle.2", "mid_block.resnets.1"))
# Outside the halves in both namings; inside them in ours.
_QUANT = (("encoder.quant", "conv1", "quant_conv"), ("decoder.quant", "conv2", "post_quant_conv"))


def _layer(path: str, name: str) -> list[Entry]:
    """The tensors of one layer: a norm's scale, or a convolution's kernel and bias."""
    keys = tuple(path.split("."))
    if keys[-1].startswith("norm"):
        axes = 3 if keys[-2] == "attention" else 4
        return [Entry(f"{name}.gamma", (*keys, "scale"), None, vector(axes))]
    return [
        Entry(f"{name}.weight", (*keys, "kernel"), None, CONV),
        Entry(f"{name}.bias", (*keys, "bias"), None, SAME),
    ]


def _levels(config: VaeConfig, half: str) -> list[tuple[str, int, int, bool]]:
    """(path, channels in, channels out, whether its resampling has a `time_conv`) of each level of one half."""
    dims, times = [config.dim * mult for mult in config.dim_mult], [*config.temporal_downsample, False]
    if half == "encoder":
        before = [config.dim, *dims[:-1]]
    else:
        dims, times = dims[::-1], [*config.temporal_downsample[::-1], False]
        before = [dims[0], *(dim // 2 for dim in dims[:-1])]
    return [(f"{half}.levels_{i}", *level) for i, level in enumerate(zip(before, dims, times, strict=True))]


def _half(config: VaeConfig, half: str, column: int) -> list[Entry]:
    """The map of the encoder or the decoder."""
    found = [entry for row in _FRAME for entry in _layer(f"{half}.{row[0]}", f"{half}.{row[column]}")]
    blocks = [(f"{half}.{row[0]}", f"{half}.{row[column]}", False) for row in _MIDDLE]
    stem = f"{half}.{'downsamples' if half == 'encoder' else 'upsamples'}"
    count, number = config.num_res_blocks + (half == "decoder"), 0
    levels = _levels(config, half)
    for level, (path, before, after, time) in enumerate(levels):
        # Official files and diffusers' encoder number the blocks consecutively; diffusers' decoder nests them.
        nested = f"{half}.up_blocks.{level}"
        for i in range(count):
            name = (f"{stem}.{number}", f"{half}.down_blocks.{number}")[column - 1]
            if column == 2 and half == "decoder":
                name = f"{nested}.resnets.{i}"
            blocks.append((f"{path}.blocks_{i}", name, i == 0 and before != after))
            number += 1
        if level == len(levels) - 1:
            break
        name = (f"{stem}.{number}", f"{half}.down_blocks.{number}")[column - 1]
        if column == 2 and half == "decoder":
            name = f"{nested}.upsamplers.0"
        number += 1
        found += _layer(f"{path}.resample.conv", f"{name}.resample.1")
        if time:
            found += _layer(f"{path}.resample.time_conv", f"{name}.time_conv")
    for path, name, shortcut in blocks:
        for row in _BLOCK if shortcut else _BLOCK[:-1]:
            found += _layer(f"{path}.{row[0]}", f"{name}.{row[column]}")
    return found


def entries(config: VaeConfig, naming: str = "official") -> list[Entry]:
    """The map of the VAE; `naming` is "official" or "diffusers"."""
    column = {"official": 1, "diffusers": 2}[naming]
    found = [entry for row in _QUANT for entry in _layer(row[0], row[column])]
    return found + _half(config, "encoder", column) + _half(config, "decoder", column)


def vae_config_of(shapes: Mapping[str, tuple[int, ...]]) -> VaeConfig:
    """The sizes of a VAE from its tensors' official or diffusers' names and shapes.

    Files do not store the latents' mean and standard deviation: with 16 channels they are Wan2.1's, else 0 and 1.

    Raises:
      ValueError: if the names are not a VAE's.
    """
    official = "encoder.downsamples.0.residual.6.weight" in shapes
    stem = "encoder.downsamples" if official else "encoder.down_blocks"
    block, quant = ("residual.6.weight", "conv2.weight") if official else ("conv2.weight", "post_quant_conv.weight")
    if f"{stem}.0.{block}" not in shapes or quant not in shapes:
        raise ValueError(f"these are not the weights of a video VAE: no {stem}.0.{block} or no {quant} among the names")
    widths, times, count, number = [], [], 0, 0
    while True:
        if f"{stem}.{number}.{block}" in shapes:
            width, count = shapes[f"{stem}.{number}.{block}"][0], count + 1
        else:
            widths.append(width)
            if f"{stem}.{number}.resample.1.weight" not in shapes:
                break
            times.append(f"{stem}.{number}.time_conv.weight" in shapes)
        number += 1
    dim, z_dim = shapes[f"encoder.{'conv1' if official else 'conv_in'}.weight"][0], shapes[quant][0]
    if min(dim, *widths) < 1 or not 1 <= z_dim <= LIMITS["z_dim"]:
        raise ValueError(f"these are not the weights of a video VAE: {widths} channels from {dim}, {z_dim} latent ones")
    values = {} if z_dim == len(VaeConfig.mean) else {"mean": (0.0,) * z_dim, "std": (1.0,) * z_dim}
    return VaeConfig(
        dim=dim,
        z_dim=z_dim,
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=max(count // len(widths), 1),
        temporal_downsample=tuple(times),
        **values,
    )


def tiny_entries(config: TinyVaeConfig) -> list[Entry]:
    """The map of the tiny decoder.

    A file of the tiny VAE (`taew2_1`) also contains an encoder; drop names that start with `TINY_UNUSED` first.
    """
    found = []

    def add(path, name, bias=True):
        path = ("decoder", *path.split("."))
        found.append(Entry(f"decoder.{name}.weight", (*path, "kernel"), None, CONV))
        if bias:
            found.append(Entry(f"decoder.{name}.bias", (*path, "bias")))

    add("conv_in", "1")
    number = 3  # follows a clamp, the convolution and its ReLU
    for stage in range(len(config.grow)):
        for block in range(config.blocks):
            for i in range(3):
                add(f"stage{stage}_block{block}.conv{i + 1}", f"{number}.conv.{2 * i}")
            number += 1
        add(f"stage{stage}_grow", f"{number + 1}.conv", bias=False)  # follows the upsampling, which has no weights
        add(f"stage{stage}_out", f"{number + 2}", bias=False)
        number += 3
    add("conv_out", str(number + 1))
    return found


def tiny_vae_config_of(shapes: Mapping[str, tuple[int, ...]]) -> TinyVaeConfig:
    """The sizes of a tiny decoder from its tensors' names and shapes.

    Raises:
      ValueError: if the names are not a tiny VAE's.
    """
    grow = sorted(int(m[1]) for name in shapes if (m := re.fullmatch(r"decoder\.(\d{1,4})\.conv\.weight", name)))
    outs = [f"decoder.{number + 1}.weight" for number in grow]
    if len(grow) != 3 or any(name not in shapes for name in ("decoder.1.weight", *outs)):
        raise ValueError("these are not the weights of a tiny VAE: decoder.1.weight and three decoder.N.conv.weight")
    widths = tuple(shapes[name][0] for name in ("decoder.1.weight", *outs))
    if min(widths) < 1:
        raise ValueError(f"these are not the weights of a tiny VAE: its layers have {widths} channels")
    return TinyVaeConfig(
        z_dim=shapes["decoder.1.weight"][1],
        widths=widths,
        grow=tuple(shapes[f"decoder.{number}.conv.weight"][0] // width for number, width in zip(grow, widths)),
        blocks=grow[0] - 4,
    )
