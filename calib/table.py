"""TensorRT's calibration cache: a table of INT8 scales by tensor, as text."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from darktrt.calib.threshold import DEAD_SCALE_AMAX, LEVELS
from darktrt.errors import DarktrtError, quote
from darktrt.files import atomic_output, read_text

CACHE_VERSION = "8600"
"""TensorRT 8.6.0, in the header of tables made here."""

_HEADER = re.compile(r"TRT-([0-9]{1,9})-((?:Entropy|MinMax|Legacy)Calibration2?)")
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
_WHOLE = re.compile(r": [0-9a-fA-F]{8}\s*$")
"""The end of a last line that has no line end; with fewer digits it may have been cut."""
_MOST_BYTES = 16 << 20
"""More than the table of any network has; a larger file was named by mistake and is not read."""
_DEAD_SCALE = np.float32(DEAD_SCALE_AMAX / LEVELS)
"""Replaces a scale of 0. TensorRT 8.6 itself writes some (NVIDIA/TensorRT issue 3020) and then fails to build layers that
read such a tensor in INT8, although the other lines are sound. The tensor was zero in every image, "uniformly zero" in
TensorRT's log: it stays zero at any scale, and gets the scale of an all-zero tensor in a calibration of darktrt."""


class Comparison(NamedTuple):
    """The difference between a table and the tensors of a network, each in its own order."""

    missing: list[str]
    """Tensors of the network that the table does not have."""
    unused: list[str]
    """Tensors of the table that the network does not have."""


@dataclass(frozen=True)
class CalibrationTable:
    """Scales (amax / 127) by tensor name, in order.

    Raises:
        DarktrtError: on creation, when a scale is not a positive finite float32 or a name does not fit on a line.
    """

    scales: dict[str, np.float32]
    version: str
    """TensorRT's version as in its caches: 8600 for 8.6.0, 101300 for 10.13.0."""
    calibrator: str = "EntropyCalibration2"
    """The kind of calibrator in the header."""

    def __post_init__(self) -> None:
        if not _HEADER.fullmatch(f"TRT-{self.version}-{self.calibrator}"):
            raise DarktrtError(f"'TRT-{self.version}-{self.calibrator}' is no header of a calibration cache")
        for name, scale in self.scales.items():
            if not name or "\n" in name or "\r" in name:
                raise DarktrtError(f"tensor '{quote(name)}': such a name does not fit into a calibration cache")
            _check_scale(quote(name), float(scale))

    def text(self) -> str:
        """The cache: a header, then a line ``name: hex`` for each tensor; hex is the scale as a big-endian float32."""
        lines = [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in self.scales.items()]
        return "\n".join([f"TRT-{self.version}-{self.calibrator}", *lines, ""])

    def save(self, path: str | Path) -> None:
        """Write :meth:`text`, whole or not at all.

        Raises:
            DarktrtError: the file cannot be written.
        """
        with atomic_output(path) as temporary:
            temporary.write_bytes(self.text().encode())

    @staticmethod
    def load(path: str | Path) -> CalibrationTable:
        """Read a cache of darktrt, trtexec or any other user of TensorRT.

        Caches of TensorRT's entropy, minmax and legacy calibrators have the same lines; the kind is in ``calibrator``. A
        tensor with a scale of 0 gets the scale of an all-zero tensor.

        Raises:
            DarktrtError: the file cannot be read, is no such text, or a line of it is wrong; the line is named.
        """
        text = read_text(path, _MOST_BYTES, "name a TensorRT calibration cache")
        return parse_table(text, str(path))

    def compare(self, names: Iterable[str]) -> Comparison:
        """The tensors of a network that the table lacks, and the reverse."""
        wanted = dict.fromkeys(names)
        return Comparison(
            [name for name in wanted if name not in self.scales], [name for name in self.scales if name not in wanted]
        )


def parse_table(text: str, where: str) -> CalibrationTable:
    """Parse the text of a cache; ``where`` names it in errors.

    Raises:
        DarktrtError: it has no such header, no scale, or a wrong line.
    """
    header, *lines = text.replace("\r\n", "\n").split("\n")
    match = _HEADER.fullmatch(header.strip())
    if not match:
        raise DarktrtError(
            f"{where}: begins with {header[:40]!r}, not with a header such as 'TRT-8600-EntropyCalibration2'; "
            "is it a calibration cache?"
        )
    if lines and lines[-1].strip() and not _WHOLE.search(lines[-1]):
        raise DarktrtError(f"{where}:{len(lines) + 1}: ends inside the line {lines[-1][:80]!r}; copy the file again")
    scales: dict[str, np.float32] = {}
    for number, line in enumerate(lines, 2):
        if line.strip():
            name, scale = _parse_line(line, f"{where}:{number}")
            if name in scales:
                raise DarktrtError(f"{where}:{number}: tensor '{quote(name)}' has a scale already; delete one of the two lines")
            scales[name] = scale
    if not scales:
        raise DarktrtError(f"{where}: holds no scales, only a header; calibrate again")
    if not any(scales.values()):
        raise DarktrtError(f"{where}: every scale is 0, so calibration saw nothing but zeros; calibrate again")
    return CalibrationTable({name: scale or _DEAD_SCALE for name, scale in scales.items()}, match[1], match[2])


def _parse_line(line: str, where: str) -> tuple[str, np.float32]:
    name, colon, digits = line.rpartition(": ")  # names have colons of their own
    if not colon or not name or not _HEX.fullmatch(digits.strip()):
        raise DarktrtError(f"{where}: {line[:80]!r} is not 'tensor: scale' with the scale as up to 8 hexadecimal digits")
    scale = np.float32(struct.unpack(">f", bytes.fromhex(digits.strip().zfill(8)))[0])
    if scale != 0:
        _check_scale(f"{where}: {quote(name)}", float(scale))
    return name, scale


def _check_scale(name: str, scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise DarktrtError(f"{name}: the scale is {scale}; it must be positive and finite, so calibrate this tensor again")
