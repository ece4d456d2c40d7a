"""Histograms to thresholds: where INT8's range of one tensor should end. Pure functions of a histogram.

A tensor is quantized symmetrically to the 255 levels -127..127: x becomes ``scale * clip(round(x / scale), -127, 127)``
with scale = amax / 127. Choosing the amax trades rounding error below it for clipping error above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.histogram import Histogram
from darktrt.errors import DarktrtError

Method = Literal["entropy", "percentile", "minmax", "mse", "weighted", "auto"]
METHODS: tuple[Method, ...] = ("entropy", "percentile", "minmax", "mse", "weighted", "auto")

LEVELS = 127
ENTROPY_BINS, ENTROPY_LEVELS = 2048, 128
DEAD_AMAX = 2.0**-100
"""A tensor that never exceeds this is taken as all zero."""
DEAD_SCALE_AMAX = 1.0
"""What an all-zero tensor gets: any positive scale maps zero to zero; TensorRT and ONNX refuse a scale of 0."""

NEAR = 1.25
"""How much the thresholds of tensors may differ that get a common one."""

Floats = NDArray[np.float64]
ErrorMeasure = Callable[[Histogram, Floats], Floats]
"""Of a histogram and candidate amaxes ``(n,)``: the error ``(n,)`` that quantizing with each makes."""


@dataclass(frozen=True)
class Choice:
    """The threshold of one tensor and how it came about."""

    amax: float
    method: str
    """The method that gave it: under ``auto`` the winner; ``minmax`` also where the one asked for has no answer."""
    clipped_share: float
    """The share of all values whose magnitude exceeds ``amax``."""
    errors: dict[str, float]
    """Under ``auto`` the error measured for each method's threshold; else empty."""
    dead: bool = False
    """The tensor was zero in every image; its scale is arbitrary."""
    joined: bool = False
    """The threshold is that of a group of tensors, and ``clipped_share`` of the tensor's own, so at most this is clipped; or it
    is that of what a Mish makes of this tensor."""

    @property
    def scale(self) -> np.float32:
        scale: np.float32 = np.float32(self.amax / LEVELS)
        return scale


def choose_amax(
    histogram: Histogram,
    method: Method,
    percentile: float = 99.99,
    error: ErrorMeasure | None = None,
    *,
    for_head: bool = False,
) -> Choice:
    """The threshold of a tensor by one method.

    ``entropy``: :func:`entropy_amax`. ``percentile``: :func:`percentile_amax`. ``minmax``: the largest |x| seen.
    ``mse``: :func:`mse_amax`. ``weighted``: the same where every value weighs with the score that the network has at its place
    (:mod:`darktrt.calib.importance`). ``auto``: of those five the one with the least ``error``, the earlier in this list where
    two are equal. ``error`` is the expected squared error so weighted; no threshold has less of it than that of ``weighted``,
    what the others have is kept in the choice, for comparison. ``for_head`` says that a head reads the tensor; then
    ``auto`` weighs all values alike: rounding there moves every box at once, while what clipping takes from a large score the
    logistic function hardly shows. Most of an image is background, whose small values ask for a small
    range; but what clipping them costs falls on the objects. With weights INT8 changes scores by a seventh
    less than without (benchmarks/int8.md).

    Raises:
        DarktrtError: the method is unknown, the percentile is not in (0, 100], or the histogram is empty.
    """
    if method not in METHODS:
        raise DarktrtError(f"unknown calibration method '{method}'; use {', '.join(METHODS)}")
    if not 0 < percentile <= 100:
        raise DarktrtError(f"the percentile is {percentile}; it must be above 0 and at most 100")
    if histogram.count == 0:
        raise DarktrtError("a tensor has no values to calibrate on; were any images counted?")
    if histogram.amax < DEAD_AMAX:
        return Choice(DEAD_SCALE_AMAX, "minmax", 0.0, {}, dead=True)
    if method != "auto":
        amax = _amax_by(method, histogram, percentile)
        return _choice(histogram, amax, method, {})
    amaxes = {name: _amax_by(name, histogram, percentile) for name in METHODS[:-1]}
    judged = histogram if for_head else _weighted(histogram)
    found = (error or expected_error)(judged, np.array(list(amaxes.values())))
    errors = dict(zip(amaxes, found.tolist(), strict=True))
    best = min(errors, key=errors.__getitem__)
    return _choice(histogram, amaxes[best], best, errors)


