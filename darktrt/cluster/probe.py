"""What a node has installed, as far as results depend on it.

This module is sent to nodes by its value, for they may have another darktrt or none; it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from importlib import metadata

EXACT = ("darktrt", "sources", "onnxruntime", "numpy", "pillow")
"""What must be the same on all nodes."""

INSTRUCTIONS = {
    *("avx", "avx2", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "fma", "f16c"),
    *("asimd", "asimddp", "i8mm", "sve", "bf16"),
}
"""Flags of processors by which ONNX Runtime chooses its kernels."""


def node_versions() -> dict[str, str]:
    """The versions of :data:`EXACT`, empty for what is missing; ``sources`` is a digest of the package's Python files.

    ``processor`` has the flags of :data:`INSTRUCTIONS`.
    """
    versions = {package: _version(package) for package in EXACT}
    spec = importlib.util.find_spec("darktrt")
    if spec and spec.origin:
        from darktrt import __version__

        digest = hashlib.sha256()
        for path in _sources(os.path.dirname(spec.origin)):
            with open(path, "rb") as file:
                digest.update(file.read())
        versions |= {"darktrt": __version__, "sources": digest.hexdigest()[:16]}
    return versions | {"processor": _processor()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _sources(top: str) -> Iterator[str]:
    for folder, _, names in sorted(os.walk(top, followlinks=True)):
        yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(".py"))


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = [line.split() for line in file if line.lower().startswith(("flags", "features"))]
    return " ".join(sorted(INSTRUCTIONS.intersection(*lines[:1])))
