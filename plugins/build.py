"""Compiling the plugin library from the CUDA sources of the package."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from darktrt import __version__
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, cache_folder, check_writable, sha256_of
from darktrt.plugins.library import FILE_NAME, PluginLibrary, cached_path, installed_tensorrt, read_library
from darktrt.progress import LOGGER

_SOURCES = Path(__file__).resolve().parent / "csrc"
_NVCC = "/usr/local/cuda/bin/nvcc"
_LINES = 15
"""Of the compiler's output, in an error message."""
_OBJECTS = 3


def compile_plugins(
    tensorrt: str | None = None,
    sms: Sequence[int] = (),
    nvcc: str | Path | None = None,
    include: str | Path | None = None,
    output: str | Path | None = None,
) -> PluginLibrary:
    """Compile the plugin library; the whole of ``darktrt plugins``.

    Object files stay in the cache, so that compiling for another version of TensorRT is short.

    Args:
        tensorrt: the version of TensorRT whose headers to use, such as 8.6.0; by default that of the installed TensorRT, else
            that of the headers found in the system, else 10.16.
        sms: compute capabilities to compile kernels for, times ten, such as 86 and 90; by default those of this machine's GPUs,
            else the usual ones.
        nvcc: the CUDA compiler; by default the one on the PATH, else that of ``/usr/local/cuda``.
        include: the folder of NvInfer.h; by default a folder of the system with headers of that major version, else a download
            from NVIDIA's repository.
        output: the file to write; by default one in the cache, where :func:`darktrt.plugins.library.find_library` looks.

    Raises:
        DarktrtError: make, nvcc or the headers are missing, the sources do not compile, or ``output`` cannot be written.
    """
    if output is not None:
        check_writable(output)
    make, compiler = _found_make(), _found_nvcc(nvcc)
    version = tensorrt or installed_tensorrt() or ""
    headers = _headers(version, include)
    LOGGER.info(f"compiling the plugins with {compiler} and the headers in {headers}; this may take minutes")
    with _build_folder() as folder:
        words = [f"OUT={folder}", f"NVCC={compiler}", f"TENSORRT_INCLUDE={headers}", f"VERSION={__version__}"]
        words += [f"SM={' '.join(map(str, sms))}"] if sms else []
        _run([make, "-j", str(min(_OBJECTS, os.cpu_count() or 1)), "-C", str(_SOURCES), "plugins", *words])
        built = read_library(folder / FILE_NAME)
        target = Path(output) if output is not None else cached_path(version or built.tensorrt)
        if output is None:
            target.parent.mkdir(parents=True, exist_ok=True)
        _copy(built, target)
    return read_library(target)


def _found_make() -> str:
    make = shutil.which("make")
    if make is None:
        raise DarktrtError(
            "compiling the plugins needs make and a C++ compiler; on Debian and Ubuntu: apt install build-essential"
        )
    return make


def _found_nvcc(nvcc: str | Path | None) -> str:
    found = shutil.which(nvcc or "nvcc") or (None if nvcc else shutil.which(_NVCC))
    if found is None:
        raise DarktrtError(
            f"{nvcc or 'nvcc'}: there is no such CUDA compiler; install the CUDA toolkit, or name its nvcc", "nvcc"
        )
    return str(Path(found).absolute())


def _headers(version: str, include: str | Path | None) -> Path:
    """The folder of NvInfer.h, found or downloaded."""
    known = {"TENSORRT_VERSION": version, **({"TENSORRT_INCLUDE": str(include)} if include else {})}
    command = ["sh", str(_SOURCES / "trt" / "headers.sh")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **known}, check=False)
    if done.returncode:
        raise DarktrtError(done.stderr.strip(), "include")
    return Path(done.stdout.strip()).absolute()


@contextmanager
def _build_folder() -> Iterator[Path]:
    """The folder of object files, which only one process uses at a time."""
    folder = cache_folder() / "objects" / __version__
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def _run(command: Sequence[str]) -> None:
    """Run make; the variables of a make that called darktrt are not for it."""
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean, check=False)
    if done.returncode:
        raise DarktrtError("the plugins do not compile:\n" + "\n".join(done.stdout.splitlines()[-_LINES:]))


def _copy(library: PluginLibrary, target: Path) -> None:
    """Copy the library, unless the very same one is there: engines that depend on it are not built again for nothing."""
    if target.is_file() and sha256_of(target) == library.sha256:
        return
    with atomic_output(target) as temporary:
        shutil.copyfile(library.path, temporary)
