"""The facts about a machine that an issue needs; no name of a user or folder is among them."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from darktrt import __version__
from darktrt.cuda import dotted_capability, first_gpu
from darktrt.engine.bench import gpu_state
from darktrt.engine.target import installed_version
from darktrt.errors import DarktrtError
from darktrt.plugins.library import find_library, read_library

_PACKAGES = "torch", "onnxruntime", "onnx", "onnx-graphsurgeon", "numpy", "polygraphy"
_BOARD = Path("/proc/device-tree/model")
"""Where Linux has the name of a Jetson."""


def facts(plugins: str | Path | None = None) -> dict[str, str]:
    """Versions, GPU and driver by name; what is missing is not among them.

    Args:
        plugins: the plugin library, as :func:`darktrt.plugins.library.find_library` has it.
    """
    gpu = first_gpu()
    found = {
        "darktrt": __version__,
        "GPU": f"{gpu[0]}, compute capability {dotted_capability(gpu[1])}" if gpu else "none",
        "driver": gpu_state().get("driver_version", ""),
        "TensorRT": installed_version("trt") or "",
        "TensorRT for RTX": installed_version("rtx") or "",
        "plugin library": _library(plugins),
        "Python": platform.python_version(),
        "machine": _machine(),
        **{package: _version(package) for package in _PACKAGES},
    }
    return {name: value for name, value in found.items() if value}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _library(plugins: str | Path | None) -> str:
    path = find_library(plugins)
    try:
        library = read_library(path) if path else None
    except DarktrtError:
        return "damaged"
    if library is None:
        return ""
    capabilities = " ".join(map(dotted_capability, library.sms))
    return f"of darktrt {library.darktrt} for TensorRT {library.tensorrt}, compute capability {capabilities}"


def _machine() -> str:
    board = _BOARD.read_text(errors="replace").strip("\0\n ") if _BOARD.is_file() else ""
    return ", ".join(filter(None, [board, f"{platform.system()} {platform.machine()}"]))
