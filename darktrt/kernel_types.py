"""Types of plugins/csrc/kernels.h that more than one room passes to C functions."""

from __future__ import annotations

import ctypes

FLOAT, UINT8 = 0, 3
"""DARKTRT_FLOAT and DARKTRT_UINT8."""


class Fit(ctypes.Structure):
    """DarktrtFit: the input of a network."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("width", "height", "channels", "letterbox"))


class Image(ctypes.Structure):
    """DarktrtImage: an RGB image, on the host or on the GPU."""

    _fields_ = (("pixels", ctypes.c_void_p), ("width", ctypes.c_int32), ("height", ctypes.c_int32))
