"""Bias correction: the mean of each channel before and after quantization, and the biases that compensate the difference.

Rounding errors cancel out only where values are spread evenly over a step. The many small values behind a Mish or a leaky
rectifier are not, nor are clipped values, so quantization moves the mean of a channel. The output of every convolution that
reads it moves too, by the same constant at all positions, which its bias can compensate. After M. Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with measured means in place of derived
ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError

UNIT_BITS = 38
"""Of the largest mean: its unit is ``2 ** -38`` of the tensor's range, some thousand times finer than float32."""
MOST_IMAGES = 1 << 24
"""The most images that channel means are measured on."""

_ADVICE = "calibrate again, without images to correct biases by if need be"


class ChannelMeans(NamedTuple):
    """The means of one tensor's channels over images and positions, each ``(C,)``."""

    mean: NDArray[np.float64]
    quantized: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ChannelSums:
    """Exact sums over images of one tensor, from which :class:`ChannelMeans` follow.

    They are whole numbers, so they do not depend on the order or the grouping of the images. An image's mean of a channel is
    rounded once, to a unit of ``2 ** (exponent - UNIT_BITS)``, where ``exponent`` is that of the tensor's histogram: all values
    are below ``2 ** exponent``. No sum can overflow 63 bits: a tensor of one image has less than 2**30 positions, for
    :mod:`darktrt.memory` allows twice its bytes 6 GiB, and there are at most :data:`MOST_IMAGES` images of 2**24, so the means
    add up to at most 2**(38 + 24), and the levels to at most 2**(7 + 30 + 24).
    """

    positions: int
    """Of one image."""
    means: NDArray[np.int64]
    """``(C,)``: the sum over images of the mean of each channel, in units."""
    levels: NDArray[np.int64]
    """``(C,)``: the sum over images and positions of the INT8 levels of each channel."""

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(self.positions, self.means + other.means, self.levels + other.levels)

    def channel_means(self, images: int, scale: np.float32, exponent: int) -> ChannelMeans:
        """The means over so many images."""
        unit = math.ldexp(1.0, exponent - UNIT_BITS)
        return ChannelMeans(self.means * unit / images, self.levels / (self.positions * images) * float(scale))


def channel_sums(values: NDArray[Any], scale: np.float32, exponent: int) -> ChannelSums:
    """The sums of one image's tensor ``(C, H, W)``, quantized to INT8 with this scale (levels -128..127)."""
    means = values.mean((1, 2), dtype=np.float64)
    levels = np.clip(np.rint(values / scale), -128, 127)
    units = np.rint(means * math.ldexp(1.0, UNIT_BITS - exponent))
    return ChannelSums(values[0].size, units.astype(np.int64), levels.sum((1, 2), dtype=np.float64).astype(np.int64))


def corrected_bias(
    bias: NDArray[Any], weight: NDArray[Any], quantized_weight: NDArray[Any], means: ChannelMeans, groups: int = 1
) -> NDArray[np.float32]:
    """The bias ``(O,)`` that restores the mean output of a convolution with quantized input and weights.

    It is ``bias + sum(W) mean - sum(Wq) quantized mean``, with sums over the kernel; the zeros around an image are neglected.

    Args:
        bias: ``(O,)``.
        weight: ``(O, C / groups, kh, kw)``.
        quantized_weight: the same weights, quantized and expanded again.
        means: of the input's C channels.
        groups: of the convolution.

    Raises:
        DarktrtError: the means are of another number of channels, or the corrected bias is not finite.
    """
    outputs, inputs = weight.shape[:2]
    if len(means.mean) != inputs * groups:
        raise DarktrtError(
            f"the means are of {len(means.mean)} channels where a convolution reads {inputs * groups}; {_ADVICE}"
        )
    mean, quantized = (part.reshape(groups, inputs).repeat(outputs // groups, 0) for part in means)
    before, after = (w.astype(np.float64).sum((2, 3)) for w in (weight, quantized_weight))
    with np.errstate(over="ignore", invalid="ignore"):
        corrected: NDArray[np.float32] = (bias + (before * mean - after * quantized).sum(1)).astype(np.float32)
    if not np.isfinite(corrected).all():
        raise DarktrtError(f"the means of the channels make a bias that is not finite; {_ADVICE}")
    return corrected
