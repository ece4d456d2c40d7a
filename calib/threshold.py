"""Histograms to thresholds: the amax of each tensor, at which INT8's range ends. Pure functions of the histograms.

A tensor is quantized symmetrically to the 255 levels -127..127: x becomes ``scale * clip(round(x / scale), -127, 127)``
with scale = amax / 127. A smaller amax lowers the rounding error below it and raises the clipping error above it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.histogram import Histogram, HistogramSet
from darktrt.errors import DarktrtError

Method = Literal["entropy", "percentile", "minmax", "mse", "weighted", "auto"]
"""How to choose a threshold.

- ``entropy``: :func:`entropy_amax`, TensorRT's own method;
- ``percentile``: :func:`percentile_amax`;
- ``minmax``: the largest |x|;
- ``mse``: :func:`mse_amax`, the least expected squared error;
- ``weighted``: the same, each value weighted by the score that the network has at its position
  (:mod:`darktrt.calib.importance`). Most of an image is background, whose small values call for a small range, but the cost of
  clipping falls on the objects. With weights INT8 changes scores by a seventh less than without (benchmarks/int8.md);
- ``auto``: of those five the one with the least weighted squared error, the earlier one where two are equal. No threshold
  has less of it than that of ``weighted``; the errors of the others are recorded for comparison.
"""
METHODS: tuple[Method, ...] = get_args(Method)

LEVELS = 127
ENTROPY_BINS, ENTROPY_LEVELS = 2048, 128
DEAD_AMAX = 2.0**-100
"""A tensor that never exceeds this counts as all zero."""
DEAD_SCALE_AMAX = 1.0
"""The amax of an all-zero tensor: any positive scale maps zero to zero; TensorRT and ONNX refuse a scale of 0."""

NEAR = 1.25
"""The largest ratio between thresholds that are joined."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """The threshold of one tensor and its origin."""

    amax: float
    method: str
    """The method that led to it: under ``auto`` the best one; ``minmax`` also where the requested one has no answer."""
    clipped_share: float
    """The share of all values whose magnitude exceeds ``amax``."""
    errors: dict[str, float]
    """Under ``auto`` the error of each method's threshold; else empty."""
    dead: bool = False
    """The tensor was zero in every image; its scale is arbitrary."""
    joined: bool = False
    """The threshold comes from another tensor: the largest of a group, of which ``clipped_share`` is an upper bound then, or
    that of the output of the Mish that reads this tensor."""

    @property
    def scale(self) -> np.float32:
        scale: np.float32 = np.float32(self.amax / LEVELS)
        return scale


def choose_thresholds(histograms: HistogramSet, method: Method = "auto", percentile: float = 99.99) -> dict[str, Choice]:
    """The threshold of every tensor of a network; tensors that should have a common scale share one.

    Args:
        histograms: of all tensors, from :func:`darktrt.calib.collect.collect`.
        method: see :data:`Method`.
        percentile: for the method of that name, above 0 and at most 100.

    Raises:
        DarktrtError: the method or the percentile is invalid, there are no histograms, or one is empty.
    """
    check_method(method, percentile)
    if not histograms.histograms:
        raise DarktrtError("there are no histograms to choose scales from; calibrate on images first")
    choices = {
        name: choose_amax(histogram, method, percentile, for_head=name in histograms.head_inputs)
        for name, histogram in histograms.histograms.items()
    }
    return join_mish(join_groups(choices, histograms.groups), histograms.histograms, histograms.mish)


def check_method(method: str, percentile: float) -> None:
    """Check the arguments of :func:`choose_thresholds`.

    Raises:
        DarktrtError: the method is unknown, or the percentile is not above 0 and at most 100.
    """
    if method not in METHODS:
        raise DarktrtError(f"unknown calibration method '{method}'; use {', '.join(METHODS)}", argument="method")
    if not 0 < percentile <= 100:
        raise DarktrtError(f"the percentile is {percentile:g}; it must be above 0 and at most 100", argument="percentile")


def choose_amax(histogram: Histogram, method: Method, percentile: float = 99.99, *, for_head: bool = False) -> Choice:
    """The threshold of one tensor.

    Args:
        histogram: of the tensor.
        method: see :data:`Method`.
        percentile: for the method of that name, above 0 and at most 100.
        for_head: the tensor is the input of a head's convolution. ``auto`` then weights all values equally: rounding errors
            there move every box, while the logistic function hides the clipping of a large score.

    Raises:
        DarktrtError: the method or the percentile is invalid, or the histogram is empty.
    """
    check_method(method, percentile)
    if histogram.count == 0:
        raise DarktrtError("a tensor has no values to calibrate on; were any images counted?")
    if histogram.amax < DEAD_AMAX:
        return Choice(DEAD_SCALE_AMAX, "minmax", 0.0, {}, dead=True)
    if method != "auto":
        return _choice(histogram, _amax_by(method, histogram, percentile), method, {})
    amaxes = {name: _amax_by(name, histogram, percentile) for name in METHODS[:-1]}
    judged = histogram if for_head else _weighted(histogram)
    errors = dict(zip(amaxes, expected_error(judged, np.array(list(amaxes.values()))).tolist(), strict=True))
    best = min(errors, key=errors.__getitem__)
    return _choice(histogram, amaxes[best], best, errors)


