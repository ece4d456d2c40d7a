"""Images from the host to the GPU: copied by several threads, and fitted into a network's input by the plugins' kernel."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import Buffer, DeviceImage, Driver, Event, Frame, Stream
from darktrt.errors import DarktrtError
from darktrt.metadata import DetectorInfo

_THREADS = min(4, os.cpu_count() or 1)
_SMALLEST_PIECE, _LARGEST_PIECE = 2 << 20, 8 << 20
"""Bytes that a thread copies at a time."""

_FLOAT, _UINT8 = 0, 3
"""DARKTRT_FLOAT and DARKTRT_UINT8 of plugins/csrc/kernels.h."""


class _Fit(ctypes.Structure):
    """DarktrtFit of plugins/csrc/kernels.h."""

    _fields_ = [(name, ctypes.c_int32) for name in ("width", "height", "channels", "letterbox")]


class _Image(ctypes.Structure):
    """DarktrtImage of plugins/csrc/kernels.h."""

    _fields_ = [("pixels", ctypes.c_void_p), ("width", ctypes.c_int32), ("height", ctypes.c_int32)]


class FitKernel:
    """``darktrt_fit`` of a plugin library: the preprocessing of :func:`darktrt.vision.images.preprocess` on the GPU."""

    def __init__(self, function: Any, info: DetectorInfo) -> None:
        self._function = function
        self._fit = _Fit(info.width, info.height, info.channels, int(info.resize == "letterbox"))
        self._type = ctypes.c_int32(_UINT8 if info.input == "uint8" else _FLOAT)

    @staticmethod
    def find(library: Path | None, info: DetectorInfo) -> FitKernel | None:
        """The kernel of a library that TensorRT has loaded; None for one that was compiled before it had the kernel."""
        if library is None or info.input == "image":
            return None
        function = getattr(ctypes.CDLL(str(library.resolve())), "darktrt_fit", None)
        return FitKernel(function, info) if function else None

    def enqueue(self, images: Sequence[tuple[int, int, int]], target: int, stream: Stream) -> None:
        """Fit images, each its address on the GPU, width and height, into the network input at ``target``."""
        array = (_Image * len(images))(*(_Image(*image) for image in images))
        count, pixel_type = ctypes.c_int32(len(images)), ctypes.c_int32(_UINT8)
        pointers = ctypes.c_void_p(target), self._type, ctypes.c_void_p(stream.handle)
        status = self._function(self._fit, count, array, pixel_type, *pointers)
        if status:
            raise DarktrtError(f"CUDA: fitting images on the GPU fails ({status})")


class Uploader:
    """Copies frames to the GPU on a stream of its own, beside the work of other streams."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._stream = Stream(driver)
        self._pool = ThreadPoolExecutor(_THREADS, "upload")

    def upload(self, frames: Sequence[Frame], buffer: Buffer, done: Event) -> list[int]:
        """Copy frames one behind the other into a buffer; ``done`` is recorded behind the copies.

        Frames that are on the GPU already stay where they are.

        Returns:
            The address of each on the GPU.
        """
        addresses, pieces, offset = [], [], 0
        host = buffer.array((buffer.size,), np.dtype(np.uint8))
        for frame in frames:
            if isinstance(frame, DeviceImage):
                addresses.append(frame.address)
                continue
            pixels = np.ascontiguousarray(frame).reshape(-1)
            addresses.append(buffer.address + offset)
            pieces += _pieces(pixels, host[offset : offset + pixels.size], addresses[-1])
            offset += pixels.size
        if len(pieces) > 1:
            list(self._pool.map(self._copy, *zip(*pieces, strict=True)))
        elif pieces:
            self._copy(*pieces[0])
        self._stream.record(done)
        return addresses

    def _copy(self, pixels: NDArray[np.uint8], pinned: NDArray[np.uint8], address: int) -> None:
        ctypes.memmove(pinned.ctypes.data, pixels.ctypes.data, pixels.size)  # lets other threads run meanwhile
        self._stream.upload(address, pinned)

    def close(self) -> None:
        """May be called twice."""
        self._pool.shutdown()
        self._stream.close()


def host_bytes(frames: Sequence[Frame]) -> int:
    """Of the frames that are on the host."""
    return sum(frame.nbytes for frame in frames if isinstance(frame, np.ndarray))


def _pieces(
    pixels: NDArray[np.uint8], pinned: NDArray[np.uint8], address: int
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8], int]]:
    """A frame in pieces: source, pinned memory and address of each."""
    size = min(max(-(-pixels.size // _THREADS), _SMALLEST_PIECE), _LARGEST_PIECE)
    begins = range(0, pixels.size, size)
    return [(pixels[begin : begin + size], pinned[begin : begin + size], address + begin) for begin in begins]
