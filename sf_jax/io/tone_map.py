"""Tone-maps HDR pictures (PQ and HLG, BT.2020) to standard ones (BT.709).

Pixels are decoded to display light, with 100 cd/m2 (white paper) as 1. A Moebius curve on the brightest channel rolls
off brighter light, and the result is encoded for a BT.1886 display. This is what ffmpeg's
`zscale=t=linear:npl=100,zscale=p=bt709,tonemap=mobius:desat=0,zscale=t=bt709` does.
"""

import functools

import numpy as np

PQ, HLG = 16, 18  # transfer functions in ITU-T H.273
WHITE = 100.0  # cd/m2
PEAK = 1000.0  # cd/m2; brighter light is white, regardless of the file's own peak
_KNEE = 0.3  # the curve is linear up to here
_LEVELS = 2**13  # entries of the table from light to 8 bits
_TO_709 = np.array(
    [[1.6604910, -0.5876411, -0.0728499], [-0.1245505, 1.1328999, -0.0083494], [-0.0181508, -0.1005789, 1.1187297]],
    np.float32,
)
_ROWS = 64  # rows processed at a time, which fit into the CPU's cache


def tone_map(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """Converts pixels uint16 [h, w, 3] in BT.2020 to uint8 [h, w, 3] in BT.709.

    Args:
      pixels: full-range R'G'B'.
      transfer: PQ or HLG.
    """
    out = np.empty(pixels.shape, np.uint8)
    for row in range(0, len(pixels), _ROWS):
        out[row : row + _ROWS] = _rows(pixels[row : row + _ROWS], transfer)
    return out


def _rows(pixels, transfer):
    light = _TO_709 @ _to_light(transfer)[pixels.reshape(-1, 3).T]  # [3, h * w], numpy's faster layout
    brightest = np.maximum(light.max(0), 1e-6)
    light *= np.where(brightest > _KNEE, _rolled_off(brightest) / brightest, np.float32(1))
    # The table is indexed by square roots, for precision in dark areas.
    levels = np.sqrt(np.clip(light, 0, 1, out=light), out=light)
    levels *= _LEVELS - 1
    levels += 0.5
    return _to_709()[levels.astype(np.uint16)].T.reshape(pixels.shape)


def _rolled_off(light):
    """The part of the curve above the knee: continues the line smoothly and maps the peak to 1."""
    knee, peak = _KNEE, PEAK / WHITE
    a = -(knee**2) * (peak - 1) / (knee**2 - 2 * knee + peak)
    b = (knee**2 - 2 * knee * peak + peak) / (peak - 1)
    return (b * b + 2 * b * knee + knee**2) / (b - a) * (light + a) / (light + b)


@functools.cache
def _to_light(transfer: int) -> np.ndarray:
    """Display light of each of 65536 code values, in units of `WHITE`: ST 2084, and BT.2100 for HLG.

    HLG's system gamma of 1.2 is applied to each channel separately, as in ffmpeg.
    """
    code = np.linspace(0, 1, 2**16)
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        power = code ** (1 / m2)
        light = (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * (10000 / WHITE)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
        light = scene**1.2 * (PEAK / WHITE)
    return light.astype(np.float32)


@functools.cache
def _to_709() -> np.ndarray:
    """uint8 code value of each of `_LEVELS` square roots of light, for a BT.1886 display with gamma 2.4."""
    return np.round(np.linspace(0, 1, _LEVELS) ** (2 / 2.4) * 255).astype(np.uint8)