def join_groups(choices: Mapping[str, Choice], groups: Iterable[Sequence[str]]) -> dict[str, Choice]:
    """The choices with a common threshold, the largest, for each group whose thresholds are near each other.

    With one scale a tensor is quantized once for all its readers and passes through concats, max pools, slices and upsamples
    as INT8. A group whose thresholds differ by more than :data:`NEAR` is left as it is: coarser steps would cost accuracy.
    """
    result = dict(choices)
    for group in groups:
        alive = [name for name in group if not choices[name].dead]
        amaxes = [choices[name].amax for name in alive]
        if amaxes and max(amaxes) <= NEAR * min(amaxes):
            result.update({name: replace(choices[name], amax=max(amaxes), joined=True) for name in alive})
    return result


def join_mish(choices: Mapping[str, Choice], histograms: Mapping[str, Histogram], mish: Mapping[str, str]) -> dict[str, Choice]:
    """The choices with the threshold of each Mish's output for its input too, which a fused Mish reads in INT8.

    Mish leaves large x as it is and maps x below -5 to nearly zero, so its input needs the range of its output, however
    far below zero it reaches; and with one scale a large value is rounded once, not twice.

    Args:
        mish: maps the input tensor of each Mish to its output tensor.
    """
    result = dict(choices)
    for name, output in mish.items():
        of_output = choices[output]
        if not of_output.dead:
            result[name] = replace(_choice(histograms[name], of_output.amax, of_output.method, {}), joined=True)
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
    """The histogram of weighted counts; the unweighted one where the network detected nothing anywhere."""
    if not histogram.weighted.any():
        return histogram
    return replace(histogram, counts=histogram.weighted, zeros=0)


def _choice(histogram: Histogram, amax: float, method: str, errors: dict[str, float]) -> Choice:
    if not amax >= DEAD_AMAX:
        return Choice(histogram.amax, "minmax", 0.0, errors)
    above = histogram.count - float(np.interp(amax, *_cumulative(histogram))) if amax < histogram.amax else 0.0
    return Choice(amax, method, above / histogram.count, errors)


def _cumulative(histogram: Histogram) -> tuple[Floats, Floats]:
    """Edges ``(b + 1,)`` from 0 to amax and the number of values below each; values are spread evenly inside a bin.

    The last bin ends at amax. Zeros lie at 0 itself, outside every bin.
    """
    bins = max(math.ceil(histogram.amax / histogram.bin_width), 1)
    edges: Floats = np.arange(bins + 1, dtype=np.float64) * histogram.bin_width
    edges[-1] = histogram.amax
    below = np.concatenate([[0.0], np.cumsum(histogram.counts[:bins])])
    below[0], below[-1] = histogram.zeros, histogram.count
    return edges, below


def percentile_amax(histogram: Histogram, percentile: float) -> float:
    """The |x| that ``percentile`` % of all values, zeros included, do not exceed; interpolated inside a bin.

    It is 0 where that many values are zero.
    """
    edges, below = _cumulative(histogram)
    wanted = histogram.count * percentile / 100
    if wanted <= histogram.zeros:
        return 0.0
    return float(np.interp(wanted, below, edges))


def entropy_histogram(histogram: Histogram) -> Floats:
    """The 2048 bins over [0, amax] of the entropy method.

    A bin of the finer histogram that straddles an edge is split in proportion, so counts need not be whole. Bin 0 is
    replaced by bin 1, as NVIDIA's own published code does (``_compute_amax_entropy`` of pytorch-quantization): zero is
    exact at every scale, and the spike that a rectifier makes there would drown the rest of the distribution.
    """
    edges, below = _cumulative(histogram)
    counts = np.diff(np.interp(np.linspace(0, histogram.amax, ENTROPY_BINS + 1), edges, below))
    counts[0] = counts[1]
    return counts


def entropy_amax(histogram: Histogram) -> float:
    """The threshold that loses the least information, by the method of TensorRT's entropy calibrator.

    After S. Migacz, "8-bit Inference with TensorRT", GTC 2017. There are 2048 bins over [0, amax]; a candidate keeps the
    first i = 128..2048. The reference P has these bins, with all outliers added to the last one. Q has these bins without
    the outliers, quantized to 128 levels and expanded again: each level is spread evenly over its non-empty bins. The
    threshold is (i + 1/2) bins for the i of least divergence KL(P, Q), the largest such i. The half bin is the talk's; it is
    visible in TensorRT's own caches, where images in 0..1 have the amax 2048.5 / 2048.
    """
    divergence = entropy_divergences(entropy_histogram(histogram))
    if not np.isfinite(divergence).any():
        return 0.0
    best = len(divergence) - 1 - int(np.argmin(divergence[::-1]))
    return (best + ENTROPY_LEVELS + 0.5) * histogram.amax / ENTROPY_BINS


def entropy_divergences(counts: Floats) -> Floats:
    """KL(P, Q) in nats for keeping the first 128, 129, ... ``len(counts)`` bins; infinite where Q is 0 and P is not.

    KL = sum of P log P - sum of P log Q, and Q is constant over the non-empty bins of a level. Every sum is a difference of
    prefix sums, so that a candidate costs 128 terms.
    """
    kept = np.arange(ENTROPY_LEVELS, len(counts) + 1)
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    self_information = np.concatenate([[0.0], np.cumsum(_x_log_x(counts))])
    total, inside, last = mass[-1], mass[kept], counts[kept - 1]
    outliers = total - inside
    # level j of i kept bins consists of the bins b with floor(b * 128 / i) == j
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
