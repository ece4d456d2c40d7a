"""Histograms of activations without a range fixed beforehand: ranges widen without loss, shards merge bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.calib.importance import Weights, resampled
from darktrt.errors import DarktrtError

BINS = 1 << 14
LEAST_EXPONENT = -100
"""Of the smallest range, 2**-100: ``BINS / range`` stays inside float32, and smaller values are no signal."""

_BLOCK = 1 << 16
_MOST_FLOAT = float(np.finfo(np.float32).max)


@dataclass(eq=False)
class Histogram:
    """The distribution of |x| in one tensor: ``counts[i]`` values lie in ``[i, i + 1) * 2**exponent / BINS``.

    The exponent is a function of the largest |x|: the least one with amax < 2**exponent. So at least BINS / 2 bins lie below
    amax. A larger value doubles the range, as often as needed, by adding pairs of bins, which is exact:
    ``floor(floor(v) / 2) == floor(v / 2)``, and scaling a float by a power of two does not round. Hence the histogram depends
    on the values added, and not on their order or grouping: the histograms of the shards of a data set merge to the histogram
    of one run over all of it, bit for bit, and no pass for the ranges is needed.
    """

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    exponent: int = LEAST_EXPONENT
    minimum: float = math.inf
    maximum: float = -math.inf
    zeros: int = 0
    """Values that are exactly zero; they are also counted in bin 0."""
    weighted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """Like ``counts``, with every value counted as often as the weight of its position."""

    @property
    def count(self) -> int:
        """The number of values added."""
        return int(self.counts.sum())

    @property
    def amax(self) -> float:
        """The largest |x|, exact; 0 for an empty histogram."""
        return max(-self.minimum, self.maximum, 0.0) + 0.0  # no -0.0

    @property
    def bin_width(self) -> float:
        return math.ldexp(1.0, self.exponent) / BINS

    def add(self, values: NDArray[Any], weights: Weights | None = None) -> None:
        """Count the values of an array, as float32.

        Args:
            values: of any shape; ``(N, C, H, W)`` with weights.
            weights: of each position, on a grid of their own ``(N, rows, columns)``; None gives every value the weight 1.

        Raises:
            ValueError: a value is NaN or infinite; nothing is counted then.
        """
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"holds {'NaN' if math.isnan(low) else 'infinite'} values")
        self._extend(low, high)
        scale = np.float32(1 / self.bin_width)
        for start in range(0, flat.size, _BLOCK):  # blocks stay in the cache
            magnitude = np.abs(flat[start : start + _BLOCK])
            self.zeros += int(np.count_nonzero(magnitude == 0))
            magnitude *= scale
            counts = np.bincount(magnitude.astype(np.intp))
            self.counts[: len(counts)] += counts
        self._add_weighted(flat.reshape(np.shape(values)), weights, scale)

    def _add_weighted(self, values: NDArray[np.float32], weights: Weights | None, scale: np.float32) -> None:
        if weights is None:
            self._count_weighted(values.reshape(1, -1), np.ones(values.size), scale)
            return
        for image, grid in zip(values, resampled(weights, *values.shape[2:]), strict=True):
            positions = np.flatnonzero(grid)
            self._count_weighted(image.reshape(len(image), -1).take(positions, 1), grid.ravel()[positions], scale)

    def _count_weighted(self, values: NDArray[np.float32], times: NDArray[Any], scale: np.float32) -> None:
        """Count values ``(C, positions)``, those of each position so many times."""
        if values.size == 0:
            return
        rows = max(_BLOCK // len(times), 1)
        for start in range(0, len(values), rows):
            bins = (np.abs(values[start : start + rows]) * scale).astype(np.intp)
            # sums of whole numbers are exact in doubles up to 2**53
            counts = np.bincount(bins.ravel(), np.broadcast_to(times, bins.shape).ravel())
            self.weighted[: len(counts)] += counts.astype(np.int64)

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self._extend(other.minimum, other.maximum)
        self.counts += _widened(other.counts, self.exponent - other.exponent)
        self.weighted += _widened(other.weighted, self.exponent - other.exponent)
        self.zeros += other.zeros

    def _extend(self, minimum: float, maximum: float) -> None:
        # + 0.0 makes -0.0 to 0.0, which of the two comes first would decide otherwise
        self.minimum, self.maximum = min(self.minimum, minimum) + 0.0, max(self.maximum, maximum) + 0.0
        exponent = _exponent(self.amax)
        self.counts = _widened(self.counts, exponent - self.exponent)
        self.weighted = _widened(self.weighted, exponent - self.exponent)
        self.exponent = exponent


def _exponent(amax: float) -> int:
    return max(math.frexp(amax)[1], LEAST_EXPONENT) if amax else LEAST_EXPONENT  # frexp(0) is (0, 0)


def _widened(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """The counts in bins ``2**doublings`` times as wide; the same array where ``doublings`` is 0."""
    if doublings == 0:
        return counts
    group = 1 << min(doublings, BINS.bit_length() - 1)
    wide = np.zeros_like(counts)
    wide[: BINS // group] = counts.reshape(-1, group).sum(axis=1)
    return wide


@dataclass(eq=False)
class HistogramSet:
    """Histograms of a network's tensors, with the network and the images that they come from."""

    model: str
    """SHA-256 of the ONNX file."""
    histograms: dict[str, Histogram] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    """Maps the SHA-256 of each image file counted to its path, as text."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Maps the path of each image that could not be read to a sentence."""
    files: dict[str, Path] = field(default_factory=dict)
    """Maps the SHA-256 of those images that a run has found to their files; not saved."""
    groups: list[list[str]] = field(default_factory=list)
    """Groups of tensors with common values, from :func:`darktrt.calib.graph.passing_groups`."""
    head_inputs: list[str] = field(default_factory=list)
    """The input tensors of the heads' convolutions, from :func:`darktrt.calib.graph.head_inputs`."""
    mish: dict[str, str] = field(default_factory=dict)
    """Maps the input tensor of each Mish to its output tensor, from :func:`darktrt.calib.graph.mish_outputs`."""

    def add(self, activations: Mapping[str, NDArray[Any]], images: Mapping[str, str], weights: Weights | None = None) -> None:
        """Count the tensors' values for these images; on an error nothing is counted.

        Args:
            activations: values by tensor.
            images: paths by SHA-256.
            weights: of the images' positions, as for :meth:`Histogram.add`.

        Raises:
            DarktrtError: a value is NaN or infinite.
        """
        for name, values in activations.items():
            if not np.isfinite([values.min(), values.max()]).all():
                where = ", ".join(images.values())
                raise DarktrtError(f"tensor '{name}' is NaN or infinite for {where}; are the weights damaged?")
        for name, values in activations.items():
            self.histograms.setdefault(name, Histogram()).add(values, weights)
        self.images.update(images)

    def merge(self, others: Iterable[HistogramSet]) -> None:
        """Add the counts of other runs: the result is that of one run over all their images.

        Raises:
            DarktrtError: another run is of another model or other tensors, or has counted an image that is here too; nothing
                of it is added then.
        """
        for other in others:
            self._check_mergeable(other)
            self.groups = self.groups or other.groups
            self.head_inputs = self.head_inputs or other.head_inputs
            self.mish = self.mish or other.mish
            for name, histogram in other.histograms.items():
                self.histograms.setdefault(name, Histogram()).merge(histogram)
            self.images.update(other.images)
            self.skipped.update(other.skipped)
            self.files.update(other.files)

    def _check_mergeable(self, other: HistogramSet) -> None:
        if other.model != self.model:
            raise DarktrtError(
                f"histograms of different models do not merge (SHA-256 {self.model[:12]} and {other.model[:12]}); "
                "calibrate on the same ONNX file for every shard"
            )
        if self.images and other.images and set(self.histograms) != set(other.histograms):
            odd = sorted(set(self.histograms) ^ set(other.histograms))[0]
            raise DarktrtError(f"the histograms are not of the same tensors: '{odd}' is only in one of them; calibrate again")
        if twice := [digest for digest in other.images if digest in self.images]:
            first, second = self.images[twice[0]], other.images[twice[0]]
            raise DarktrtError(
                f"{len(twice)} images were counted on both sides, first '{first}' (there as '{second}'); "
                "shards must not share images"
            )


