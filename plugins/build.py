"""Compiling the plugin library from the CUDA sources of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from darktrt import __version__
from darktrt.errors import DarktrtError
from darktrt.files import atomic_output, cache_folder, check_writable, make_folder, one_process_at_a_time, sha256_of
from darktrt.plugins.library import FILE_NAME, PluginLibrary, cached_path, installed_tensorrt, major_version, read_library
from darktrt.progress import LOGGER

_SOURCES = Path(__file__).resolve().parent / "csrc"
_NVCC = "/usr/local/cuda/bin/nvcc"
_LINES = 15
"""Of the compiler's output, in an error message."""
_OBJECTS = 3
"""The object files of the library, compiled side by side."""


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
        tensorrt: the version of TensorRT whose headers to use, such as 8.6.0; by default that of ``include``, else that of the
            installed TensorRT, else that of the headers found in the system, else 10.16.
        sms: compute capabilities to compile kernels for, times ten, such as 86 and 90; by default those of this machine's GPUs,
            else the usual ones.
        nvcc: the CUDA compiler; by default the one on the PATH, else that of ``/usr/local/cuda``.
        include: the folder of NvInfer.h; by default a folder of the system with headers of that major version, else a download
            from NVIDIA's repository.
        output: the file to write; by default one in the cache, where :func:`darktrt.plugins.library.find_library` looks.

    Raises:
        DarktrtError: make, nvcc or the headers are missing, the headers are of another TensorRT, the sources do not compile, or
            ``output`` cannot be written.
    """
    if output:
        check_writable(output)
    make, compiler = _found_make(), _found_nvcc(nvcc)
    version = tensorrt or (None if include else installed_tensorrt()) or ""
    headers = _headers(version, include)
    LOGGER.info(f"compiling the plugins with {compiler} and the headers in {headers}; this may take minutes")
    with _build_folder() as folder:
        _make(make, folder, compiler, headers, sms)
        built = read_library(folder / FILE_NAME)
        _check_version(built, version, headers)
        target = Path(output or cached_path(version or built.tensorrt))
        _copy(built, target, new_folder=not output)
    return read_library(target)


def _found_make() -> str:
    make = shutil.which("make")
    if make is None:
        raise DarktrtError(
            "compiling the plugins needs make and a C++ compiler; on Debian and Ubuntu: apt install build-essential"
        )
    return make


def _found_nvcc(nvcc: str | Path | None) -> str:
    path = shutil.which(nvcc or "nvcc") or (None if nvcc else shutil.which(_NVCC))
    if path is None:
        raise DarktrtError(
            f"{nvcc or 'nvcc'}: there is no such CUDA compiler; install the CUDA toolkit, or name its nvcc", "nvcc"
        )
    return str(Path(path).absolute())


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
    with one_process_at_a_time(folder / "lock"):
        yield folder


def _make(make: str, folder: Path, nvcc: str, headers: Path, sms: Sequence[int]) -> None:
    """Run make, without the variables of a make that called darktrt."""
    jobs = str(min(_OBJECTS, os.cpu_count() or 1))
    variables = [f"OUT={folder}", f"NVCC={nvcc}", f"TENSORRT_INCLUDE={headers}", f"VERSION={__version__}"]
    variables += [f"SM={' '.join(map(str, sms))}"] if sms else []
    command = [make, "-j", jobs, "-C", str(_SOURCES), "plugins", *variables]
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean, check=False)
    if done.returncode:
        raise DarktrtError("the plugins do not compile:\n" + "\n".join(done.stdout.splitlines()[-_LINES:]))


def _check_version(library: PluginLibrary, version: str, headers: Path) -> None:
    if version and major_version(version) != major_version(library.tensorrt):
        raise DarktrtError(f"{headers}: has the headers of TensorRT {library.tensorrt}, not {version}", "include")


def _copy(library: PluginLibrary, target: Path, new_folder: bool) -> None:
    """Copy the library, unless the very same one is there: engines that depend on it are not built again for nothing."""
    if os.path.isfile(target) and sha256_of(target) == library.sha256:
        return
    if new_folder:
        make_folder(target.parent)
    with atomic_output(target) as temporary:
        shutil.copyfile(library.path, temporary)
