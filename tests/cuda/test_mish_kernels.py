"""The Mish kernels on a GPU, without TensorRT, against float64 and the host library.

Needs numpy, pytest and torch for CUDA, and nvcc:

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
from kernels import LAYOUTS, UNSUPPORTED, Array, Format, Layout, Library, Shape
from oracles import mish64

FLOAT, HALF, INT8 = np.float32, np.float16, np.int8
PAIRS = [(FLOAT, FLOAT), (HALF, HALF), (INT8, INT8), (HALF, INT8)]
"""Types of x and of y."""
SCALES = [(0.05, 0.07, 0.04), (1.0, 0.5, 1.0), (0.031, 1e-3, 0.02), (3.0, 2.0, 0.3), (0.1, 0.1, 0.1), (1e-3, 1e-3, 1e-6)]
"""Of x, of the other input, of y. Those of powers of two give quotients halfway between levels."""
NEAR = 2e-4
"""Half to INT8 uses a fast Mish: it may miss the nearest level where the quotient is this near to halfway."""


def made(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    if dtype is INT8:
        return random.integers(-128, 128, shape).astype(INT8)
    x = random.normal(0, 4, shape)
    x.flat[::7] = random.uniform(-110, 110, x.flat[::7].shape)
    return x.astype(dtype)


def half_ulp(x: Array) -> Array:
    """The distance between neighbours of a half."""
    return np.spacing(np.abs(x.astype(HALF))).astype(np.float64)


def assert_alike(found: Array, expected: Array) -> None:
    """FP32 and INT8 have the host library's bits; half, whose Mish is a fast one, may be the next number now and then."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.dtype == HALF:
        difference = np.abs(found.astype(np.float64) - expected)
        assert (difference <= half_ulp(expected)).all()
        assert (difference > 0).mean() <= 0.01 or found.size < 1000
    else:
        np.testing.assert_array_equal(found, expected)


def assert_levels(found: Array, value: Array, scale: float) -> None:
    """Levels of half's values: nearest, but for quotients almost halfway."""
    quotient = np.clip(value / np.float64(np.float32(scale)), -128, 127)
    assert (np.abs(found - quotient) <= 0.5 + NEAR).all()


def compare(cuda: CudaLibrary, host: Library, dtypes: tuple[Any, Any], x: Array, **options: Any) -> None:
    found, padding = cuda.mish(x, dtype=dtypes[1], **options)
    expected, _ = host.mish(x, dtype=dtypes[1], **options)
    assert not padding.any()
    if dtypes == (HALF, INT8):
        residual = options.get("residual")
        value = np.concatenate([mish64(part) for part in (x, options.get("second")) if part is not None], 1)
        value = value if residual is None else value + residual.astype(np.float64)
        assert_levels(found, value, options["scales"][2])
    else:
        assert_alike(found, expected)