_MOST_VALUES = float(1 << 53)
"""Of one tensor; up to here sums are exact in doubles."""


@dataclass(frozen=True)
class Limits:
    """What is known of a tensor's values besides the counts of its histogram; see :class:`Histogram`."""

    exponent: int
    minimum: float
    maximum: float
    zeros: int


def checked_histogram(limits: Limits, counts: NDArray[np.int64], weighted: NDArray[np.int64]) -> Histogram:
    """A histogram that can be one of values.

    Raises:
        ValueError: it cannot.
    """
    minimum, maximum, zeros = float(limits.minimum), float(limits.maximum), limits.zeros
    result = Histogram(counts, limits.exponent, minimum, maximum, zeros, weighted)
    if not -_MOST_FLOAT <= minimum <= maximum <= _MOST_FLOAT or limits.exponent != _exponent(result.amax):
        raise ValueError("the range of a histogram is not that of its values")
    if min(counts.min(), weighted.min()) < 0 or max(part.sum(dtype=np.float64) for part in (counts, weighted)) > _MOST_VALUES:
        raise ValueError("a count is negative or too large")
    filled = np.flatnonzero(counts)
    if not len(filled) or filled[-1] != int(result.amax / result.bin_width) or weighted[counts == 0].any():
        raise ValueError("the counts of a histogram do not fit its values")
    if not 0 <= zeros <= counts[0]:
        raise ValueError("a histogram has more zeros than values near zero")
    return result