def joined(choices: Mapping[str, Choice], groups: Iterable[Sequence[str]]) -> dict[str, Choice]:
    """The choices, with one threshold, the largest, for each group whose thresholds are near to each other.

    With one scale a tensor is quantized once, whoever reads it, and passes through concats, max pools, slices and upsamples
    as INT8. A group whose thresholds differ by more than :data:`NEAR` keeps them, for the coarser steps would cost accuracy.
    """
    result = dict(choices)
    for group in groups:
        alive = [name for name in group if not choices[name].dead]
        amaxes = [choices[name].amax for name in alive]
        if amaxes and max(amaxes) <= NEAR * min(amaxes):
            result.update({name: replace(choices[name], amax=max(amaxes), joined=True) for name in alive})
    return result


def before_mish(
    choices: Mapping[str, Choice], histograms: Mapping[str, Histogram], outputs: Mapping[str, str]
) -> dict[str, Choice]:
    """The choices, with the threshold of what a Mish gives for what it reads too, which a fused Mish takes in INT8.

    Mish leaves large x as it is and makes nearly nothing of what is below -5, so its input needs the range that its output
    needs, however far below zero it reaches; and with one scale a large value is rounded once, not twice.

    Args:
        outputs: of tensors that a Mish reads the tensor that it gives.
    """
    result = dict(choices)
    for name, output in outputs.items():
        chosen = choices[output]
        if not chosen.dead:
            result[name] = replace(_choice(histograms[name], chosen.amax, chosen.method, {}), joined=True)
    return result


def _amax_by(method: Method, histogram: Histogram, percentile: float) -> float:
    if method == "entropy":
        return entropy_amax(histogram)
    if method == "percentile":
        return percentile_amax(histogram, percentile)
    if method in ("mse", "weighted"):
        return mse_amax(histogram if method == "mse" else _weighted(histogram))
    return histogram.amax


def _weighted(histogram: Histogram) -> Histogram:
    """The histogram by the weights of its values; as it is where nothing was found anywhere."""
    if not histogram.weighted.any():
        return histogram
    return replace(histogram, counts=histogram.weighted, zeros=0)


def _choice(histogram: Histogram, amax: float, method: str, errors: dict[str, float]) -> Choice:
    if not amax >= DEAD_AMAX:
        return Choice(histogram.amax, "minmax", 0.0, errors)
    above = histogram.count - float(np.interp(amax, *_cumulative(histogram))) if amax < histogram.amax else 0.0
    return Choice(amax, method, above / histogram.count, errors)


def _cumulative(histogram: Histogram) -> tuple[Floats, Floats]:
    """Edges ``(b + 1,)`` from 0 to amax and how many values lie below each, taken as spread evenly inside a bin.

    The last bin ends at amax, where its values do. Zeros lie at 0 itself, outside every bin.
    """
    bins = max(math.ceil(histogram.amax / histogram.bin_width), 1)
    edges: Floats = np.arange(bins + 1, dtype=np.float64) * histogram.bin_width
    edges[-1] = histogram.amax
    below = np.concatenate([[0.0], np.cumsum(histogram.counts[:bins])])
    below[0], below[-1] = histogram.zeros, histogram.count
    return edges, below


def percentile_amax(histogram: Histogram, percentile: float) -> float:
    """The |x| that ``percentile`` % of all values, zeros included, do not exceed; interpolated inside a bin.

    0 where so many values are zero.
    """
    edges, below = _cumulative(histogram)
    wanted = histogram.count * percentile / 100
    if wanted <= histogram.zeros:
        return 0.0
    return float(np.interp(wanted, below, edges))


def entropy_histogram(histogram: Histogram) -> Floats:
    """The 2048 bins over [0, amax] that the entropy method looks at.

    A bin of the finer histogram that straddles an edge is split in proportion, so counts need not be whole. Bin 0 is
    replaced by bin 1, as NVIDIA's own published code does (``_compute_amax_entropy`` of pytorch-quantization): zero is
    exact at every scale, and the spike that a rectifier makes there would drown the rest of the distribution.
    """
    edges, below = _cumulative(histogram)
    counts = np.diff(np.interp(np.linspace(0, histogram.amax, ENTROPY_BINS + 1), edges, below))
    counts[0] = counts[1]
    return counts


