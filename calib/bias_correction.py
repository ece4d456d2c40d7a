"""What quantizing shifts: the mean of each channel before and after, by which biases are corrected; a file beside the table.

Rounding is even-handed only where values are spread evenly over a step. The many small values behind a Mish or a leaky
rectifier are not, nor are clipped ones, so the mean of a quantized channel moves, and with it the output of every convolution
that reads it, at all places alike: a constant that its bias can take back. After M. Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with means that are measured and not derived.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, sha256_of

_FORMAT = "darktrt channel means 1"


class ChannelMeans(NamedTuple):
    """Means of one tensor's channels over images and places, each ``(C,)``."""

    mean: NDArray[np.float64]
    quantized: NDArray[np.float64]


class ChannelMeanMeter:
    """Adds up what :class:`ChannelMeans` is the mean of, for tensors ``(N, C, H, W)`` of a float network."""

    def __init__(self, scales: Mapping[str, np.float32]) -> None:
        self.scales = scales
        self.sums: dict[str, ChannelMeans] = {}
        self.places: dict[str, int] = {}

    def add(self, activations: Mapping[str, NDArray[Any]]) -> None:
        """Count these values, and what they are after INT8 (-128..127 steps of the tensor's scale)."""
        for name, values in activations.items():
            steps = np.clip(np.rint(values / self.scales[name]), -128, 127)
            sums = ChannelMeans(
                values.sum((0, 2, 3), dtype=np.float64),
                steps.sum((0, 2, 3), dtype=np.float64) * float(self.scales[name]),
            )
            earlier = self.sums.get(name, ChannelMeans(np.zeros(1), np.zeros(1)))
            self.sums[name] = ChannelMeans(earlier.mean + sums.mean, earlier.quantized + sums.quantized)
            self.places[name] = self.places.get(name, 0) + values[:, 0].size

    def channel_means(self) -> dict[str, ChannelMeans]:
        return {name: ChannelMeans(*(part / self.places[name] for part in sums)) for name, sums in self.sums.items()}


def corrected_bias(
    bias: NDArray[Any], weight: NDArray[Any], quantized_weight: NDArray[Any], means: ChannelMeans
) -> NDArray[np.float32]:
    """The bias ``(O,)`` with which a convolution of quantized input and weights ``(O, C / groups, kh, kw)`` has its old mean.

    ``bias + sum(W) mean - sum(Wq) quantized mean``, sums over the kernel; the zeros around an image are left out of account.
    """
    outputs, inputs = weight.shape[:2]
    groups = len(means.mean) // inputs
    mean, quantized = (part.reshape(groups, inputs).repeat(outputs // groups, 0) for part in means)
    before, after = (w.astype(np.float64).sum((2, 3)) for w in (weight, quantized_weight))
    corrected: NDArray[np.float32] = (bias + (before * mean - after * quantized).sum(1)).astype(np.float32)
    return corrected


def channel_means_path(table: str | Path) -> Path:
    """The file beside a table."""
    return Path(table).with_suffix(".means.npz")


def save_channel_means(channel_means: Mapping[str, ChannelMeans], table: str | Path) -> None:
    """Write them beside the table that they were measured with, whole or not at all.

    Raises:
        DarktrtError: the file cannot be written.
    """
    header = {
        "format": _FORMAT,
        "table": sha256_of(table),
        "channels": {name: len(one.mean) for name, one in channel_means.items()},
    }
    columns = [np.concatenate([np.zeros(0), *(one[i] for one in channel_means.values())]) for i in range(2)]
    with atomic_output(channel_means_path(table)) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), mean=columns[0], quantized=columns[1]
        )


def load_channel_means(table: str | Path) -> dict[str, ChannelMeans]:
    """What lies beside a table; nothing where there is no such file, as beside a TensorRT cache from elsewhere.

    Raises:
        DarktrtError: the file is damaged, or was measured with another table.
    """
    path = channel_means_path(table)
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            header, columns = json.loads(archive["header"].tobytes()), (archive["mean"], archive["quantized"])
        if header["format"] != _FORMAT or any(len(part) != sum(header["channels"].values()) for part in columns):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DarktrtError(f"{path}: is damaged; run calib again, or delete it to do without corrected biases") from error
    if header["table"] != sha256_of(table):
        raise DarktrtError(f"{path}: was measured with another {table}; run calib again, or delete it to do without")
    ends = np.cumsum(list(header["channels"].values()))
    parts = [np.split(part.astype(np.float64), ends[:-1]) for part in columns]
    return {name: ChannelMeans(*means) for name, *means in zip(header["channels"], *parts, strict=True)}
