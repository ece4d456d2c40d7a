"""Bias correction: the mean of each channel before and after quantization, measured, and kept in a file beside the table.

Rounding errors cancel out only where values are spread evenly over a step. The many small values behind a Mish or a leaky
rectifier are not, nor are clipped values, so quantization moves the mean of a channel. The output of every convolution that
reads it moves too, by the same constant at all positions, which its bias can compensate. After M. Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with measured means in place of derived
ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darktrt.archives import array_of, header_array, header_of, read_arrays
from darktrt.errors import DarktrtError, quote
from darktrt.files import atomic_output, sha256_of
from darktrt.records import record

_FORMAT = "darktrt channel means 1"
_ADVICE = "calibrate again, or delete the file of the means to leave biases uncorrected"


class ChannelMeans(NamedTuple):
    """The means of one tensor's channels over images and positions, each ``(C,)``."""

    mean: NDArray[np.float64]
    quantized: NDArray[np.float64]


class ChannelMeanMeter:
    """Measures :class:`ChannelMeans` of tensors ``(N, C, H, W)`` of a float network.

    Args:
        scales: the INT8 scale of each tensor.
    """

    def __init__(self, scales: Mapping[str, np.float32]) -> None:
        self.scales = scales
        self.sums: dict[str, ChannelMeans] = {}
        self.positions: dict[str, int] = {}

    def add(self, activations: Mapping[str, NDArray[Any]]) -> None:
        """Add these values, and the same values in INT8 (-128..127 steps of the tensor's scale)."""
        for name, values in activations.items():
            steps = np.clip(np.rint(values / self.scales[name]), -128, 127)
            sums = ChannelMeans(
                values.sum((0, 2, 3), dtype=np.float64),
                steps.sum((0, 2, 3), dtype=np.float64) * float(self.scales[name]),
            )
            earlier = self.sums.get(name, ChannelMeans(np.zeros(1), np.zeros(1)))
            self.sums[name] = ChannelMeans(earlier.mean + sums.mean, earlier.quantized + sums.quantized)
            self.positions[name] = self.positions.get(name, 0) + values[:, 0].size

    def channel_means(self) -> dict[str, ChannelMeans]:
        return {name: ChannelMeans(*(part / self.positions[name] for part in sums)) for name, sums in self.sums.items()}


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


def channel_means_path(table: str | Path) -> Path:
    """The file of the channel means beside a calibration table."""
    return Path(table).with_suffix(".means.npz")


def save_channel_means(channel_means: Mapping[str, ChannelMeans], table: str | Path) -> None:
    """Write the means beside the table that they were measured with, whole or not at all.

    Raises:
        DarktrtError: the file cannot be written.
    """
    header = {
        "format": _FORMAT,
        "table": sha256_of(table),
        "channels": {name: len(means.mean) for name, means in channel_means.items()},
    }
    columns = [np.concatenate([np.zeros(0), *(means[i] for means in channel_means.values())]) for i in range(2)]
    with atomic_output(channel_means_path(table)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, header=header_array(header), mean=columns[0], quantized=columns[1])


def load_channel_means(table: str | Path) -> dict[str, ChannelMeans]:
    """The channel means of a table; none where there is no such file, as beside a TensorRT cache.

    Raises:
        DarktrtError: the file is damaged, or was measured with another table.
    """
    path = channel_means_path(table)
    if not os.path.exists(path):  # where Path.exists raises an error at a name that is too long
        return {}
    arrays = read_arrays(path, _MOST_BYTES, _ADVICE)
    try:
        header = record(_Header, header_of(arrays, str(path), _ADVICE))
        total = (sum(header.channels.values()),)
        columns = [array_of(arrays, name, np.float64, total) for name in ("mean", "quantized")]
        if not np.isfinite(columns).all():
            raise ValueError("a mean is not finite")
    except (ValueError, TypeError) as error:
        raise DarktrtError(f"{path}: is damaged ({quote(str(error))}); {_ADVICE}") from error
    if header.table != sha256_of(table):
        raise DarktrtError(f"{path}: was measured with another {table}; calibrate again, or delete this file")
    ends = np.cumsum(list(header.channels.values()))
    parts = [np.split(part, ends[:-1]) for part in columns]
    return {name: ChannelMeans(*means) for name, *means in zip(header.channels, *parts, strict=True)}


_MOST_BYTES = 128 << 20
"""Of the arrays of a file; those of yolov4 have 0.5 MB."""


@dataclass(frozen=True)
class _Header:
    """What a file of channel means says in JSON."""

    format: Literal["darktrt channel means 1"]
    table: str
    channels: dict[str, int]
    """The number of channels by tensor."""

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels.values()) < 1:
            raise ValueError("a tensor has no channels")
