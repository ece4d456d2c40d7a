"""Copies from ordinary host memory to the GPU by several threads."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from device import CudaLibrary
from kernels import UNSUPPORTED

pytestmark = pytest.mark.cuda


class Copy(ctypes.Structure):
    """DarktrtCopy of kernels.h."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("pinned", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
    ]


def upload(cuda: CudaLibrary, arrays: list[Any], threads: int, offset: int = 0) -> torch.Tensor:
    """Copy arrays one behind the other; ``offset`` misaligns the pinned memory."""
    total = sum(array.nbytes for array in arrays)
    pinned = torch.zeros(total + offset, dtype=torch.uint8, pin_memory=True)[offset:]
    target = cuda.empty(total)
    cuda.stream.synchronize()
    copies, begin = [], 0
    for array in arrays:
        copies.append(Copy(array.ctypes.data, pinned.data_ptr() + begin, target.data_ptr() + begin, array.nbytes))
        begin += array.nbytes
    assert cuda.call("upload", len(copies), (Copy * len(copies))(*copies), threads) == 0
    for array in arrays:
        array[...] = 0  # the sources may change at once
    cuda.stream.synchronize()
    return target.cpu()


@pytest.mark.parametrize("threads", [1, 2, 5, 64])
@pytest.mark.parametrize("offset", [0, 1, 15])
def test_every_byte_arrives(cuda: CudaLibrary, threads: int, offset: int) -> None:
    random = np.random.default_rng(threads)
    for sizes in ([1], [3, 0, 17], [1920 * 1080 * 3] * 8, [5_000_001, 1, 262_144, 262_145]):
        arrays = [random.integers(0, 256, size, np.uint8) for size in sizes]
        expected = np.concatenate(arrays)
        assert np.array_equal(upload(cuda, arrays, threads, offset).numpy(), expected)


def test_again_and_again(cuda: CudaLibrary) -> None:
    array = np.arange(3_000_000, dtype=np.uint32).view(np.uint8)
    for _ in range(200):
        assert np.array_equal(upload(cuda, [array.copy()], 4).numpy(), array)


def test_nothing_and_what_makes_no_sense(cuda: CudaLibrary) -> None:
    assert cuda.call("upload", 0, None, 4) == 0
    assert cuda.call("upload", -1, None, 4) == UNSUPPORTED
    assert cuda.call("upload", 0, None, 0) == UNSUPPORTED
