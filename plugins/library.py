"""The plugin library: what it is, told from its file, and loading it into the registry of the TensorRT at hand."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darktrt.cuda import dotted_capability, first_gpu
from darktrt.errors import DarktrtError
from darktrt.files import sha256_of

FILE_NAME = "libdarktrt_plugins.so"
VARIABLE = "DARKTRT_PLUGINS"
DEFAULT = Path(__file__).resolve().parent.parent / "build" / FILE_NAME
"""Where ``make plugins`` puts it."""

_MARK = b"darktrt-plugins="


@dataclass(frozen=True)
class PluginLibrary:
    """What a plugin library says of itself."""

    path: Path
    sha256: str
    darktrt: str
    """The version of darktrt that it is of."""
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


def find_library(path: str | Path | None = None) -> Path | None:
    """The library to take: ``path``, else what the variable DARKTRT_PLUGINS names, else :data:`DEFAULT` if it exists."""
    named = path or os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return DEFAULT if DEFAULT.is_file() else None


def read_library(path: str | Path) -> PluginLibrary:
    """What a library is, read from its file without loading it.

    Raises:
        DarktrtError: there is no such file, or it is something else.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            begin = content.find(_MARK) + len(_MARK)
            text = content[begin : content.find(b"\0", begin)] if begin >= len(_MARK) else b""
    except FileNotFoundError as error:
        raise DarktrtError(f"{path}: there is no plugin library; build it with 'make plugins'") from error
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise DarktrtError(f"{path}: cannot read the plugin library: {error}") from error
    if not text:
        raise DarktrtError(f"{path}: is no plugin library of darktrt; build one with 'make plugins'")
    facts = json.loads(text)
    sms, names = (tuple(facts[name].split()) for name in ("sms", "plugins"))
    return PluginLibrary(Path(path), sha256_of(path), facts["darktrt"], facts["tensorrt"], tuple(map(int, sms)), names)


def load_plugins(trt: Any, path: str | Path) -> PluginLibrary:
    """Load a library, which puts its plugins into the registry of ``trt``, the module tensorrt. Loading twice does nothing.

    Raises:
        DarktrtError: there is no such library, it is for another TensorRT or GPU, or it does not load.
    """
    library = read_library(path)
    _check_fits(library, str(trt.__version__))
    try:
        ctypes.CDLL(str(library.path.resolve()))
    except OSError as error:
        raise DarktrtError(f"{path}: does not load ({error}); build it on this machine with 'make plugins'") from error
    if not all(_registered(trt, plugin) for plugin in library.plugins):  # the library was in memory before TensorRT was
        trt.get_plugin_registry().load_library(str(library.path.resolve()))
    missing = [plugin for plugin in library.plugins if not _registered(trt, plugin)]
    if missing:
        raise DarktrtError(f"{path}: loads, but TensorRT {trt.__version__} does not register {', '.join(missing)}")
    return library


def is_registered(trt: Any, name: str, version: str, namespace: str) -> bool:
    """Whether the registry of ``trt`` has a plugin."""
    registry = trt.get_plugin_registry()
    find = getattr(registry, "get_creator", None) or registry.get_plugin_creator  # the first from TensorRT 10 on
    return find(name, version, namespace) is not None


def _registered(trt: Any, plugin: str) -> bool:
    name, _, version = plugin.partition(":")
    return is_registered(trt, name, version, "")


def _check_fits(library: PluginLibrary, version: str) -> None:
    if library.tensorrt.partition(".")[0] != version.partition(".")[0]:
        raise DarktrtError(
            f"{library.path}: is for TensorRT {library.tensorrt}, here is TensorRT {version}; "
            f"build it again with 'make plugins TENSORRT_VERSION={version}'"
        )
    sm = _gpu_sm()
    if sm is not None and not library.runs_on(sm):
        raise DarktrtError(
            f"{library.path}: has kernels for compute capability {' '.join(map(dotted_capability, library.sms))}, this GPU has "
            f"{dotted_capability(sm)}; build it again with 'make plugins SM={sm}'"
        )


def _gpu_sm() -> int | None:
    found = first_gpu()
    return found and found[1]