def entropy_amax(histogram: Histogram) -> float:
    """The threshold that loses least information, as TensorRT's entropy calibrator finds it.

    After S. Migacz, "8-bit Inference with TensorRT", GTC 2017: of 2048 bins over [0, amax], candidates keep the first
    i = 128..2048. The reference P is those bins with all outliers added to the last; Q is the kept bins without the
    outliers, quantized to 128 levels and expanded again, each level spread evenly over its non-empty bins. The threshold is
    (i + 1/2) bins for the i of least divergence KL(P, Q), the largest such i. The half bin is the talk's; it shows in
    TensorRT's own caches, where images in 0..1 have the amax 2048.5 / 2048.

    Every sum is a difference of prefix sums, so a candidate costs 128 terms: KL = sum of P log P - sum of P log Q, and
    Q is constant over the non-empty bins of a level.
    """
    divergence = entropy_divergences(entropy_histogram(histogram))
    if not np.isfinite(divergence).any():
        return 0.0
    best = len(divergence) - 1 - int(np.argmin(divergence[::-1]))
    return (best + ENTROPY_LEVELS + 0.5) * histogram.amax / ENTROPY_BINS


def entropy_divergences(counts: Floats) -> Floats:
    """KL(P, Q) in nats for keeping the first 128, 129, ... ``len(counts)`` bins; infinite where Q is 0 and P is not."""
    kept = np.arange(ENTROPY_LEVELS, len(counts) + 1)
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    self_information = np.concatenate([[0.0], np.cumsum(_x_log_x(counts))])
    total, inside, last = mass[-1], mass[kept], counts[kept - 1]
    outliers = total - inside
    # Level j of i kept bins takes the bins b with floor(b * 128 / i) == j.
    edges = -(-np.arange(ENTROPY_LEVELS + 1) * kept[:, np.newaxis] // ENTROPY_LEVELS)
    level = np.diff(mass[edges], axis=1)
    spread = _log(level / np.maximum(np.diff(filled[edges], axis=1), 1))
    p_log_p = self_information[kept] - _x_log_x(last) + _x_log_x(last + outliers)
    p_log_q = (level * spread).sum(axis=1) + outliers * spread[:, -1] - total * _log(inside)
    with np.errstate(invalid="ignore", divide="ignore"):
        divergence: Floats = (p_log_p - p_log_q) / total - np.log(total)
    divergence[(last == 0) & (outliers > 0) | (inside == 0)] = np.inf
    return divergence


def _log(values: Floats) -> Floats:
    """The logarithm, and 0 for 0: such terms are multiplied by 0."""
    logarithm: Floats = np.log(np.where(values > 0, values, 1.0))
    return logarithm


def _x_log_x(values: Floats) -> Floats:
    return values * _log(values)


def expected_error(histogram: Histogram, amaxes: Floats, power: float = 2) -> Floats:
    """The mean of ``|x - quantized x| ** power`` over all values, for each candidate amax ``(n,)``.

    Exact for values spread evenly inside each bin: with u = x / scale and n = min(round(u), 127), the integral of
    ``|u - n| ** p`` from 0 is ``2 n r(1/2) + r(u - n)`` where ``r(t) = sign(t) |t| ** (p + 1) / (p + 1)``. Rounding and
    clipping need no cases of their own: beyond 127 the distance just grows.
    """
    edges, below = _cumulative(histogram)
    density = np.diff(below) / np.diff(edges)
    scales = np.asarray(amaxes, np.float64) / LEVELS
    return np.array([_expected_error(edges, density, scale, power) for scale in scales]) / histogram.count


def _expected_error(edges: Floats, density: Floats, scale: float, power: float) -> float:
    units = edges / scale
    level = np.minimum(np.rint(units), LEVELS)
    rest = units - level
    part = rest * np.abs(rest) ** power
    integral = (level * 2 * 0.5 ** (power + 1) + part) / (power + 1)
    return float((density * np.diff(integral)).sum() * scale ** (power + 1))


def mse_amax(histogram: Histogram) -> float:
    """The threshold of least expected squared error.

    Searched on a geometric grid from amax / 256 to amax, then twice on a finer one between the neighbours of the best.
    """
    candidates: Floats = np.geomspace(histogram.amax / 256, histogram.amax, 48)
    for _ in range(3):
        best = int(np.argmin(expected_error(histogram, candidates)))
        low, high = candidates[max(best - 1, 0)], candidates[min(best + 1, len(candidates) - 1)]
        amax = float(candidates[best])
        candidates = np.linspace(low, high, 9)
    return amax
