"""The kernels on a GPU, by numpy arrays: torch holds the memory and the streams."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernels import GUARD, UNWRITTEN, Array, CNms, CYolo, Library

NVCC = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def sm() -> str:
    """The GPU's architecture, as the Makefile wants it."""
    return "{}{}".format(*torch.cuda.get_device_capability())


class CudaLibrary(Library):
    """libdarktrt_kernels.so on a stream of its own. All memory begins ``offset`` bytes after an aligned address."""

    prefix = "darktrt"

    def __init__(self, path: Path, offset: int = 0) -> None:
        super().__init__(path)
        self.functions.darktrt_detect_workspace.restype = ctypes.c_size_t
        self.stream = torch.cuda.Stream()
        self.tail = (ctypes.c_void_p(self.stream.cuda_stream),)
        self.offset = offset
        self.kept: Any = None

    def upload(self, array: Array) -> torch.Tensor:
        raw = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        memory = self.empty(raw.numel())
        with torch.cuda.stream(self.stream):
            return memory.copy_(raw)

    def empty(self, size: int) -> torch.Tensor:
        with torch.cuda.stream(self.stream):
            return torch.full((size + self.offset,), UNWRITTEN, dtype=torch.uint8, device="cuda")[self.offset :]

    def download(self, memory: torch.Tensor) -> Array:
        with torch.cuda.stream(self.stream):
            made: Array = memory.cpu().numpy()
        return made

    def address(self, memory: torch.Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if memory is None else memory.data_ptr())

    def workspace_size(self, yolo: CYolo, nms: CNms) -> int:
        size: int = self.functions.darktrt_detect_workspace(ctypes.byref(yolo), ctypes.byref(nms))
        return size

    def workspace(self, yolo: CYolo, nms: CNms) -> tuple[ctypes.c_void_p, ...]:
        with torch.cuda.stream(self.stream):
            self.kept = torch.empty(self.workspace_size(yolo, nms) + GUARD, dtype=torch.uint8, device="cuda")
        return (self.address(self.kept),)
