"""The compiled form of the arithmetic of images.py: the library of plugins/csrc/fit_host.cpp, called through ctypes.

setup.py compiles it where a C++ compiler is; without it NumPy does the same work. ctypes lets other threads run meanwhile.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darktrt.errors import DarktrtError
from darktrt.kernel_types import FLOAT, UINT8, Fit, Image
from darktrt.metadata import InputForm, ResizePolicy

FILE_NAME = "libdarktrt_fit.so"

FitFunction = Callable[[NDArray[np.uint8], int, int, int, ResizePolicy, InputForm], NDArray[Any]]
"""The array of :func:`darktrt.vision.images.preprocess`, of the same arguments."""


def library_path() -> Path | None:
    """The library's file: beside this module, or beside the zip file that has it; None where there is none."""
    module = Path(__file__)
    archive = module.parents[2]
    path = archive.with_name(FILE_NAME) if archive.is_file() else module.with_name(FILE_NAME)
    return path if path.is_file() else None


def load_fit() -> FitFunction | None:
    """The library's function; None where there is no library, or one that does not load on this machine."""
    path = library_path()
    if path is None:
        return None
    with suppress(OSError, AttributeError):  # another machine's or a damaged file; one without the function
        function = ctypes.CDLL(str(path)).darktrt_host_fit
        function.argtypes = (Fit, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32)
        return lambda *arguments: _call(function, *arguments)
    return None


def _call(
    function: Any,
    image: NDArray[np.uint8],
    width: int,
    height: int,
    channels: int,
    policy: ResizePolicy,
    input_form: InputForm,
) -> NDArray[Any]:
    pixels = np.ascontiguousarray(image)
    as_bytes = input_form == "uint8"
    shape = (height, width, channels) if as_bytes else (channels, height, width)
    array = np.empty(shape, np.uint8 if as_bytes else np.float32)
    images = Image(pixels.ctypes.data, pixels.shape[1], pixels.shape[0])
    fit = Fit(*map(int, (width, height, channels, policy == "letterbox")))
    status = function(fit, 1, ctypes.byref(images), UINT8, array.ctypes.data, UINT8 if as_bytes else FLOAT)
    if status != 0:
        raise DarktrtError(f"an image of {pixels.shape[1]}x{pixels.shape[0]} cannot be fitted into {width}x{height}")
    return array
