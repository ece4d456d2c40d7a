"""Builds the kernels for the GPU here, and the host library that they are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device import NVCC, CudaLibrary, sm
from kernels import Library, build, has_compiler


def missing() -> str | None:
    """What these tests lack here."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is usable here"
    if NVCC is None or not has_compiler():
        return "building the kernels needs nvcc, make and a C++ compiler"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def kernels_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("kernels", tmp_path_factory.mktemp("kernels"), SM=sm(), NVCC=str(NVCC))


@pytest.fixture(scope="session")
def cuda(kernels_file: Path) -> CudaLibrary:
    return CudaLibrary(kernels_file)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(build("host", tmp_path_factory.mktemp("host")))