@pytest.mark.parametrize("dtypes", PAIRS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("padded", [False, True])
def test_types_and_formats(cuda: CudaLibrary, host: Library, dtypes: tuple[Any, Any], layout: Layout, padded: bool) -> None:
    """With padding channels full of garbage, which must come out as zeros."""
    garbage = 77 if dtypes[0] is INT8 else np.nan
    options: dict[str, Any] = {"layout": layout, "scales": SCALES[0], "padding": garbage}
    for batch, channels, pixels in ((1, 32, 16), (3, 64, 49), (8, 96, 5)):
        shape = batch, channels - padded, pixels
        x, residual, second = made(shape, dtypes[0]), made(shape, dtypes[0], 1), made(shape, dtypes[0], 2)
        compare(cuda, host, dtypes, x, **options)
        compare(cuda, host, dtypes, x, residual=residual, **options)
        compare(cuda, host, dtypes, made((batch, 32, pixels), dtypes[0], 3), second=second, **options)


@pytest.mark.parametrize("dtypes", PAIRS)
def test_sizes_and_unaligned_addresses(cuda: CudaLibrary, host: Library, kernels_file: Path, dtypes: tuple[Any, Any]) -> None:
    """Sizes that fill 16 bytes or do not, some larger than a grid; addresses of a single element's alignment."""
    shifted = CudaLibrary(kernels_file, offset=np.dtype(dtypes[0]).itemsize)
    options = {"scales": SCALES[0]}
    for size in (*range(1, 20), 31, 32, 33, 4095, 4096, 4097, 1_000_003, 5_000_000 if dtypes[0] is INT8 else 2_000_000):
        x, residual = made((1, 1, size), dtypes[0]), made((1, 1, size), dtypes[0], 1)
        compare(cuda, host, dtypes, x, **options)
        if size < 5000:
            compare(shifted, host, dtypes, x, **options)
            compare(shifted, host, dtypes, x, residual=residual, **options)
            compare(cuda, host, dtypes, x, second=residual[..., :size], **options)
    # the second of the two is as long as a dozen of the first, in rows longer and shorter than a grid
    for channels, second, pixels in ((16, 192, 1600), (64, 16, 20_000)):
        x, other = made((2, channels, pixels), dtypes[0]), made((2, second, pixels), dtypes[0], 1)
        compare(cuda, host, dtypes, x, second=other, **options)


def test_empty(cuda: CudaLibrary) -> None:
    for shape in ((0, 32, 9), (2, 32, 0), (2, 0, 9)):
        assert cuda.mish(np.zeros(shape, HALF))[0].size == 0


def test_float_special_values(cuda: CudaLibrary, host: Library) -> None:
    values = [np.inf, np.nan, -np.inf, 0.0, -0.0, 1e-45, -1e-45, -87.4, -103.9, -104.1, 20.0, 20.1, 3e38, -3e38]
    x = np.array(values * 4, FLOAT).reshape(1, 1, -1)
    found, expected = cuda.mish(x)[0], host.mish(x)[0]
    np.testing.assert_array_equal(found, expected)
    assert found[0, 0, 0] == np.inf and np.isnan(found[0, 0, 1])


def test_float_is_the_host_librarys(cuda: CudaLibrary, host: Library) -> None:
    """A million floats from everywhere between -110 and 110: its bits, and within 4 ulp of double."""
    x = np.random.default_rng(0).uniform(-110, 110, (1, 1, 1 << 20)).astype(FLOAT)
    found = cuda.mish(x)[0]
    np.testing.assert_array_equal(found, host.mish(x)[0])
    expected = mish64(x)
    assert (np.abs(found - expected) <= 4 * np.spacing(np.abs(expected).astype(FLOAT)) + 60 * np.spacing(FLOAT(0))).all()


def test_every_half(cuda: CudaLibrary) -> None:
    """Within 0.51 ulp of float64, where 0.5 is a correct rounding; the plain formula in half must err twice as much."""
    x = np.arange(1 << 16, dtype=np.uint16).view(HALF)
    x = x[np.isfinite(x)].reshape(1, 1, -1)
    expected = mish64(x)
    plain = torch.from_numpy(x).cuda()
    plain = (plain * torch.tanh(torch.nn.functional.softplus(plain))).cpu().numpy()
    found = cuda.mish(x)[0]
    finite = np.isfinite(found)
    assert finite.all()
    error, plain_error = (np.abs(y.astype(np.float64) - expected) / half_ulp(expected) for y in (found, plain))
    print(f"half: at most {error.max():.4f} ulp, wrongly rounded {np.mean(found != expected.astype(HALF)):.2e};", end=" ")
    print(f"the plain formula {plain_error.max():.2f} ulp, {np.mean(plain != expected.astype(HALF)):.2e}")
    assert error.max() <= 0.51
    assert error.max() <= 2 * plain_error.max()


def test_half_add_is_rounded_to_half_once(cuda: CudaLibrary) -> None:
    x, residual = made((1, 1, 1 << 20), HALF), made((1, 1, 1 << 20), HALF, 1)
    expected = mish64(x) + residual.astype(np.float64)
    found = cuda.mish(x, residual=residual)[0]
    # and where the sum cancels, the float32 error of what is added shows
    tolerance = 0.5 * half_ulp(expected) + 2e-6 * (np.abs(mish64(x)) + np.abs(residual.astype(np.float64)))
    assert (np.abs(found - expected) <= tolerance).all()


@pytest.mark.parametrize("scales", SCALES)
def test_int8_is_exact(cuda: CudaLibrary, host: Library, scales: tuple[float, float, float]) -> None:
    """All levels, all pairs of levels: those of the host library, which the unit tests compare with QuantizeLinear."""
    levels = np.arange(-128, 128)
    x, residual = (part.astype(INT8).reshape(1, 1, -1) for part in np.meshgrid(levels, levels))
    for options in ({}, {"residual": residual}, {"second": residual}):
        np.testing.assert_array_equal(
            cuda.mish(x, scales=scales, **options)[0], host.mish(x, scales=scales, **options)[0], err_msg=str(options.keys())
        )
    exact = np.clip(mish64(x * np.float64(FLOAT(scales[0]))) / np.float64(FLOAT(scales[2])), -128, 127)
    assert (np.abs(cuda.mish(x, scales=scales)[0] - exact) <= 0.5 + 1e-6 * np.abs(exact)).all()


def test_int8_add_divides_exactly(cuda: CudaLibrary, host: Library) -> None:
    """Scales of all mantissas: the division by four instructions is the IEEE one."""
    random = np.random.default_rng(0)
    x, residual = made((1, 1, 1 << 16), INT8), made((1, 1, 1 << 16), INT8, 1)
    for scale in 0.05 * 2 ** random.uniform(-1, 1, 40):
        scales = (float(random.uniform(0.01, 0.1)), float(random.uniform(0.01, 0.1)), float(scale))
        options = {"residual": residual, "scales": scales}
        np.testing.assert_array_equal(cuda.mish(x, **options)[0], host.mish(x, **options)[0])


def test_beyond_32_bits(cuda: CudaLibrary, host: Library) -> None:
    """More than 2^31 elements, alone and as rows of a concatenation; INT8, all levels in turn."""
    levels = np.arange(-128, 128).astype(INT8).reshape(1, 1, -1)
    scales = SCALES[0]
    table = torch.from_numpy(host.mish(levels, scales=scales)[0].reshape(-1)).cuda()
    batch, channels, second, pixels = 2, 40, 24, (1 << 31) // 128 + (1 << 20)
    formats = [Format(2, 1, 0, scales[0]), Format(2, 1, 0, scales[0]), Format(2, 1, 0, scales[2])]
    with torch.cuda.stream(cuda.stream):
        x = torch.from_numpy(levels.reshape(-1)).cuda().repeat(batch * channels * pixels // 256)
        y = torch.zeros(batch * (channels + second) * pixels, dtype=torch.int8, device="cuda")
        assert y.numel() > 1 << 31
        whole = Shape(1, 1, y.numel())
        same = y.new_empty(y.numel()).view(-1, 256).copy_(torch.from_numpy(levels.reshape(1, -1)).cuda())
        cuda.checked("mish", whole, cuda.address(same), formats[0], cuda.address(y), formats[2])
        assert bool((y.view(-1, 256) == table).all())
        y.zero_()
        ins = Shape(batch, channels, pixels), cuda.address(x), formats[0], cuda.address(same), formats[1], second
        cuda.checked("mish_concat", *ins, cuda.address(y), formats[2])
        assert bool((y.view(-1, 256) == table).all())


def test_what_no_kernel_supports(cuda: CudaLibrary) -> None:
    shape, nowhere = Shape(1, 3, 4), ctypes.c_void_p(None)
    cases = [
        (Format(0, 1, 0, 1), Format(1, 1, 0, 1)),  # float to half
        (Format(1, 8, 1, 1), Format(1, 16, 1, 1)),  # of different vector widths
        (Format(2, 1, 0, 1), Format(2, 1, 0, 0)),  # without a scale
        (Format(7, 1, 0, 1), Format(7, 1, 0, 1)),
        (Format(0, 0, 0, 1), Format(0, 0, 0, 1)),
    ]
    for x, y in cases:
        assert cuda.call("mish", shape, nowhere, x, nowhere, y) == UNSUPPORTED
    wide = Format(1, 16, 0, 1)
    assert cuda.call("mish_concat", shape, nowhere, wide, nowhere, wide, 16, nowhere, wide) == UNSUPPORTED
