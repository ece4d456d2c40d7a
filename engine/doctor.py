"""The state of this machine for building and running engines, and the use of each missing thing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from darktrt.engine.target import INSTALL, MODULES, Flavour, gpu_name, is_installed
from darktrt.errors import DarktrtError
from darktrt.plugins.library import find_library, read_library

_INCLUDE_FOLDERS = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/cuda/include",
)


@dataclass(frozen=True)
class Finding:
    """Something to look for: ``found`` is its version or path, empty where it is missing; ``allows`` is its use."""

    name: str
    found: str
    allows: str


def examine_machine() -> list[Finding]:
    """Look for everything, without loading the large libraries."""
    packages = [
        ("torch", "converting darknet networks: pip install darktrt"),
        ("onnx", "converting and surgery: pip install darktrt"),
        ("onnx-graphsurgeon", "surgery: pip install darktrt"),
        ("onnxruntime", "detecting on the CPU: pip install darktrt"),
        ("av", "detecting in videos: pip install darktrt"),
    ]
    return [
        Finding("Python", platform.python_version(), ""),
        *(Finding(name, _package(name), allows) for name, allows in packages),
        Finding("TensorRT for RTX", _tensorrt("rtx"), f"building engines without a GPU: {INSTALL['rtx']}"),
        Finding("TensorRT", _tensorrt("trt"), f"building engines for this machine's GPU: {INSTALL['trt']}"),
        Finding("GPU", gpu_name() or "", "running engines, and building with full TensorRT: an NVIDIA GPU and its driver"),
        Finding("nvImageCodec", _nvimgcodec(), "decoding JPEGs on the GPU: pip install 'darktrt[gpu]'"),
        Finding("PyNvVideoCodec", _package("PyNvVideoCodec"), "decoding videos on the GPU: pip install 'darktrt[gpu]'"),
        Finding("nvcc", _nvcc(), "compiling the CUDA plugins: the CUDA toolkit"),
        Finding(
            "TensorRT headers",
            _headers(),
            "compiling the plugins without a download: set TENSORRT_INCLUDE to the folder of NvInfer.h",
        ),
        Finding("plugin library", _plugin_library(), "custom nodes as CUDA plugins in full TensorRT: darktrt plugins"),
    ]


def report(findings: list[Finding]) -> str:
    """The findings as a table for people."""
    lines = []
    for finding in findings:
        mark, text = ("ok", finding.found) if finding.found else ("--", f"not found; would allow {finding.allows}")
        lines.append(f"{mark}  {finding.name:<18} {text}")
    return "\n".join(lines)


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _nvimgcodec() -> str:
    return _package("nvidia-nvimgcodec-cu12") or _package("nvidia-nvimgcodec-cu13")


def _tensorrt(flavour: Flavour) -> str:
    return (_package(MODULES[flavour]) or "installed, of unknown version") if is_installed(flavour) else ""


def _nvcc() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = [line for line in done.stdout.splitlines() if "release" in line]
    return f"{nvcc} ({release[0].partition('release ')[2].partition(',')[0]})" if release else nvcc


def _headers() -> str:
    folders = [os.environ.get("TENSORRT_INCLUDE", ""), *_INCLUDE_FOLDERS]
    return next((folder for folder in folders if folder and (Path(folder) / "NvInfer.h").is_file()), "")


def _plugin_library() -> str:
    path = find_library()
    try:
        return str(read_library(path)) if path else ""
    except DarktrtError as error:
        return f"not usable: {error}"
