"""Quantized weight files: dequantizes scaled float8; for other quantizations, raises an error that names them.

Formats: ComfyUI's `scaled_fp8` with `.scale_weight`, its newer `.weight_scale` with `.comfy_quant`
(ComfyUI, QUANTIZATION.md), LightX2V's and DeepSeek's `.weight_scale` and `.weight_scale_inv`.
"""

import math
import re
from collections.abc import Iterable

import numpy as np

from sf_jax.weights.tensors import Float8, TensorFile, cast, empty_aligned, is_float8

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
# Scales of activations, and ComfyUI's metadata; neither changes the weights.
_NOTES = (".scale_input", ".input_scale", ".comfy_quant")
_BLOCK = 128  # side of the usual blocks; the last one may be smaller
_STEP = 1 << 20  # elements held in float32 at a time
_OTHERS = (
    (r"\.SCB$", "bitsandbytes' int8"),
    (r"\.quant_state\.|\.(nested_)?(absmax|quant_map)$", "bitsandbytes' 4 bits"),
    (r"\.(wscales|wcscales|wtscale|smooth_factor|smooth_factor_orig)$", "SVDQuant (nunchaku)"),
    (r"\.(qzeros|qweight|g_idx)$", "GPTQ or AWQ"),
    (r"\.weight_scale_2$", "NVFP4"),
    (r"\.(pre_quant_scale|smooth_scale|weight_zero_point)$", "a quantization with scaled activations or zero points"),
    (r"weight\._data$|weight\._scale$", "optimum-quanto"),
    (r"_weight_(qdata|scale|zero_point)$|\.weight_qdata$", "torchao"),
)
_ADVICE = (
    "give the file in bfloat16 or float16 that it was made from, or write that with diffusers' model.dequantize() and "
    "save_pretrained (https://huggingface.co/docs/diffusers/quantization/overview)"
)


def refuse_quantized(tensors: TensorFile) -> None:
    """Raises for weights in a quantization other than scaled float8.

    Raises:
      ValueError: With the quantization's name and what to do.
    """
    for pattern, title in _OTHERS:
        name = next((name for name in tensors if re.search(pattern, name)), None)
        if name is not None:
            raise ValueError(f"{tensors.path} is quantized with {title} ({name}), which is not read: {_ADVICE}")
    for name, dtype in tensors.dtypes.items():
        if name.endswith(".weight") and dtype.kind in "iu" and tensors.shapes[name]:
            raise ValueError(f"{tensors.path} is quantized ({name} is {dtype}), which is not read: {_ADVICE}")


def refuse_lost_scales(tensors: TensorFile) -> None:
    """Raises for float8 weights that are marked as scaled but have no scales.

    Raises:
      ValueError: With the marker's name.
    """
    for marker in (name for name in tensors if re.search(r"(^|\.)scaled_fp8$", name)):
        prefix = marker.removesuffix("scaled_fp8")
        inside = [name for name in tensors if name.startswith(prefix) and name != marker]
        if any(is_float8(tensors.dtypes[name]) for name in inside) and not any(n.endswith(_SCALES) for n in inside):
            raise ValueError(
                f"{tensors.path} is marked as scaled float8 ({marker}) but has no scales (such as "
                f"{prefix}blocks.0.ffn.0.scale_weight): give the file that it was made from"
            )


def scale_names(names: Iterable[str]) -> dict[str, str]:
    """The scales in a scaled float8 file: name of the weight -> name of its scale."""
    found = {}
    for name in names:
        for suffix in _SCALES:
            if name.endswith(suffix):
                found[f"{name.removesuffix(suffix)}.weight"] = name
    return found


