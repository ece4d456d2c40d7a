"""Finding a Python and a tritonserver on this machine, with scripts in their place; the real ones are in tests/serve."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from darktrt.errors import DarktrtError
from darktrt.serve import install, program
from darktrt.serve.install import Interpreter, find_interpreter, installed_program
from darktrt.serve.program import Program, docker_runs


def write_python(folder: Path, name: str, version: str, libraries: str = "", base: str = "", status: int = 0) -> Path:
    """A script in the place of a Python that states its version and the folders that may hold its shared library."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' {version} '{libraries}' '{base}'\nexit {status}\n")
    path.chmod(0o755)
    return path


def runs_in(monkeypatch: pytest.MonkeyPatch, minor: int, executable: Path) -> None:
    """Let this process seem to run in Python 3.``minor``."""
    this = SimpleNamespace(version_info=SimpleNamespace(major=3, minor=minor), executable=str(executable))
    monkeypatch.setattr(install, "sys", this)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH but for a shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def library(tmp_path: Path) -> str:
    """A folder with the shared libraries of Python 3.10 to 3.12."""
    folder = tmp_path / "lib"
    folder.mkdir()
    for minor in (10, 11, 12):
        (folder / f"libpython3.{minor}.so.1.0").touch()
    return str(folder)


# --- Pythons ---


def test_this_python_is_taken_where_it_can_run_the_backend(
    on_path: Path, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_python(on_path, "python3.12", "3.12", library)
    own = write_python(tmp_path, "own", "3.11", library)
    runs_in(monkeypatch, 11, own)
    assert find_interpreter() == Interpreter(str(own), "3.11", library)


def test_else_the_newest_on_path_that_can(on_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name on PATH may start something else, such as a version manager that lacks this version."""
    write_python(on_path, "python3.10", "3.10", library)
    runs_in(monkeypatch, 13, write_python(on_path, "own", "3.13", library))
    assert find_interpreter().version == "3.10"
    newer = write_python(on_path, "python3.11", "3.11", "/missing", library)
    write_python(on_path, "python3.12", "3.12", library, status=1)
    assert find_interpreter() == Interpreter(str(newer), "3.11", library), "its library is in the folder of its base"


def test_no_python_that_can(on_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs_in(monkeypatch, 13, write_python(on_path, "own", "3.13", library))
    with pytest.raises(DarktrtError, match=r"nvidia-pytriton needs Python 3\.10 to 3\.12, and none is on PATH; install one"):
        find_interpreter()


def test_a_python_without_a_shared_library(on_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the current folder, which anybody may have put there, is not taken."""
    runs_in(monkeypatch, 11, write_python(on_path, "own", "3.9", "/missing", "/missing"))
    monkeypatch.chdir(library)
    Path("libpython3.9.so.1.0").touch()
    with pytest.raises(DarktrtError, match=r"needs libpython3\.9\.so\.1\.0; on Debian and Ubuntu: apt install libpython3\.9"):
        find_interpreter()


# --- the package ---


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Interpreter:
    """The Python of the package, for a user who has installed nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = Interpreter("/usr/bin/python3.11", "3.11", "/usr/lib/x")
    monkeypatch.setattr(install, "find_interpreter", lambda: found)
    return found


def test_the_package_is_installed_once(python: Interpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier try left, which did not come to its end, is removed first."""
    asked: list[tuple[object, ...]] = []

    def make(path: str, folder: Path, *requirements: Path) -> None:
        asked.append((path, folder, *requirements))
        package = folder / "lib/python3.11/site-packages/pytriton/tritonserver"
        for name in ("backends/python/model.so", "caches/local/cache.so"):
            (package / name).parent.mkdir(parents=True)
            (package / name).touch()
        for version in ("3.10", "3.11"):
            (package / "python_backend_stubs" / version).mkdir(parents=True)
            (package / "python_backend_stubs" / version / "triton_python_backend_stub").write_text(version)

    monkeypatch.setattr(install, "new_environment", make)
    python.folder.mkdir(parents=True)
    (python.folder / "half").touch()
    first, second = installed_program(), installed_program()
    assert asked == [(python.path, python.folder, install.SERVER_REQUIREMENTS, install.BACKEND_REQUIREMENTS)]
    site = python.folder / "lib/python3.11/site-packages"
    libraries = str(site / "nvidia_pytriton.libs"), "/usr/lib/x"
    server = str(site / "pytriton/tritonserver/bin/tritonserver")
    assert re.fullmatch(r"triton-0\.7\.0-python3\.11-[0-9a-f]{8}", python.folder.name), (
        "earlier versions found it under this name"
    )
    assert first == second == Program(server, libraries, python.folder, python.folder / "backends")
    assert not (python.folder / "half").exists()
    assert (python.folder / "backends/python/triton_python_backend_stub").read_text() == "3.11"
    assert (python.folder / "backends/python/model.so").exists() and (python.folder / "caches/local/cache.so").exists()


# --- Docker and the environment ---


@pytest.mark.parametrize(("status", "runs"), [(0, True), (1, False)])
def test_docker_runs_where_its_daemon_answers(on_path: Path, status: int, runs: bool) -> None:
    assert docker_runs() is False
    (on_path / "docker").write_text(f'#!/bin/sh\n[ "$1" = info ] && exit {status}\n')
    (on_path / "docker").chmod(0o755)
    assert docker_runs() is runs


def test_a_daemon_that_does_not_answer_is_none(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("docker", timeout)

    (on_path / "docker").touch(0o755)
    monkeypatch.setattr(program.subprocess, "run", hang)
    assert docker_runs() is False


def test_the_environment_is_that_of_this_process_and_what_the_server_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LD_LIBRARY_PATH", "PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONHOME", "/theirs")
    monkeypatch.setenv("HOME", "/home/user")
    given = Program("tritonserver", ("/a",)).environment()
    assert given == {**os.environ, "LD_LIBRARY_PATH": "/a"}
    given = Program("tritonserver", python=tmp_path).environment()
    assert given["VIRTUAL_ENV"] == str(tmp_path) and given["HOME"] == "/home/user" and "PYTHONHOME" not in given
    assert given["PATH"].split(os.pathsep)[0] == f"{tmp_path}/bin"
