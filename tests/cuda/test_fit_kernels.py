"""The kernels that fit images and place boxes, on a GPU, without TensorRT, against the host library bit for bit.

The unit tests compare the host library with NumPy. Needs numpy, pytest and torch for CUDA, and nvcc:

    PYTHONPATH=tests:tests/cuda python3 -m pytest --confcutdir=tests/cuda tests/cuda
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import CudaLibrary
from kernels import TYPES, UNSUPPORTED, Array, CImage, Fit, Library

FLOAT, HALF, BYTE = np.float32, np.float16, np.uint8
IMAGE_SIZES = ((1, 1), (1, 7), (9, 1), (2, 2), (53, 37), (61, 46), (640, 480), (333, 500), (1920, 1080), (7680, 31), (17, 4320))
"""Width, height. In float, 60 / 415 * 415 and 45 / 607 * 607 are less than 60 and 45: see taps_at."""
FITS = [
    Fit(*size, channels, letterbox)
    for size in ((1, 1), (32, 32), (416, 416), (320, 608), (33, 65), (7, 200))
    for channels in (1, 3)
    for letterbox in (0, 1)
]


def image_of(width: int, height: int, seed: int = 0, dtype: Any = BYTE) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8).astype(dtype)


@pytest.mark.parametrize("pixels", [BYTE, HALF, FLOAT])
@pytest.mark.parametrize("dtype", [BYTE, HALF, FLOAT])
@pytest.mark.parametrize("fit", FITS, ids=str)
def test_images_of_all_sizes_in_one_launch(cuda: CudaLibrary, host: Library, fit: Fit, pixels: Any, dtype: Any) -> None:
    images = [image_of(*size, seed, pixels) for seed, size in enumerate(IMAGE_SIZES)]
    np.testing.assert_array_equal(cuda.fit(fit, images, dtype), host.fit(fit, images, dtype))


def test_every_level(cuda: CudaLibrary, host: Library) -> None:
    """All 256, unmixed: the division by three instructions is the IEEE one. Halfs between the levels too."""
    levels = np.arange(256, dtype=BYTE).reshape(1, 256, 1).repeat(3, 2)
    halves = np.arange(0x3C00, 0x5BF8 + 1, dtype=np.uint16).view(HALF)  # 1 to 255
    for image in (levels, halves[: len(halves) // 3 * 3].reshape(1, -1, 3)):
        fit = Fit(image.shape[1], 1)
        for dtype in (FLOAT, HALF):
            np.testing.assert_array_equal(cuda.fit(fit, [image], dtype), host.fit(fit, [image], dtype))
        np.testing.assert_array_equal(cuda.fit(fit, [image], FLOAT)[0, :, 0].T, image[0].astype(FLOAT) / FLOAT(255))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [BYTE, HALF, FLOAT])
def test_many_images(cuda: CudaLibrary, host: Library, count: int, dtype: Any) -> None:
    """As many as a launch takes, and more."""
    random = np.random.default_rng(0)
    images = [image_of(*random.integers(1, 60, 2), seed) for seed in range(count)]
    for fit in (Fit(40, 24), Fit(40, 24, letterbox=1)):
        np.testing.assert_array_equal(cuda.fit(fit, images, dtype), host.fit(fit, images, dtype))


def test_no_image(cuda: CudaLibrary) -> None:
    nowhere = ctypes.c_void_p(None)
    cuda.checked("fit", Fit(2, 2).struct(), 0, None, 3, nowhere, 0)
    cuda.checked("preprocess", Fit(2, 2).struct(), 0, CImage(None, 4, 4), 3, nowhere, 0, nowhere, nowhere)


@pytest.mark.parametrize("offset", [1, 4])
def test_unaligned_addresses(kernels_file: Path, host: Library, offset: int) -> None:
    shifted = CudaLibrary(kernels_file, offset)
    for pixels in (BYTE, FLOAT) if offset == 4 else (BYTE,):
        for dtype in (BYTE, HALF, FLOAT) if offset == 4 else (BYTE,):
            images, fit = [image_of(53, 37, dtype=pixels), image_of(31, 90, dtype=pixels)], Fit(33, 65, letterbox=1)
            np.testing.assert_array_equal(shifted.fit(fit, images, dtype), host.fit(fit, images, dtype))


@pytest.mark.parametrize("pixels", [BYTE, HALF, FLOAT])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
@pytest.mark.parametrize("fit", FITS, ids=str)
def test_preprocess(cuda: CudaLibrary, host: Library, fit: Fit, pixels: Any, dtype: Any) -> None:
    """Batches of one size: pixels, sizes and placement."""
    for count, size in (
        (1, (640, 480)),
        (3, (53, 37)),
        (2, (37, 53)),
        (2, (1, 1)),
        (1, (7680, 4320) if pixels is BYTE else (9, 1)),
    ):
        images = np.stack([image_of(*size, seed, pixels) for seed in range(count)])
        for found, expected in zip(cuda.preprocess(fit, images, dtype), host.preprocess(fit, images, dtype), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("letterbox", [0, 1])
def test_boxes(cuda: CudaLibrary, host: Library, letterbox: int) -> None:
    random = np.random.default_rng(0)
    for size in ((640, 480), (37, 53), (7680, 4320)):
        placement = host.preprocess(Fit(416, 416, 3, letterbox), image_of(*size)[np.newaxis], FLOAT)[2]
        for shape in ((1, 1, 4), (8, 300, 4), (1, 0, 4), (3, 100_001, 4)):
            boxes = random.uniform(-50, 500, shape).astype(FLOAT)
            np.testing.assert_array_equal(cuda.place_boxes(boxes, placement), host.place_boxes(boxes, placement))


def test_cuda_graph(cuda: CudaLibrary, host: Library) -> None:
    """Captured once, with more images than a launch takes; their list may change after that, their pixels count."""
    fit, sizes = Fit(96, 64, letterbox=1), [(40 + i, 90 - i) for i in range(70)]
    memories = [cuda.empty(3 * width * height) for width, height in sizes]
    rows = [(cuda.address(memory), *size) for memory, size in zip(memories, sizes, strict=True)]
    listed = (CImage * len(rows))(*rows)
    y = cuda.output((len(rows), 3, 64, 96), HALF)
    graph = torch.cuda.CUDAGraph()
    cuda.stream.synchronize()
    with torch.cuda.graph(graph, stream=cuda.stream):
        cuda.checked("fit", fit.struct(), len(rows), listed, TYPES.index(BYTE), cuda.address(y[0]), TYPES.index(HALF))
    ctypes.memset(listed, 0, ctypes.sizeof(listed))
    for seed in range(3):
        images = [image_of(*size, seed + i) for i, size in enumerate(sizes)]
        with torch.cuda.stream(cuda.stream):
            for memory, image in zip(memories, images, strict=True):
                memory.copy_(torch.from_numpy(image.reshape(-1)))
            graph.replay()
        np.testing.assert_array_equal(cuda.result(y), host.fit(fit, images, HALF))


def test_beyond_32_bits(cuda: CudaLibrary, host: Library) -> None:
    """An image of more than 2^31 bytes, and a batch of more than 2^31 values."""
    image = np.tile(image_of(1024, 24_576), (1, 30, 1))
    assert image.nbytes > 1 << 31
    fit = Fit(608, 608)
    np.testing.assert_array_equal(cuda.fit(fit, [image], FLOAT), host.fit(fit, [image], FLOAT))
    del image
    wide, images = Fit(6144, 4096), [image_of(640, 480, seed % 2) for seed in range(30)]
    found = cuda.fit(wide, images, BYTE)
    assert found.size > 1 << 31
    expected = host.fit(wide, images[:2], BYTE)
    for i, one in enumerate(found):
        np.testing.assert_array_equal(one, expected[i % 2])


def test_what_no_kernel_supports(cuda: CudaLibrary) -> None:
    nowhere = ctypes.c_void_p(None)
    good, image = Fit(2, 2), CImage(256, 4, 4)
    bad = [
        (Fit(0, 2), image, 3, 0),
        (Fit(2, 2, 2), image, 3, 0),
        (Fit(2, 2, 3, 2), image, 3, 0),
        (good, CImage(None, 4, 4), 3, 0),
        (good, CImage(256, 0, 4), 3, 0),
        (good, CImage(256, 4, (1 << 24) + 1), 3, 0),
        (good, image, 2, 0),
        (good, image, 3, 4),
    ]
    for fit, given, pixels, kind in bad:
        assert cuda.call("fit", fit.struct(), 1, (CImage * 1)(given), pixels, nowhere, kind) == UNSUPPORTED
        assert cuda.call("preprocess", fit.struct(), 1, given, pixels, nowhere, kind, nowhere, nowhere) == UNSUPPORTED
    assert cuda.call("fit", good.struct(), -1, None, 3, nowhere, 0) == UNSUPPORTED
    assert cuda.call("place_boxes", ctypes.c_int64(-1), nowhere, nowhere, nowhere) == UNSUPPORTED