def dequantized(tensors: TensorFile, dtype=np.float32) -> TensorFile:
    """The weights of a scaled float8 file: stored values times their scales, computed in float32 and rounded once.

    A weight has one scale, one per row, or one per block. Only a few elements are in float32 at a time.

    Args:
      tensors: The file; files without scales are returned unchanged.
      dtype: Type of the weights.

    Raises:
      ValueError: If a scale does not fit its weight; on reading, if a scale is not finite.
    """
    scales = scale_names(tensors)
    dropped = {name for name in tensors if name.endswith(_NOTES)} | set(scales.values())
    if not dropped:
        return tensors
    for weight, scale in scales.items():
        if weight not in tensors:
            raise ValueError(f"{tensors.path}: {scale} is the scale of {weight}, which is not there")
        if not (tensors.dtypes[scale].kind == "f" or tensors.dtypes[scale].name == "bfloat16"):
            kind = "MXFP8" if tensors.dtypes[scale].kind == "u" else "a quantization that is not known"
            raise ValueError(f"{tensors.path} is quantized with {kind} ({scale} is {tensors.dtypes[scale]}): {_ADVICE}")
        _spread(np.ones(tensors.shapes[scale], np.float32), tensors.shapes[weight], f"{tensors.path}: {scale}")
    dtype = np.dtype(dtype)

    def scale_of(name):
        scale = tensors[scales[name]].astype(np.float32)
        if not np.isfinite(scale).all():
            raise ValueError(f"{tensors.path}: {scales[name]} is not finite; the file is damaged")
        return scale

    def read(name):
        if name not in scales:
            return tensors[name]
        value, scale, title = tensors[name], scale_of(name), f"{tensors.path}: {name}"
        out, rows = empty_aligned(value.shape, dtype), max(1, _STEP // max(1, math.prod(value.shape[1:])))
        if not value.ndim:
            return cast(_widened(value) * _spread(scale, (), scales[name]), dtype, title)
        for start in range(0, len(value), rows):
            part = slice(start, start + rows)
            out[part] = cast(_widened(value[part]) * _spread(scale, value.shape, scales[name], part), dtype, title)
        return out

    def stored(name):
        rows = tensors.shapes[name][0]

        def scale():
            return np.broadcast_to(scale_of(name).reshape(-1, 1), (rows, 1))

        return Float8(tensors.dtypes[name], lambda: tensors[name], scale)

    kept = [name for name in tensors if name not in dropped]
    whole = [name for name in scales if name in kept and _has_row_scales(tensors, name, scales[name])]
    return TensorFile(
        tensors.path,
        {name: tensors.shapes[name] for name in kept},
        {name: dtype if name in scales else tensors.dtypes[name] for name in kept},
        read,
        tensors.metadata,
        tensors.part,
        tensors.close,
        {name: stored(name) for name in whole},
    )


def _has_row_scales(tensors: TensorFile, name: str, scale: str) -> bool:
    """Whether this is a float8 matrix with one scale, or one per row."""
    shape, scales = tensors.shapes[name], tensors.shapes[scale]
    rows = math.prod(scales) == 1 or scales in ((shape[0],), (shape[0], 1), (shape[0], 1, 1)) if shape else False
    return len(shape) == 2 and is_float8(tensors.dtypes[name]) and rows


def _widened(value: np.ndarray) -> np.ndarray:
    """The same values in float32."""
    if not is_float8(value.dtype):
        return value.astype(np.float32)
    # A lookup table of all 256 values is ten times as fast as ml_dtypes' conversion.
    table = np.arange(256, dtype=np.uint8).view(value.dtype).astype(np.float32)
    return table[value.view(np.uint8)]


def _spread(scale: np.ndarray, shape: tuple[int, ...], title: str, rows: slice = slice(None)) -> np.ndarray:
    """Broadcasts a scale for multiplication with the given rows of a weight of `shape`."""
    if scale.size == 1:
        return scale.reshape(())
    if scale.ndim == 1 and shape and scale.size == shape[0]:
        return scale[rows].reshape(-1, *(1,) * (len(shape) - 1))
    if scale.ndim == len(shape) == 2:
        blocks = [_block(parts, size) for parts, size in zip(scale.shape, shape, strict=True)]
        if None not in blocks:
            if scale.shape[0] > 1:
                scale = scale[np.arange(*rows.indices(shape[0])) // blocks[0]]
            return np.repeat(scale, blocks[1], 1)[:, : shape[1]] if scale.shape[1] > 1 else scale
    if scale.ndim == 3 and len(shape) == 2 and scale.shape[0] == shape[0] and scale.shape[2] == 1:
        return _spread(scale[..., 0], shape, title, rows)
    raise ValueError(f"{title} is {scale.shape}: no scale of a weight {shape}, by row or by block")


def _block(parts: int, size: int) -> int | None:
    """The number of elements along an axis that share one of `parts` scales."""
    if parts > 1 and math.ceil(size / _BLOCK) == parts:
        return _BLOCK
    return size // parts if size % parts == 0 else None
