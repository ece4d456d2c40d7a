"""The ``tritonserver`` programs of this machine: one on PATH, or Docker that can run a container with one."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Program:
    """A ``tritonserver`` to start."""

    path: str
    libraries: tuple[str, ...] = ()
    """Folders of its shared libraries."""
    python: Path | None = None
    """The virtual environment of its Python backend."""
    backends: Path | None = None
    """The folder of its backends, where it is not the program's default."""

    def environment(self) -> dict[str, str]:
        """The environment of this process, with what the server needs."""
        result = dict(os.environ)
        if self.libraries:
            result["LD_LIBRARY_PATH"] = os.pathsep.join([*self.libraries, *filter(None, [result.get("LD_LIBRARY_PATH")])])
        if self.python:
            result["PATH"] = os.pathsep.join([str(self.python / "bin"), result.get("PATH", "")])
            result["VIRTUAL_ENV"] = str(self.python)
            result.pop("PYTHONPATH", None)
            result.pop("PYTHONHOME", None)
        return result


def program_on_path() -> Program | None:
    """The ``tritonserver`` on PATH, if there is one."""
    path = shutil.which("tritonserver")
    return Program(path) if path else None


def docker_runs() -> bool:
    """Whether Docker is installed and its daemon answers."""
    docker = shutil.which("docker")
    if docker is None:
        return False
    try:
        return subprocess.run([docker, "info"], capture_output=True, check=False, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False
