"""Images from the host to the GPU, and into a network's input, by functions of the plugin library."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darktrt.cuda import Buffer, DeviceImage, Driver, Event, Frame, Stream
from darktrt.errors import DarktrtError
from darktrt.kernel_types import FLOAT, UINT8, Fit, Image
from darktrt.metadata import DetectorInfo

_THREADS = min(6, len(os.sched_getaffinity(0)))
"""That copy frames into pinned memory; a few reach the bandwidth of the memory."""


class _Copy(ctypes.Structure):
    """DarktrtCopy of plugins/csrc/kernels.h."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("pinned", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    ]


def load_kernels(library: Path | None) -> ctypes.CDLL | None:
    """A plugin library that TensorRT has loaded, for its functions on images; None for one that is older than they are."""
    loaded = ctypes.CDLL(str(library.resolve())) if library else None
    return loaded if loaded and hasattr(loaded, "darktrt_fit") and hasattr(loaded, "darktrt_upload") else None


class FitKernel:
    """``darktrt_fit`` of a plugin library: the preprocessing of :func:`darktrt.vision.images.preprocess` on the GPU."""

    def __init__(self, library: ctypes.CDLL, info: DetectorInfo) -> None:
        self._function = library.darktrt_fit
        self._fit = Fit(info.width, info.height, info.channels, int(info.resize == "letterbox"))
        self._type = ctypes.c_int32(UINT8 if info.input == "uint8" else FLOAT)

    def enqueue(self, images: Sequence[tuple[int, int, int]], target: int, stream: Stream) -> None:
        """Fit images, each its address on the GPU, width and height, into the network input at ``target``."""
        array = (Image * len(images))(*(Image(*image) for image in images))
        count, pixel_type = ctypes.c_int32(len(images)), ctypes.c_int32(UINT8)
        pointers = ctypes.c_void_p(target), self._type, ctypes.c_void_p(stream.handle)
        _check(self._function(self._fit, count, array, pixel_type, *pointers), "fitting images on the GPU")


class Uploader:
    """Copies frames to the GPU on a stream of its own, beside the work of other streams.

    Args:
        library: with ``darktrt_upload``, which copies by several threads; without it one thread copies.
    """

    def __init__(self, driver: Driver, library: ctypes.CDLL | None) -> None:
        self._driver = driver
        self._stream = Stream(driver)
        self._function = library.darktrt_upload if library else None

    def upload(self, frames: Sequence[Frame], offsets: Sequence[int], buffer: Buffer, done: Event) -> list[int]:
        """Copy frames to their offsets in a buffer, in bytes; ``done`` is recorded behind the copies.

        Frames that are on the GPU already stay where they are.

        Returns:
            The address of each on the GPU.
        """
        addresses, arrays = [], []
        for frame, offset in zip(frames, offsets, strict=True):
            if isinstance(frame, DeviceImage):
                addresses.append(frame.address)
            else:
                arrays.append((np.ascontiguousarray(frame), offset))
                addresses.append(buffer.address + offset)
        if arrays:
            self._copy(arrays, buffer)
        self._stream.record(done)
        return addresses

    def _copy(self, arrays: Sequence[tuple[NDArray[np.uint8], int]], buffer: Buffer) -> None:
        """Copy arrays to their offsets in the buffer."""
        pinned = buffer.array((buffer.size,), np.dtype(np.uint8))
        if self._function is None:
            for array, offset in arrays:
                part = pinned[offset : offset + array.size]
                part[...] = array.reshape(-1)
                self._stream.upload(buffer.address + offset, part)
            return
        copies = [
            _Copy(array.ctypes.data, pinned.ctypes.data + offset, buffer.address + offset, array.size)
            for array, offset in arrays
        ]
        count, threads = ctypes.c_int32(len(copies)), ctypes.c_int32(_THREADS)
        with self._driver.current():
            status = self._function(count, (_Copy * len(copies))(*copies), threads, ctypes.c_void_p(self._stream.handle))
        _check(status, "copying images to the GPU")

    def close(self) -> None:
        """May be called twice."""
        self._stream.close()


def host_offsets(frames: Sequence[Frame]) -> list[int]:
    """Offsets in bytes at which frames lie one behind the other, and the end; those on the GPU take no room."""
    return [0, *accumulate(frame.nbytes if isinstance(frame, np.ndarray) else 0 for frame in frames)]


def _check(status: int, what: str) -> None:
    if status:
        raise DarktrtError(f"CUDA: {what} fails ({status})")
