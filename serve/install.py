"""Installs the ``tritonserver`` of the pip package nvidia-pytriton, once for each user and Python version."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from darktrt.errors import DarktrtError
from darktrt.files import cache_folder, one_process_at_a_time
from darktrt.progress import LOGGER
from darktrt.serve.program import Program, docker_runs, program_on_path
from darktrt.wheels import new_environment

PACKAGE = "nvidia-pytriton"
PACKAGE_VERSION = "0.7.0"
"""The pip package with the ``tritonserver``; of Triton's backends it has only the Python backend."""

_REQUIREMENTS = Path(__file__).parent / "requirements"
BACKEND_REQUIREMENTS = _REQUIREMENTS / "backend.txt"
"""What darktrt's backend imports beside NumPy, with hashes. ONNX Runtime's other dependencies serve its tools only."""
SERVER_REQUIREMENTS = _REQUIREMENTS / "server.txt"
"""The package, whose dependencies belong to its own Python API, and NumPy 1, for which its Python backend is built: NumPy 2
crashes it on encoded images."""

_PYTHONS = ("3.12", "3.11", "3.10")
"""The versions with NumPy 1 and a stub of the Python backend."""

_FACTS = """\
import sys, sysconfig
print("%d.%d" % sys.version_info[:2], sysconfig.get_config_var("LIBDIR"), sys.base_prefix + "/lib", sep="\\n")
"""
"""Prints a Python's version and the folders that may hold its shared library."""

Choice = Literal["auto", "path", "docker", "pip"]


def choose_program(choice: Choice) -> Program | None:
    """The server to start; None for Docker. ``auto`` prefers the one on PATH, then Docker where it runs, then the pip package.

    Raises:
        DarktrtError: the choice is not there, or cannot be installed.
    """
    program = program_on_path() if choice in ("auto", "path") else None
    if choice == "path" and program is None:
        raise DarktrtError("there is no tritonserver on PATH; the choice 'pip' installs one", "program")
    if program or choice == "docker" or (choice == "auto" and docker_runs()):
        return program
    return installed_program()


def installed_program() -> Program:
    """The server of the pip package, which is installed on first use.

    Raises:
        DarktrtError: it cannot be installed.
    """
    python = find_interpreter()
    with one_process_at_a_time(f"{python.folder}.lock"):
        if not python.complete.is_file():
            _install(python)
    server = python.packages / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    libraries = str(python.packages / "nvidia_pytriton.libs"), python.libraries
    return Program(str(server), libraries, python.folder, python.folder / "backends")


@dataclass(frozen=True)
class Interpreter:
    """A Python that can run the Python backend of the package."""

    path: str
    version: str
    """Such as 3.11."""
    libraries: str
    """The folder of its shared library."""

    @property
    def folder(self) -> Path:
        """The virtual environment of the package for this Python; another one where other wheels are asked for."""
        wheels = hashlib.sha256(SERVER_REQUIREMENTS.read_bytes() + BACKEND_REQUIREMENTS.read_bytes()).hexdigest()[:8]
        return cache_folder() / f"triton-{PACKAGE_VERSION}-python{self.version}-{wheels}"

    @property
    def complete(self) -> Path:
        """A file that exists once the package is installed."""
        return self.folder / ".complete"

    @property
    def packages(self) -> Path:
        return self.folder / "lib" / f"python{self.version}" / "site-packages"


def find_interpreter() -> Interpreter:
    """This Python, or another one on PATH where NumPy 1 does not support it.

    Raises:
        DarktrtError: there is none, or it has no shared library.
    """
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    names = [sys.executable] if own in _PYTHONS else [f"python{version}" for version in _PYTHONS]
    for path in filter(None, map(shutil.which, names)):
        done = subprocess.run([path, "-c", _FACTS], capture_output=True, text=True, check=False)
        if done.returncode == 0:  # a name on PATH may start something else
            version, *folders = done.stdout.split("\n")
            return Interpreter(path, version, _library_folder(version, folders[:2]))
    raise DarktrtError(
        f"{PACKAGE} needs Python {_PYTHONS[-1]} to {_PYTHONS[0]}, and none is on PATH; install one, or use Docker"
    )


def _library_folder(version: str, folders: list[str]) -> str:
    name = f"libpython{version}.so.1.0"
    for folder in (*folders, "/usr/lib/x86_64-linux-gnu", "/usr/lib64"):
        if (Path(folder) / name).is_file():
            return folder
    raise DarktrtError(f"Triton's Python backend needs {name}; on Debian and Ubuntu: apt install libpython{version}")


def _install(python: Interpreter) -> None:
    """Make the virtual environment, and a folder of backends whose Python backend starts this Python."""
    LOGGER.info(f"installing {PACKAGE} {PACKAGE_VERSION} into {python.folder}")
    shutil.rmtree(python.folder, ignore_errors=True)
    try:
        new_environment(python.path, python.folder, SERVER_REQUIREMENTS, BACKEND_REQUIREMENTS)
    except DarktrtError as error:
        raise DarktrtError(f"cannot install {PACKAGE} ({error}); put a tritonserver on PATH, or use Docker") from error
    package = python.packages / "pytriton" / "tritonserver"
    for name in ("backends", "caches"):
        shutil.copytree(package / name, python.folder / name)
    stub = package / "python_backend_stubs" / python.version / "triton_python_backend_stub"
    shutil.copy(stub, python.folder / "backends" / "python")
    python.complete.touch()
