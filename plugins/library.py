"""The plugin library: finding it, reading what it is for from its file, and loading it into TensorRT's plugin registry."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darktrt.cuda import dotted_capability, first_gpu
from darktrt.errors import DarktrtError
from darktrt.files import cache_folder, open_input, sha256_of

FILE_NAME = "libdarktrt_plugins.so"
VARIABLE = "DARKTRT_PLUGINS"
"""The environment variable that names a plugin library."""

_MARK = b"darktrt-plugins="
_DISTRIBUTIONS = "tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"


@dataclass(frozen=True)
class PluginLibrary:
    """A plugin library, as its file describes it."""

    path: Path
    sha256: str
    darktrt: str
    """The version of darktrt that it belongs to."""
    tensorrt: str
    """The version of TensorRT's headers; it works with TensorRT of the same major version."""
    sms: tuple[int, ...]
    """Compute capabilities with kernels of their own, times ten: 75, 90, 120."""
    plugins: tuple[str, ...]
    """As name:version."""

    def __str__(self) -> str:
        capabilities = " ".join(dotted_capability(sm) for sm in self.sms)
        return f"{self.path} (for TensorRT {self.tensorrt}, compute capability {capabilities})"

    def runs_on(self, sm: int) -> bool:
        """Whether it has kernels for a GPU: those of its own major version, or the highest, which the driver translates."""
        return sm >= max(self.sms) or any(own // 10 == sm // 10 and own <= sm for own in self.sms)


def cached_path(tensorrt: str) -> Path:
    """Where ``darktrt plugins`` puts the library for a version of TensorRT."""
    return cache_folder() / "plugins" / tensorrt / FILE_NAME


def installed_tensorrt() -> str | None:
    """The version of the installed TensorRT, read without loading it; None where none is installed."""
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def find_library(path: str | Path | None = None, tensorrt: str | None = None) -> Path | None:
    """The library to use: ``path``, else the one that DARKTRT_PLUGINS names, else one in the cache that fits TensorRT.

    Args:
        tensorrt: the version of TensorRT that will load the library; by default the installed one.
    """
    if named := path or os.environ.get(VARIABLE):
        return Path(named)
    wanted = tensorrt or installed_tensorrt()
    return _cached_library(wanted) if wanted else None


def _cached_library(tensorrt: str) -> Path | None:
    """The library compiled for this version of TensorRT, else the newest one for its major version."""
    if (exact := cached_path(tensorrt)).is_file():
        return exact
    fitting = []
    for path in cached_path("*").parent.parent.glob(f"*/{FILE_NAME}"):
        with suppress(DarktrtError):  # a damaged file is no candidate
            library = read_library(path)
            if major_version(library.tensorrt) == major_version(tensorrt):
                fitting.append((path.stat().st_mtime, path))
    return max(fitting)[1] if fitting else None


def major_version(version: str) -> str:
    """``8`` of ``8.6.0``."""
    return version.partition(".")[0]


def read_library(path: str | Path) -> PluginLibrary:
    """Describe a library from its file, without loading it.

    Raises:
        DarktrtError: there is no such file, or it is no plugin library.
    """
    if not os.path.exists(path):
        raise DarktrtError(f"{path}: there is no plugin library; compile it with 'darktrt plugins'", "plugins")
    try:
        with open_input(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = content.find(_MARK) + len(_MARK)
            text = content[begin : content.find(b"\0", begin)] if begin >= len(_MARK) else b""
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise DarktrtError(f"{path}: cannot read the plugin library: {error}", "plugins") from error
    if not text:
        raise DarktrtError(f"{path}: is no plugin library of darktrt; compile one with 'darktrt plugins'", "plugins")
    facts = json.loads(text)
    sms, names = (tuple(facts[name].split()) for name in ("sms", "plugins"))
    return PluginLibrary(Path(path), sha256_of(path), facts["darktrt"], facts["tensorrt"], tuple(map(int, sms)), names)


def load_plugins(trt: Any, path: str | Path) -> PluginLibrary:
    """Load a library, which registers its plugins with TensorRT. Loading it again changes nothing.

    Args:
        trt: the module tensorrt.

    Raises:
        DarktrtError: there is no such library, it is for another TensorRT or GPU, or it does not load.
    """
    library = read_library(path)
    _check_fits(library, str(trt.__version__))
    try:
        ctypes.CDLL(str(library.path.resolve()))
    except OSError as error:
        raise DarktrtError(f"{path}: does not load ({error}); compile it on this machine with 'darktrt plugins'") from error
    if not all(_registered(trt, plugin) for plugin in library.plugins):  # the library was in memory before TensorRT was
        trt.get_plugin_registry().load_library(str(library.path.resolve()))
    missing = [plugin for plugin in library.plugins if not _registered(trt, plugin)]
    if missing:
        raise DarktrtError(f"{path}: loads, but TensorRT {trt.__version__} does not register {', '.join(missing)}")
    return library


def is_registered(trt: Any, name: str, version: str, namespace: str) -> bool:
    """Whether TensorRT's plugin registry has a plugin."""
    registry = trt.get_plugin_registry()
    find = getattr(registry, "get_creator", None) or registry.get_plugin_creator  # the first from TensorRT 10 on
    return find(name, version, namespace) is not None


def _registered(trt: Any, plugin: str) -> bool:
    name, _, version = plugin.partition(":")
    return is_registered(trt, name, version, "")


def _check_fits(library: PluginLibrary, version: str) -> None:
    if major_version(library.tensorrt) != major_version(version):
        raise DarktrtError(
            f"{library.path}: is for TensorRT {library.tensorrt}, here is TensorRT {version}; "
            f"compile it again with 'darktrt plugins --tensorrt {version}'",
            "plugins",
        )
    sm = _gpu_sm()
    if sm is not None and not library.runs_on(sm):
        raise DarktrtError(
            f"{library.path}: has kernels for compute capability {' '.join(map(dotted_capability, library.sms))}, this GPU has "
            f"{dotted_capability(sm)}; compile it again with 'darktrt plugins --sm {sm}'",
            "plugins",
        )


def _gpu_sm() -> int | None:
    gpu = first_gpu()
    return gpu and gpu[1]
